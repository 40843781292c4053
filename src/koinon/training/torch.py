"""Declared local training in PyTorch: model factory, loss and optimiser are data.

The loop is lean on purpose: the model is built once a worker and weights are copied in place; batches are
slices of arrays, not a DataLoader; the usual optimisers are a few `foreach` calls (the first use of
`torch.optim` alone costs a second).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from koinon.errors import DataError, JobError, SettingsError, extra, nearest
from koinon.payload import Arrays, Payload
from koinon.streams import number
from koinon.task import Context, Worker
from koinon.training import cohort
from koinon.training.batches import batches, check

torch: Any = extra("torch", "torch")

Metric: TypeAlias = Callable[[Any, Any], Any]
"""(outputs, targets) -> a number, both tensors over all held-out samples of a site."""

LOSSES = {"cross_entropy": torch.nn.functional.cross_entropy, "mse": torch.nn.functional.mse_loss}
EVALUATION_BATCH = 1000
SMALL_STEP = 1 << 23
"""Multiply-adds of a dense step (weights times batch) below which one thread is faster than two."""


@dataclass(frozen=True, kw_only=True)
class LocalSGD:
    """Train a `torch.nn.Module` on a site's data by mini-batch descent.

    The whole state travels: parameters, and buffers of a floating type (a batch norm's running statistics),
    are averaged; integer buffers (its counter of batches) are not.

    Args:
        model: a class or function that makes the module; called once a worker, seeded for the first weights.
        loss: `cross_entropy`, `mse`, or a function (outputs, targets) -> scalar tensor.
        optimizer: `sgd` (v <- momentum v + g + weight_decay w; w <- w - lr v), or a function
            parameters -> torch.optim.Optimizer, made anew for every local training.
        lr: step size of `sgd`; multiplied by `lr_decay` to the power (round - 1).
        momentum: of `sgd`; starts at rest in every local training.
        weight_decay: of `sgd`.
        epochs: passes over the site's data in a round.
        steps: instead of epochs, batches in a round.
        batch_size: samples a step; the last batch of an epoch may be smaller.
        metrics: name -> function (outputs, targets) -> number, for evaluation beside the loss; by default
            the accuracy, where targets are class labels.
        device: such as `cpu` or `cuda`; by default CUDA where there is one.
        form: how several sites are trained: `cohort`, in one tensor program; `loop`, one after the other;
            `auto`, in a cohort where the network and the settings allow it.
        max_batches: stop a local training early, to see that everything fits together.

    Raises:
        SettingsError: a setting is outside its domain.
        JobError: `model` is a module instead of what makes one.
    """

    model: Callable[[], Any]
    loss: str | Callable[[Any, Any], Any] = "cross_entropy"
    optimizer: str | Callable[[Sequence[Any]], Any] = "sgd"
    lr: float = 0.01
    lr_decay: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    device: str | None = None
    form: str = "auto"
    max_batches: int | None = None

    tasks = ("train", "evaluate")

    def __post_init__(self) -> None:
        check(lr=self.lr, epochs=self.epochs, batch_size=self.batch_size, steps=self.steps)
        if isinstance(self.model, torch.nn.Module):
            raise JobError(f"model= is a {type(self.model).__name__} already built: give what makes one, without ()")
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise SettingsError(f"there is no loss '{self.loss}': {nearest(self.loss, LOSSES)}")
        if isinstance(self.optimizer, str) and self.optimizer != "sgd":
            raise SettingsError(f"there is no optimizer '{self.optimizer}': use 'sgd' or a function of the parameters")
        if self.form not in ("auto", "cohort", "loop"):
            raise SettingsError(f"there is no form '{self.form}': {nearest(self.form, ['auto', 'cohort', 'loop'])}")
        if not 0 <= self.momentum < 1:
            raise SettingsError(f"momentum must lie in [0, 1), not {self.momentum}")

    def initial(self, seed: int) -> Arrays:
        """The module's own first weights, drawn with the run's seed."""
        with _seeded(number(seed, "model")):
            module = self.model()
        return {name: np.array(tensor.numpy()) for name, tensor in _state(module).items()}

    def open(self) -> Worker:
        """Build the module, once a worker."""
        return _Trainer(self)


class _Trainer:
    """A module that takes weights and trains or evaluates, for one site after the other."""

    def __init__(self, settings: LocalSGD) -> None:
        self.settings = settings
        self.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with _seeded(0):
            self.module = settings.model().to(self.device)
        self.loss = LOSSES[settings.loss] if isinstance(settings.loss, str) else settings.loss
        kinds = {type(part).__name__ for part in self.module.modules()}
        if "Conv2d" in kinds and self.device == "cpu":
            self.module.to(memory_format=torch.channels_last)  # 10 to 15 % of a convolution step on a CPU
        self.state = _state(self.module)
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.tail = 2 if any("BatchNorm" in kind for kind in kinds) else 1
        # A small dense step is over before a second thread has woken up, and on a busy machine waits for it.
        small = sum(parameter.numel() for parameter in self.parameters) * settings.batch_size < SMALL_STEP
        self.threads = 1 if small and not any("Conv" in kind for kind in kinds) else torch.get_num_threads()
        self.cohorts, self.forms = self._form()

    def __call__(self, payload: Payload, context: Context) -> Payload:
        self._take(payload.arrays)
        with self._ready(context):
            return self._train(context) if context.task == "train" else self._evaluate(context)

    def together(self, payload: Payload, contexts: Sequence[Context]) -> list[Payload]:
        """Train several sites from the same weights in one tensor program."""
        settings, work = self.settings, []
        for context in contexts:
            x, y = self._tensors(context.data.train)
            work.append(cohort.Work(x.numpy(), y.numpy(), list(self._batches(len(x), context))))
        step = cohort.Step(self._lr(contexts[0]), settings.momentum, settings.weight_decay)
        self.module.train()
        with self._ready(contexts[0]):
            updates, losses = self.program.train(payload.arrays, work, step)
        return [
            Payload("weight_diff", update, {"weight": len(site.x), "metrics": {"loss": loss}})
            for update, loss, site in zip(updates, losses, work, strict=True)
        ]

    @contextmanager
    def _ready(self, context: Context) -> Iterator[None]:
        """As many threads as help, and the random numbers of this site and round, for dropout and the like."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with _seeded(context.number("torch"), self.device):
                yield
        finally:
            torch.set_num_threads(before)

    def _form(self) -> tuple[dict[str, int], dict[str, str]]:
        """How many sites are trained at once, and why."""
        settings = self.settings
        if settings.form == "loop":
            return {}, {"train": "one site after the other, as asked"}
        try:
            if self.device != "cpu" or settings.optimizer != "sgd":
                raise cohort.Refused("cohorts are for the CPU and optimizer='sgd'")
            self.program = cohort.program(self.module, settings.loss)
        except cohort.Refused as reason:
            if settings.form == "cohort":
                raise JobError(f"form='cohort' cannot train this network: {reason}") from reason
            return {}, {"train": f"one site after the other: {reason}"}
        return {"train": self.program.size}, {"train": f"cohorts of {self.program.size} sites in one tensor program"}

    def _lr(self, context: Context) -> float:
        return self.settings.lr * self.settings.lr_decay ** max(0, context.round - 1)

    def _batches(self, samples: int, context: Context) -> Iterator[np.ndarray]:
        """The batches of one local training."""
        settings = self.settings
        order = batches(
            samples,
            settings.batch_size,
            random=context.stream("batches"),
            epochs=settings.epochs,
            steps=settings.steps,
            tail=self.tail,
        )
        return itertools.islice(order, settings.max_batches)

    def _take(self, model: Arrays) -> None:
        """Copy weights into the module, in place."""
        if model.keys() != self.state.keys():
            odd = sorted(model.keys() ^ self.state.keys())
            raise JobError(f"the global model and the module differ in '{odd[0]}': is it the same model code?")
        for name, tensor in self.state.items():
            if tensor.device.type == "cpu":
                np.copyto(tensor.numpy(), model[name])
            else:
                tensor.copy_(torch.from_numpy(np.array(model[name])))

    def _train(self, context: Context) -> Payload:
        x, y = self._tensors(context.data.train)
        self.module.train()
        update = self._optimizer(self._lr(context))
        losses = []
        for batch in self._batches(len(x), context):
            index = torch.from_numpy(batch).to(self.device)
            loss = self.loss(self.module(x[index]), y[index])
            update(torch.autograd.grad(loss, self.parameters))
            losses.append(loss.detach())
        # Read once: asking for each step's loss would stop a GPU at every step.
        mean_loss = float(torch.stack(losses).mean())
        arrays = {name: tensor.cpu().numpy() for name, tensor in self.state.items()}
        return Payload("weights", arrays, {"weight": len(x), "metrics": {"loss": mean_loss}})

    def _evaluate(self, context: Context) -> Payload:
        x, y = self._tensors(context.data.test)
        self.module.eval()
        with torch.inference_mode():
            starts = range(0, len(x), EVALUATION_BATCH)
            outputs = torch.cat([self.module(x[start : start + EVALUATION_BATCH]) for start in starts])
            metrics = {name: float(metric(outputs, y)) for name, metric in self._metrics(outputs, y).items()}
            metrics["loss"] = float(self.loss(outputs, y))
        return Payload("metrics", {}, {"weight": len(x), "metrics": metrics})

    def _metrics(self, outputs: Any, targets: Any) -> Mapping[str, Metric]:
        labels = not targets.is_floating_point() and outputs.ndim == 2
        return self.settings.metrics or ({"accuracy": _accuracy} if labels else {})

    def _optimizer(self, lr: float) -> Callable[[Sequence[Any]], None]:
        """A fresh optimiser: gradients -> one step of the parameters in place."""
        if callable(self.settings.optimizer):
            return _wrapped(self.settings.optimizer(self.parameters), self.parameters)
        return _sgd(self.parameters, lr, self.settings.momentum, self.settings.weight_decay)

    def _tensors(self, data: Any) -> tuple[Any, Any]:
        if data is None or not len(data):
            raise DataError("this site holds no such data")
        x, y = (torch.from_numpy(_writable(data[column])).to(self.device) for column in ("x", "y"))
        # Numbers as NumPy makes them by default are not what PyTorch computes with: float64 beside float32
        # weights, int32 labels.
        x = x.to(self.parameters[0].dtype) if x.is_floating_point() else x
        return x, (y.to(self.parameters[0].dtype) if y.is_floating_point() else y.long())


def _state(module: Any) -> dict[str, Any]:
    """All parameters and buffers that a state_dict would hold, as tensors that share memory with the module."""
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    for name, tensor in state.items():
        if tensor.dtype == torch.bfloat16:
            raise JobError(f"'{name}' is of type bfloat16, which has no form as a named array: use float32 or float16")
    return state


def _sgd(parameters: Sequence[Any], lr: float, momentum: float, decay: float) -> Callable[[Sequence[Any]], None]:
    """v <- momentum v + g + decay w;  w <- w - lr v."""
    weights = [parameter.detach() for parameter in parameters]
    velocity: list[Any] = []

    def step(gradients: Sequence[Any]) -> None:
        if decay:
            gradients = torch._foreach_add(gradients, weights, alpha=decay)
        if momentum:
            if velocity:
                torch._foreach_mul_(velocity, momentum)
                torch._foreach_add_(velocity, gradients)
            else:
                velocity.extend(gradient.clone() for gradient in gradients)
            gradients = velocity
        torch._foreach_add_(weights, gradients, alpha=-lr)

    return step


def _wrapped(optimizer: Any, parameters: Sequence[Any]) -> Callable[[Sequence[Any]], None]:
    """A torch.optim.Optimizer as a function of gradients."""

    def step(gradients: Sequence[Any]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return step


def _accuracy(outputs: Any, targets: Any) -> Any:
    return (outputs.argmax(1) == targets).double().mean()


def _writable(array: np.ndarray) -> np.ndarray:
    """PyTorch shares memory only with arrays that may be written: a memory map is copied."""
    return np.require(array, requirements=["C", "W"])


@contextmanager
def _seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Seed PyTorch for a while; whatever the caller's own program draws afterwards is not disturbed.

    Not by torch.manual_seed: without a GPU it notes a stack trace at every call, for a GPU that may come.
    """
    generators = [torch.default_generator]
    if device != "cpu":
        generators.append(torch.cuda.default_generators[torch.device(device).index or 0])
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
