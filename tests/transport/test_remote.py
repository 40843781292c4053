"""The controller's end of a real federation: what it is told of, in any order, becomes the bits of a simulation."""

import json
import queue
import time
from types import SimpleNamespace

import numpy as np
import pytest

import koinon
from koinon.control import Federation, Sites
from koinon.errors import QuorumNotReached
from koinon.payload import Payload, codec
from koinon.site import Agent, inline
from koinon.task import Board, Task
from koinon.tracking import Folder, Tracker
from koinon.transport.remote import Remote, Stopped

SITES = ("a", "b", "c", "d")


class Line:
    """The process next door, with sites that answer in the order of `arrival`, some of them never."""

    def __init__(self, folder, answer=None, arrival=SITES):
        self.folder, self.answer, self.arrival = folder, answer, arrival
        self.said, self.queue = [], queue.Queue()

    def say(self, **message):
        self.said.append(message)
        if "close" in message:
            self.queue.put({"closed": message["close"]})
        if (post := message.get("post")) and self.answer:
            for site in self.arrival:
                if site in post["sites"]:
                    self.queue.put(self.result(post, site))

    def hear(self):
        while True:
            yield self.queue.get()

    def result(self, post, site):
        path = self.folder / f"{post['id']}-{site}"
        payload = self.answer(post, site)
        if isinstance(payload, str):
            path.write_text(payload)
        else:
            codec.save(payload, path)
        failed = isinstance(payload, str)
        return {
            "result": post["id"],
            "site": site,
            "path": str(path),
            "seconds": 1.0,
            "failed": failed,
            "at": time.time(),
        }


def metrics(**values):
    return Payload("metrics", {}, {"weight": 1, "metrics": values})


def failure(reason="no data"):
    return json.dumps({"reason": reason, "traceback": "where"})


@pytest.fixture
def posted(tmp_path):
    """A remote transport with one task on its board, and what the sites answer."""

    def make(answer=lambda post, site: metrics(), arrival=SITES, silent=(), **task):
        line = Line(tmp_path, answer, arrival)
        remote, board = Remote(line, tmp_path, limit=task.pop("limit", 1e9)), Board()
        if silent:
            line.queue.put({"silent": list(silent)})
        board.post(Task("1.1-train", "train", 1, Payload("weights", {}), SITES, **task))
        return SimpleNamespace(line=line, remote=remote, board=board, task=board.tasks["1.1-train"])

    return make


def everything(at, aggregator=None):
    """What is delivered until the task is over, and who failed of what."""
    order = []
    while not at.board.progress(at.task.id, at.remote.now()).over:
        at.remote.wait(at.board, at.task, aggregator)
        while result := at.board.take(at.task.id):
            order.append(result.site)
    return order, {site: failure.reason for site, failure in at.board.close(at.task.id).items()}


@pytest.mark.parametrize(
    ("fold", "order"), [(True, ["a", "b", "c", "d"]), (False, ["d", "b", "a", "c"])], ids=["folded", "streamed"]
)
def test_a_fold_is_in_the_order_of_the_sites_and_a_stream_in_that_of_arrival(posted, fold, order):
    at = posted(arrival=("d", "b", "a", "c"))
    assert everything(at, koinon.mean() if fold else None) == (order, {})


def test_a_failure_is_named_and_the_rest_goes_on(posted):
    at = posted(lambda post, site: failure() if site == "b" else metrics(), arrival=("d", "b", "a", "c"))
    assert everything(at, koinon.mean()) == (["a", "c", "d"], {"b": "no data"})


def test_what_cannot_be_read_is_a_failure_of_its_site(posted):
    at = posted(lambda post, site: "{}" if site == "a" else metrics())
    order, why = everything(at)
    assert order == ["b", "c", "d"] and "cannot be read" in why["a"]


def test_what_is_far_too_large_is_not_read(posted, monkeypatch):
    monkeypatch.setattr("koinon.transport.remote._Open.limit", 100)
    monkeypatch.setattr("koinon.transport.remote.LEAST", 100)
    at = posted(lambda post, site: metrics(**{"long" * 4000: 1}) if site == "a" else metrics())
    order, why = everything(at)
    assert order == ["b", "c", "d"] and "over the limit" in why["a"]


def test_the_silent_do_not_hold_up_a_round_whose_quorum_has_answered(posted):
    at = posted(arrival=("d", "b"), silent=("a", "c"), quorum=2)
    order, why = everything(at, koinon.mean())
    assert order == ["b", "d"] and set(why) == {"a", "c"} and "silent" in why["a"]


