"""A cohort at once: K sites' copies of one network, trained in one tensor program.

Weights are stacked, [K, out, in] for a dense layer, and an SGD step is taken inside the backward pass: a dense
layer's gradient is never written down, as `W.baddbmm_(dy^T, x, alpha=-lr)` adds it straight to the weights.  On
dense networks this is several times faster than one site after the other; what cannot be stacked is refused, and
is trained by the loop.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from koinon.errors import extra
from koinon.training.boost import Halts
from koinon.training.layers import LOSSES, Local, Moment, Operation, Relu, Reshape, Rule, Stack, layer
from koinon.training.memory import Memory
from koinon.training.terms import Named
from koinon.training.visits import Visit, Visits, Work

torch: Any = extra("torch", "torch")
nn: Any = torch.nn
functional: Any = torch.nn.functional

SIZE = 32
"""Sites a cohort, at most.  Fixed, so that the bits do not depend on the machine; fewer are slower, more no faster."""

LARGEST = 1 << 28
"""Bytes of a stack above which fewer sites stand in a cohort: 256 MiB."""

ROWS = 2048
"""Samples that are taken together where every site takes but one step."""

PLAIN = {
    *(nn.Tanh, nn.GELU, nn.Sigmoid, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Identity, nn.Dropout),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
}
FUNCTIONS = {
    *(functional.gelu, functional.silu, functional.elu, functional.leaky_relu, torch.tanh, torch.sigmoid),
    *(functional.max_pool2d, torch.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d),
    *("tanh", "sigmoid"),
}
"""Modules, functions and methods of tensors that have no parameters and treat each sample by itself."""

RELUS = {functional.relu, torch.relu, "relu"}
SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
IN_PLACE = {operator.iadd, "add_"}
FLATTENS = {torch.flatten, "flatten"}
VIEWS = {"view", "reshape"}


class Refused(Exception):
    """A network or a loss that cannot be stacked; the message says why."""


class Program:
    """K sites' copies of one network, as stacks of its parameters.  Abstract: `_step` is not written here.

    The sites start from the module's own parameters, as they are at each call.
    """

    def __init__(self, module: Any, size: int) -> None:
        self.size, self._moment = size, Moment()
        self._stacks: dict[str, Stack] = {}
        self._learned: dict[str, Any] = {}  # what came of the terms' memory (Memory.learn)
        self._buffers: dict[str, np.ndarray] = {}
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not parameters:
            raise Refused("nothing to train, or all of it frozen")
        if len(list(module.parameters())) < len(list(module.named_parameters(remove_duplicate=False))):
            raise Refused("two layers share their weights")
        self._kind, self._device = parameters[0].dtype, str(parameters[0].device)

    def train(self, work: Sequence[Work], rule: Rule) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
        """Train up to K sites from the same weights.

        Returns:
            Each site's change, and its mean loss over its batches.  The changes are views of the stacks: they
            are overwritten by the next cohort.
        """
        with self._whole(rule):
            visits, losses = self._train(work, rule)
            found = {name: stack.changes(len(work)) for name, stack in self._stacks.items()} | self._learned
            changes = {name: change.cpu().numpy() for name, change in found.items()}
        updates: list[dict[str, np.ndarray]] = [{} for _ in work]
        for place, index in enumerate(visits.order):
            updates[index] = {name: stacked[place] for name, stacked in changes.items()}
        return updates, losses

    def train_on(
        self, work: Sequence[Work], rule: Rule, own: Sequence[Mapping[str, np.ndarray]]
    ) -> list[dict[str, np.ndarray]]:
        """Train any number of sites, each from weights of its own, or from the module's where it has none.

        To the rule and its terms, `start` is the module's still.  Nobody stops early.

        Returns:
            Each site's weights afterwards.
        """
        ends: list[dict[str, np.ndarray]] = []
        for part in (slice(start, start + self.size) for start in range(0, len(work), self.size)):
            with self._whole(rule):
                visits, _ = self._train([replace(site, halt=None) for site in work[part]], rule, own[part])
            held = {name: stack.first(len(visits.order)).cpu().numpy() for name, stack in self._stacks.items()}
            places = np.argsort(visits.order)
            ends += [{name: np.array(stacked[place]) for name, stacked in held.items()} for place in places]
        return ends

    def fold(self, work: Sequence[Work], rule: Rule, shares: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        """Train any number of sites from the same weights.

        Returns:
            sum_k shares_k (change of site k), in arrays of the caller's own; and each site's mean loss.
        """
        total: dict[str, Any] = {}
        size, losses = self._span(work, rule), []
        with self._whole(rule):
            for part in (slice(start, start + size) for start in range(0, len(work), size)):
                changes, means = self._folded(work[part], rule, shares[part])
                total = {name: total[name].add_(change) for name, change in changes.items()} if total else changes
                losses.append(means)
        return total, np.concatenate(losses)

    @contextmanager
    def _whole(self, rule: Rule) -> Iterator[None]:
        """Train unrecorded; if that fails, perhaps for want of memory, whoever tries again with fewer sites has it."""
        try:
            with self._unrecorded(rule):
                yield
        except BaseException:
            self._buffers.clear()
            for stack in self._stacks.values():
                stack.release()
            raise

    def _unrecorded(self, rule: Rule) -> Any:
        """While this is entered PyTorch records nothing, unless it is asked to."""
        return torch.no_grad()

    def _span(self, work: Sequence[Work], rule: Rule) -> int:
        """How many of these sites are folded at a time."""
        return self.size

    def _folded(self, work: Sequence[Work], rule: Rule, shares: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        visits, losses = self._train(work, rule)
        placed = torch.from_numpy(shares[visits.order]).to(self._device)
        changes = {name: stack.mean_change(placed) for name, stack in self._stacks.items()}
        for name, learned in self._learned.items():
            changes[name] = torch.tensordot(placed.to(learned.dtype), learned, 1)
        return changes, losses

    def _visits(self, work: Sequence[Work]) -> Visits:
        return Visits(work, self._kind, self._device, self._buffers)

    def _train(
        self, work: Sequence[Work], rule: Rule, own: Sequence[Mapping[str, np.ndarray]] = ()
    ) -> tuple[Visits, np.ndarray]:
        """All steps of all sites; each site's mean loss."""
        visits = self._visits(work)
        told = []  # of each step the losses of those at work
        self._begin(rule, fused=not rule.terms)
        self._moment.widths, self._moment.steps = visits.widths, visits.own_steps
        start = {name: stack.start for name, stack in self._stacks.items()}
        memory = Memory(rule.terms, rule, sites=[work[index].state for index in visits.order], like=start)
        start = {name: tensor.unsqueeze(0) for name, tensor in start.items()}
        if own:
            self._go_on([own[index] for index in visits.order], rule)
        halts = Halts([work[index].halt for index in visits.order], self._stacks)
        for visit in visits:
            told.append(self._step(visit))
            left: Named = {name: stack.gradient for name, stack in self._stacks.items() if stack.gradient is not None}
            if rule.terms:
                left = memory.apply(left, self._weights(visit.sites), start)
            for name, gradient in left.items():
                self._stacks[name].move(gradient, rule)
            for stack in self._stacks.values():
                stack.fresh, stack.gradient = False, None
            if halts.after(told[-1]):
                break
        losses = nn.utils.rnn.pad_sequence(told, batch_first=True).sum(0)  # who had no such step adds a zero
        for place, loss in halts.end(visits.own_steps).items():
            losses[place] = loss * visits.own_steps[place]
        self._learned = memory.learn(start, self._weights(len(work)), visits.own_steps)
        return visits, visits.means(losses.cpu().numpy())

    def _go_on(self, own: Sequence[Mapping[str, np.ndarray]], rule: Rule) -> None:
        """Let the sites begin with these weights, in the order of visiting."""
        for name, stack in self._stacks.items():
            stack.fresh, stack.factors = False, None
            if rule.momentum:
                stack.room("velocity", len(own)).zero_()
            for held, weights in zip(stack.first(len(own)), own, strict=True):
                held.copy_(torch.from_numpy(np.array(weights[name])) if weights else stack.start)

    def _weights(self, sites: int) -> dict[str, Any]:
        return {name: stack.now(sites) for name, stack in self._stacks.items()}

    def _begin(self, rule: Rule, *, fused: bool) -> None:
        self._moment.rule, self._moment.fused = rule, fused
        for stack in self._stacks.values():
            stack.fresh, stack.gradient = True, None

    def _step(self, visit: Visit) -> Any:
        """Forward and back: the stacks have moved or hold gradients; each site's mean loss."""
        raise NotImplementedError


