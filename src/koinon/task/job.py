"""A job: what is submitted.  Its parts are checked against each other when it is built; it has a state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np

from koinon.aggregate import Aggregator, Optimizer, any_number
from koinon.errors import FilterMismatch, JobError, SettingsError, nearest
from koinon.filters import Crossing, Filter, chain
from koinon.payload import Arrays, Payload, Plain
from koinon.streams import number, stream


@dataclass
class Context:
    """What an executor is told besides the payload: who and where it is, and what it may touch.

    Args:
        task: the task's name.
        site: this site's name.
        round: the controller's round.
        data: the site's data: `data.train` and `data.test`, each a Dataset or None.
        seed: the run's.
        state: what this executor remembers at this site, from task to task: arrays and plain values by name.
    """

    task: str
    site: str
    round: int
    data: Any
    seed: int
    state: dict[str, Any] = field(default_factory=dict)

    def stream(self, purpose: str) -> np.random.Generator:
        """A random stream of this site, round and purpose."""
        return stream(self.seed, purpose, self.round, self.site)

    def number(self, purpose: str) -> int:
        """An integer of 63 bits from the same key, to seed a library with."""
        return number(self.seed, purpose, self.round, self.site)


@runtime_checkable
class Selects(Protocol):
    """What says which sites take part (koinon.Sampler)."""

    select: Any


CONTROLLER: dict[str, tuple[type, str]] = {
    "rounds": (int, "a whole number"),
    "aggregator": (Aggregator, "an aggregator such as koinon.mean()"),
    "optimizer": (Optimizer, "an optimizer such as koinon.sgd(1.0)"),
    "sampler": (Selects, "a sampler such as koinon.fraction(.1)"),
}
JOB = dict.fromkeys(
    ("upload", "download"), (Filter, "a filter such as koinon.clip(1.0), or a koinon.chain(…) of several")
)
"""What parts must be, if they are there."""

Worker: TypeAlias = Callable[[Payload, Context], Payload]
"""An opened executor: (payload, context) -> payload."""


class Executor(Protocol):
    """What answers tasks at a site.

    `open` is called once a worker, which then answers any number of tasks of any number of sites: what is
    expensive to build belongs there.
    """

    @property
    def tasks(self) -> Collection[str]:
        """The names of the tasks that it answers."""

    def open(self) -> Worker:
        """Build what is expensive, once."""

    def initial(self, seed: int) -> Arrays | None:
        """The first global model, or None if this executor has none to offer."""


class Controller(Protocol):
    """What happens in which order, on the server.

    What it says of itself refuses a job early that could only fail later: `asks`, the names of the tasks that it will
    ask for; `needs`, if that is "each": no filter may show the server only the sum of the updates; `partner`, what
    sites must train with, as (name, how to write it); and a method `fits(sites)`, which raises SettingsError.
    """

    def run(self, fed: Any, model: Arrays) -> Arrays:
        """From the first global model to the last."""


@dataclass(frozen=True, init=False, eq=False)
class Job:
    """A controller, the executors that answer its tasks, and the filters on every crossing.

    Args:
        controller: such as `koinon.FedAvg(rounds=10)`.
        executors: such as `koinon.torch.LocalSGD(…)` or functions marked with `@koinon.task`.
        model: the first global model as named arrays; by default an executor's own.
        data: what a simulation deals out to virtual sites (a `koinon.data` split or source).
        upload: the filter on what sites send.
        download: the filter on what the server sends.
        quorum: the share of the asked sites whose answers are enough, in (0, 1].
        score: the metric that picks the best model; the lower wins for `loss` and `…_loss`.

    Raises:
        JobError: the parts do not fit together: FilterMismatch for a rule that needs to see what a filter hides.
        SettingsError: quorum is outside (0, 1].
    """

    controller: Controller
    executors: tuple[Executor, ...]
    model: Arrays | None
    data: Any
    upload: Filter
    download: Filter
    quorum: float
    score: str

    def __init__(
        self,
        controller: Controller,
        *executors: Executor,
        model: Arrays | None = None,
        data: Any = None,
        upload: Filter | None = None,
        download: Filter | None = None,
        quorum: float = 0.5,
        score: str = "accuracy",
    ) -> None:
        vars(self).update(controller=controller, executors=executors, model=model, data=data)
        vars(self).update(upload=upload or chain(), download=download or chain(), quorum=quorum, score=score)
        self._check()

    def _check(self) -> None:
        """Refuse what could only fail later."""
        for owner, parts in ((self.controller, CONTROLLER), (self, JOB)):
            for name, (kind, words) in parts.items():
                if not isinstance(part := getattr(owner, name, None), (kind, type(None))):
                    call = f": write koinon.{part.__name__}(…)" if callable(part) else f" where {words} is needed"
                    raise JobError(f"{type(owner).__name__}: {name}= is a {type(part).__name__}{call}")
        if not self.executors:
            raise JobError("a Job needs an executor: koinon.torch.LocalSGD(…) or a function marked @koinon.task")
        for executor in self.executors:
            if isinstance(executor, type) or not hasattr(executor, "open"):
                raise JobError(f"{executor!r} is no executor: mark a function with @koinon.task('train')")
        named = [name for executor in self.executors for name in executor.tasks]
        for name in named:
            if named.count(name) > 1:
                raise JobError(f"two executors answer the task '{name}': leave one out")
        for name in getattr(self.controller, "asks", ()):
            if name not in named:
                known = nearest(name, named)
                raise JobError(
                    f"{type(self.controller).__name__} asks for '{name}', which no executor answers: {known}"
                )
        partner, how = getattr(self.controller, "partner", ("", ""))
        for executor in (one for one in self.executors if hasattr(one, "terms") and "train" in one.tasks):
            used = [*(term.name for term in executor.terms), type(getattr(executor, "epochs", 1)).__name__]
            if partner and partner not in used:
                raise JobError(f"{type(self.controller).__name__} is for sites that train with {how}: these do not")
        if not 0 < self.quorum <= 1:
            raise SettingsError(f"quorum is a share of the sites in (0, 1], not {self.quorum}")
        if self.download.shows == "sum":
            raise FilterMismatch(f"{self.download.name} hides single updates: it belongs in upload=, not in download=")
        if (each := self.need_each) and self.upload.shows == "sum":
            raise FilterMismatch(
                f"{each[0]} needs each site's own update, but {self.upload.name} lets the server see only "
                f"their sum. Use mean() in FedAvg, or leave {self.upload.name} out of upload=."
            )

    @property
    def need_each(self) -> list[str]:
        """What of this job needs to see each site's own update, by name."""
        rules = [rule.name for rule in self._aggregators() if rule.needs == "each"]
        whole = getattr(self.controller, "needs", "sum") == "each"
        return [*rules, type(self.controller).__name__] if whole else rules

    def _aggregators(self) -> list[Aggregator]:
        values = vars(self.controller).values() if hasattr(self.controller, "__dict__") else ()
        return [value for value in values if isinstance(value, Aggregator)]

    def fits(self, sites: Sequence[str]) -> None:
        """Refuse what cannot work with so many sites, were all that are asked to answer.

        Raises:
            SettingsError: with the admissible range.
        """
        if hasattr(self.controller, "fits"):
            self.controller.fits(sites)
        enough = getattr(self.controller, "enough", None)
        checks = [rule.check for rule in self._aggregators() if rule.check is not any_number]
        if not checks and not enough:
            return
        select = getattr(getattr(self.controller, "sampler", None), "select", None)
        asked = len(select(sites, stream(0, "fits")) if select else sites)
        if enough and enough > asked:
            raise SettingsError(f"enough must lie in 1 … {asked}, the sites that are asked, not {enough}")
        for check in checks:
            check(enough or asked)

    @cached_property
    def answers(self) -> dict[str, Executor]:
        """Each task's name, and the executor that answers it."""
        return {name: executor for executor in self.executors for name in executor.tasks}

    def replace(self, **changes: Any) -> Job:
        """The same job with other parts, checked again."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__} | changes
        return Job(parts.pop("controller"), *parts.pop("executors"), **parts)

    def with_rounds(self, rounds: int) -> Job:
        """The same job with another number of rounds.

        Raises:
            JobError: its controller has no rounds.
        """
        if not hasattr(self.controller, "rounds"):
            raise JobError(f"{type(self.controller).__name__} has no rounds to set")
        return self.replace(controller=dataclasses.replace(cast(Any, self.controller), rounds=rounds))

    def fast(self) -> Job:
        """One round of a few batches, to see that everything fits together."""
        short = [
            dataclasses.replace(cast(Any, executor), max_batches=2) if hasattr(executor, "max_batches") else executor
            for executor in self.executors
        ]
        return self.replace(executors=tuple(short)).with_rounds(1)

    def first_model(self, seed: int) -> Arrays:
        """The first global model: the job's own, or the first that an executor offers.

        Raises:
            JobError: there is none, or a filter cannot work on it.
        """
        offers = (executor.initial(seed) for executor in self.executors)
        model = self.model if self.model is not None else next((offer for offer in offers if offer is not None), None)
        if model is None:
            raise JobError("this job has no first model: give Job(model={'name': array, …})")
        model = {name: np.asarray(array) for name, array in model.items()}
        self.upload.check(model)
        self.download.check(model)
        self.download.encode(Payload("weights", model), self.download.init(), Crossing(stream(0, "check"), model))
        return model

    def describe(self) -> dict[str, Plain]:
        """Every setting as plain values, for the record of a run."""
        return {
            "controller": describe(self.controller),
            "executors": [describe(executor) for executor in self.executors],
            "upload": self.upload.name,
            "download": self.download.name,
            "quorum": self.quorum,
            "score": self.score,
        }


def describe(value: Any) -> Plain:
    """Any setting as plain values: frozen objects by their fields, functions and classes by name.

    >>> describe({"rate": 0.1, "rule": len})
    {'rate': 0.1, 'rule': 'len'}
    """
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(entry) for entry in value]
    if isinstance(value, np.ndarray):
        return f"array of shape {value.shape}, {value.dtype}"
    if isinstance(getattr(value, "name", None), str):
        return str(value.name)  # an aggregator, an optimizer, a sampler: its name says its settings
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    return str(getattr(value, "__qualname__", type(value).__name__))
