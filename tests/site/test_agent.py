"""A site at work: the executor sees the model and its own data, and only what the filters leave goes out."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

import koinon
from koinon.errors import DataError
from koinon.payload import Payload
from koinon.site import Agent, inline
from koinon.streams import number, stream
from koinon.task import Context, Task

DATA = SimpleNamespace(train="training data", test="held-out data")
MODEL = {"w": np.zeros(3, np.float32), "head": np.ones(2, np.float32), "count": np.array(4)}


@dataclass(frozen=True)
class Answers:
    """An executor that answers every task with `call(payload, context)`, and counts how often it is opened."""

    call: object
    tasks: tuple = ("train", "evaluate")
    opened: tuple = ()

    def open(self):
        self.opened.append(1) if isinstance(self.opened, list) else None
        return self.call

    def initial(self, seed):
        return MODEL


class At:
    """An agent, of which one site is asked."""

    def __init__(self, call, site="north", **parts):
        job = koinon.Job(koinon.FedAvg(1), Answers(call), **parts)
        self.agent, self.site = Agent(job, lambda site: DATA, inline(job), 7), site

    def work(self, task, state):
        states = {self.site: state}
        return self.agent.work(task, self.site, states), states[self.site]


agent = At


def task(name="train", round=1, model=MODEL):
    return Task(f"{round}-{name}", name, round, Payload("weights", model), ("north",))


def plus_one(payload, context):
    arrays = {name: array + 1 for name, array in payload.arrays.items()}
    return Payload("weights", arrays, {"weight": 5, "metrics": {"loss": 0.5}})


def test_what_leaves_is_the_change_of_the_floating_arrays():
    """With the executor's own values beside it; counters stay at home."""
    result, state = agent(plus_one).work(task(), {})
    assert (result.task, result.site, result.failure) == ("1-train", "north", None)
    assert result.payload.kind == "weight_diff"
    assert {name: array.tolist() for name, array in result.payload.arrays.items()} == {"w": [1, 1, 1], "head": [1, 1]}
    assert result.payload.values == {"weight": 5, "metrics": {"loss": 0.5}}
    assert result.seconds > 0
    assert state == {}


def test_a_change_leaves_as_it_is():
    """An executor may answer with the change itself."""
    diff = Payload("weight_diff", {"w": np.full(3, 2.0), "count": np.array(1)}, {"weight": 1})
    result, _ = agent(lambda payload, context: diff).work(task(), {})
    assert list(result.payload.arrays) == ["w"]
    assert result.payload.arrays["w"].tolist() == [2, 2, 2]


def test_metrics_leave_untouched():
    """No filter on updates acts on them."""
    metrics = Payload("metrics", {}, {"weight": 1, "metrics": {}})
    result, state = agent(lambda payload, context: metrics, upload=koinon.exclude("head")).work(task("evaluate"), {})
    assert result.payload is metrics
    assert state == {}


def test_what_is_excluded_stays_and_is_trained_on():
    """The next task, evaluation too, sees the site's own head and the federation's rest."""
    seen = []

    def train(payload, context):
        seen.append({name: array.tolist() for name, array in payload.arrays.items()})
        return plus_one(payload, context)

    north = agent(train, upload=koinon.exclude("head"))
    result, state = north.work(task(), {})
    assert list(result.payload.arrays) == ["w"]
    assert state["kept"]["head"].tolist() == [2, 2]
    north.work(task(round=2, model={**MODEL, "w": MODEL["w"] + 9}), state)
    assert seen[1] == {"w": [9, 9, 9], "head": [2, 2], "count": 4}


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"upload": koinon.exclude("head")},
        {
            "download": koinon.Filter(
                "copies", decode=lambda p: replace(p, arrays={n: a.copy() for n, a in p.arrays.items()})
            )
        },
    ],
    ids=["plain", "kept", "decoded"],
)
def test_the_model_is_read_only(parts):
    """Whoever trained in place would be taken for one who learned nothing, and spoil what the site keeps."""

    def in_place(payload, context):
        payload.arrays["head"][:] = 5
        return payload

    kept = {"kept": {"head": np.full(2, 3, np.float32)}} if "upload" in parts else {}
    result, state = agent(in_place, **parts).work(task(), kept)
    assert "read-only" in result.failure.reason
    assert state == kept
    if kept:
        assert kept["kept"]["head"].tolist() == [3, 3]


