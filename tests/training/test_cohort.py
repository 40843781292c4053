"""A cohort in one tensor program ends where the loop ends; what cannot be stacked is refused, with the reason."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'koinon[torch]'")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import koinon  # noqa: E402
from koinon.errors import JobError  # noqa: E402
from koinon.payload import Payload  # noqa: E402
from koinon.site import SiteContext  # noqa: E402

nn = torch.nn
MATRIX = nn.Linear(3, 3)


class Written(nn.Module):
    """A network that is no Sequential: traced."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(torch.flatten(x, 1))))


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3)),
    "deep": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)
    ),
    "written": Written,
}


def sites(sizes, seed=0, outputs=3, loss="cross_entropy"):
    """One training context a site, of 2 x 3 inputs."""
    random = np.random.default_rng(seed)
    contexts = []
    for number, size in enumerate(sizes):
        x = random.normal(size=(size, 2, 3))
        y = random.integers(0, outputs, size) if loss == "cross_entropy" else random.normal(size=(size, outputs))
        data = SimpleNamespace(train=koinon.data.Dataset({"x": x, "y": y}), test=None)
        contexts.append(SiteContext("train", f"site-{number}", 1, data, seed=4))
    return contexts


def both(network, contexts, **rule):
    """Every site's change and loss, in a cohort and in the loop, in double precision."""
    executor = koinon.torch.LocalSGD(model=lambda: network().double(), form="cohort", **rule)
    model = executor.initial(0)
    payload = Payload("weights", model)
    together = [
        ({name: array.copy() for name, array in answer.arrays.items()}, answer.values)
        for answer in executor.open().together(payload, contexts)
    ]
    loop = koinon.torch.LocalSGD(model=lambda: network().double(), form="loop", **rule).open()
    alone = []
    for context in contexts:
        answer = loop(payload, context)
        alone.append(({name: array - model[name] for name, array in answer.arrays.items()}, answer.values))
    return together, alone


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(NETWORKS)),
    st.lists(st.integers(1, 23), min_size=1, max_size=16),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.9]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from(["cross_entropy", "mse"]),
)
def test_a_ragged_cohort_ends_where_the_loop_ends(name, sizes, batch, epochs, momentum, decay, loss):
    """Over networks, sizes, batches, momentum, weight decay and losses: to 1e-9 in double precision."""
    rule = {"lr": 0.1, "batch_size": batch, "epochs": epochs, "momentum": momentum, "weight_decay": decay}
    together, alone = both(NETWORKS[name], sites(sizes, loss=loss), loss=loss, **rule)
    for (cohort, said), (loop, expected) in zip(together, alone, strict=True):
        assert list(cohort) == list(loop)
        for part, array in loop.items():
            assert cohort[part] == pytest.approx(array, abs=1e-9)
        assert said["weight"] == expected["weight"]
        assert said["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], abs=1e-9)


def test_steps_instead_of_epochs_and_a_second_cohort():
    """The buffers of one cohort are used by the next, of other sizes, without a trace."""
    executor = koinon.torch.LocalSGD(model=NETWORKS["deep"], form="cohort", lr=0.1, momentum=0.9, batch_size=4, steps=5)
    payload, worker = Payload("weights", executor.initial(0)), executor.open()
    fresh = [a.arrays["1.weight"].copy() for a in executor.open().together(payload, sites([9, 3], seed=2))]
    worker.together(payload, sites([20, 20, 17], seed=1))
    again = [a.arrays["1.weight"].copy() for a in worker.together(payload, sites([9, 3], seed=2))]
    assert [array.tobytes() for array in again] == [array.tobytes() for array in fresh]


def test_what_one_site_holds_never_reaches_another():
    """NaN at one site of a ragged cohort is that site's own affair."""
    contexts = sites([5, 12, 12])
    contexts[1].data.train.stored["x"][:] = np.nan
    together, _ = both(NETWORKS["written"], contexts, lr=0.1, batch_size=5)
    spoilt = [not np.isfinite(arrays["first.weight"]).all() for arrays, _ in together]
    assert spoilt == [False, True, False]


def test_dropout_trains_after_an_evaluation_as_before_it():
    """Evaluation switches dropout off; the next round's training has it again, with the same numbers."""
    network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))  # noqa: E731
    executor = koinon.torch.LocalSGD(model=network, form="cohort", lr=0.1)
    payload, worker, contexts = Payload("weights", executor.initial(0)), executor.open(), sites([6, 6])
    first = worker.together(payload, contexts)[1].arrays["1.weight"].copy()
    held_out = SimpleNamespace(train=None, test=contexts[0].data.train)
    worker(payload, SiteContext("evaluate", "site-0", 1, held_out, seed=4))
    assert worker.together(payload, contexts)[1].arrays["1.weight"].tobytes() == first.tobytes()
    without = koinon.torch.LocalSGD(model=lambda: nn.Sequential(*network()[:2], *network()[3:]), form="cohort", lr=0.1)
    model = {name.replace("3.", "2."): array for name, array in payload.arrays.items()}
    plain = without.open().together(Payload("weights", model), contexts)[1].arrays["1.weight"]
    assert not np.allclose(plain, first)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return x + self.layer(x)


def hooked():
    layer = nn.Linear(3, 3)
    layer.register_forward_hook(lambda *_: None)
    return layer


def tied():
    network = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    network[2].weight = network[0].weight
    return network


