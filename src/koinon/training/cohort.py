"""A cohort at once: K sites' copies of one network, trained in one tensor program.

Weights are stacked, [K, in, out] for a dense layer, and an SGD step is taken inside the backward pass: a dense
layer's gradient is never written down, as `W.baddbmm_(x^T, dy, alpha=-lr)` adds it straight to the weights.  On
dense networks this is several times faster than one site after the other; what cannot be stacked is refused, and
is trained by the loop.

Sites of unequal size stand in descending order of their steps, so that those still at work at any step are a
prefix, and a prefix of a stack is a view.  A batch smaller than its neighbours is padded, and weighs nothing there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from koinon.errors import extra
from koinon.payload import Arrays

torch: Any = extra("torch", "torch")
nn: Any = torch.nn
functional: Any = torch.nn.functional

SIZE = 16
"""Sites a cohort.  Fixed, so that the bits do not depend on the machine; 8 to 32 keep the stack in the cache."""

LARGEST = 1 << 28
"""Bytes of a stack above which fewer sites stand in a cohort: 256 MiB."""

POINTWISE = (nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Identity, nn.Dropout)
FUNCTIONS = {functional.relu, functional.gelu, functional.silu, torch.relu, torch.tanh, torch.sigmoid}
METHODS = {"relu", "tanh", "sigmoid"}
LOSSES = {"cross_entropy", "mse"}


class Refused(Exception):
    """A network or a loss that cannot be stacked; the message says why."""


@dataclass(frozen=True)
class Work:
    """One site's part of a cohort: its columns, and its batches as indices into them."""

    x: np.ndarray
    y: np.ndarray
    batches: Sequence[np.ndarray]


@dataclass(frozen=True)
class Step:
    """How weights move: v <- momentum v + g + decay w;  w <- w - lr v."""

    lr: float
    momentum: float
    decay: float


