"""What a relay makes of its group's answers, and what it leaves when nobody waits any more."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import koinon
from koinon.errors import FilterMismatch, JobError, QuorumNotReached
from koinon.payload import Payload, codec
from koinon.server import group
from koinon.task import Failure, Result, Task
from koinon.transport.remote import Remote

W = {"w": np.zeros(2)}


@koinon.task("train")
def train(model, data, context):
    """Never called: the sites are elsewhere."""


def job(controller: Any = None, **more: Any) -> koinon.Job:
    return koinon.Job(controller or koinon.FedAvg(rounds=1), train, model=W, **more)


def sent(value: float, weight: float, kind: str = "weight_diff", **more: Any) -> Payload:
    values = {"weight": weight, "metrics": {"loss": value}, **more}
    return Payload(kind, {"w": np.full(2, value)} if kind == "weight_diff" else {}, values)


class Sites:
    """In Remote's place: each answers what the test says, in this order."""

    def __init__(self, answers: dict[str, Payload | Failure]) -> None:
        self.answers, self.evaluators = answers, ["a"]
        self.held = {"a": {"train": 3, "test": 2}, "b": {"train": math.nan, "test": -1}, "c": {"train": "many"}}

    def join(self, sites: Any, quorum: float) -> None: ...

    def now(self) -> float:
        return 0.0

    def wait(self, board: Any, task: Task, aggregator: Any) -> None:
        for site in task.sites:
            said = self.answers[site]
            failure, payload = (said, None) if isinstance(said, Failure) else (None, said)
            assert board.answer(Result(task.id, site, payload, failure), 0.0) == "accepted"


def folded(answers: dict[str, Payload | Failure], name: str = "train", **more: Any) -> Payload:
    here = group.Group(job(**more), list(answers), Sites(answers))
    return here.work(Task("1.1", name, 1, Payload("weights", W), ("west",)), Payload("weights", W), None)


def test_the_mean_of_a_group_bears_all_its_weight():
    """Of updates and metrics; whoever failed is left out as long as the quorum holds."""
    update = folded({"a": sent(1.0, 1), "b": sent(5.0, 3), "c": Failure("no")})
    assert (update.kind, update.arrays["w"].tolist()) == ("weight_diff", [4.0, 4.0])
    assert update.values == {"weight": 4.0, "metrics": {"loss": 4.0}}


def test_only_who_can_judge_is_asked_to():
    """And their metrics are folded."""
    judged = folded({"a": sent(1.0, 2, "metrics"), "b": Failure("it was not to be asked")}, "evaluate", quorum=1.0)
    assert (judged.kind, judged.values) == ("metrics", {"weight": 2.0, "metrics": {"loss": 1.0}})


@pytest.mark.parametrize(
    ("answers", "error", "wrong"),
    [
        ({"a": sent(1.0, 1, histogram=[1, 2])}, JobError, "can only fold updates and metrics: 'a' sent 'histogram'"),
        ({"a": sent(1.0, 1, "statistics")}, JobError, "'a' sent statistics"),
        ({"a": sent(1.0, 1), "b": sent(1.0, 1, "metrics")}, JobError, "with metrics and weight_diff"),
        ({"a": sent(1.0, 1), "b": Failure("no", "trace")}, QuorumNotReached, "1 of 2 sites .* 2 are needed\n  'b': no"),
        ({"a": sent(math.nan, 1)}, QuorumNotReached, "'a': its 'w' holds NaN"),
    ],
)
def test_what_has_no_mean_is_refused(answers: dict[str, Payload | Failure], error: type[Exception], wrong: str):
    """By the site's name, or with each site's reason."""
    with pytest.raises(error, match=wrong):
        folded(answers, quorum=1.0)


def test_a_group_holds_what_its_sites_say_that_they_hold():
    """What is no number of samples counts for nothing."""
    held = group.Group(job(), ["a", "b", "c"], Sites({})).held
    assert (len(held.train), len(held.test)) == (3, 2)


