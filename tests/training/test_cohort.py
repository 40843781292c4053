"""A cohort in one tensor program ends where the loop ends; what cannot be stacked is refused, with the reason."""

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'koinon[torch]'")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import koinon  # noqa: E402
from koinon.errors import JobError  # noqa: E402
from koinon.payload import Payload  # noqa: E402
from koinon.task import Context  # noqa: E402
from koinon.training.cohort import program  # noqa: E402
from koinon.training.layers import Rule  # noqa: E402
from koinon.training.terms import Term, clip_gradient, proximal  # noqa: E402
from koinon.training.visits import Work  # noqa: E402

nn = torch.nn
MATRIX = nn.Linear(3, 3)


class Written(nn.Module):
    """A network that is no Sequential: traced."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x.view(x.shape[0], -1))))


class Residual(nn.Module):
    """x + f(x), with a hidden layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 6, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Image(nn.Module):
    """Convolutions, one of them in groups, a residual, pooling."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(8, 3)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.tanh(self.first(x)), 2)
        x = nn.functional.avg_pool2d(x + self.norm(self.second(x)), (1, 2))
        return self.head(x.reshape(x.size(0), -1))


class Text(nn.Module):
    """Words to vectors, a layer over each of them, and all of them to a class."""

    def __init__(self):
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(15, 3)

    def forward(self, x):
        return self.head(torch.flatten(self.mix(self.words(x)).sigmoid(), 1))


class Unlike(nn.Module):
    """What cannot be traced: its way depends on a shape, and a parameter stands outside any layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * self.layer(x.flatten(1)) if len(x) else x


# No ReLU among them: behind a norm it may stand on its kink, where rounding decides.
BLOCKS = {
    "dense": lambda: nn.Linear(6, 6),
    "unbiased": lambda: nn.Linear(6, 6, bias=False),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "norm": lambda: nn.LayerNorm(6),
    "bare": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "unshifted": lambda: nn.LayerNorm(6, bias=False),
    "groups": lambda: nn.GroupNorm(2, 6),
    "residual": Residual,
}


def chain(blocks):
    return lambda: nn.Sequential(nn.Flatten(), *[BLOCKS[block]() for block in blocks], nn.Linear(6, 3))


NETWORKS = {
    "linear": chain([]),
    "alone": lambda: nn.Linear(3, 3),
    "deep": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)
    ),
    "rectified": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)),
    "written": Written,
    "image": Image,
    "text": Text,
}
INPUTS = {"image": (1, 4, 4), "text": (5,), "alone": (3,)}
"""Shape of one input, (2, 3) where nothing is said."""


def sites(sizes, seed=0, loss="cross_entropy", inputs=(2, 3)):
    """One training context a site."""
    random = np.random.default_rng(seed)
    contexts = []
    for number, size in enumerate(sizes):
        x = random.integers(0, 9, (size, 5)) if inputs == (5,) else random.normal(size=(size, *inputs))
        y = random.integers(0, 3, size) if loss == "cross_entropy" else random.normal(size=(size, 3))
        data = SimpleNamespace(train=koinon.data.Dataset({"x": x, "y": y}), test=None)
        contexts.append(Context("train", f"site-{number}", 1, data, seed=4))
    return contexts


def shared(contexts):
    """The same sites as parts of one data set, in another order there."""
    parts = [context.data.train for context in contexts]
    order = np.random.default_rng(3).permutation(sum(map(len, parts)))
    whole = koinon.data.Dataset({name: np.concatenate([part[name] for part in parts])[order] for name in "xy"})
    places, ends = np.argsort(order), np.cumsum([len(part) for part in parts])
    return [
        Context("train", context.site, 1, SimpleNamespace(train=whole.take(places[end - len(part) : end])), seed=4)
        for context, part, end in zip(contexts, parts, ends, strict=True)
    ]


def both(network, contexts, *, kind="double", form="cohort", **rule):
    """Every site's change and loss in a cohort, in the loop, and the weighted mean that never wrote them."""
    make = lambda: getattr(network(), kind)()  # noqa: E731
    executor = koinon.torch.LocalSGD(model=make, form=form, **rule)
    model = executor.initial(0)
    payload, worker = Payload("weights", model), executor.open()
    folded = worker.folded(payload, contexts)
    together = [
        ({name: array.copy() for name, array in answer.arrays.items()}, answer.values)
        for answer in worker.together(payload, contexts)
    ]
    loop = koinon.torch.LocalSGD(model=make, form="loop", **rule).open()
    alone = []
    for context in contexts:
        answer = loop(payload, context)
        alone.append(({name: array - model[name] for name, array in answer.arrays.items()}, answer.values))
    return together, alone, folded


