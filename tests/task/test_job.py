"""The life of a job, and a job as plain values."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

import koinon
from koinon.errors import JobError
from koinon.task import describe, move

MAY = {
    ("submitted", "running"), ("submitted", "stopped"),
    ("running", "finished"), ("running", "failed"), ("running", "stopped"),
    ("stopped", "running"), ("failed", "running"), ("finished", "running"),
}  # fmt: skip
STATES = ("submitted", "running", "finished", "failed", "stopped")


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATES, STATES)))
def test_a_job_goes_only_where_it_may(before, after):
    """A table of all pairs of states."""
    if (before, after) in MAY:
        assert move(before, after) == after
    else:
        with pytest.raises(JobError, match=f"{before} cannot become {after}"):
            move(before, after)


@dataclass(frozen=True)
class Turns:
    """A controller without rounds."""

    asks = ("dance",)

    def run(self, federation, model):
        return model


@koinon.task("train")
def train(model, data, context):
    return model, 1, {}


def test_a_controllers_tasks_must_be_answered():
    """A job whose sites could not do what will be asked is not built, and the nearest task is named."""
    with pytest.raises(JobError, match="Turns asks for 'dance', which no executor answers: known are train"):
        koinon.Job(Turns(), train)


def test_rounds_cannot_be_set_where_there_are_none():
    """The controller is named."""
    with pytest.raises(JobError, match="Turns has no rounds"):
        koinon.Job(Turns(), koinon.task("dance")(lambda *_: None)).with_rounds(3)


def test_fast_is_one_round_of_a_few_batches():
    """Executors that know no batches are left as they are."""
    regression = koinon.numpy.SoftmaxRegression(features=1, classes=2)
    fast = koinon.Job(koinon.FedAvg(rounds=9), regression).fast()
    assert (fast.controller.rounds, fast.executors[0].max_batches) == (1, 2)
    assert koinon.Job(koinon.FedAvg(rounds=9), train).fast().executors == (train,)


def test_a_first_model_of_lists_becomes_arrays():
    """And the job's own comes before an executor's."""
    model = koinon.Job(koinon.FedAvg(rounds=1), train, model={"w": [1.0, 2.0]}).first_model(0)
    assert model["w"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (koinon.mean(), "mean"),
        (koinon.sgd(0.5), "sgd(0.5)"),
        (np.zeros((2, 3), np.float32), "array of shape (2, 3), float32"),
        ((1, None, "x"), [1, None, "x"]),
        ({1: train.function}, {"1": "train"}),
        (Turns(), {"type": "Turns"}),
        (object, "object"),
        (object(), "object"),
    ],
)
def test_settings_are_recorded_as_plain_values(value, plain):
    """By their fields, or by a name that says their settings."""
    assert describe(value) == plain
