"""Layers of a cohort: the parameters of K sites stacked, [K, ...] in the network's own layout.

Activations stand as the network itself would have them for one large batch, the sites' batches one after the other;
so whatever has no parameters works on them as it is.  A layer with parameters looks at them as [K, rows, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from koinon.errors import extra
from koinon.training.terms import Named, Term, coefficients

torch: Any = extra("torch", "torch")
nn: Any = torch.nn
functional: Any = torch.nn.functional


FEW, FEW_CLASSES = 8, 32
"""Steps up to which it may pay to keep what each of them saw, and classes up to which a softmax goes across rows."""


@dataclass(frozen=True)
class Rule:
    """How weights move: g <- terms of g;  v <- momentum v + gain g + decay w + pull start;  w <- w - lr v.

    `common` is what was sent along for the terms that remember something, by their names; `values` are plain ones.
    """

    lr: float
    momentum: float = 0.0
    gain: float = 1.0
    decay: float = 0.0
    pull: float = 0.0
    terms: Sequence[Term] = ()
    common: Mapping[str, Mapping[str, Named]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    def unrolled(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Where t steps lead, in numbers: w_t = a_t start + sum_s c_ts g_s; without terms.

        Returns:
            a [steps + 1] and c [steps + 1, steps].
        """
        a, c = np.ones(steps + 1), np.zeros((steps + 1, steps))
        velocity, velocities = 0.0, np.zeros(steps)
        for step in range(steps):
            velocity = self.momentum * velocity + self.decay * a[step] + self.pull
            velocities = self.momentum * velocities + self.decay * c[step]
            velocities[step] += self.gain
            a[step + 1], c[step + 1] = a[step] - self.lr * velocity, c[step] - self.lr * velocities
        return a, c


def rule(
    lr: float,
    momentum: float,
    *,
    decay: float,
    terms: Sequence[Term],
    common: Mapping[str, Mapping[str, Named]],
    values: Mapping[str, Any],
) -> Rule:
    """Weight decay after the terms; linear ones need no pass of their own."""
    if (linear := coefficients(terms)) is None:
        return Rule(lr, momentum, decay=decay, terms=terms, common=common, values=values)
    return Rule(lr, momentum, linear[0], linear[1] + decay, linear[2])


@dataclass
class Moment:
    """Where a cohort is in its training: its first `sites` sites are at work.

    Fused layers take their step inside the backward pass; others leave a gradient.  The cohort's steps have `widths`
    samples a site; each site takes so many `steps`.
    """

    sites: int = 1
    rule: Rule = field(default_factory=lambda: Rule(0.0))
    fused: bool = True
    widths: Sequence[int] = ()
    steps: Any = None