def agree(together, alone, folded, bound=1e-9):
    """Site by site, and in the mean."""
    if not all(np.abs(array).max() < 1e3 for loop, _ in alone for array in loop.values()):
        return  # a training that diverges multiplies rounding, until it is no number
    for (cohort, said), (loop, expected) in zip(together, alone, strict=True):
        assert list(cohort) == list(loop)
        for part, array in loop.items():
            assert cohort[part] == pytest.approx(array, abs=bound)
        assert said["weight"] == expected["weight"]
        assert said["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], abs=bound)
    mean, values = folded
    sizes = [said["weight"] for _, said in alone]
    assert mean.values == {"weight": sum(sizes)}
    for part in alone[0][0]:
        expected = np.average([loop[part] for loop, _ in alone], axis=0, weights=sizes)
        assert mean.arrays[part] == pytest.approx(expected, abs=bound)
    assert [value["metrics"]["loss"] for value in values] == pytest.approx(
        [said["metrics"]["loss"] for _, said in alone], abs=bound
    )


SIZES = st.lists(st.integers(1, 23), min_size=1, max_size=16)
RULES = st.fixed_dictionaries(
    {
        "lr": st.just(0.1),
        "batch_size": st.integers(1, 24),
        "epochs": st.integers(1, 3),
        "momentum": st.sampled_from([0.0, 0.9]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "terms": st.sampled_from([(), (proximal(0.5),), (clip_gradient(0.3), proximal(0.1))]),
        "loss": st.sampled_from(["cross_entropy", "mse"]),
    }
)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(sorted(BLOCKS)), max_size=5), SIZES, RULES)
def test_a_ragged_cohort_ends_where_the_loop_ends(blocks, sizes, rule):
    """Over random networks, sizes, batches, momenta, weight decays, terms and losses: to 1e-9 in double precision."""
    agree(*both(chain(blocks), shared(sites(sizes, loss=rule["loss"])), **rule))


@settings(max_examples=30)
@given(st.sampled_from(sorted(NETWORKS)), SIZES, RULES)
def test_networks_as_people_write_them_agree_too(name, sizes, rule):
    """Convolutions, embeddings, residuals, a single layer."""
    agree(*both(NETWORKS[name], sites(sizes, loss=rule["loss"], inputs=INPUTS.get(name, (2, 3))), **rule))


@settings(max_examples=15, deadline=None)
@given(SIZES, RULES)
def test_what_is_mapped_by_pytorch_agrees(sizes, rule):
    """A network that cannot be traced, and a loss of one's own that knows no fillers."""
    rule = {**rule, "loss": lambda outputs, targets: (outputs[:, 0] - targets.sum()).square().mean().sqrt()}
    agree(*both(Unlike, sites(sizes), form="vmap", **rule), bound=1e-8)


@pytest.mark.parametrize("form", ["cohort", "vmap"])
def test_in_single_precision_smooth_networks_agree_to_five_digits(form):
    """After an epoch, relative to the largest weight."""
    network = chain(["dense", "tanh", "norm", "gelu"])
    together, alone, folded = both(network, sites([20, 13, 40], seed=1), kind="float", form=form, lr=0.1, batch_size=8)
    agree(together, alone, folded, bound=1e-5)


def test_more_sites_than_a_cohort_holds_fold_into_one_mean():
    """Forty sites, 32 at a time; a single step, and several."""
    for batch in (4, 30):
        contexts = sites([5 + number % 17 for number in range(40)])
        executor = koinon.torch.LocalSGD(model=lambda: Written().double(), form="cohort", lr=0.1, batch_size=batch)
        payload, worker = Payload("weights", executor.initial(0)), executor.open()
        mean, values = worker.folded(payload, contexts)
        updates = [
            (each.values["weight"], {name: array.copy() for name, array in each.arrays.items()})
            for start in (0, 16, 32)
            for each in worker.together(payload, contexts[start : start + 16])
        ]
        sizes = [weight for weight, _ in updates]
        assert ([value["weight"] for value in values], mean.values["weight"]) == (sizes, sum(sizes))
        for name, array in mean.arrays.items():
            expected = np.average([update[name] for _, update in updates], axis=0, weights=sizes)
            assert array == pytest.approx(expected, abs=1e-12)
            assert array.flags.c_contiguous