def test_the_dict_is_the_executors_own():
    """What it puts there is no part of what the change is taken from, nor of what the next site gets."""

    def own(payload, context):
        payload.arrays["w"] = payload.arrays["w"] + 1
        return replace(payload, values={"weight": 1})

    answers = agent(own).agent.answer(task(), ["north", "south"], {})
    assert [update.arrays["w"].tolist() for update in answers.updates] == [[1, 1, 1], [1, 1, 1]]
    assert MODEL["w"].tolist() == [0, 0, 0]


def counter(first):
    """A filter whose state is a number."""

    def encode(payload, state, random):
        return replace(payload, values={**payload.values, "state": state}), state - 1

    return koinon.Filter("counter", encode=encode, init=lambda: first)


def test_a_filter_remembers_also_nothing_at_all():
    """Zero is a state like any other: it is not begun anew."""
    north, state, seen = agent(plus_one, upload=counter(2)), {}, []
    for round in range(1, 6):
        result, state = north.work(task(round=round), state)
        seen.append(result.payload.values["state"])
    assert seen == [2, 1, 0, -1, -2]


def test_a_filter_may_remember_an_array():
    """Of any size."""
    hoard = koinon.Filter("hoard", encode=lambda p, s, r: (p, s + 1), init=lambda: np.zeros(3))
    north, state = agent(plus_one, upload=hoard), {}
    for _ in range(3):
        _, state = north.work(task(), state)
    assert state["filter"].tolist() == [3, 3, 3]


def test_filters_draw_from_a_stream_of_the_site_and_the_round():
    """Nobody's noise is another's, nor that of another round."""
    noise = koinon.Filter(
        "noise", encode=lambda p, s, at: (replace(p, values={**p.values, "noise": at.random.random()}), s)
    )
    drawn = {
        (site, round): agent(plus_one, site, upload=noise).work(task(round=round), {})[0].payload.values["noise"]
        for site in ("north", "south")
        for round in (1, 2)
    }
    assert drawn == {key: stream(7, "upload", key[1], key[0]).random() for key in drawn}
    assert len(set(drawn.values())) == 4


def test_an_executor_is_told_where_it_is():
    """Task, site, round, data, and streams that are its own."""
    seen = []

    def look(payload, context):
        seen.append(context)
        return plus_one(payload, context)

    agent(look).work(task(round=3), {})
    (context,) = seen
    assert context == Context("train", "north", 3, DATA, 7)
    assert context.stream("x").random() == stream(7, "x", 3, "north").random()
    assert context.number("x") == number(7, "x", 3, "north")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError("too hot"), "ValueError: too hot"), (DataError("no data here"), "no data here")],
    ids=str,
)
def test_whatever_an_executor_raises_becomes_a_failure(error, reason):
    """One line, the traceback behind it, and the state as it was."""

    def broken(payload, context):
        raise error

    before = {"kept": {"head": np.ones(2)}}
    result, after = agent(broken).work(task(), before)
    assert result.payload is None
    assert result.failure.reason == reason
    assert "in broken" in result.failure.traceback
    assert after is before


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_wants_to_stop_is_not_held_up(error):
    """Ctrl-C in a training ends the run, and is no failure of the site."""

    def stopped(payload, context):
        raise error

    with pytest.raises(error):
        agent(stopped).work(task(), {})


def test_an_executor_is_opened_once():
    """However many sites and tasks it serves."""
    opened = []
    job = koinon.Job(koinon.FedAvg(1), Answers(plus_one, opened=opened))
    workers = inline(job)
    for site in ("north", "south"):
        for name in ("train", "evaluate"):
            Agent(job, lambda site: DATA, workers, 7).work(task(name), site, {})
    assert opened == [1]


def test_a_task_that_nobody_answers_is_refused_by_its_name():
    """Also at the site."""
    result, _ = agent(plus_one).work(task("dance"), {})
    assert result.failure.reason == "no executor of this job answers the task 'dance'"
