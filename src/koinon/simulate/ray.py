"""Hands that are actors of a Ray cluster: long-lived, one a core or a share of a GPU, as in CollA.

Each builds the model once.  The weights are put once a round into Ray's object store, and whoever is idle gets the
next chunk.  A node that dies costs its chunks, which run again elsewhere.
"""

from __future__ import annotations

import copy
import math
import os
import platform
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koinon.data import Split
from koinon.errors import JobError, RunError, SettingsError, extra
from koinon.payload import Plain
from koinon.simulate.box import carried
from koinon.simulate.crew import Crew, Gone, Hand
from koinon.simulate.processes import ONE_THREAD, keep_memory
from koinon.simulate.weather import Weather
from koinon.site import Agent, inline
from koinon.task import Job
from koinon.transport import Chunk

PATIENCE = 60.0
"""Seconds that actors may wait for a place on the cluster while nobody else works."""

SAME = "every machine needs the same Python, Ray, Koinon and libraries, and the token of the head (RAY_AUTH_MODE=token)"
"""What hinders those who cannot take part."""

ARRIVED = "arrived"
"""Asked of an actor first, while its chunks have numbers: where it is."""


@dataclass(frozen=True)
class Cluster:
    """Virtual sites on a Ray cluster; see `ray`."""

    address: str | None = None
    workers: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    weather: Weather | None = None
    reproducible: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise SettingsError(f"workers must be 1 or more, not {self.workers}")
        if min(self.cpus, self.gpus) < 0 or self.cpus == self.gpus == 0:
            raise SettingsError(f"a worker needs CPUs or GPUs, not {self.cpus:g} and {self.gpus:g}")
        if any(number > 1 and number % 1 for number in (self.cpus, self.gpus)):
            raise SettingsError(f"a worker has shares of one or a whole number, not {self.cpus:g} and {self.gpus:g}")

    def crew(self, job: Job, split: Split, seed: int) -> Crew:
        """As many actors as the cluster has room for."""
        return Crew(
            Actors(self, job, split, seed), rounds=getattr(job.controller, "rounds", 1), at_once=True, wait=True
        )

    def describe(self) -> dict[str, Plain]:
        """What was asked for, with one thread an actor."""
        asked = {"address": self.address, "workers": self.workers, "cpus": self.cpus, "gpus": self.gpus}
        return {"where": "ray", **asked, "threads": 1}


def ray(
    address: str | None = None,
    *,
    workers: int | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
    weather: Weather | None = None,
    reproducible: bool = False,
) -> Cluster:
    """A Ray cluster for `simulate(…, on=…)`.  Its nodes need the same Python, Koinon and framework.

    If Ray is initialised already, that cluster is used, whatever the address, and left as it was.

    Args:
        address: `auto` for the cluster that this machine belongs to, `HOST:6379` or `ray://HOST:10001`; None for the
            one that RAY_ADDRESS names, as it does in a job that was submitted to Ray, else for one on this machine and
            for this run only.
        workers: actors; by default as many as the cluster has room for.
        cpus: of each actor.
        gpus: of each actor; a share such as 0.25 lets four of them use one.
        weather: what becomes of the sites meanwhile.
        reproducible: to the same bits as a real federation; see `koinon.Here`.

    Raises:
        SettingsError: workers < 1, or CPUs or GPUs that no actor can have.
    """
    return Cluster(address, workers, cpus, gpus, weather, reproducible)


@dataclass
class _Actor:
    """An actor, and what it was asked, by Ray's reference: a chunk's number, ARRIVED, or None for whether it is ready.

    It has a place on the cluster as soon as it has arrived.
    """

    number: int
    remote: Any
    asked: dict[Any, int | str | None]