def test_stored_bytes_are_read_as_the_data_set_reads_them():
    """Pixels of a byte, scaled in the cohort's own buffer: the same numbers."""
    random = np.random.default_rng(0)
    whole = koinon.data.Dataset(
        {"x": random.integers(0, 256, (40, 6)).astype(np.uint8), "y": random.integers(0, 3, 40).astype(np.int32)},
        scale={"x": (1 / 127.5, -1.0)},
    )
    parts = [SimpleNamespace(train=whole.take(range(start, start + 10))) for start in (0, 10, 20)]
    contexts = [Context("train", f"site-{number}", 1, part, seed=4) for number, part in enumerate(parts)]
    agree(*both(NETWORKS["linear"], contexts, lr=0.1, batch_size=4))


def test_steps_instead_of_epochs_and_a_second_cohort():
    """The buffers of one cohort are used by the next, of other sizes, without a trace."""
    executor = koinon.torch.LocalSGD(model=NETWORKS["deep"], form="cohort", lr=0.1, momentum=0.9, batch_size=4, steps=5)
    payload, worker = Payload("weights", executor.initial(0)), executor.open()
    fresh = [a.arrays["1.weight"].copy() for a in executor.open().together(payload, sites([9, 3], seed=2))]
    worker.together(payload, sites([20, 20, 17], seed=1))
    again = [a.arrays["1.weight"].copy() for a in worker.together(payload, sites([9, 3], seed=2))]
    assert [array.tobytes() for array in again] == [array.tobytes() for array in fresh]


def test_a_program_trains_with_a_term_of_ones_own_after_it_has_trained_without():
    """Where nobody may ask for a gradient PyTorch watches nothing; what was made there can still be written to."""
    seen = []

    def apply(gradient, weights, start, state):
        with torch.enable_grad():
            own = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            pull = torch.autograd.grad(sum(weight.square().sum() for weight in own.values()), list(own.values()))
        seen.append(len(pull))
        return {name: g + 0.1 * p for (name, g), p in zip(gradient.items(), pull, strict=True)}

    together = program(NETWORKS["rectified"]().double(), "cross_entropy")
    work = [Work(context.data.train, np.split(np.arange(12), 3)) for context in sites([12, 12])]
    rules = Rule(0.1, 0.9, decay=0.2), Rule(0.1, 0.9, terms=(Term("ridge", apply),))  # d/dw w^2 / 10 = 0.2 w
    decayed, changes = (together.fold(work, rule, np.full(2, 0.5))[0] for rule in rules)
    assert len(seen) == 3
    for name, change in changes.items():
        assert change.numpy() == pytest.approx(decayed[name].numpy(), abs=1e-9)


def test_what_one_site_holds_never_reaches_another():
    """NaN at one site of a ragged cohort is that site's own affair."""
    contexts = sites([5, 12, 12])
    contexts[1].data.train.stored["x"][:] = np.nan
    together, _, (mean, _) = both(NETWORKS["written"], contexts, lr=0.1, batch_size=5)
    spoilt = [not np.isfinite(arrays["first.weight"]).all() for arrays, _ in together]
    assert spoilt == [False, True, False]
    assert not np.isfinite(mean.arrays["first.weight"]).all()


def test_dropout_trains_after_an_evaluation_as_before_it():
    """Evaluation switches dropout off; the next round's training has it again, with the same numbers."""
    network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))  # noqa: E731
    executor = koinon.torch.LocalSGD(model=network, form="cohort", lr=0.1)
    payload, worker, contexts = Payload("weights", executor.initial(0)), executor.open(), sites([6, 6])
    first = worker.together(payload, contexts)[1].arrays["1.weight"].copy()
    held_out = SimpleNamespace(train=None, test=contexts[0].data.train)
    worker(payload, Context("evaluate", "site-0", 1, held_out, seed=4))
    assert worker.together(payload, contexts)[1].arrays["1.weight"].tobytes() == first.tobytes()
    without = koinon.torch.LocalSGD(model=lambda: nn.Sequential(*network()[:2], *network()[3:]), form="cohort", lr=0.1)
    model = {name.replace("3.", "2."): array for name, array in payload.arrays.items()}
    plain = without.open().together(Payload("weights", model), contexts)[1].arrays["1.weight"]
    assert not np.allclose(plain, first)


def hooked():
    layer = nn.Linear(3, 3)
    layer.register_forward_hook(lambda *_: None)
    return layer


def tied():
    network = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    network[2].weight = network[0].weight
    return network


