"""A site's work as a plain function: any library, any loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from koinon.errors import DataError, PayloadError
from koinon.payload import Payload
from koinon.task import Context, Worker


@dataclass(frozen=True)
class Function:
    """A function that answers one task; made by `@koinon.task`.  Calling it calls the function."""

    tasks: tuple[str]
    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def initial(self, seed: int) -> None:
        """A function has no model of its own: give one to the Job."""

    def open(self) -> Worker:
        """Nothing to build."""
        return self._answer

    def _answer(self, payload: Payload, context: Context) -> Payload:
        held_out = context.task == "evaluate"
        data = context.data.test if held_out else context.data.train
        if data is None:
            raise DataError(f"site '{context.site}' holds no {'held-out' if held_out else 'training'} data")
        answer = self.function(payload.arrays, data, context)
        try:
            *models, weight, metrics = answer
            weight, metrics = float(weight), {str(name): float(value) for name, value in metrics.items()}
            if len(models) > 1:
                raise ValueError("one model is enough")
            arrays = {name: np.asarray(array) for name, array in models[0].items()} if models else {}
        except (TypeError, ValueError, AttributeError) as cause:
            raise PayloadError(
                f"'{self.function.__name__}' returned {type(answer).__name__}; a task function returns "
                "(model, samples, metrics), or (samples, metrics) where there is no model to send"
            ) from cause
        values = {"weight": weight, "metrics": metrics}
        return Payload("weights" if models else "metrics", arrays, values)


def task(name: str) -> Callable[[Callable[..., Any]], Function]:
    """Mark a function as the executor of a task.

    `train` functions are called as `(model, data, context)` with the global model as a dict of read-only
    named arrays and the site's training data, and return `(model, samples, metrics)`: the trained arrays
    under the same names, the weight in the mean, and a dict of numbers.  `evaluate` functions get the
    site's held-out data and return `(samples, metrics)`.

    >>> @task("train")
    ... def nothing(model, data, context):
    ...     return model, len(data), {}
    >>> nothing.tasks
    ('train',)
    """
    return lambda function: Function((name,), function)
