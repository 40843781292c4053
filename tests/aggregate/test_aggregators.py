"""Every aggregation rule obeys the same laws; one row in a table is all that a new rule needs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import koinon
from koinon.errors import SettingsError
from koinon.testing import check_aggregator


def coordinate_median() -> koinon.Aggregator:
    """Coordinate-wise median of the sites' updates (Yin et al., 2018)."""
    return koinon.collect(lambda updates, weights: koinon.zip_map(lambda *layers: np.median(layers, axis=0), *updates))


RULES = [koinon.mean(), coordinate_median()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rule_obeys_the_laws(rule, seed):
    """Order, merging, equal updates, types, weights, storing in mid-round, nothing written in place."""
    check_aggregator(rule, seed=seed)


def broken(change):
    rule = koinon.mean()
    parts = {"init": rule.init, "add": rule.add, "merge": rule.merge, "finish": rule.finish, **change(rule)}
    return koinon.Aggregator("broken", **parts)


@pytest.mark.parametrize(
    ("change", "law"),
    [
        (lambda rule: {"finish": lambda state: {n: a * 2 for n, a in rule.finish(state).items()}}, "equal updates"),
        (lambda rule: {"finish": lambda state: {n: a.astype(float) for n, a in rule.finish(state).items()}}, "dtypes"),
        (lambda rule: {"merge": lambda left, right: left}, "merged"),
        (lambda rule: {"add": lambda state, update, weight: rule.add(rule.init(), update, weight)}, "order"),
        (lambda rule: {"add": lambda state, update, weight: rule.add(state, update, 1.0)}, "weights"),
    ],
)
def test_a_rule_that_breaks_a_law_is_told_which(change, law):
    """The check can fail, and names the law."""
    with pytest.raises(AssertionError, match=law):
        check_aggregator(broken(change))


def test_the_mean_is_weighted_by_samples():
    """Worked by hand: (1 * 1 + 3 * 5) / 4 = 4."""
    rule = koinon.mean()
    state = rule.add(rule.init(), {"w": np.array([1.0])}, 1)
    assert rule.finish(rule.add(state, {"w": np.array([5.0])}, 3))["w"] == [4.0]


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 1000)), min_size=1, max_size=20))
def test_the_mean_equals_numpys_average(pairs):
    """Against an independent implementation."""
    rule = koinon.mean()
    state = rule.init()
    for value, weight in pairs:
        state = rule.add(state, {"w": np.full(3, value)}, weight)
    values, weights = zip(*pairs, strict=True)
    assert rule.finish(state)["w"] == pytest.approx(np.full(3, np.average(values, weights=weights)), abs=1e-9)


def test_the_mean_of_half_precision_does_not_overflow():
    """65,504 is the largest half; the sum is taken in single precision."""
    rule = koinon.mean()
    state = rule.init()
    for _ in range(4):
        state = rule.add(state, {"w": np.full(2, 60_000, np.float16)}, 10)
    assert rule.finish(state)["w"].tolist() == [60_000, 60_000]


def test_a_large_array_is_added_piece_by_piece():
    """More entries than one piece, and a strided view."""
    array = np.random.default_rng(0).normal(size=(300, 500)).T
    rule = koinon.mean()
    state = rule.add(rule.init(), {"w": array}, 2.0)
    assert np.allclose(rule.finish(rule.add(state, {"w": -3 * array}, 2.0))["w"], -array)


def test_a_collected_rule_is_called_after_the_function_that_made_it():
    """So that errors can name it."""
    assert coordinate_median().name == "coordinate_median"


def test_sgd_with_lr_one_is_the_update_itself():
    """FedAvg: the model moves by the mean update."""
    optimizer = koinon.sgd(1.0)
    model = {"w": np.array([1.0, 2.0], np.float32), "count": np.array(3)}
    after, _ = optimizer.step(model, {"w": np.array([0.5, -1.0], np.float32)}, optimizer.init(model))
    assert after["w"].tolist() == [1.5, 1.0]
    assert after["w"].dtype == np.float32
    assert after["count"] == 3


def test_sgd_with_momentum_follows_the_recurrence():
    """v1 = 1, v2 = 0.5 * 1 + 1 = 1.5; w = 0 + 0.1 * (1 + 1.5)."""
    optimizer = koinon.sgd(0.1, momentum=0.5)
    model, state = {"w": np.zeros(1)}, optimizer.init({"w": np.zeros(1)})
    for _ in range(2):
        model, state = optimizer.step(model, {"w": np.ones(1)}, state)
    assert model["w"] == pytest.approx([0.25])


@pytest.mark.parametrize("settings", [{"lr": 0}, {"lr": -1}, {"momentum": 1}, {"momentum": -0.1}])
def test_sgd_refuses_settings_outside_their_domain(settings):
    """Before anything runs."""
    with pytest.raises(SettingsError):
        koinon.sgd(**settings)


def test_running_statistics_become_their_mean_whatever_the_optimizer():
    """A variance that momentum or a large step carried on would end below zero."""
    optimizer = koinon.sgd(2.0, momentum=0.9)
    model = {"norm.weight": np.ones(1), "norm.running_var": np.ones(1)}
    state = optimizer.init(model)
    for _ in range(3):
        model, state = optimizer.step(model, {name: np.full(1, -0.3) for name in model}, state)
    assert model["norm.running_var"] == pytest.approx([0.1])
    assert model["norm.weight"] == pytest.approx([1 - 0.6 * (1 + 1.9 + 2.71)])
