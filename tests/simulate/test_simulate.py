"""simulate(): which data it deals out, what it records, and that a run goes on where it was."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

import koinon
from koinon.errors import DataError, JobError, RunError, SettingsError
from koinon.tracking import FEDERATION, SERVER, read

RANDOM = np.random.default_rng(2)
X, Y = RANDOM.normal(size=(200, 3)), RANDOM.integers(0, 2, 200)
SOURCE = koinon.data.arrays(X, Y)


def job(rounds=3, **parts):
    regression = koinon.numpy.SoftmaxRegression(features=3, classes=2, lr=0.5)
    return koinon.Job(koinon.FedAvg(rounds=rounds), regression, **parts)


def split(sites=4, **settings):
    return SOURCE.split(koinon.iid(), sites=sites, **settings)


@pytest.mark.parametrize(
    ("given", "own", "sites", "count"),
    [
        (split(5), None, None, 5),
        (None, split(5), None, 5),
        (split(5), split(3), None, 5),
        (split(5), None, 5, 5),
        (SOURCE, None, None, 8),
        (SOURCE, None, 6, 6),
        (None, SOURCE, 2, 2),
    ],
)
def test_data_come_from_the_call_or_from_the_job(tmp_path, given, own, sites, count):
    """A source is dealt out evenly; what the call says goes first."""
    run = koinon.simulate(job(1, data=own), given, sites=sites, out=tmp_path / "run", sinks=())
    assert run.info["sites"] == len(run.by_site("train_loss")) == count
    assert sum(map(sum, run.info["partition"]["table"])) == 160


@pytest.mark.parametrize(
    ("data", "sites", "error", "words"),
    [
        (None, None, SettingsError, "give data= to the Job or to simulate"),
        (split(4), 5, SettingsError, "dealt out over 4 sites already; sites=5"),
        (SOURCE, 1000, DataError, "1000 sites"),
    ],
)
def test_data_that_cannot_be_dealt_out_are_refused(tmp_path, data, sites, error, words):
    """Before anything is written."""
    with pytest.raises(error, match=words):
        koinon.simulate(job(), data, sites=sites, out=tmp_path / "run", sinks=())
    assert not (tmp_path / "run").exists()


def test_a_place_is_no_word(tmp_path):
    """It is said what it may be."""
    with pytest.raises(SettingsError, match=r"on='ray' is no place: .*koinon\.ray"):
        koinon.simulate(job(), split(), on="ray", out=tmp_path / "run", sinks=())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["server", "federation"])
def test_a_site_may_not_have_the_name_of_somebody_else(tmp_path, name):
    """Its numbers could not be told from theirs."""
    data = koinon.data.sites({"north": (X[:5], Y[:5]), name: (X[5:9], Y[5:9])})
    with pytest.raises(DataError, match=f"'{name}'"):
        koinon.simulate(job(), data, out=tmp_path / "run", sinks=())
    assert not (tmp_path / "run").exists()


def test_the_run_folder_is_the_first_free_one(tmp_path, monkeypatch):
    """Named by the controller."""
    monkeypatch.chdir(tmp_path)
    names = [koinon.simulate(job(1), split(), sinks=()).path for _ in range(2)]
    assert [str(name) for name in names] == ["runs/fedavg-1", "runs/fedavg-2"]


def test_equal_seeds_are_equal_bits(tmp_path):
    """And a different seed, or another dealing, is another model."""
    runs = {
        name: koinon.simulate(job(), split(seed=dealing), seed=seed, out=tmp_path / name, sinks=())
        for name, seed, dealing in (("one", 0, 0), ("two", 0, 0), ("seed", 1, 0), ("dealing", 0, 1))
    }
    data = {name: (run.path / "last.safetensors").read_bytes() for name, run in runs.items()}
    assert data["one"] == data["two"]
    assert len(set(data.values())) == 3


def test_a_run_says_what_it_was(tmp_path):
    """Settings, partition, versions and state: enough to run it again."""
    info = koinon.simulate(job(2, upload=koinon.clip(1.0)), split(), seed=5, out=tmp_path / "run", sinks=()).info
    assert (info["job"], info["seed"], info["rounds"], info["sites"]) == ("FedAvg", 5, 2, 4)
    assert (info["name"], info["state"], info["reason"], info["score"]) == ("run", "finished", "", "accuracy")
    assert info["settings"]["upload"] == "clip(1)"
    assert info["settings"]["controller"]["aggregator"] == "mean"
    assert info["partition"]["names"] == ["site-1", "site-2", "site-3", "site-4"]
    assert {"python", "koinon", "numpy"} <= info["versions"].keys()


def test_of_many_sites_only_the_figures_are_recorded(tmp_path):
    """No table of thousands of lines in run.json; and the server evaluates."""
    data = koinon.data.arrays(np.tile(X, (3, 1)), np.tile(Y, 3)).split(koinon.iid(), sites=300)
    run = koinon.simulate(job(1), data, out=tmp_path / "run", sinks=())
    assert "table" not in run.info["partition"]
    assert run.info["partition"]["smallest"] >= 1
    assert {row.site for row in run.rows if row.name == "accuracy"} == {SERVER, FEDERATION}


# -- who evaluates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test", "who"), [("sites", {"site-1", "site-2"}), ("server", {SERVER}), ("both", {"site-1", "site-2", SERVER})]
)
def test_the_federations_metric_is_the_servers_where_it_has_one(tmp_path, test, who):
    """Otherwise the mean of the sites', weighted by their held-out samples."""
    run = koinon.simulate(job(2), split(2, test=test), out=tmp_path / "run", sinks=())
    assert {row.site for row in run.rows if row.name == "accuracy"} == who | {FEDERATION}
    for name in ("accuracy", "loss"):
        whole = [row.value for row in run.series(name)]
        if test == "sites":
            values, samples = run.by_site(name), run.by_site("samples")
            expected = [
                np.average([values[s][r] for s in sorted(who)], weights=[samples[s][r] for s in sorted(who)])
                for r in (1, 2)
            ]
        else:
            expected = [row.value for row in run.series(name, SERVER)]
        assert whole == pytest.approx(expected, abs=1e-12)


