"""What a controller sees when sites misbehave: refused by name, the round goes on if the quorum remains."""

from dataclasses import dataclass

import numpy as np
import pytest

import koinon
from koinon.errors import FilterMismatch, JobError, QuorumNotReached, SettingsError

X = np.eye(4, dtype=np.float32)
MODEL = {"w": np.zeros(4, np.float32), "count": np.array(7)}
SITES = {f"site-{index}": (X, np.arange(4)) for index in range(1, 5)}


def job(train, **parts):
    """Four sites that run `train(model, site)`."""

    @koinon.task("train")
    def local(model, data, context):
        return train(model, context)

    return koinon.Job(koinon.FedAvg(rounds=2), local, **{"model": MODEL, "data": koinon.data.sites(SITES), **parts})


def honest(model, context):
    return {"w": model["w"] + 1, "count": model["count"] + 1}, 4, {"loss": 1.0}


def run(tmp_path, train, **parts):
    events = []
    result = koinon.simulate(job(train, **parts), out=tmp_path / "run", sinks=[events.append])
    return result, [(event.site, event.values["reason"]) for event in events if event.kind == "refused"]


def except_site_2(bad):
    return lambda model, context: bad(model, context) if context.site == "site-2" else honest(model, context)


def test_an_honest_federation_moves_by_the_mean(tmp_path):
    """And the counter, which is no floating array, stays as it was."""
    result, refused = run(tmp_path, honest)
    assert result.model()["w"].tolist() == [2, 2, 2, 2]
    assert result.model()["count"] == 7
    assert not refused


def poison(value):
    return lambda model, context: ({**model, "w": np.full(4, value, np.float32)}, 4, {})


BAD = {
    "nan": (poison(np.nan), "'w' holds NaN or infinity"),
    "infinity": (poison(np.inf), "'w' holds NaN or infinity"),
    "shape": (lambda model, context: ({"w": np.zeros((2, 3))}, 4, {}), r"shape \(2, 3\); the global model has \(4,\)"),
    "name": (lambda model, context: ({"v": model["w"]}, 4, {}), "'v', which the global model has not"),
    "missing": (lambda model, context: ({}, 4, {}), "no 'w'"),
    "type": (lambda model, context: ({"w": model["w"].astype(np.float64)}, 4, {}), "float64"),
    "metrics only": (lambda model, context: (4, {"loss": 1.0}), "with metrics; weight_diff is needed"),
    "weight zero": (lambda model, context: (model, 0, {}), "weight"),
    "weight nan": (lambda model, context: (model, np.nan, {}), "weight"),
    "raises": (lambda model, context: 1 / 0, "ZeroDivisionError"),
    "writes": (lambda model, context: model["w"].fill(1), "read-only"),
    "nothing": (lambda model, context: None, "returned NoneType"),
    "metrics": (lambda model, context: (model, 4, {"loss": "low"}), "returned tuple"),
}  # fmt: skip