class _Dense(torch.autograd.Function):  # type: ignore[misc]
    """y = x W + b for K sites at once; the backward pass takes the step of W and b in place."""

    @staticmethod
    def forward(ctx: Any, x: Any, anchor: Any, how: tuple[_Layer, Step]) -> Any:
        ctx.save_for_backward(x)
        ctx.layer, ctx.step = layer, _ = how
        weight, bias = layer.weight[: len(x)], layer.bias
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias[: len(x)], x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,), (dy,) = ctx.saved_tensors, gradients
        layer, step, active = ctx.layer, ctx.step, len(x)
        weight = layer.weight[:active]
        dx = torch.bmm(dy, weight.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        inputs = x.transpose(1, 2)
        if step.momentum:
            velocity = layer.velocity("weight")[:active].baddbmm_(inputs, dy, beta=step.momentum)
            weight.sub_(velocity.add_(weight, alpha=step.decay) if step.decay else velocity, alpha=step.lr)
        else:
            weight.baddbmm_(inputs, dy, beta=1 - step.lr * step.decay, alpha=-step.lr)
        if layer.bias is not None:
            _move(layer, "bias", dy.sum(1, keepdim=True), step)
        return dx, None, None


def _move(layer: _Layer, name: str, gradient: Any, step: Step) -> None:
    """The step of one stacked tensor, in place."""
    tensor = getattr(layer, name)[: len(gradient)]
    if step.decay:
        gradient = gradient.add(tensor, alpha=step.decay)
    if step.momentum:
        gradient = layer.velocity(name)[: len(gradient)].mul_(step.momentum).add_(gradient)
    tensor.sub_(gradient, alpha=step.lr)


class _Layer:
    """A dense layer of K sites: weight [K, in, out], bias [K, 1, out]; buffers are made once."""

    def __init__(self, name: str, linear: Any, size: int) -> None:
        self.name, kind = name, linear.weight.dtype
        self.weight = torch.empty(size, linear.in_features, linear.out_features, dtype=kind)
        self.bias = None if linear.bias is None else torch.empty(size, 1, linear.out_features, dtype=kind)
        self._velocities: dict[str, Any] = {}

    def velocity(self, name: str) -> Any:
        """The momentum of one tensor."""
        if name not in self._velocities:
            self._velocities[name] = torch.zeros_like(getattr(self, name))
        return self._velocities[name]

    def take(self, model: Arrays) -> None:
        """All sites start from the global weights, at rest."""
        self.weight.copy_(_tensor(model[f"{self.name}.weight"]).t())
        if self.bias is not None:
            self.bias.copy_(_tensor(model[f"{self.name}.bias"]))
        for velocity in self._velocities.values():
            velocity.zero_()

    def changes(self, model: Arrays, active: int) -> dict[str, np.ndarray]:
        """What the first sites' weights have become, less the global ones, stacked: views of [active, …]."""
        weight = self.weight[:active].sub_(_tensor(model[f"{self.name}.weight"]).t())
        stacked = {f"{self.name}.weight": weight.transpose(1, 2).numpy()}
        if self.bias is not None:
            bias = self.bias[:active, 0].sub_(_tensor(model[f"{self.name}.bias"]))
            stacked[f"{self.name}.bias"] = bias.numpy()
        return stacked


class Program:
    """A network as a list of operations on stacked activations [K, batch, …]."""

    def __init__(self, module: Any, loss: str, size: int = SIZE) -> None:
        self.layers: list[_Layer] = []
        self.operations: list[Callable[[Any, Step], Any]] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._loss, self.size = loss, size
        self._buffers: dict[str, Any] = {}
        self._compile(module)

    def train(self, model: Arrays, work: Sequence[Work], step: Step) -> tuple[list[dict[str, np.ndarray]], list[float]]:
        """Train up to K sites from the same weights.

        Returns:
            Each site's change, and its mean loss over its batches.  The changes are views of the stacks: they
            are overwritten by the next cohort.
        """
        order = sorted(range(len(work)), key=lambda index: -len(work[index].batches))  # stable: ties keep their place
        placed = [work[index] for index in order]
        for layer in self.layers:
            layer.take(model)
        x, y = self._columns(placed)
        rows, counts = _plan(placed)
        losses = np.zeros(len(placed))
        for at in range(rows.shape[1]):
            count = counts[:, at]
            active = int((count > 0).sum())
            width = int(count.max())
            index = torch.from_numpy(rows[:active, at, :width].reshape(-1))
            inputs = self._buffer("inputs", index.shape + x.shape[1:], x.dtype)
            inputs = torch.index_select(x, 0, index, out=inputs).view(active, width, *x.shape[1:])
            targets = y.index_select(0, index).view(active, width, *y.shape[1:])
            losses[:active] += self._step(inputs, targets, count[:active], step)
        changes: dict[str, np.ndarray] = {}
        for layer in self.layers:
            changes |= layer.changes(model, len(placed))
        updates: list[dict[str, np.ndarray]] = [{} for _ in work]
        means = [0.0] * len(work)
        for place, index in enumerate(order):
            updates[index] = {name: changes[name][place] for name in model}
            means[index] = float(losses[place] / len(work[index].batches))
        return updates, means

    def _columns(self, work: Sequence[Work]) -> tuple[Any, Any]:
        """All sites' samples one after the other."""
        x, y = [site.x for site in work], torch.from_numpy(np.concatenate([site.y for site in work]))
        kind = torch.from_numpy(x[0][:0]).dtype
        together = self._buffer("columns", (sum(map(len, x)), *x[0].shape[1:]), kind)
        np.concatenate(x, out=together.numpy())
        return together, y

    def _buffer(self, name: str, shape: Sequence[int], kind: Any) -> Any:
        """Memory that is made once and used again: fresh pages cost as much as the arithmetic."""
        wanted = math.prod(shape)
        if name not in self._buffers or len(self._buffers[name]) < wanted or self._buffers[name].dtype != kind:
            self._buffers[name] = torch.empty(wanted, dtype=kind)
        return self._buffers[name][:wanted].view(*shape)

    def _step(self, x: Any, y: Any, counts: np.ndarray, step: Step) -> np.ndarray:
        """One batch of every active site, forward and back; each site's mean loss."""
        for operation in self.operations:
            x = operation(x, step)
        if self._loss == "cross_entropy":
            each = functional.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="none").view(x.shape[:2])
        else:
            each = (x - y).square().flatten(2).mean(2)
        weights = torch.from_numpy((np.arange(x.shape[1]) < counts[:, None]) / counts[:, None]).to(each.dtype)
        each = (each * weights).sum(1)
        each.sum().backward()
        means: np.ndarray = each.detach().numpy()
        return means

    def _compile(self, module: Any) -> None:
        graph = torch.fx.symbolic_trace(module)
        parts, last, seen = dict(graph.named_modules()), None, set()
        for node in graph.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "placeholder":
                last = node
                continue
            if node.target in seen or node.all_input_nodes != [last]:
                raise Refused(f"'{node.name}' is no plain chain of layers")
            self.operations.append(self._operation(node, parts.get(node.target) if node.op == "call_module" else None))
            seen |= {node.target} if node.op == "call_module" else set()
            last = node
        held = {f"{layer.name}.{part}" for layer in self.layers for part in ("weight", "bias")}
        state = module.state_dict()
        if odd := set(state) - held:
            raise Refused(f"'{sorted(odd)[0]}' belongs to no dense layer")
        if len(list(module.parameters())) < len(state):
            raise Refused("two layers share their weights")
        if not self.layers or not all(parameter.requires_grad for parameter in module.parameters()):
            raise Refused("nothing to train, or frozen weights")

    def _operation(self, node: Any, part: Any) -> Callable[[Any, Step], Any]:
        """One node of the traced network, over stacks.

        Raises:
            Refused: it has no stacked form here.
        """
        if part is not None and (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks):
            raise Refused(f"'{node.name}' has hooks")
        if type(part) is nn.Linear:  # not a subclass: who knows what its forward does
            layer = _Layer(node.target, part, self.size)
            self.layers.append(layer)
            return lambda x, step: _dense(x, self._anchor, layer, step)
        flat = type(part) is nn.Flatten and (part.start_dim, part.end_dim) == (1, -1)
        if flat or (node.target in (torch.flatten, "flatten") and node.args[1:] == (1,)):
            return lambda x, step: x.flatten(2)
        if type(part) in POINTWISE:
            return lambda x, step: part(x)
        if node.op == "call_function" and node.target in FUNCTIONS:
            return lambda x, step: node.target(x, **node.kwargs)
        if node.op == "call_method" and node.target in METHODS:
            return lambda x, step: getattr(x, node.target)()
        raise Refused(f"'{node.name}' ({type(part).__name__ if part is not None else node.target}) has no stacked form")