def test_without_a_quorum_the_silent_are_waited_for(posted):
    at = posted(arrival=("d",), silent=("a", "c"), quorum=2)
    at.remote.wait(at.board, at.task)  # d's
    at.line.queue.put(at.line.result({"id": at.task.id}, "a"))
    at.line.queue.put({"silent": ["b", "c"]})
    order, why = everything(at)
    assert order == ["d", "a"] and set(why) == {"b", "c"}


@pytest.mark.parametrize("how", ["limit", "deadline"])
def test_a_round_ends_in_time_with_who_has_answered(posted, how):
    soon = {"limit": 0.2} if how == "limit" else {"deadline": time.time() + 0.2}
    at = posted(arrival=("d", "b"), **soon)
    order, why = everything(at, koinon.mean())
    assert order == ["b", "d"] and set(why) <= {"a", "c"}


def test_who_was_in_time_counts_even_if_it_is_read_after_the_deadline(posted):
    at = posted(arrival=("c", "a"), deadline=time.time() + 0.3)
    at.remote.wait(at.board, at.task)  # c's: a's has arrived by now
    time.sleep(0.4)
    assert everything(at)[0] == ["c", "a"] or at.board


def test_told_twice_is_told_once(posted):
    at = posted(arrival=("a", "a", "b", "c", "b", "d"))
    assert everything(at) == (["a", "b", "c", "d"], {})


def test_a_closed_task_is_closed_at_the_sites_too(posted):
    at = posted()
    everything(at)
    at.board.post(Task("1.2-train", "train", 1, Payload("weights", {}), SITES))
    at.remote.wait(at.board)
    assert {"close": "1.1-train"} in at.line.said


def test_it_stops_on_demand(posted):
    at = posted(arrival=())
    at.line.queue.put({"stop": True})
    with pytest.raises(Stopped):
        at.remote.wait(at.board)


def test_sites_say_what_they_hold_and_are_asked_once(tmp_path):
    line = Line(tmp_path, lambda post, site: metrics(train=10, test=int(site != "b")), arrival="dcba")
    remote = Remote(line, tmp_path)
    remote.join(SITES, 1.0)
    assert remote.evaluators == ["a", "c", "d"]
    assert remote.samples(["a", "x"])[0] == 10 and np.isnan(remote.samples(["x"])[0])
    again = Remote(silent := Line(tmp_path), tmp_path)
    again.join(SITES, 1.0)
    assert again.evaluators == ["a", "c", "d"] and not silent.said


def test_too_few_can_take_part(tmp_path):
    line = Line(tmp_path, lambda post, site: failure("no file 'train'") if site in "ab" else metrics(train=1, test=0))
    with pytest.raises(QuorumNotReached, match=r"2 of 4 sites cannot take part, 3 are needed\n  'a': no file 'train'"):
        Remote(line, tmp_path).join(SITES, 0.75)


# -- the whole path, but for the network ----------------------------------------------------------------------


@koinon.task("train")
def train(model, data, context):
    """Least squares, with noise of the site's own."""
    x = data["x"]
    error = x @ model["w"] - data["y"]
    noise = context.stream("noise").normal(size=3).astype(np.float32)
    return {"w": model["w"] - 0.1 * x.T @ error / len(x) + 0.01 * noise}, len(x), {"loss": float(error @ error)}


@koinon.task("evaluate")
def evaluate(model, data, context):
    return len(data), {"loss": float(np.square(data["x"] @ model["w"] - data["y"]).mean())}


@pytest.fixture
def job():
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 3)).astype(np.float32)
    parts = {site: x[15 * place : 15 * place + 15] for place, site in enumerate(SITES)}
    executors, data = (train, evaluate), koinon.data.sites({site: (part, part.sum(1)) for site, part in parts.items()})
    return koinon.Job(koinon.FedAvg(3), *executors, model={"w": np.zeros(3, np.float32)}, data=data)


def test_the_bits_are_those_of_a_reproducible_simulation(job, tmp_path):
    agent, states = Agent(job, job.data.site, inline(job), 7), {}

    def answer(post, site):
        task = Task(post["id"], post["name"], post["round"], codec.load(tmp_path / f"{post['id']}.payload"), SITES)
        return agent.work(task, site, states).payload

    line = Line(tmp_path, answer, arrival="dbca")
    folder = Folder.create(tmp_path / "run", {"rounds": 3, "settings": {}})
    remote, tracker = Remote(line, tmp_path), Tracker(folder)
    federation = Federation(job, Sites(SITES, []), transport=remote, store=folder, tracker=tracker, seed=7)
    here = job.controller.run(federation, dict(job.model))
    for on in (koinon.Here(1, reproducible=True), koinon.Here(2, reproducible=True, wait=True)):
        run = koinon.simulate(job, seed=7, out=tmp_path / f"there-{on.workers}", sinks=[], on=on)
        assert run.model()["w"].tobytes() == here["w"].tobytes()
    assert {"committed": 3} in line.said