def test_the_server_sees_all_held_out_data(tmp_path):
    """Its accuracy is that of the recorded model on them."""
    data = split(3, test="server")
    run = koinon.simulate(job(2), data, out=tmp_path / "run", sinks=())
    model = run.model()
    guessed = (data.server["x"].astype(np.float32) @ model["weight"] + model["bias"]).argmax(1)
    assert run.series("accuracy")[-1].value == np.mean(guessed == data.server["y"])


def test_alone_every_evaluator_is_compared_with_itself(tmp_path):
    """Trained alone for as many rounds: the metric of a federation of one."""
    data = split(3)
    run = koinon.alone(koinon.simulate(job(3), data, out=tmp_path / "run", sinks=()), job(3), data)
    alone = run.by_site("alone_accuracy")
    assert {site: list(rounds) for site, rounds in alone.items()} == {f"site-{n}": [3] for n in (1, 2, 3)}
    held = data.site(1)
    one = koinon.data.sites({"site-2": {"train": held.train, "test": held.test}})
    by_hand = koinon.simulate(job(3), one, out=tmp_path / "one", sinks=())
    assert alone["site-2"][3] == by_hand.series("accuracy")[-1].value
    assert run.by_site("alone_loss")["site-2"][3] == by_hand.series("loss")[-1].value


def test_what_was_measured_alone_survives_more_rounds(tmp_path):
    """The rows stay, and are joined by those of the longer training."""
    koinon.alone(koinon.simulate(job(2), split(), out=tmp_path / "run", sinks=()), job(2), split())
    run = koinon.simulate(job(3), split(), out=tmp_path / "run", resume=True, sinks=())
    run = koinon.alone(run, job(3), split())
    assert Counter(row.round for row in run.rows if row.name == "alone_accuracy") == {2: 4, 3: 4}


# -- going on ------------------------------------------------------------------------------------------------


class Cut(BaseException):
    """A kill that a test can survive."""


def cut_after(events):
    left = [events]

    def sink(event):
        left[0] -= 1
        if not left[0]:
            raise Cut

    return sink


