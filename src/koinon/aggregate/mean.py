"""The weighted mean of the updates (McMahan et al., 2017), streamed: one model of memory for any number of sites."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from koinon.aggregate.aggregator import Aggregator, State
from koinon.payload import Arrays

PIECE = 1 << 17
"""Entries taken at a time: a piece of the sum and of the product stay in the cache."""


def mean(*, weighted: bool = True) -> Aggregator:
    """update = sum_i w_i u_i / sum_i w_i, with w_i the site's weight, by default its number of samples.

    Half precision is summed in single precision; every other type in its own.

    Args:
        weighted: False counts every site the same, as the paper of a sampler that draws by size asks for.  It needs to
            see each site's own update.

    >>> rule = mean()
    >>> state = rule.add(rule.init(), {"w": np.array([1.0])}, 1.0)
    >>> rule.finish(rule.add(state, {"w": np.array([4.0])}, 2.0))
    {'w': array([3.])}
    """
    if not weighted:
        return Aggregator("mean(weighted=False)", init, _add_one, merge, finish, weighted=False)
    return Aggregator("mean", init, add, merge, finish, needs="sum", weighted=True)


def init() -> State:
    """A sum of nothing."""
    return {"sum": {}, "unit": 1.0, "weight": 0.0, "types": {}}


def add(state: State, update: Arrays, weight: float) -> State:
    """Add `weight * update` to `unit * sum`, in place.

    As long as all weigh the same, and more than one (or the sum might overflow), that is the unit: then there is
    nothing to multiply.
    """
    if not state["sum"]:
        total = {name: np.array(array, np.result_type(array, np.float32)) for name, array in update.items()}
        if weight < 1:
            for each in total.values():
                each *= weight
        types = {name: array.dtype.name for name, array in update.items()}
        return {"sum": total, "unit": max(weight, 1.0), "weight": weight, "types": types}
    if state["unit"] not in (1.0, weight):
        for total in state["sum"].values():
            total *= state["unit"]
        state["unit"] = 1.0
    for name, array in update.items():
        total = state["sum"][name]
        if weight == state["unit"]:
            total += array
            continue
        total, entries, scale = total.reshape(-1), array.reshape(-1), total.dtype.type(weight)
        for start in range(0, total.size, PIECE):  # twice as fast as with a temporary of full size
            piece = total[start : start + PIECE]
            piece += entries[start : start + PIECE] * scale
    state["weight"] += weight
    return state


def _add_one(state: State, update: Arrays, weight: float) -> State:
    return add(state, update, 1.0)


def merge(left: State, right: State) -> State:
    """Add the right sum to the left one, in place."""
    if not left["sum"] or not right["sum"]:
        return left if left["sum"] else right
    unit = left["unit"] if left["unit"] == right["unit"] else 1.0
    for name, total in left["sum"].items():
        if left["unit"] != unit:
            total *= left["unit"]
        other = right["sum"][name]
        np.add(total, other if right["unit"] == unit else other * right["unit"], out=total)
    return {**left, "unit": unit, "weight": left["weight"] + right["weight"]}


def finish(state: State) -> Arrays:
    """The sum divided by the weight, in the updates' own types."""
    weight, types = state["weight"] / state["unit"], state["types"]
    return {name: np.asarray(total / weight, types[name]) for name, total in state["sum"].items()}


def average(updates: Sequence[Arrays], weights: Sequence[float]) -> Arrays:
    """The mean of updates that are all at hand."""
    state = init()
    for update, weight in zip(updates, weights, strict=True):
        state = add(state, update, weight)
    return finish(state)