class Actors:
    """An engine of Ray actors.

    Raises:
        MissingExtra: Ray is not installed.
        RunError: there is no cluster at the address, or it has no room for so many actors.
        JobError: the job holds something that cannot be handed to another machine.
    """

    def __init__(self, cluster: Cluster, job: Job, split: Split, seed: int) -> None:
        self._ray: Any = extra("ray", "ray")
        self._cluster = cluster
        self._need = f"{cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs"
        self._ours = not self._ray.is_initialized()
        if self._ours:
            self._connect()
        self._tasks: dict[str, Any] = {}  # references, by the task's id
        self._actors: list[_Actor] = []
        try:
            self._kind = self._ray.remote(_Worker).options(
                num_cpus=cluster.cpus,
                num_gpus=cluster.gpus,
                scheduling_strategy="SPREAD",
                runtime_env={"env_vars": ONE_THREAD},
            )
            self.size = self._room()
            self._setup = self._put((job.replace(data=None), split.reduce(), seed))
        except BaseException:
            self.close()
            raise

    def start(self) -> Hand:
        """One more actor, wherever there is room."""
        actor = self._actor()
        return Hand(f"Ray actor {actor.number}", actor)

    def give(self, hand: Hand, number: int, chunk: Chunk) -> None:
        """Ask an actor; the weights are in the object store, once for all chunks of their task."""
        if chunk.task.id not in self._tasks:
            recent = list(self._tasks.items())[-2:]  # Ray keeps what is still being used
            self._tasks = {**dict(recent), chunk.task.id: self._put((chunk.task, chunk.aggregator))}
        actor: _Actor = hand.handle
        asked = actor.remote.answer.remote(self._tasks[chunk.task.id], chunk.sites, chunk.states)
        actor.asked[asked] = number

    def hear(self, hands: Sequence[Hand], *, wait: bool) -> list[tuple[Hand, Any]]:
        """What the actors say.

        Raises:
            RunError: an actor cannot begin, or there is no room on the cluster for those that are waited for.
        """
        of = {reference: hand for hand in hands for reference in hand.handle.asked}
        waiting = [hand for hand in hands if ARRIVED in hand.handle.asked.values()]
        done, _ = self._ray.wait(list(of), num_returns=1, timeout=(PATIENCE if waiting else None) if wait else 0)
        if wait and not done and (len(waiting) == len(hands) or not self._tasks):
            raise RunError(
                f"the Ray cluster has had no room for {PATIENCE:g} s for {len(waiting)} of {len(hands)} workers of "
                f"{self._need}: see with `ray status` who has them, or add a node with `ray start --address=HOST:6379`"
            )
        return [(hand, said) for reference in done for hand in [of[reference]] for said in self._said(hand, reference)]

    def close(self) -> None:
        """Leave the cluster as it was found."""
        if self._ours:
            self._ray.shutdown()
            return
        for actor in self._actors:
            self._ray.kill(actor.remote)

    # -- inside ----------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        address = self._cluster.address or os.environ.get("RAY_ADDRESS") or "local"
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            workers = self._cluster.workers
            settings |= {"include_dashboard": False, "num_cpus": workers and math.ceil(workers * self._cluster.cpus)}
        none = f"there is no Ray cluster at '{address}': begin one with `ray start --head`"
        if address not in ("auto", "local"):
            try:
                _reach(address)
            except (OSError, ValueError) as error:
                raise RunError(none) from error
        try:
            self._ray.init(address=address, **settings)
        except (OSError, ValueError, RuntimeError) as error:
            if address == "auto" and isinstance(error, ConnectionError):
                raise RunError(none) from error
            raise RunError(f"the Ray cluster at '{address}' cannot be joined ({_last(error)}): {SAME}") from error

    def _room(self) -> int:
        """How many actors there should be."""
        needs = {"CPU": self._cluster.cpus, "GPU": self._cluster.gpus}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        fit = [min(node.get(kind, 0) / need for kind, need in needs.items() if need) for node in nodes]
        room = sum(int(workers + 1e-9) for workers in fit)  # a third of a GPU fits three times
        if room < (self._cluster.workers or 1):
            raise RunError(
                f"the Ray cluster has room for {room} workers of {self._need}, not for {self._cluster.workers or 1}: "
                f"add a node with `ray start --address=HOST:6379`, or ask for less"
            )
        return self._cluster.workers or room

    def _put(self, value: Any) -> Any:
        """A reference to a value in the object store."""
        for module in carried():  # Ray has a register of its own
            self._ray.cloudpickle.register_pickle_by_value(module)
        try:
            return self._ray.put(value)
        except ImportError as error:  # the process that stands for a client on the cluster reads what it puts
            raise RunError(f"the Ray cluster cannot read this job ({error}): {SAME}") from error
        except (TypeError, AttributeError, ValueError) as error:  # among them pickle's own
            raise JobError(f"this job cannot be handed to a cluster ({error.__cause__ or error}): use on=1") from error

    def _actor(self) -> _Actor:
        remote = self._kind.remote()
        asked = {remote.arrive.remote([str(Path(path).absolute()) for path in sys.path]): ARRIVED}
        actor = _Actor(len(self._actors) + 1, remote, {**asked, remote.begin.remote(self._setup): None})
        self._actors.append(actor)
        return actor

    def _said(self, hand: Hand, reference: Any) -> list[Any]:
        actor: _Actor = hand.handle
        asked = actor.asked.pop(reference)
        try:
            said = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return self._lost(hand, error)
        if asked == ARRIVED:
            hand.name = f"Ray actor {actor.number} at {said}"
            return []
        # What lies in the object store is read-only, and stays there for as long as somebody looks at it.
        return [None if asked is None else (asked, *copy.deepcopy(said))]

    def _lost(self, hand: Hand, error: Exception) -> list[Any]:
        """An actor is dead, or it says what hinders it."""
        with_its_node = "its node has died" in str(error)
        if hand.ready and isinstance(error, self._ray.exceptions.RayTaskError):
            raise error  # Koinon itself failed: whatever a site's code raises is an answer
        if not hand.ready and not with_its_node:
            raise RunError(f"{hand.name} could not begin ({_last(error)}): {SAME}") from error
        self._ray.kill(hand.handle.remote)  # it may be out of reach only
        if not hand.ready:
            hand.handle = self._actor()
            return []
        return [Gone("died with its node" if with_its_node else f"is lost ({type(error).__name__})")]


class _Worker:
    """What an actor does: as a worker process does."""

    def arrive(self, paths: Sequence[str]) -> str:
        """Modules beside the job file are found where this node has them too; the node's name."""
        sys.path.extend(path for path in paths if path not in sys.path)
        return platform.node()

    def begin(self, setup: Any) -> None:
        """Build the model."""
        keep_memory()
        job, (rebuild, arguments), seed = setup
        self._agent = Agent(job, rebuild(*arguments).site, inline(job, threads=1), seed)

    def answer(self, task: Any, sites: Any, states: Any) -> Any:
        """What came of a chunk, and what its sites remember now."""
        work, aggregator = task
        states = copy.deepcopy(states)  # what arrives is read-only
        return self._agent.answer(work, sites, states, aggregator), states


def _reach(address: str) -> None:
    """Fail at once if nobody listens there: Ray would try for half a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
        pass


def _last(error: Exception) -> str:
    """The last line of what Ray says, after its tracebacks."""
    return str(error).strip().rpartition("\n")[2]
