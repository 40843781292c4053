"""LOCAL TRAINING: what a site does with a model and its data, declared per framework or as a plain function."""

from koinon.training.batches import partial_work
from koinon.training.boost import Boosted
from koinon.training.function import Function, task
from koinon.training.terms import Term, clip_gradient, control_variates, ditto, proximal

__all__ = [
    "Boosted",
    "Function",
    "Term",
    "clip_gradient",
    "control_variates",
    "ditto",
    "partial_work",
    "proximal",
    "task",
]
