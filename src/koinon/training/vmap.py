"""A cohort of networks that cannot be taken apart: PyTorch's own vectorisation of their gradient.

Slower than layers that are made for stacks, and it takes a second before the first step; but it knows almost every
operation, and any loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from koinon.errors import extra
from koinon.training.cohort import Program, Refused, size
from koinon.training.layers import Stack
from koinon.training.visits import Visit

torch: Any = extra("torch", "torch")


class Mapped(Program):
    """vmap over sites of the gradient of loss(network(x), y).

    Sites whose batches differ in length are mapped apart: a loss of anybody's own knows no fillers.
    """

    def __init__(self, module: Any, loss: Callable[[Any, Any], Any]) -> None:
        super().__init__(module, size(module))
        if any(getattr(part, "track_running_stats", False) for part in module.modules()):
            raise Refused("a batch norm's running statistics cannot be mapped")
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self._stacks[name] = Stack(name, parameter)

        def of(parameters: Any, x: Any, y: Any) -> Any:
            return loss(torch.func.functional_call(module, parameters, (x,)), y)

        self._mapped = torch.func.vmap(torch.func.grad_and_value(of), randomness="different")
        self._tried = False

    def _step(self, visit: Visit) -> Any:
        sites, losses = visit.sites, torch.empty(visit.sites, dtype=self._kind, device=self._device)
        x, y = (column.view(sites, -1, *column.shape[1:]) for column in (visit.x, visit.y))
        if (visit.counts == visit.counts[0]).all():
            found, losses = self._gradients({name: stack.now(sites) for name, stack in self._stacks.items()}, x, y)
            for name, stack in self._stacks.items():
                stack.gradient = found[name]
            return losses
        for stack in self._stacks.values():
            stack.gradient = stack.room("gradient", sites)
        for count in np.unique(visit.counts):
            which = torch.from_numpy(np.flatnonzero(visit.counts == count)).to(self._device)
            parameters = {name: stack.now(sites)[which] for name, stack in self._stacks.items()}
            found, losses[which] = self._gradients(parameters, x[which, :count], y[which, :count])
            for name, stack in self._stacks.items():
                stack.gradient[which] = found[name]
        return losses

    def _gradients(self, *arguments: Any) -> Any:
        """Gradients and losses; the first time, warnings are looked at.

        Raises:
            Refused: PyTorch would run one site after the other inside.
        """
        if self._tried:
            return self._mapped(*arguments)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result = self._mapped(*arguments)
        if slow := [str(one.message) for one in said if "performance drop" in str(one.message)]:
            raise Refused(f"vmap has no rule for an operation: {slow[0].splitlines()[0]}")
        self._tried = True
        return result