@pytest.mark.parametrize("events", [2, 7, 11, 12, 20, 30])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(tmp_path, events):
    """Whatever it was doing; `resume` is given the same job, data and seed."""
    whole = koinon.simulate(job(), split(), seed=1, out=tmp_path / "whole", sinks=())
    with pytest.raises(Cut):
        koinon.simulate(job(), split(), seed=1, out=tmp_path / "run", sinks=[cut_after(events)])
    assert read(tmp_path / "run").info["state"] == "stopped"
    run = koinon.simulate(job(), split(), seed=1, out=tmp_path / "run", resume=True, sinks=())
    assert (run.path / "last.safetensors").read_bytes() == (whole.path / "last.safetensors").read_bytes()
    rows = [
        Counter((row.round, row.site, row.name, row.value) for row in one.rows if row.name != "seconds")
        for one in (run, whole)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 2}, "seed: 1 then, 2 now"),
        ({"data": split(5)}, "partition: sites: 4 then, 5 now"),
        ({"job": job(3, upload=koinon.clip(1.0))}, r"upload: nothing then, clip\(1\) now"),
        ({"out": "elsewhere"}, "there is no run in"),
    ],
    ids=["seed", "data", "job", "folder"],
)
def test_a_run_goes_on_only_with_what_it_began_with(tmp_path, change, words):
    """The difference is named."""
    given = {"job": job(), "data": split(), "seed": 1, "out": "run"}
    koinon.simulate(given["job"], given["data"], seed=1, out=tmp_path / "run", sinks=())
    given |= change
    with pytest.raises(RunError, match=words):
        koinon.simulate(
            given["job"], given["data"], seed=given["seed"], out=tmp_path / given["out"], resume=True, sinks=()
        )


def test_a_run_goes_on_only_with_the_model_it_began_with(tmp_path):
    """Another architecture under the same settings is found before a site is asked."""

    @koinon.task("train")
    def train(model, data, context):
        return {"w": model["w"] + 1}, len(data), {}

    one, other = (
        koinon.Job(koinon.FedAvg(rounds), train, model={"w": np.zeros(size)}) for rounds, size in ((1, 3), (2, 4))
    )
    koinon.simulate(one, split(), out=tmp_path / "run", sinks=())
    with pytest.raises(RunError, match=r"another model.*\(3,\)"):
        koinon.simulate(other, split(), out=tmp_path / "run", resume=True, sinks=())


def test_a_run_goes_on_for_no_fewer_rounds_than_it_has(tmp_path):
    """As many change nothing."""
    koinon.simulate(job(3), split(), out=tmp_path / "run", sinks=())
    with pytest.raises(RunError, match="3 rounds are done already: give --rounds 4 or more"):
        koinon.simulate(job(2), split(), out=tmp_path / "run", resume=True, sinks=())
    run = koinon.simulate(job(3), split(), out=tmp_path / "run", resume=True, sinks=())
    assert (run.info["rounds"], run.info["state"]) == (3, "finished")


@pytest.mark.parametrize("error", [JobError, ValueError])
def test_a_failed_run_says_why_and_may_go_on(tmp_path, error):
    """Whatever went wrong on the server: the error comes out, and the folder keeps the reason and the last commit."""
    calls = []

    def moody(updates, weights):
        calls.append(len(updates))
        if len(calls) == 2:
            raise error("a bad day")
        return updates[0]

    rule = koinon.collect(moody, name="moody")
    moody_job = job().replace(controller=koinon.FedAvg(rounds=3, aggregator=rule))
    with pytest.raises(error, match="a bad day"):
        koinon.simulate(moody_job, split(), out=tmp_path / "run", sinks=())
    info = read(tmp_path / "run").info
    assert info["state"] == "failed"
    assert "a bad day" in info["reason"]
    assert max(row.round for row in read(tmp_path / "run").rows) == 1
    run = koinon.simulate(moody_job, split(), out=tmp_path / "run", resume=True, sinks=())
    assert (run.info["state"], run.info["reason"]) == ("finished", "")
    assert [row.round for row in run.series("accuracy")] == [1, 2, 3]


# -- who is told ---------------------------------------------------------------------------------------------


