"""Softmax regression in plain NumPy: declared training without any framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from koinon.errors import DataError, SettingsError
from koinon.payload import Arrays, Payload
from koinon.task import Context, Worker
from koinon.training.batches import batches, check


@dataclass(frozen=True, kw_only=True)
class SoftmaxRegression:
    """Multinomial logistic regression trained by mini-batch gradient descent.

    W <- W - lr * (x^T (softmax(xW + b) - onehot(y)) / n + l2 * W), and b without the decay.

    Args:
        features: columns of `x`; inputs of more dimensions are flattened.
        classes: labels are 0 … classes - 1.
        lr: step size.
        epochs: passes over the site's data in a round.
        batch_size: samples a step.
        l2: weight decay on W.
        dtype: of the model, `float32` or `float64`.
        max_batches: stop a local training early, to see that everything fits together.
    """

    features: int
    classes: int
    lr: float = 0.1
    epochs: int = 1
    batch_size: int = 32
    l2: float = 0.0
    dtype: str = "float32"
    max_batches: int | None = None

    tasks = ("train", "evaluate")

    def __post_init__(self) -> None:
        check(lr=self.lr, epochs=self.epochs, batch_size=self.batch_size, steps=self.max_batches)
        if self.dtype not in ("float32", "float64"):
            raise SettingsError(f"dtype must be 'float32' or 'float64', not '{self.dtype}'")

    def initial(self, seed: int) -> Arrays:
        """Zeros: the loss is convex, so the start does not matter."""
        shapes = {"weight": (self.features, self.classes), "bias": (self.classes,)}
        return {name: np.zeros(shape, self.dtype) for name, shape in shapes.items()}

    def open(self) -> Worker:
        """Nothing to build."""
        return lambda payload, context: (self._train if context.task == "train" else self._evaluate)(
            payload.arrays, context
        )

    def _train(self, model: Arrays, context: Context) -> Payload:
        x, y = self._columns(context.data.train)
        weight, bias = model["weight"].copy(), model["bias"].copy()
        loss = 0.0
        order = batches(
            len(x), self.batch_size, random=context.stream("batches"), epochs=self.epochs, steps=self.max_batches
        )
        for step, batch in enumerate(order, 1):
            error, batch_loss = _error(x[batch], y[batch], weight, bias)
            weight -= self.lr * (x[batch].T @ error + self.l2 * weight)
            bias -= self.lr * error.sum(0)
            loss += (batch_loss - loss) / step
        return Payload("weights", {"weight": weight, "bias": bias}, {"weight": len(x), "metrics": {"loss": loss}})

    def _evaluate(self, model: Arrays, context: Context) -> Payload:
        x, y = self._columns(context.data.test)
        logits = x @ model["weight"] + model["bias"]
        _, loss = _error(x, y, model["weight"], model["bias"])
        metrics = {"accuracy": float((logits.argmax(1) == y).mean()), "loss": loss}
        return Payload("metrics", {}, {"weight": len(x), "metrics": metrics})

    def _columns(self, data: Mapping[str, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
        if data is None:
            raise DataError("this site holds no such data")
        x = data["x"].reshape(len(data["x"]), -1).astype(self.dtype, copy=False)
        if x.shape[1] != self.features:
            raise DataError(f"x has {x.shape[1]} features; SoftmaxRegression was told {self.features}")
        y = data["y"]
        if len(y) and not 0 <= y.min() <= y.max() < self.classes:
            raise DataError(f"labels run from {y.min()} to {y.max()}; there are {self.classes} classes, from 0")
        return x, y


def _error(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, float]:
    """(softmax - onehot) / n, of shape [n, classes], and the mean cross-entropy."""
    logits = x @ weight + bias
    logits -= logits.max(1, keepdims=True)
    exponential = np.exp(logits)
    total = exponential.sum(1, keepdims=True)
    rows = np.arange(len(y))
    loss = float((np.log(total[:, 0]) - logits[rows, y]).mean())
    error: np.ndarray = exponential / total
    error[rows, y] -= 1
    return error / np.asarray(len(y), error.dtype), loss
