"""Optimizers: how the server turns a round's update into the next global model.

An update is a step in the direction in which the sites moved: the negative of what Reddi et al. (2021) call
the pseudo-gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from koinon.aggregate.aggregator import State
from koinon.errors import SettingsError
from koinon.payload import Arrays

STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance")
"""How the names of a batch norm's running statistics end.  They are estimates, not weights: whatever the optimizer
does, they become their mean over the sites.  A variance that a momentum carries on would end below zero."""


@dataclass(frozen=True)
class Optimizer:
    """Two functions: `init(model) -> state` and `step(model, update, state) -> (model, state)`.

    An update may lack names of the model (what never leaves the sites): those arrays stay as they are.
    """

    name: str
    init: Callable[[Arrays], State]
    step: Callable[[Arrays, Arrays, State], tuple[Arrays, State]]


def sgd(lr: float = 1.0, *, momentum: float = 0.0) -> Optimizer:
    """Server gradient descent; with lr 1 and no momentum, plain federated averaging (McMahan et al., 2017).

    v <- momentum * v + update;  model <- model + lr * v.  With momentum this is FedAvgM (Hsu et al., 2019).

    Raises:
        SettingsError: lr <= 0, or momentum outside [0, 1).
    """
    if lr <= 0:
        raise SettingsError(f"sgd: lr must be above 0, not {lr}")
    if not 0 <= momentum < 1:
        raise SettingsError(f"sgd: momentum must lie in [0, 1), not {momentum}")

    def init(model: Arrays) -> State:
        return {"velocity": {}}

    def step(model: Arrays, update: Arrays, state: State) -> tuple[Arrays, State]:
        velocity, before = dict(update), state["velocity"]
        for name in before.keys() & update.keys():
            velocity[name] = momentum * before[name] + update[name]
        moved = {name: (model[name] + lr * v).astype(model[name].dtype, copy=False) for name, v in velocity.items()}
        for name in moved:
            if name.endswith(STATISTICS):
                moved[name] = model[name] + update[name]
        return {**model, **moved}, {"velocity": velocity if momentum else {}}

    return Optimizer(f"sgd({lr:g}, momentum={momentum:g})" if momentum else f"sgd({lr:g})", init, step)