@pytest.mark.parametrize(
    ("controller", "more", "wrong"),
    [
        (koinon.FedAvg(1, aggregator=koinon.coordinate_median()), {}, "coordinate_median needs each site's own"),
        (koinon.FedAvg(1, aggregator=koinon.mean(weighted=False)), {}, r"mean\(weighted=False\) needs each"),
        (koinon.Cyclic(1), {}, "Cyclic needs each"),
        (None, {"upload": koinon.Filter("masks", shows="sum")}, "masks hides updates"),
    ],
)
def test_which_jobs_a_relay_refuses(controller: Any, more: dict[str, Any], wrong: str):
    """What needs each update, and what hides them from whoever folds; but not a rule and a filter that do neither."""
    with pytest.raises(FilterMismatch, match=wrong):
        group.foldable(job(controller, **more))
    group.foldable(job(koinon.Scaffold(1), upload=koinon.clip(1.0)))


class Relay:
    """The process next door, as a job's process hears it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said, self._heard = folder, queue.SimpleQueue(), queue.SimpleQueue()
        self.tell: Callable[[dict[str, Any]], None] = self._heard.put
        self.line = group.Line(SimpleNamespace(say=lambda **said: self.said.put(said), hear=self._hear))
        (folder / "sites.json").write_text('{"a": {"train": 1}, "b": {"train": 1}}')  # they were asked before
        self.group = group.Group(job(), ["a", "b"], Remote(self.line, folder))

    def _hear(self):
        while True:
            yield self._heard.get()

    def ask(self, desk: str) -> threading.Thread:
        """A task of the server's, at that desk."""
        (self.folder / desk).mkdir()
        codec.save(Payload("weights", W), self.folder / "payload")
        places = {name: str(self.folder / desk / name) for name in ("answer", "state")}
        task = {"id": "1.1-train-x", "name": "train", "round": 1}
        message = {"task": task, "payload": str(self.folder / "payload"), "site": "west", "home": str(self.folder)}
        self.tell(message | places)
        assert self.line.tasks.get(timeout=30) == message | places
        thread = threading.Thread(target=group._answer, args=(self.line, self.group, message | places, 0), daemon=True)
        thread.start()
        return thread

    def heard(self, what: str) -> Any:
        """What is said next, which must be this."""
        said = self.said.get(timeout=30)
        assert what in said, said
        return said[what]

    def closed(self) -> None:
        """The task is closed, and that is said."""
        self.tell({"closed": self.heard("close")})

    def answered(self) -> None:
        """Both sites answer the task that is posted."""
        task = self.heard("post")["id"]
        for site, value in (("b", 3.0), ("a", 1.0)):
            codec.save(sent(value, 1), path := self.folder / site)
            told = {"path": str(path), "seconds": 0.0, "failed": False, "at": time.time()}
            self.tell({"result": task, "site": site, **told})


def test_a_task_that_nobody_waits_for_is_left(tmp_path: Path):
    """The group is told at once; asked again, the task is done as if it were new."""
    relay = Relay(tmp_path)
    thread = relay.ask("first")
    assert relay.heard("post")["sites"] == ["a", "b"]
    relay.tell({"drop": str(tmp_path / "first" / "answer")})
    relay.closed()
    thread.join(30)
    assert not thread.is_alive() and relay.said.empty() and not (tmp_path / "first" / "answer").exists()
    relay.ask("second")
    relay.answered()
    assert relay.heard("done") == "1.1-train-x"
    assert codec.load(tmp_path / "second" / "answer").arrays["w"].tolist() == [2.0, 2.0]


def test_a_task_that_was_done_when_it_was_dropped_does_not_take_the_next_along(tmp_path: Path):
    """That one goes on."""
    relay = Relay(tmp_path)
    relay.ask("second")
    relay.heard("post")
    relay.tell({"drop": str(tmp_path / "first" / "answer")})
    relay.closed()
    relay.answered()
    assert relay.heard("done") == "1.1-train-x"


def test_the_jobs_end_ends_the_task_at_hand(tmp_path: Path):
    """And whatever would come after it."""
    relay, ended = Relay(tmp_path), queue.SimpleQueue()
    threading.excepthook, before = lambda said: ended.put(said.exc_type), threading.excepthook
    try:
        thread = relay.ask("first")
        relay.heard("post")
        relay.tell({"stop": True})
        thread.join(30)
    finally:
        threading.excepthook = before
    assert ended.get(timeout=1) is group.Stopped and relay.line.tasks.get(timeout=30) is None
