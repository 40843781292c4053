"""What the server makes of results: read, checked, and folded if it is known how.

Pure, so that it happens wherever the results are: at the server for what comes over a wire, in the worker for what
was trained there.  A worker that folds sends one model, however many sites it trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from koinon.aggregate import Aggregator, State
from koinon.filters import NOTHING
from koinon.payload import Arrays, Payload, codec, tree
from koinon.task.job import Job
from koinon.task.task import Failure, Result

SHARES = 32
"""Into how many pieces of about equal work a round is cut, if its sites are not trained in cohorts."""

LARGEST = 32
"""Sites in such a piece, at most: a piece costs two passes over a model, beside what its sites do."""

COHORTS, PIECES = 4, 12
"""Cohorts in a piece, at most, where there are so many pieces at least."""

NAME = 200
"""Characters of a metric's name, at most: it stands in every row of the table."""


@dataclass
class Update:
    """One site's answer as a controller sees it: decoded and checked.  Where it was folded, the arrays are gone.

    `values` are whatever plain values it sent besides its weight and its metrics.
    """

    site: str
    arrays: Arrays
    weight: float
    metrics: Mapping[str, float]
    kind: str = "weight_diff"
    bytes: int = 0
    seconds: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """What came of some sites' work on one task.

    Args:
        task: the task's id.
        updates: of those whose answer counts.
        failures: of the others, why not.
        fold: the updates folded; None where they still have their arrays.
        warning: what somebody should know, if anything.
    """

    task: str
    updates: Sequence[Update] = ()
    failures: Mapping[str, Failure] = field(default_factory=dict)
    fold: State | None = None
    warning: str = ""

    def __reduce__(self) -> tuple[Any, ...]:  # between processes: each update's class would be looked at anew
        rows = [tuple(vars(update).values()) for update in self.updates]
        return _rebuilt, (self.task, rows, self.failures, self.fold, self.warning)

    @property
    def sites(self) -> tuple[str, ...]:
        """Who answers."""
        return (*(update.site for update in self.updates), *self.failures)


def _rebuilt(task: str, rows: Sequence[tuple[Any, ...]], *rest: Any) -> Answers:
    return Answers(task, [Update(*row) for row in rows], *rest)


class Refusal(Exception):
    """One site's answer cannot be counted; the round goes on if the quorum remains."""


def expected(job: Job, model: Arrays) -> Arrays:
    """The arrays, by name, that an update of this model must hold: what floats, less what stays at the sites."""
    kept = job.upload.keeps(frozenset(floating := tree.floating(model)))
    return {name: array for name, array in floating.items() if name not in kept}


def checked(
    job: Job, results: Iterable[Result], *, task: str, like: Arrays, aggregator: Aggregator | None = None
) -> Answers:
    """Read results one by one, and fold them as they come if there is an aggregator."""
    updates: list[Update] = []
    failures: dict[str, Failure] = {}
    fold = aggregator.init() if aggregator else None
    for result in results:
        if result.payload is None:
            failures |= result.failures
            continue
        try:
            update = read(job, result, like)
            if aggregator and update.kind != "weight_diff":
                raise Refusal(f"it answered with {update.kind}; weight_diff is needed")
        except Refusal as refusal:
            failures[result.site] = Failure(str(refusal))
            continue
        if aggregator and fold is not None:
            fold = aggregator.add(fold, update.arrays, update.weight)
            update.arrays = {}
        else:  # whoever made these arrays may write the next site's over them
            update.arrays = tree.map(np.copy, update.arrays)
        updates.append(update)
    return Answers(task, updates, failures, fold)


