"""The sites' part of LoAdaBoost: whoever has learned too little goes on training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from koinon.errors import JobError, SettingsError


@dataclass(frozen=True)
class Boosted:
    """For `LocalSGD(epochs=…)` and the controller `koinon.LoAdaBoost`: a site trains until its loss is low enough.

    With E epochs: after E/2 of them, and again E/2, E/2 - 1, …, 1, 1 later, it stops if its loss is not above last
    round's median; at the latest after 3E/2 (Huang et al., 2020; halves are rounded down).  The loss is the mean over
    the batches of its last epoch, and it is that which the site reports as `loss`.

    In a cohort whoever has stopped stands by until the last has.

    Args:
        epochs: E, 2 or more.

    Raises:
        SettingsError: epochs < 2.
    """

    epochs: int

    def __post_init__(self) -> None:
        if self.epochs < 2:
            raise SettingsError(
                f"Boosted: epochs must be 2 or more, as the first look is after half, not {self.epochs}"
            )

    def __call__(self, random: np.random.Generator) -> int:
        """The most."""
        return 3 * self.epochs // 2

    def halt(self, steps: int, values: Mapping[str, Any]) -> Halt:
        """When a site of so many steps at most may stop, if these values came along.

        Raises:
            JobError: they came from another controller.
        """
        if "median_loss" not in values:
            raise JobError("Boosted() needs last round's median loss, which koinon.LoAdaBoost sends along")
        half, epoch = self.epochs // 2, max(1, steps // (3 * self.epochs // 2))
        looks = accumulate([half, *range(half, 0, -1), 1])
        return Halt(frozenset(epochs * epoch for epochs in looks), epoch, values["median_loss"])


@dataclass(frozen=True)
class Halt:
    """A site stops after any of these steps if its loss over the last `epoch` of them is not above the bound."""

    steps: frozenset[int]
    epoch: int
    bound: float

    def __call__(self, losses: Sequence[Any]) -> bool:
        return len(losses) in self.steps and self.loss(losses) <= self.bound

    def loss(self, losses: Sequence[Any]) -> float:
        """Of the last epoch, from that of each step (tensors: they are read only when it is time)."""
        return float(sum(losses[-self.epoch :])) / len(losses[-self.epoch :])


class Halts:
    """The sites of a cohort that may stop; what they have learned by then is laid aside, until all have.

    Args:
        halts: each site's own, in the order of visiting; None where it may not.
        stacks: the cohort's parameters by name.
    """

    def __init__(self, halts: Sequence[Halt | None], stacks: Mapping[str, Any]) -> None:
        self._halts = {place: halt for place, halt in enumerate(halts) if halt}
        self._all, self._stacks = len(halts), stacks
        self._losses: list[list[Any]] = [[] for _ in halts]
        self._aside: dict[int, dict[str, Any]] = {}

    def after(self, losses: Any) -> bool:
        """After a step with these losses of the first sites: whether nobody is left."""
        for place, halt in self._halts.items():
            if place in self._aside or place >= len(losses):
                continue
            self._losses[place].append(losses[place])
            if halt(self._losses[place]):
                self._aside[place] = {
                    name: stack.first(self._all)[place].clone() for name, stack in self._stacks.items()
                }
        return len(self._aside) == self._all

    def end(self, steps: np.ndarray) -> dict[int, float]:
        """Put back what was laid aside, correct the steps that were taken; the losses of those who may stop."""
        for place, weights in self._aside.items():
            steps[place] = len(self._losses[place])
            for name, weight in weights.items():
                self._stacks[name].first(self._all)[place].copy_(weight)
        return {place: halt.loss(self._losses[place]) for place, halt in self._halts.items()}