def test_a_sink_hears_the_story_in_order(tmp_path):
    """start; each round's results, metrics and commit; end."""
    heard = []
    koinon.simulate(job(2), split(2), out=tmp_path / "run", sinks=[heard.append])
    story = [(event.kind, event.round, event.site) for event in heard]
    assert story == [
        ("start", 0, FEDERATION),
        *(
            entry
            for round in (1, 2)
            for entry in (
                ("round", round, FEDERATION),
                ("result", round, "site-1"),
                ("result", round, "site-2"),
                ("metric", round, "site-1"),
                ("metric", round, "site-2"),
                ("commit", round, FEDERATION),
            )
        ),
        ("end", 0, FEDERATION),
    ]
    assert [event.time for event in heard] == sorted(event.time for event in heard)
    values = heard[0].values
    assert (values["run"], values["rounds"], values["sites"], values["resumed"]) == (str(tmp_path / "run"), 2, 2, 0)
    assert heard[-1].values == {"state": "finished", "reason": ""}
    assert heard[2].values["train_samples"] == 80
    assert {"accuracy", "loss", "train_loss", "asked", "answered", "bytes_up", "bytes_down", "seconds"} == set(
        heard[-2].values
    )


def test_a_resumed_run_says_where_it_goes_on(tmp_path):
    """The clock goes on too."""
    koinon.simulate(job(2), split(2), out=tmp_path / "run", sinks=())
    heard = []
    run = koinon.simulate(job(3), split(2), out=tmp_path / "run", resume=True, sinks=[heard.append])
    assert (heard[0].kind, heard[0].values["resumed"], heard[0].values["rounds"]) == ("start", 2, 3)
    assert {event.round for event in heard if event.kind == "round"} == {3}
    times = [row.time for row in run.rows]
    assert times == sorted(times)


def test_by_default_a_run_is_shown(tmp_path, capsys):
    """A line a round."""
    koinon.simulate(job(2), split(2), out=tmp_path / "run")
    assert "round 2/2" in capsys.readouterr().out


def test_a_site_may_call_its_numbers_what_it_wants(tmp_path):
    """`round`, `site`, `samples`: no name of a metric disturbs the run."""
    odd = {"round": 1.0, "site": 2.0, "kind": 3.0, "samples": 4.0, "values": 5.0}

    @koinon.task("train")
    def train(model, data, context):
        return dict(model), len(data), odd

    @koinon.task("evaluate")
    def evaluate(model, data, context):
        return len(data), odd

    odd_job = koinon.Job(koinon.FedAvg(1), train, evaluate, model={"w": np.zeros(1)})
    run = koinon.simulate(odd_job, split(2), out=tmp_path / "run", sinks=())
    assert run.series("site")[0].value == 2.0
    assert run.by_site("train_kind") == {"site-1": {1: 3.0}, "site-2": {1: 3.0}}


@dataclass(frozen=True)
class Says:
    """An executor whose sites answer with these values; site-1 with what an honest one would say."""

    values: dict
    tasks: tuple = ("train",)

    def open(self):
        honest = {"weight": 1, "metrics": {"loss": 1.0}}
        return lambda payload, context: koinon.Payload(
            "weight_diff", {"w": np.ones(2)}, honest if context.site == "site-1" else self.values
        )

    def initial(self, seed):
        return {"w": np.zeros(2)}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "its weight is None"),
        ({"weight": "5"}, "its weight is '5'"),
        ({"weight": float("inf")}, "its weight is inf"),
        ({"weight": 1, "metrics": [1.0]}, "its metrics are a list"),
        ({"weight": 1, "metrics": {"loss": "low"}}, "its metric 'loss' is 'low': a number is needed"),
        ({"weight": 1, "metrics": {"loss": None}}, "its metric 'loss' is None"),
        ({"weight": 1, "metrics": {"a" * 201: 1}}, "'aaaaaaaaaaaaaaaaaaaa…' has a name of 201 characters"),
    ],
    ids=str,
)
def test_values_that_are_no_numbers_are_refused(tmp_path, values, words):
    """By the site's name; the others' answers count."""
    heard = []
    says = koinon.Job(koinon.FedAvg(1), Says(values))
    run = koinon.simulate(says, split(2), out=tmp_path / "run", sinks=[heard.append])
    (refused,) = (event for event in heard if event.kind == "refused")
    assert refused.site == "site-2"
    assert words in refused.values["reason"]
    assert run.model()["w"].tolist() == [1, 1]
    assert [row.value for row in run.series("train_loss")] == [1.0]