class Cohort(Program):
    """A network as operations whose layers with parameters hold those of K sites; the rest of it is as it was."""

    def __init__(self, module: Any, loss: str, size: int = SIZE) -> None:
        super().__init__(module, size)
        if not all(parameter.requires_grad for parameter in module.parameters()):
            raise Refused("frozen weights")
        self._loss = LOSSES[loss]
        self._operations: list[tuple[Operation, tuple[int, ...]]] = []
        self._trains = [False]
        self._compile(module)
        if odd := set(module.state_dict()) - set(self._stacks):
            raise Refused(f"'{sorted(odd)[0]}' belongs to no layer that can be stacked")

    def _unrecorded(self, rule: Rule) -> Any:
        """Where neither a layer nor a term may ask it, it need not even watch views, of which a step makes many."""
        asked = rule.terms or any(isinstance(operation, Local) for operation, _ in self._operations)
        return super()._unrecorded(rule) if asked else torch.inference_mode()

    def _span(self, work: Sequence[Work], rule: Rule) -> int:
        return max(1, ROWS // max(len(site.batches[0]) for site in work)) if _one_step(work, rule) else self.size

    def _folded(self, work: Sequence[Work], rule: Rule, shares: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        """One step of every site, from the same weights: the mean of their gradients is the gradient of their mean.

        So there is one backward pass for all rows together, and no site's own weights are ever written.
        """
        if not _one_step(work, rule):
            return super()._folded(work, rule, shares)
        visits = self._visits(work)
        visit, starts = visits.once(shares)
        self._begin(rule, fused=False)
        each = self._pass(visit)
        changes = {}
        for name, stack in self._stacks.items():
            gradient = stack.gradient[0]
            changes[name] = gradient.mul(-rule.lr * rule.gain).contiguous()
            if rule.decay + rule.pull:
                changes[name].sub_(stack.start, alpha=rule.lr * (rule.decay + rule.pull) * float(shares.sum()))
        sums = np.add.reduceat(each.cpu().numpy(), starts)
        return changes, visits.means(sums / np.diff(starts, append=len(each)))

    def _step(self, visit: Visit) -> Any:
        return self._pass(visit).mul_(visit.weights).view(visit.sites, -1).sum(1)

    def _pass(self, visit: Visit) -> Any:
        """Forward and back; each row's loss."""
        self._moment.sites = visit.sites
        values = [visit.x]
        for operation, sources in self._operations:
            values.append(operation.forward(*[values[place] for place in sources]))
        each, gradient = self._loss(values[-1], visit.y, visit.weights)
        gradients: list[Any] = [None] * len(self._operations) + [gradient]
        for place in range(len(self._operations), 0, -1):
            operation, sources = self._operations[place - 1]
            if gradients[place] is None:
                continue
            wanted = [self._trains[source] for source in sources]
            for source, dx in zip(sources, operation.backward(gradients[place], wanted), strict=True):
                if dx is not None:
                    gradients[source] = dx if gradients[source] is None else gradients[source] + dx
        return each

    def _compile(self, module: Any) -> None:
        """The operations of the traced network; around it a Sequential, so that a single layer is a network too."""
        graph = torch.fx.symbolic_trace(nn.Sequential(module))
        places: dict[Any, int] = {}
        parts = dict(graph.named_modules())
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                places[node] = 0
                continue
            if node.op == "output" or _sizes(node):
                continue
            part = parts[node.target] if node.op == "call_module" else None
            sources = tuple(places[each] for each in node.args if isinstance(each, torch.fx.Node) and each in places)
            stacked = self._layer(node, part)
            operation = stacked or (_plain(node, part, self._moment) if sources else None)
            if operation is None:
                raise Refused(f"'{_name(node) or node.name}' ({_kind(node, part)}) has no stacked form")
            self._operations.append((operation, sources))
            self._trains.append(stacked is not None or any(self._trains[place] for place in sources))
            places[node] = len(self._operations)
        if places.get(node.args[0]) != len(self._operations):
            raise Refused("its output is not the last thing it computes")

    def _layer(self, node: Any, part: Any) -> Operation | None:
        """A layer with parameters, which get their stacks."""
        if part is None:
            return None
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
            raise Refused(f"'{_name(node)}' has hooks")
        prefix = f"{_name(node)}." if _name(node) else ""
        stacks = {key: Stack(f"{prefix}{key}", held) for key, held in part.named_parameters()}
        if not stacks or (operation := layer(part, stacks, self._moment)) is None:
            return None
        if any(stack.name in self._stacks for stack in stacks.values()):
            raise Refused(f"'{_name(node)}' is used twice")
        self._stacks |= {stack.name: stack for stack in stacks.values()}
        return operation


def _one_step(work: Sequence[Work], rule: Rule) -> bool:
    return not rule.terms and all(len(site.batches) == 1 for site in work)


def _name(node: Any) -> str:
    """A layer's or a parameter's name in the network, which stands in a Sequential."""
    return str(node.target).partition(".")[2] if node.op in ("call_module", "get_attr") else ""


def _kind(node: Any, part: Any) -> str:
    if part is not None:
        return type(part).__name__
    return "a parameter" if node.op == "get_attr" else str(getattr(node.target, "__name__", node.target))


def _sizes(node: Any) -> bool:
    """It asks for the number of samples: x.size(0), or x.shape[0] in two nodes."""
    if not isinstance(node, torch.fx.Node) or len(node.args) < 2:
        return False
    subject, what = node.args[:2]
    if node.target is operator.getitem:
        return what == 0 and _sizes(subject)
    return (node.target, what) in (("size", 0), (getattr, "shape"))


def _plain(node: Any, part: Any, moment: Moment) -> Operation | None:
    """What has no parameters and treats each sample by itself: it works on a stack as on any batch."""
    rest, target = node.args[1:], part if part is not None else node.target
    inplace = getattr(part, "inplace", False) or node.kwargs.get("inplace") or target in IN_PLACE
    if inplace and len(node.args[0].users) > 1:  # whoever else reads it may find it changed
        return None
    if type(part) is nn.ReLU or target in RELUS:
        return Relu()
    if target in SUMS and len(rest) == 1 and isinstance(rest[0], torch.fx.Node) and not node.kwargs:
        return Local(lambda sites, x, y: x + y, (), moment)
    if type(part) is nn.Flatten and part.start_dim >= 1:
        return Reshape(lambda x: x.flatten(part.start_dim, part.end_dim))
    if target in FLATTENS and rest and rest[0] >= 1 and not node.kwargs:
        return Reshape(lambda x: x.flatten(*rest))
    if target in VIEWS and (rest[0] == -1 or _sizes(rest[0])) and all(isinstance(length, int) for length in rest[1:]):
        return Reshape(lambda x: x.reshape(len(x), *rest[1:]))
    if inplace or len(node.all_input_nodes) > 1:
        return None
    bare = type(part) in (nn.LayerNorm, nn.GroupNorm) and not list(part.parameters())
    if type(part) in PLAIN or bare:
        return Local(lambda sites, x: part(x), (), moment)
    if part is None and target in FUNCTIONS:
        function = target if callable(target) else getattr(torch, target)
        return Local(lambda sites, x: function(x, *rest, **node.kwargs), (), moment)
    return None


def program(module: Any, loss: Any) -> Cohort:
    """The module as a program over stacks.

    Raises:
        Refused: it has no such form, and why.
    """
    if loss not in LOSSES:
        raise Refused("a loss of one's own")
    try:
        return Cohort(module, loss, size(module))
    except (torch.fx.proxy.TraceError, TypeError, AttributeError, RuntimeError) as error:
        raise Refused(f"it cannot be traced: {error}") from error


def size(module: Any) -> int:
    """How many sites stand in a cohort."""
    number = min(SIZE, LARGEST // max(1, weight(module)))
    if number < 2:
        raise Refused("it is too large to be stacked")
    return number


def weight(module: Any) -> int:
    """Bytes of its state."""
    return sum(int(tensor.nbytes) for tensor in module.state_dict().values())