def read(job: Job, result: Result, like: Arrays) -> Update:
    """Decode and check one answer.

    Raises:
        Refusal: it cannot be counted.
    """
    assert result.payload is not None
    payload = result.payload
    try:
        if payload.arrays and job.upload is not NOTHING:
            payload = job.upload.decode(payload)
    except Exception as error:  # the bytes are a stranger's, and so is what a filter makes of them
        raise Refusal(f"{job.upload.name} cannot decode its answer: {error}") from error
    weight, metrics = numbers(payload.values)
    if payload.kind == "weight_diff" and (wrong := tree.mismatch(payload.arrays, like)):
        raise Refusal(f"it sent {wrong}. Is it running the same model code?")
    if name := tree.finite(payload.arrays):
        raise Refusal(f"its '{name}' holds NaN or infinity. Is the learning rate too high for its data?")
    size = codec.size(result.payload)
    rest = {**payload.values}
    del rest["weight"]
    rest.pop("metrics", None)
    return Update(result.site, payload.arrays, weight, metrics, payload.kind, size, result.seconds, rest)


def numbers(values: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """The weight and the metrics in a site's plain values.

    Raises:
        Refusal: they are no numbers.
    """
    weight, metrics = values.get("weight"), values.get("metrics", {})
    if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight <= 0:
        raise Refusal(f"its weight is {weight!r}: a positive number (of samples) is needed")
    if not isinstance(metrics, Mapping):
        raise Refusal(f"its metrics are a {type(metrics).__name__}: a mapping of names to numbers is needed")
    read = {}
    for key, value in metrics.items():
        if not isinstance(value, (int, float)):
            raise Refusal(f"its metric '{key}' is {value!r}: a number is needed")
        if len(name := str(key)) > NAME:
            raise Refusal(f"its metric '{name[:20]}…' has a name of {len(name):,} characters: at most {NAME} are taken")
        read[name] = float(value)
    return float(weight), read


def averaged(
    mean: Payload, values: Mapping[str, Mapping[str, Any]], *, task: str, aggregator: Aggregator, seconds: float
) -> Answers:
    """Answers of sites that were trained together, of which only the weighted mean was ever written down.

    Args:
        mean: of the updates, with the sum of their weights as its own.
        values: what each site's own answer would say beside its update.
        task: the task's id.
        aggregator: one that needs only the sum: to it, the mean with all the weight is the same as every one.
        seconds: that each site took.
    """
    updates = []
    for site, own in values.items():
        size = codec.size(Payload("weight_diff", mean.arrays, own))
        updates.append(Update(site, {}, *numbers(own), bytes=size, seconds=seconds))
    fold = aggregator.add(aggregator.init(), mean.arrays, float(mean.values["weight"]))
    return Answers(task, updates, fold=fold)


def chunks(sites: Sequence[str], samples: np.ndarray, cohort: int = 1) -> Iterator[Sequence[str]]:
    """The pieces in which a task's sites are worked off, and whose folds are merged in this order.

    They depend on who was asked and on nothing else, so that the bits do not depend on who does the work.

    Args:
        sites: who is asked.
        samples: [sites], what each of them holds.
        cohort: how many are trained at once, of which a piece may hold several; 1 cuts the work into pieces of about
            the same size.

    Yields:
        The sites of each piece, the largest sites first, so that nobody has to wait for a long last one.
    """
    order, number, total = np.argsort(-samples, kind="stable").tolist(), len(sites), float(samples.sum())
    sizes = samples.tolist()
    most, share, held, cuts, beside = LARGEST, total / SHARES, 0.0, [0], 1
    if cohort > 1:
        pieces = -(-number // (cohort * min(COHORTS, max(1, number // (PIECES * cohort)))))
        most = -(-number // pieces)
        share = 2 * total / pieces  # a few that hold much are not left to one worker
        beside = 2  # who holds most takes its many steps anyway, and beside it the next ones' cost little
    for place, index in enumerate(order, start=1):
        held += sizes[index]
        full = held >= max(share, beside * sizes[order[cuts[-1]]])
        if full or place - cuts[-1] == most or place == number:
            cuts, held = [*cuts, place], 0.0
    for start, end in pairwise(cuts):
        yield [sites[index] for index in order[start:end]]