@pytest.mark.parametrize(("bad", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_site_is_named_and_the_round_goes_on(tmp_path, bad, words):
    """Its answer does not count, the others' do; the reason says what was wrong."""
    result, refused = run(tmp_path, except_site_2(bad))
    assert result.model()["w"].tolist() == [2, 2, 2, 2]
    assert [site for site, _ in refused] == ["site-2", "site-2"]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(refused[0][1])
    assert [row.value for row in result.series("answered")] == [3, 3]


def test_without_a_quorum_the_run_fails_with_the_cause(tmp_path):
    """How many answered, how many are needed, who failed and why; the site's own traceback is kept."""

    def broken(model, context):
        raise KeyError("label")

    with pytest.raises(QuorumNotReached, match=r"0 of 4 sites answered 'train', 2 are needed") as caught:
        run(tmp_path, broken)
    assert "3 failed ('site-1', 'site-2', 'site-3'): KeyError: 'label'" in str(caught.value)  # the fourth is spared
    assert "in broken" in caught.value.traceback
    assert koinon.tracking.read(tmp_path / "run").info["state"] == "failed"


def test_the_quorum_is_a_share_of_those_asked(tmp_path):
    """With quorum=1.0 one failing site of four ends the run, at once."""
    with pytest.raises(QuorumNotReached, match="1 of 4 sites answered 'train', 4 are needed"):
        run(tmp_path, except_site_2(poison(np.nan)), quorum=1.0)


def test_what_is_excluded_lives_on_at_its_site(tmp_path):
    """Each site's head grows by its own number, round after round; the global head stays as it was."""
    seen = []

    def personal(model, context):
        seen.append((context.site, float(model["head"][0])))
        own = float(context.site[-1])
        return {"w": model["w"] + 1, "head": model["head"] + own}, 1, {}

    model = {"w": np.zeros(2, np.float32), "head": np.zeros(1, np.float32)}
    result, _ = run(tmp_path, personal, model=model, upload=koinon.exclude("head"))
    assert seen[4:] == [("site-1", 1.0), ("site-2", 2.0), ("site-3", 3.0), ("site-4", 4.0)]
    assert result.model()["head"] == [0.0]
    assert result.model()["w"].tolist() == [2.0, 2.0]


def test_upload_filters_act_on_what_leaves(tmp_path):
    """An update of norm 2 is clipped to 1."""
    result, _ = run(tmp_path, honest, upload=koinon.clip(1.0))
    assert result.model()["w"] == pytest.approx(np.full(4, 1.0))


def test_bytes_are_those_of_the_wire(tmp_path):
    """Up: one update a site and round, as encoded. Down: each new global model once a site."""
    from koinon.payload import codec

    result, _ = run(tmp_path, honest)
    update = koinon.Payload("weight_diff", {"w": MODEL["w"]}, {"weight": 4.0, "metrics": {"loss": 1.0}})
    assert [row.value for row in result.series("bytes_up")] == [4 * codec.size(update)] * 2
    assert [row.value for row in result.series("bytes_down")] == [4 * codec.size(koinon.Payload("weights", MODEL))] * 2


def test_a_site_fetches_a_model_once_for_evaluation_and_training(tmp_path):
    """After round 1 was evaluated, training in round 2 brings no bytes down."""

    @koinon.task("evaluate")
    def evaluate(model, data, context):
        return len(data), {"accuracy": float(model["w"][0])}

    data = koinon.data.sites({name: {"train": part, "test": part} for name, part in SITES.items()})
    two = job(honest, data=data)
    result = koinon.simulate(two.replace(executors=(*two.executors, evaluate)), out=tmp_path / "run", sinks=())
    down = result.by_site("bytes_down")["site-1"]
    assert down[1] > 0
    assert down[2] == 0
    assert [row.value for row in result.series("accuracy")] == [1.0, 2.0]
    assert [row.value for row in result.series("bytes_down")] == [8 * down[1], 4 * down[1]]


@dataclass(frozen=True)
class Turns:
    """A workflow of one's own: the model goes from site to site."""

    rounds: int = 1

    def run(self, fed, model):
        at = fed.start(model=model)
        for _ in fed.rounds(self.rounds):
            for site in fed.sites:
                update = fed.send("train", at.model, to=site)
                at.model = {**at.model, **koinon.zip_map(np.add, update.arrays, at.model)}
            fed.log(turns=len(fed.sites))
            fed.commit(at)
        if self.rounds == 99:
            fed.abort("far too many rounds")
        return at.model


def test_a_controller_of_ones_own_reads_top_to_bottom(tmp_path):
    """fed.sites, fed.send, fed.log and fed.commit are all it needs."""
    turns = job(honest).replace(controller=Turns(rounds=2))
    result = koinon.simulate(turns, out=tmp_path / "run", sinks=())
    assert result.model()["w"].tolist() == [8, 8, 8, 8]
    assert [row.value for row in result.series("turns")] == [4, 4]


@dataclass(frozen=True)
class TwoAtOnce:
    """A workflow that has two models out at the same time."""

    def run(self, fed, model):
        at = fed.start(model=model)
        for _ in fed.rounds(1):
            wide = {"w": np.zeros(6, np.float32)}
            tasks = [fed.broadcast("train", model, to=["site-1"]), fed.broadcast("train", wide, to=["site-2"])]
            at.model = {"w": np.array([len(update.arrays["w"]) for task in tasks for update in fed.stream(task)])}
            fed.commit(at)
        return at.model


def test_each_answer_is_held_against_the_model_it_was_asked_about(tmp_path):
    """Two tasks may be open at once, with models of other shapes."""
    two = job(lambda model, context: ({"w": model["w"] + 1}, 4, {})).replace(controller=TwoAtOnce())
    assert koinon.simulate(two, out=tmp_path / "run", sinks=()).model()["w"].tolist() == [4, 6]


def test_a_controller_may_abort_with_a_reason(tmp_path):
    """The run has failed, and says why."""
    with pytest.raises(JobError, match="far too many rounds"):
        koinon.simulate(job(honest).replace(controller=Turns(rounds=99)), out=tmp_path / "run", sinks=())


def test_a_task_that_no_executor_answers_is_refused(tmp_path):
    """Before any site is asked."""

    @dataclass(frozen=True)
    class Dances:
        def run(self, fed, model):
            fed.broadcast("dance", model, to=fed.sites)

    with pytest.raises(JobError, match="no executor of this job answers the task 'dance'"):
        koinon.simulate(job(honest).replace(controller=Dances()), out=tmp_path / "run", sinks=())


def test_an_answer_that_a_filter_cannot_decode_is_refused(tmp_path):
    """What a stranger's bytes do to a filter is the stranger's affair."""

    def decode(payload):
        if payload.values["metrics"]["loss"] == 2.0:
            raise IndexError("no such block")
        return payload

    broken = lambda model, context: (honest(model, context)[0], 4, {"loss": 2.0})  # noqa: E731
    result, refused = run(tmp_path, except_site_2(broken), upload=koinon.Filter("blocks", decode=decode))
    assert result.model()["w"].tolist() == [2, 2, 2, 2]
    assert refused[0] == ("site-2", "blocks cannot decode its answer: no such block")


def test_a_sampler_that_chooses_nobody_is_refused(tmp_path):
    """By the round and the task."""
    nobody = koinon.Sampler("nobody", lambda sites, random: ())
    two = job(honest).replace(controller=koinon.FedAvg(rounds=1, sampler=nobody))
    with pytest.raises(JobError, match="round 1"):
        koinon.simulate(two, out=tmp_path / "run", sinks=())


median = koinon.collect(lambda updates, weights: updates[0], name="median")
hide = koinon.Filter("secure_sum", shows="sum")


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        (
            {"controller": koinon.FedAvg(1, aggregator=median), "upload": hide},
            FilterMismatch,
            "median needs each site's",
        ),
        ({"download": hide}, FilterMismatch, "belongs in upload="),
        ({"quorum": 0}, SettingsError, "quorum"),
        ({"quorum": 1.5}, SettingsError, "quorum"),
        ({"executors": ()}, JobError, "needs an executor"),
        ({"executors": (honest,)}, JobError, "@koinon.task"),
        ({"executors": (koinon.task("train")(honest), koinon.task("train")(honest))}, JobError, "two executors"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_parts_that_do_not_fit_are_refused_when_the_job_is_built(parts, error, words):
    """Not in round 7."""
    with pytest.raises(error, match=words):
        job(honest).replace(**parts)


@pytest.mark.parametrize(
    ("parts", "words"), [({"model": None}, "no first model"), ({"upload": koinon.exclude("haed*")}, "haed")]
)
def test_a_job_that_cannot_start_leaves_no_folder(tmp_path, parts, words):
    """Nothing half-written."""
    with pytest.raises(JobError, match=words):
        run(tmp_path, honest, **parts)
    assert not (tmp_path / "run").exists()