REFUSED = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten()), {}, "Conv2d"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), {}, "BatchNorm1d"),
    "residual": (Residual, {}, "plain chain"),
    "shared": (lambda: nn.Sequential(MATRIX, MATRIX), {}, "plain chain"),
    "own loss": (NETWORKS["linear"], {"loss": lambda outputs, targets: outputs.sum()}, "a loss of one's own"),
    "own optimizer": (NETWORKS["linear"], {"optimizer": lambda p: torch.optim.Adam(p)}, "optimizer='sgd'"),
    "nothing": (lambda: nn.Sequential(nn.Flatten()), {}, "nothing to train"),
    "tied": (tied, {}, "share their weights"),
    "hooks": (lambda: nn.Sequential(hooked()), {}, "hooks"),
    "frozen": (lambda: nn.Sequential(nn.Linear(3, 3).requires_grad_(False)), {}, "frozen"),
}


@pytest.mark.parametrize(("network", "rule", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_stacked_form_is_trained_by_the_loop(network, rule, words):
    """And the record says why; asked for by name, it is an error."""
    worker = koinon.torch.LocalSGD(model=network, **rule).open()
    assert worker.cohorts == {}
    assert words in worker.forms["train"]
    with pytest.raises(JobError, match=words):
        koinon.torch.LocalSGD(model=network, form="cohort", **rule).open()


def simulated(tmp_path, form, **parts):
    x, y = np.random.default_rng(1).normal(size=(90, 6)).astype(np.float32), np.arange(90) % 3
    job = koinon.Job(
        koinon.FedAvg(rounds=3),
        koinon.torch.LocalSGD(model=NETWORKS["deep"], form=form, lr=0.1, momentum=0.5, batch_size=4),
        data=koinon.data.arrays(x, y).split(koinon.dirichlet(0.5), sites=20),
        **parts,
    )
    return koinon.simulate(job, out=tmp_path / form, sinks=())


@pytest.mark.parametrize("parts", [{}, {"upload": koinon.clip(0.05)}, {"upload": koinon.exclude("5.*")}], ids=str)
def test_a_run_in_cohorts_is_the_run_in_the_loop(tmp_path, parts):
    """Through the whole path, filters and what stays at the sites included: to 1e-5 in single precision."""
    cohort, loop = (simulated(tmp_path, form, **parts) for form in ("cohort", "loop"))
    for name, array in loop.model().items():
        assert cohort.model()[name] == pytest.approx(array, abs=1e-5)
    assert cohort.by_site("train_samples") == loop.by_site("train_samples")
    assert "cohorts of 16" in cohort.info["forms"]["train"]


def test_a_rule_that_keeps_updates_gets_its_own(tmp_path):
    """Arrays of a cohort are overwritten by the next one; the median of all is that of the loop."""
    median = koinon.collect(lambda updates, weights: koinon.zip_map(lambda *u: np.median(u, axis=0), *updates))
    results = []
    for form in ("cohort", "loop"):
        x, y = np.random.default_rng(1).normal(size=(90, 6)), np.arange(90) % 3
        job = koinon.Job(
            koinon.FedAvg(rounds=1, aggregator=median),
            koinon.torch.LocalSGD(model=NETWORKS["deep"], form=form, lr=0.1, batch_size=4),
            data=koinon.data.arrays(x, y).split(koinon.iid(), sites=20),
        )
        results.append(koinon.simulate(job, out=tmp_path / f"median-{form}", sinks=()).model())
    for name, array in results[1].items():
        assert results[0][name] == pytest.approx(array, abs=1e-5)


def test_a_filter_that_fails_at_one_site_of_a_cohort_fails_that_site(tmp_path):
    """Its code is the job's, what it chokes on is the site's: the round goes on without it."""

    def encode(payload, state, random):
        if payload.values["weight"] == 5:
            raise ValueError("five is too many")
        return payload, state

    parts = {f"site-{number}": (np.ones((3 + number, 6), np.float32), np.arange(3 + number) % 3) for number in range(4)}
    events = []
    job = koinon.Job(
        koinon.FedAvg(rounds=1),
        koinon.torch.LocalSGD(model=NETWORKS["written"], form="cohort"),
        data=koinon.data.sites(parts),
        upload=koinon.Filter("picky", encode=encode),
    )
    run = koinon.simulate(job, out=tmp_path / "run", sinks=[events.append])
    refused = [(event.site, event.values["reason"]) for event in events if event.kind == "refused"]
    assert refused == [("site-2", "ValueError: five is too many")]
    assert run.series("answered")[0].value == 3


def test_a_failing_site_of_a_cohort_is_named(tmp_path):
    """A label out of range fails its site, and no other."""
    parts = {f"site-{number}": (np.ones((4, 6), np.float32), np.arange(4) % 3) for number in range(5)}
    parts["site-2"] = (np.ones((4, 6), np.float32), np.array([0, 1, 2, 3]))
    events = []
    job = koinon.Job(
        koinon.FedAvg(rounds=1), koinon.torch.LocalSGD(model=NETWORKS["written"]), data=koinon.data.sites(parts)
    )
    run = koinon.simulate(job, out=tmp_path / "run", sinks=[events.append])
    refused = [(event.site, event.values["reason"]) for event in events if event.kind == "refused"]
    assert [site for site, _ in refused] == ["site-2"]
    assert "out of bounds" in refused[0][1]
    assert run.series("answered")[0].value == 4