class Stack:
    """One parameter of K sites.  Until the first step all of them stand at `start`, and nothing is written.

    Its memory is for as many sites as there have been.
    """

    def __init__(self, name: str, parameter: Any) -> None:
        self.name, self.start, self.shape = name, parameter.detach(), parameter.shape
        self.fresh = True
        self.gradient: Any = None
        self.factors: Factors | None = None
        self._rooms: dict[str, Any] = {}
        self.release()

    def release(self) -> None:
        """Give all memory back."""
        self._rooms.clear()
        self.gradient = self.factors = None
        self._first = self._single = self.start.new_empty(0, *self.shape)

    def now(self, sites: int) -> Any:
        """The parameter of the first sites, [sites, ...]."""
        return self.start.expand(sites, *self.shape) if self.fresh else self.first(sites)

    def first(self, sites: int) -> Any:
        """What is held for the first sites; as long as these are the same, so is the view (each takes its time)."""
        if self._first.shape[0] != sites:
            self._first = self._single = None  # they would hold a room that must be made larger
            self._first = self.room("weights", sites)
            self._single = self._first[0]
        return self._first

    def same(self, sites: int) -> Any:
        """What the first sites all have, [...]: at the start, and where there is but one; otherwise None."""
        return self.start if self.fresh else self._single if sites == 1 else None

    def move(self, gradient: Any, rule: Rule) -> None:
        """The step of the first sites."""
        sites = gradient.shape[0]
        if rule.momentum:
            velocity = self.room("velocity", sites)
            velocity = velocity.zero_() if self.fresh else velocity.mul_(rule.momentum)
            self._move(velocity.add_(gradient, alpha=rule.gain), rule)
        else:
            self._move(gradient if rule.gain == 1 else gradient * rule.gain, rule)

    def move_by_product(self, left: Any, right: Any, rule: Rule) -> None:
        """The step for the gradient left @ right, which is added where it belongs without being written down."""
        sites = left.shape[0]
        if rule.momentum:
            velocity = self.room("velocity", sites)
            beta = 0.0 if self.fresh else rule.momentum
            self._move(torch.baddbmm(velocity, left, right, beta=beta, alpha=rule.gain, out=velocity), rule)
            return
        beta, alpha, held = 1 - rule.lr * rule.decay, -rule.lr * rule.gain, self.first(sites)
        torch.baddbmm(self.now(sites), left, right, beta=beta, alpha=alpha, out=held)
        if rule.pull:
            held.sub_(self.start, alpha=rule.lr * rule.pull)

    def _move(self, velocity: Any, rule: Rule) -> None:
        """v <- v + decay w + pull start;  w <- w - lr v.  Of `velocity`, only momentum is written to."""
        sites = velocity.shape[0]
        now = self.now(sites)
        for other, factor in ((now, rule.decay), (self.start, rule.pull)):
            if factor:
                velocity = (velocity.add_ if rule.momentum else velocity.add)(other, alpha=factor)
        torch.sub(now, velocity, alpha=rule.lr, out=self.first(sites))

    def mean_change(self, shares: Any) -> Any:
        """sum_k shares_k (w_k - start): one product; a tensor of the caller's own."""
        if self.factors:
            return self.factors.mean_change(shares.to(self.start.dtype))
        total = torch.mv(self.first(len(shares)).view(len(shares), -1).t(), shares.to(self.start.dtype))
        return total.view(self.shape).sub_(self.start, alpha=float(shares.sum()))

    def changes(self, sites: int) -> Any:
        """w_k - start of the first sites, in place of their weights."""
        if self.factors:
            return self.factors.changes(self.first(sites))
        return self.first(sites).sub_(self.start)

    def room(self, purpose: str, sites: int) -> Any:
        """Memory for so many sites, [sites, ...]; made when more are asked for than ever before."""
        room = self._rooms.get(purpose)
        if room is None or len(room) < sites:
            self._rooms[purpose] = None  # so that the old one goes before the new one comes
            with torch.inference_mode(False):  # else nobody but another such mode could write to it
                room = self._rooms[purpose] = self.start.new_empty(sites, *self.shape)
        return room[:sites]


class Factors:
    """A dense layer's weights while its sites have seen few samples: as products that nobody multiplies out.

    After t steps a site stands at a_t start + sum_s c_ts dy_s^T x_s (Rule.unrolled).  So

        x w_t^T = a_t x start^T + sum_s c_ts (x x_s^T) dy_s,

    and no site's own weights are ever read or written: all products with `start` are one, and so is the mean.
    """

    def __init__(self, start: Any, moment: Moment) -> None:
        self._start, self._moment = start, moment
        self._own, self._added = moment.rule.unrolled(len(moment.widths))
        self._seen: list[tuple[Any, Any]] = []  # of each step the rows and their gradients, [sites, rows, ...]

    @staticmethod
    def pay(weight: Stack, rows: Any, moment: Moment) -> bool:
        """What the last step adds to the products with `start` is less than these."""
        if not moment.fused or not 0 < len(moment.widths) <= FEW:
            return False
        seen = sum(moment.widths[:-1]) * rows.shape[1] // moment.widths[0]  # a sample may have several rows
        return bool(seen * sum(weight.shape) <= weight.start.numel())

    def forward(self, rows: Any) -> Any:
        """The rows times the weights of now, [sites, rows, out]."""
        self._rows = rows
        return self._moved(functional.linear(rows, self._start), rows)

    def backward(self, dy: Any, wanted: bool) -> Any:
        """The gradient by the rows, if it is wanted, and the step."""
        dx = self._moved(torch.matmul(dy, self._start), dy, back=True) if wanted else None
        self._seen.append((self._rows, dy))
        return dx

    def mean_change(self, shares: Any) -> Any:
        """sum_k shares_k (w_k - start)."""
        moved = self._start * float((self._own[self._moment.steps] - 1) @ shares.cpu().numpy())
        for rows, dy in self._scaled(shares):
            moved.addmm_(dy.flatten(0, 1).t(), rows.flatten(0, 1))
        return moved

    def changes(self, out: Any) -> Any:
        """w_k - start."""
        own = torch.from_numpy(self._own[self._moment.steps] - 1).to(out)
        torch.mul(own.view(-1, 1, 1), self._start, out=out)
        for rows, dy in self._scaled(out.new_ones(len(out))):
            out[: len(dy)].baddbmm_(dy.transpose(1, 2), rows)
        return out

    def _moved(self, product: Any, rows: Any, *, back: bool = False) -> Any:
        """A product with `start` as one with the weights of now."""
        at, sites = len(self._seen), len(rows)
        if self._own[at] != 1:
            product.mul_(float(self._own[at]))
        for step, pair in enumerate(self._seen):
            like, of = pair[::-1] if back else pair
            product.baddbmm_(rows @ like[:sites].transpose(1, 2), of[:sites], alpha=float(self._added[at, step]))
        return product

    def _scaled(self, shares: Any) -> Iterator[tuple[Any, Any]]:
        """Of each step the rows, and their gradients times what became of them in the end; nobody wants them after."""
        for step, (rows, dy) in enumerate(self._seen):
            became = torch.from_numpy(self._added[self._moment.steps[: len(dy)], step]).to(shares)
            yield rows, dy.mul_((became * shares[: len(dy)]).view(-1, 1, 1))