class Odd(nn.Module):
    """What a stack cannot do, by name."""

    def __init__(self, forward):
        super().__init__()
        self.layer, self.way = nn.Linear(3, 3), forward

    def forward(self, x):
        return self.way(self.layer, x)


def overwriting(layer, x):
    y = layer(x)
    return y + nn.functional.relu(y, inplace=True)


class Scaled(Unlike):
    """A parameter that belongs to no layer."""

    def forward(self, x):
        return self.layer(x.flatten(1)) * self.scale


REFUSED = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), {}, "BatchNorm1d"),
    "shared": (lambda: nn.Sequential(MATRIX, MATRIX), {}, "share their weights"),
    "mixed samples": (lambda: Odd(lambda layer, x: layer(x - x.mean(0))), {}, "mean"),
    "in place": (lambda: nn.Sequential(nn.Linear(3, 3), nn.ELU(inplace=True)), {}, "ELU"),
    "counted": (lambda: Odd(lambda layer, x: layer(x) / x.size(0)), {}, "no stacked form"),
    "overwritten": (lambda: Odd(overwriting), {}, "no stacked form"),
    "way": (lambda: Odd(lambda layer, x: layer(x) if x.sum() > 0 else x), {}, "traced"),
    "output": (lambda: Odd(lambda layer, x: (layer(x), x)[1]), {}, "not the last"),
    "bare parameter": (Scaled, {}, r"'scale' (a parameter)"),
    "padding": (lambda: nn.Sequential(nn.Embedding(3, 3, padding_idx=0), nn.Flatten()), {}, "Embedding"),
    "own loss": (NETWORKS["linear"], {"loss": lambda outputs, targets: outputs.sum()}, "a loss of one's own"),
    "own optimizer": (NETWORKS["linear"], {"optimizer": lambda p: torch.optim.Adam(p)}, "optimizer='sgd'"),
    "nothing": (lambda: nn.Sequential(nn.Flatten()), {}, "nothing to train"),
    "tied": (tied, {}, "share their weights"),
    "hooks": (lambda: nn.Sequential(hooked()), {}, "hooks"),
    "frozen": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)), {}, "frozen"),
}


