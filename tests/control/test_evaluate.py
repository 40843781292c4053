"""A trained model judged at every site, and what sites prepare before the first round."""

import numpy as np
import pytest

import koinon
from koinon.control import Evaluate
from koinon.errors import JobError, SettingsError

X = {"site-1": np.full((2, 1), 3.0), "site-2": np.full((4, 1), 5.0), "site-3": np.full((3, 1), -1.0)}


def held(*testers):
    parts = {site: (x, np.zeros(len(x))) for site, x in X.items()}
    return koinon.data.sites({s: {"train": p, "test": p} if s in testers else p for s, p in parts.items()})


@koinon.task("evaluate")
def evaluate(model, data, context):
    return len(data), {"loss": float(np.mean((data.x - model["w"]) ** 2))}


@koinon.task("prepare")
def prepare(model, data, context):
    context.state["times"] = context.state.get("times", 0) + 1
    context.state["scale"] = np.abs(data.x).mean(0) * model["w"]
    return len(data), {}


@koinon.task("train")
def train(model, data, context):
    scale = context.state["scale"]
    return {"w": model["w"] + scale}, 1, {"times": context.state["times"]}


def test_a_model_is_judged_where_there_are_held_out_data(tmp_path):
    """One round, no training, the model as it came; each evaluator's metrics, and the mean weighted by samples."""
    model = {"w": np.array([2.0])}
    job = koinon.Job(Evaluate(), evaluate, model=model, data=held("site-1", "site-2"), score="loss")
    run = koinon.simulate(job, out=tmp_path / "run", sinks=[])
    assert run.model()["w"].tolist() == [2.0]
    assert [row.value for row in run.series("loss")] == [(2 * 1 + 4 * 9) / 6]
    assert {row.site: row.value for row in run.rows if row.name == "loss" and row.site.startswith("site")} == {
        "site-1": 1.0,
        "site-2": 9.0,
    }


def test_nobody_to_judge_is_said(tmp_path):
    """Not an empty table; and no rounds are none."""
    job = koinon.Job(Evaluate(), evaluate, model={"w": np.zeros(1)}, data=held())
    with pytest.raises(JobError, match="nobody holds held-out data"):
        koinon.simulate(job, out=tmp_path / "run", sinks=[])
    with pytest.raises(SettingsError, match="rounds must be 1 or more, not 0"):
        Evaluate(rounds=0)
    with pytest.raises(JobError, match="Evaluate asks for 'evaluate'"):
        koinon.Job(Evaluate(), train, model={"w": np.zeros(1)})


@pytest.mark.parametrize("on", [1, 2])
def test_sites_prepare_once_before_the_first_round(tmp_path, on):
    """With the first model, whatever the controller; what they remember outlives a resume."""
    job = koinon.Job(koinon.FedAvg(rounds=2), prepare, train, model={"w": np.ones(1)}, data=held())
    run = koinon.simulate(job, on=on, out=tmp_path / "run", sinks=[])
    assert run.model()["w"].tolist() == [1 + 2 * 3.0]  # the mean of 3, 5 and 1, twice
    run = koinon.simulate(job.with_rounds(3), on=on, out=tmp_path / "run", resume=True, sinks=[])
    assert run.model()["w"].tolist() == [1 + 3 * 3.0]
    assert {row.value for row in run.rows if row.name == "train_times"} == {1.0}