class Operation(Protocol):
    """One node of a network."""

    def forward(self, *inputs: Any) -> Any:
        """What it makes of its inputs; it remembers what its backward pass wants."""

    def backward(self, dy: Any, wanted: Sequence[bool]) -> Sequence[Any]:
        """The gradients by the inputs that are wanted, from that by the output."""


class Dense:
    """y = x W^T + b over the last axis, whatever stands between it and the samples."""

    def __init__(self, weight: Stack, bias: Stack | None, moment: Moment) -> None:
        self._weight, self._bias, self._moment = weight, bias, moment

    def forward(self, x: Any) -> Any:
        weight, bias, sites = self._weight, self._bias, self._moment.sites
        self._x = rows = x.reshape(sites, -1, x.shape[-1])
        if weight.fresh:
            weight.factors = Factors(weight.start, self._moment) if Factors.pay(weight, rows, self._moment) else None
        if weight.factors:
            y = weight.factors.forward(rows)
            return (y if bias is None else y.add_(bias.now(sites).unsqueeze(1))).view(*x.shape[:-1], -1)
        if (same := weight.same(sites)) is not None:
            return functional.linear(x, same, None if bias is None else bias.same(sites))
        turned = weight.first(sites).transpose(1, 2)
        y = torch.bmm(rows, turned) if bias is None else torch.baddbmm(bias.first(sites).unsqueeze(1), rows, turned)
        return y.view(*x.shape[:-1], -1)

    def backward(self, dy: Any, wanted: Sequence[bool]) -> Sequence[Any]:
        weight, bias, (sites, rule) = self._weight, self._bias, (self._moment.sites, self._moment.rule)
        rows = dy.reshape(sites, -1, dy.shape[-1])
        if bias is not None:
            bias.gradient = rows.sum(1)
        if weight.factors:
            dx = weight.factors.backward(rows, wanted[0])
            return (None if dx is None else dx.view(*dy.shape[:-1], -1),)
        dx = None
        if wanted[0]:
            same = weight.same(sites)
            dx = torch.bmm(rows, weight.first(sites)).view(*dy.shape[:-1], -1) if same is None else dy @ same
        if self._moment.fused:
            weight.move_by_product(rows.transpose(1, 2), self._x, rule)
        else:
            weight.gradient = torch.bmm(rows.transpose(1, 2), self._x, out=weight.room("gradient", sites))
        return (dx,)


class Local:
    """A function of its inputs and of stacked parameters, (sites, *inputs, *parameters); PyTorch differentiates it."""

    def __init__(self, function: Callable[..., Any], stacks: Sequence[Stack], moment: Moment) -> None:
        self._function, self._stacks, self._moment = function, stacks, moment

    def forward(self, *inputs: Any) -> Any:
        sites = self._moment.sites
        self._inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        self._leaves = [stack.now(sites).detach().requires_grad_() for stack in self._stacks]
        with torch.enable_grad():
            self._y = self._function(sites, *self._inputs, *self._leaves)
        return self._y.detach()

    def backward(self, dy: Any, wanted: Sequence[bool]) -> Sequence[Any]:
        inputs = [x for x, want in zip(self._inputs, wanted, strict=True) if want]
        found = list(torch.autograd.grad(self._y, [*self._leaves, *inputs], dy))
        for stack in self._stacks:
            stack.gradient = found.pop(0)
        return [found.pop(0) if want else None for want in wanted]


