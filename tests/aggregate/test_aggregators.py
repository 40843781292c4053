"""Every aggregation rule obeys the same laws; one row in a table is all that a new rule needs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import koinon
from koinon.testing import check_aggregator

RULES = [
    koinon.mean(),
    koinon.mean(weighted=False),
    koinon.coordinate_median(),
    koinon.trimmed_mean(2),
    koinon.trimmed_mean(0.2),
    koinon.krum(1),
    koinon.multi_krum(1),
    koinon.multi_krum(0, 2),
    koinon.geometric_median(),
    koinon.geometric_median(weighted=False),
    koinon.norm_bounded(100.0),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rule_obeys_the_laws(rule, seed):
    """Order, merging, groups, equal updates, types, weights, storing in mid-round, nothing written in place."""
    check_aggregator(rule, seed=seed)


def broken(change):
    rule = koinon.mean()
    return koinon.Aggregator(**{**vars(rule), "name": "broken", "needs": "each", **change(rule)})


@pytest.mark.parametrize(
    ("change", "law"),
    [
        (lambda rule: {"finish": lambda state: {n: a * 2 for n, a in rule.finish(state).items()}}, "equal updates"),
        (lambda rule: {"finish": lambda state: {n: a.astype(float) for n, a in rule.finish(state).items()}}, "dtypes"),
        (lambda rule: {"merge": lambda left, right: left}, "merged"),
        (lambda rule: {"add": lambda state, update, weight: rule.add(rule.init(), update, weight)}, "order"),
        (lambda rule: {"add": lambda state, update, weight: rule.add(state, update, 1.0)}, "weights"),
        (lambda rule: {**vars(koinon.coordinate_median()), "name": "broken", "needs": "sum"}, "group's weighted mean"),
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


def test_the_mean_can_count_every_site_the_same():
    """(1 + 5) / 2 = 3, whatever they weigh."""
    rule = koinon.mean(weighted=False)
    state = rule.add(rule.init(), {"w": np.array([1.0])}, 1)
    assert rule.finish(rule.add(state, {"w": np.array([5.0])}, 3))["w"] == [3.0]


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 1000)), min_size=1, max_size=20))
def test_the_mean_equals_numpys_average(pairs):
    """Against an independent implementation."""
    rule = koinon.mean()
    state = rule.init()
    for value, weight in pairs:
        state = rule.add(state, {"w": np.full(3, value)}, weight)
    values, weights = zip(*pairs, strict=True)
    assert rule.finish(state)["w"] == pytest.approx(np.full(3, np.average(values, weights=weights)), abs=1e-9)


@given(st.lists(st.lists(st.tuples(st.integers(-9, 9), st.sampled_from([0.5, 1, 20, 30])), max_size=4), min_size=1))
def test_the_mean_of_folds_made_apart_is_that_of_all(parts):
    """Exactly, where the numbers are small: as long as all weigh the same, nothing is multiplied; then all of it is."""
    rule = koinon.mean()
    folded, at_once = rule.init(), rule.init()
    for part in parts:
        fold = rule.init()
        for value, weight in part:
            update = {"w": np.array([value], np.float32), "scalar": np.array(value, np.float32)}
            fold, at_once = rule.add(fold, update, weight), rule.add(at_once, update, weight)
        folded = rule.merge(folded, fold)
    if pairs := [pair for part in parts for pair in part]:
        mean = np.float32(sum(value * weight for value, weight in pairs)) / sum(weight for _, weight in pairs)
        for state in (folded, at_once):
            assert rule.finish(state) == {"w": pytest.approx([mean], rel=1e-6), "scalar": pytest.approx(mean, rel=1e-6)}
        assert rule.finish(folded) == rule.finish(at_once)


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


def test_an_array_without_axes_stays_an_array():
    """A learned temperature has one entry and no axis; as a NumPy scalar it would be stored as a plain number."""
    for rule in RULES:
        state = rule.init()
        for value in range(5):
            state = rule.add(state, {"t": np.array(value, np.float32)}, 1.0)
        assert isinstance(rule.finish(state)["t"], np.ndarray), rule.name


def largest() -> koinon.Aggregator:
    """A rule of one's own."""
    return koinon.collect(lambda updates, weights: max(updates, key=koinon.norm))


def test_a_collected_rule_is_called_after_the_function_that_made_it():
    """So that errors can name it."""
    assert largest().name == "largest"
