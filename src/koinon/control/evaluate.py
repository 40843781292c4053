"""Evaluation of a trained model, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from koinon.control.federation import Federation
from koinon.errors import SettingsError
from koinon.payload import Arrays


@dataclass(frozen=True)
class Evaluate:
    """How good a model is, at every site that holds held-out data and over all of them.

    The model is what a run before has trained: `job.replace(controller=koinon.Evaluate(), model=run.model())`.  What
    an upload filter keeps at the sites, or what they remember, is not carried over from that run.

    Args:
        rounds: how often; once is enough, unless the executor draws at random.

    Raises:
        SettingsError: rounds < 1.
    """

    rounds: int = 1

    asks = ("evaluate",)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise SettingsError(f"Evaluate: rounds must be 1 or more, not {self.rounds}")

    def run(self, fed: Federation, model: Arrays) -> Arrays:
        """Returns the model as it came."""
        at = fed.start(model=model)
        if not fed.evaluators:
            fed.abort("nobody holds held-out data: name `test` in [data] of the settings, or give data with a test set")
        for _ in fed.rounds(self.rounds):
            fed.commit(at)
        return model