class Relu:
    """max(x, 0)."""

    def forward(self, x: Any) -> Any:
        self._y = torch.relu(x)
        return self._y

    def backward(self, dy: Any, wanted: Sequence[bool]) -> Sequence[Any]:
        return (torch.ops.aten.threshold_backward(dy, self._y, 0),)


class Reshape:
    """Another view of each sample."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def forward(self, x: Any) -> Any:
        self._shape = x.shape
        return self._function(x)

    def backward(self, dy: Any, wanted: Sequence[bool]) -> Sequence[Any]:
        return (dy.reshape(self._shape),)


def _embedding(part: Any, sites: int, x: Any, table: Any) -> Any:
    ids = x.reshape(sites, -1) + torch.arange(sites, device=x.device).unsqueeze(1) * part.num_embeddings
    return functional.embedding(ids, table.flatten(0, 1)).view(*x.shape, -1)


def _layer_norm(part: Any, sites: int, x: Any, weight: Any, bias: Any = 0.0) -> Any:
    y = functional.layer_norm(x, part.normalized_shape, eps=part.eps).view(sites, -1, *part.normalized_shape)
    return (y * weight.unsqueeze(1) + (bias if isinstance(bias, float) else bias.unsqueeze(1))).view(x.shape)


def _group_norm(part: Any, sites: int, x: Any, weight: Any, bias: Any) -> Any:
    y = functional.group_norm(x, part.num_groups, eps=part.eps).view(sites, -1, part.num_channels, x[0, 0].numel())
    return (y * weight[:, None, :, None] + bias[:, None, :, None]).view(x.shape)


def _conv2d(part: Any, sites: int, x: Any, weight: Any, bias: Any = None) -> Any:
    """One convolution of as many groups as sites: on this shape or that faster than patches, and it takes no memory."""
    x = x.view(sites, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
    bias, groups = None if bias is None else bias.flatten(), sites * part.groups
    y = functional.conv2d(x, weight.flatten(0, 1), bias, part.stride, part.padding, part.dilation, groups)
    return y.view(len(y), sites, -1, *y.shape[2:]).transpose(0, 1).flatten(0, 1)


STACKED: dict[type, tuple[Callable[..., Any], dict[str, Any]]] = {
    nn.Embedding: (_embedding, {"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False, "sparse": False}),
    nn.LayerNorm: (_layer_norm, {}),
    nn.GroupNorm: (_group_norm, {}),
    nn.Conv2d: (_conv2d, {"padding_mode": "zeros"}),
}
"""Layers as functions of stacked parameters, and the only settings with which they are."""


def layer(part: Any, stacks: Mapping[str, Stack], moment: Moment) -> Operation | None:
    """What stands in a cohort for a layer of exactly this type (of a subclass, who knows what its forward does)."""
    if type(part) is nn.Linear:
        return Dense(stacks["weight"], stacks.get("bias"), moment)
    function, settings = STACKED.get(type(part), (None, {}))
    if function is None or any(getattr(part, name) != value for name, value in settings.items()):
        return None
    return Local(partial(function, part), list(stacks.values()), moment)


def cross_entropy(outputs: Any, targets: Any, weights: Any) -> tuple[Any, Any]:
    """The loss of each row, and the gradient of their weighted sum by the outputs [rows, classes]."""
    # Along rows of few classes PyTorch's kernel takes several times as long as across them.
    logs = torch.log_softmax(outputs.t(), 0).t() if outputs.shape[1] <= FEW_CLASSES else torch.log_softmax(outputs, 1)
    each = functional.nll_loss(logs, targets, reduction="none")
    gradient = logs.exp_().scatter_(1, targets.unsqueeze(1), -1.0, reduce="add")
    return each, gradient.mul_(weights.unsqueeze(1))


def mse(outputs: Any, targets: Any, weights: Any) -> tuple[Any, Any]:
    """The same for the mean squared error over each row."""
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs of shape {tuple(outputs.shape)} against targets of {tuple(targets.shape)}")
    gap = (outputs - targets).flatten(1)
    each = gap.square().mean(1)
    return each, gap.mul_(weights.mul(2 / gap.shape[1]).unsqueeze(1)).view(outputs.shape)


LOSSES = {"cross_entropy": cross_entropy, "mse": mse}