def program(module: Any, loss: Any) -> Program:
    """The module as a program over stacks.

    Raises:
        Refused: it has no such form, and why.
    """
    if loss not in LOSSES:
        raise Refused("a loss of one's own")
    try:
        size = min(SIZE, LARGEST // max(1, sum(tensor.nbytes for tensor in module.state_dict().values())))
        if size < 2:
            raise Refused("it is too large to be stacked")
        return Program(module, loss, size)
    except (torch.fx.proxy.TraceError, TypeError, AttributeError, RuntimeError) as error:
        raise Refused(f"it cannot be traced: {error}") from error


def _dense(x: Any, anchor: Any, layer: _Layer, step: Step) -> Any:
    """A dense layer over the last axis, whatever stands between it and the sites."""
    y = _Dense.apply(x.flatten(1, -2), anchor, (layer, step))
    return y.view(*x.shape[:-1], y.shape[-1])


def _plan(work: Sequence[Work]) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers [K, steps, batch] into all sites' samples together, and how many of each batch are real."""
    steps = len(work[0].batches)
    counts = np.zeros((len(work), steps), np.int64)
    for place, site in enumerate(work):
        counts[place, : len(site.batches)] = [len(batch) for batch in site.batches]
    rows = np.zeros((len(work), steps, int(counts.max())), np.int64)
    start = 0
    for place, site in enumerate(work):
        rows[place] = start  # a padded row is one of the site's own: whatever it holds stays with the site
        for at, batch in enumerate(site.batches):
            rows[place, at, : len(batch)] = batch + start
        start += len(site.x)
    return rows, counts


def _tensor(array: np.ndarray) -> Any:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