@pytest.mark.parametrize(("network", "rule", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_stacked_form_is_trained_by_the_loop(network, rule, words):
    """And the record says why; asked for by name, it is an error."""
    worker = koinon.torch.LocalSGD(model=network, **rule).open()
    assert worker.cohorts == {}
    assert words in worker.forms["train"]
    with pytest.raises(JobError, match=re.escape(words)):
        koinon.torch.LocalSGD(model=network, form="cohort", **rule).open()


def test_on_a_cpu_convolutions_are_trained_by_the_loop():
    """Unless a stack is asked for."""
    worker = koinon.torch.LocalSGD(model=Image, device="cpu").open()
    assert (worker.cohorts, worker.probe(None)) == ({}, "loop")
    assert "convolutions" in worker.forms["train"]


def test_the_probe_takes_the_faster_form_and_says_so():
    """What cannot be traced: measured, against the loop."""
    worker = koinon.torch.LocalSGD(model=Unlike, batch_size=4).open()
    assert (worker.form.name, worker.cohorts) == ("loop", {})
    name = worker.probe(sites([9])[0].data.train)
    assert name in ("loop", "vmap")
    assert worker.cohorts == ({} if name == "loop" else {"train": 32})
    assert "times as long" in worker.forms["train"]


def test_a_probe_on_data_that_fit_no_form_leaves_the_choice_as_it_was():
    """The site with such data will be named when its turn comes."""
    contexts = sites([9])
    contexts[0].data.train.stored["y"][:] = 7
    worker = koinon.torch.LocalSGD(model=Unlike, batch_size=4).open()
    assert worker.probe(contexts[0].data.train) == "loop"
    assert "unmeasured" in worker.forms["train"]


class Renormed(Unlike):
    """An operation that vmap runs for one site after the other, with a warning."""

    def forward(self, x):
        return super().forward(torch.renorm(x.flatten(1), 2, 0, 1.0) if len(x) else x)


def test_what_pytorch_would_not_map_at_once_is_trained_by_the_loop():
    """Found out by the probe; asked for by name, it is an error."""
    data = sites([9])[0].data.train
    worker = koinon.torch.LocalSGD(model=Renormed, batch_size=4).open()
    assert worker.probe(data) == "loop"
    assert "no rule" in worker.forms["train"]
    with pytest.raises(JobError, match="no rule"):
        koinon.torch.LocalSGD(model=Renormed, form="vmap", batch_size=4).open().probe(data)


def test_a_batch_norm_is_trained_by_the_loop():
    """Without a measurement: its running statistics would be those of all sites."""
    network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.BatchNorm1d(3))  # noqa: E731
    worker = koinon.torch.LocalSGD(model=network).open()
    assert (worker.probe(None), worker.cohorts) == ("loop", {})
    with pytest.raises(JobError, match="running statistics"):
        koinon.torch.LocalSGD(model=network, form="vmap").open()


def simulated(tmp_path, form, **parts):
    x, y = np.random.default_rng(1).normal(size=(90, 6)).astype(np.float32), np.arange(90) % 3
    job = koinon.Job(
        koinon.FedAvg(rounds=3),
        koinon.torch.LocalSGD(model=NETWORKS["deep"], form=form, lr=0.1, momentum=0.5, batch_size=4),
        data=koinon.data.arrays(x, y).split(koinon.dirichlet(0.5), sites=20),
        **parts,
    )
    return koinon.simulate(job, out=tmp_path / form, sinks=())


@pytest.mark.parametrize("parts", [{}, {"upload": koinon.clip(0.05)}, {"upload": koinon.exclude("5.*")}])
def test_a_run_in_cohorts_is_the_run_in_the_loop(tmp_path, parts):
    """Through the whole path, filters and what stays at the sites included: to 1e-5 in single precision."""
    cohort, loop = (simulated(tmp_path, form, **parts) for form in ("cohort", "loop"))
    for name, array in loop.model().items():
        assert cohort.model()[name] == pytest.approx(array, abs=1e-5)
    assert cohort.by_site("train_samples") == loop.by_site("train_samples")
    assert "cohorts of 32" in cohort.info["forms"]["train"]


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


def test_the_form_that_was_measured_is_every_workers_and_a_resumed_runs(tmp_path, monkeypatch):
    """Though a second measurement might have another outcome, and the bits with it."""
    data = koinon.data.arrays(np.random.default_rng(1).normal(size=(60, 6)).astype(np.float32), np.arange(60) % 3)
    split = data.split(koinon.iid(), sites=20)

    def run(rounds, folder="run", form="auto", **settings):
        job = koinon.Job(koinon.FedAvg(rounds), koinon.torch.LocalSGD(model=Unlike, batch_size=4, lr=0.1, form=form))
        return koinon.simulate(job, split, out=tmp_path / folder, sinks=(), **settings)

    monkeypatch.setattr("koinon.training.torch.fastest", lambda found, seconds: found[1])
    assert run(1, on=2).info["forms"]["train"].startswith("vmap: ")
    monkeypatch.setattr("koinon.training.torch.fastest", lambda found, seconds: found[0])
    ended = run(2, resume=True)
    assert ended.info["forms"]["train"].startswith("vmap: ")
    asked = run(2, "asked", form="vmap").model()
    assert all(array.tobytes() == asked[name].tobytes() for name, array in ended.model().items())


SHORT = """
import resource, sys
from pathlib import Path
import numpy as np
import koinon

def network():
    from torch import nn
    return nn.Sequential(nn.Linear(64, 1500), nn.ReLU(), nn.Linear(1500, 4000), nn.ReLU(), nn.Linear(4000, 10))

def trained(sites):
    executor = koinon.torch.LocalSGD(model=network, lr=0.05, batch_size=8, max_batches=12, momentum=0.9, form="cohort")
    data = koinon.data.digits().split(koinon.iid(), sites=sites, test="server")
    said = []
    run = koinon.simulate(koinon.Job(koinon.FedAvg(rounds=1), executor, data=data), on=1, sinks=[said.append])
    return run.model(), said

trained(1)  # with all that is there whatever the number of sites
plenty, _ = trained(8)
size = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line).split()[1])
resource.setrlimit(resource.RLIMIT_AS, ((size << 10) + int(sys.argv[1]), -1))
short, said = trained(8)
assert not [event for event in said if event.kind == "refused"], said
assert all(np.allclose(short[name], plenty[name], atol=1e-5) for name in plenty)
print([event.values["message"] for event in said if event.kind == "warning"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's memory is Linux's")
def test_with_too_little_memory_the_stacks_are_halved(tmp_path):
    """Of 8 sites' weights and velocities, 400 MB, half fit; whoever tries again has the memory of whoever failed."""
    done = subprocess.run(
        [sys.executable, "-c", SHORT, str(300 << 20)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory with 8 sites at once: they go on 4 at a time" in done.stdout
