"""The job that `chaos.py` torments: every answer depends on all before it, so that one lost or counted twice shows."""

import time

import numpy as np

import koinon

SIZE = 50_000


@koinon.task("train")
def train(model, data, context):
    """Walk a random step, with a momentum that the site remembers, and count the tasks."""
    time.sleep(context.stream("pause").uniform(0, 0.1))
    state = context.state if remembers else {"velocity": 0.1 * model["w"], "tasks": context.round - 1}
    velocity = 0.5 * state.get("velocity", np.zeros(SIZE)) + context.stream("step").normal(size=SIZE)
    state.update(velocity=velocity, tasks=state.get("tasks", 0) + 1)
    metrics = {"tasks": state["tasks"], "loss": float(np.square(model["w"]).mean())}
    return {"w": model["w"] + velocity}, 1 + len(data), metrics


def job(sites: int = 3, rounds: int = 30, memory: bool = True) -> koinon.Job:
    """Without memory where a site is there twice: of two, one may miss a round, and so has another memory."""
    global remembers
    remembers = memory
    rows = np.arange(6 * sites, dtype=np.float32).reshape(-1, 1)
    data = koinon.data.arrays(rows, rows[:, 0], test=None).split(koinon.iid(), sites=sites)
    return koinon.Job(koinon.FedAvg(rounds), train, model={"w": np.zeros(SIZE)}, data=data, quorum=1.0)
