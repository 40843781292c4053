"""Declared local training in PyTorch: model factory, loss and optimiser are data.

The loop is lean on purpose: the model is built once a worker and weights are copied in place; batches are
slices of arrays, not a DataLoader; the usual optimisers are a few `foreach` calls (the first use of
`torch.optim` alone costs a second).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from koinon.errors import DataError, JobError, SettingsError, extra, nearest
from koinon.payload import Arrays, Payload, tree
from koinon.streams import number
from koinon.task import Context, Worker
from koinon.training.batches import Epochs, batches, check
from koinon.training.boost import Boosted, Halt
from koinon.training.forms import FORMS, Form, fastest, forms
from koinon.training.layers import Rule
from koinon.training.layers import rule as make_rule
from koinon.training.loop import seeded, sgd, state_of, wrapped, writable
from koinon.training.memory import Memory
from koinon.training.terms import Term
from koinon.training.visits import Work

torch: Any = extra("torch", "torch")

Metric: TypeAlias = Callable[[Any, Any], Any]
"""(outputs, targets) -> a number, both tensors over all held-out samples of a site."""

LOSSES = {"cross_entropy": torch.nn.functional.cross_entropy, "mse": torch.nn.functional.mse_loss}
EVALUATION_BATCH = 1000
PERSONAL = "personal"
"""Under this name a site remembers a model of its own."""
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
        terms: what else acts on the gradient of each step, in this order, such as `proximal` (koinon.training.terms).
        epochs: passes over the site's data in a round; or how many, drawn for each site and round (`partial_work`), or
            found by the loss (`Boosted`).
        steps: instead of epochs, batches in a round.
        batch_size: samples a step; the last batch of an epoch may be smaller.
        metrics: name -> function (outputs, targets) -> number, for evaluation beside the loss; by default
            the accuracy, where targets are class labels.
        device: such as `cpu` or `cuda`; by default CUDA where there is one.
        form: how several sites are trained: `cohort`, in one tensor program of layers made for it; `vmap`, by
            torch.func.vmap; `loop`, one after the other; `auto`, whichever is faster.
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
    terms: Sequence[Term] = ()
    epochs: int | Epochs = 1
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
        if self.form not in FORMS:
            raise SettingsError(f"there is no form '{self.form}': {nearest(self.form, FORMS)}")
        if not 0 <= self.momentum < 1:
            raise SettingsError(f"momentum must lie in [0, 1), not {self.momentum}")
        if isinstance(self.epochs, Boosted) and self.steps:
            raise SettingsError(f"steps={self.steps} leaves {self.epochs} no say: give one of them")

    def initial(self, seed: int) -> Arrays:
        """The module's own first weights, drawn with the run's seed."""
        with seeded(number(seed, "model")):
            module = self.model()
        return {name: np.array(tensor.numpy()) for name, tensor in state_of(module).items()}

    def open(self) -> Worker:
        """Build the module, once a worker."""
        return _Trainer(self)


def batch_norms(model: Callable[[], Any]) -> tuple[str, ...]:
    """Patterns for the arrays of a network's batch norms, their statistics among them, as `koinon.exclude` takes them.

    `koinon.exclude(*koinon.torch.batch_norms(Net))` as upload filter is FedBN (Li et al., 2021): all is averaged but
    the batch norms; each site trains, and is evaluated, with its own.

    Args:
        model: as `LocalSGD` takes it.

    Raises:
        JobError: it has none.
    """
    with seeded(0):
        parts = dict(model().named_modules())
    kind = torch.nn.modules.batchnorm._BatchNorm
    found = tuple(f"{name}.*" for name, part in parts.items() if isinstance(part, kind) and part.state_dict())
    if not found:
        raise JobError("this network has no batch norm with anything to keep: FedBN would be FedAvg")
    return found


class _Trainer:
    """A module that takes weights and trains or evaluates, for one site after the other."""

    def __init__(self, settings: LocalSGD) -> None:
        self.settings = settings
        self.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with seeded(0):
            self.module = settings.model().to(self.device)
        self.loss = LOSSES[settings.loss] if isinstance(settings.loss, str) else settings.loss
        kinds = {type(part).__name__ for part in self.module.modules()}
        if "Conv2d" in kinds and self.device == "cpu":
            self.module.to(memory_format=torch.channels_last)  # 10 to 15 % of a convolution step on a CPU
        self.state = state_of(self.module)
        self.trained = {name: held for name, held in self.module.named_parameters() if held.requires_grad}
        self.parameters = list(self.trained.values())
        self.terms = [term for term in settings.terms if not term.personal]
        self.personal = [term for term in settings.terms if term.personal]
        self.tail = 2 if any("BatchNorm" in kind for kind in kinds) else 1
        # A small dense step is over before a second thread has woken up, and on a busy machine waits for it.
        small = sum(parameter.numel() for parameter in self.parameters) * settings.batch_size < SMALL_STEP
        self.threads = 1 if small and not any("Conv" in kind for kind in kinds) else torch.get_num_threads()
        named = settings.loss if isinstance(settings.loss, str) else None
        self.options = forms(
            self.module, self.loss, named=named, wanted=settings.form, plain=settings.optimizer == "sgd"
        )
        self._use(self.options[0])

    def __call__(self, payload: Payload, context: Context) -> Payload:
        self._take(payload.arrays)
        with self._ready(context.number("torch")):
            return self._train(payload, context) if context.task == "train" else self._evaluate(payload, context)

    def probe(self, data: Any, form: str = "") -> str:
        """Measure the forms in question on a site's training data, if there are several; some milliseconds.

        Args:
            data: the site's.
            form: the one to take unmeasured, if it is in question.

        Returns:
            The form's name, for `form=` of the workers of the same job; `forms` says why.
        """
        if known := [option for option in self.options if option.name == form]:
            self._use(known[0])
        elif data is not None and len(data) and (len(self.options) > 1 or self.form.name == "vmap"):
            with self._ready(0):
                self._use(fastest(self.options, lambda form: self._seconds(form, data)))
        return self.form.name

    def together(self, payload: Payload, contexts: Sequence[Context]) -> list[Payload]:
        """Train several sites from the same weights in one tensor program.

        Their arrays are views that last until the next call.
        """
        self._take(payload.arrays)
        work = self._work(payload, contexts)
        with self._ready(contexts[0].number("torch")):
            before = self._before(payload, contexts)
            self._train_own(payload, contexts, work)
            updates, losses = self.program.train(work, self._rule(self._lr(contexts[0]), payload))
        return [
            Payload("weight_diff", self._named(update, payload.arrays), values)
            for update, values in zip(updates, _values(work, losses, before), strict=True)
        ]

    def folded(self, payload: Payload, contexts: Sequence[Context]) -> tuple[Payload, list[dict[str, Any]]]:
        """Train several sites from the same weights; the mean of their changes, weighted by samples.

        Any number of them: they are taken as many at a time as is good.  No site's own change is ever written, so
        what is not finite shows in the mean only; `together` tells whose it is.

        Returns:
            The mean, in arrays of the caller's own, of the sites' total weight; and each site's values.
        """
        self._take(payload.arrays)
        work = self._work(payload, contexts)
        sizes = np.array([len(site.data) for site in work], float)
        with self._ready(contexts[0].number("torch")):
            before = self._before(payload, contexts)
            self._train_own(payload, contexts, work)
            rule = self._rule(self._lr(contexts[0]), payload)
            changes, losses = self.program.fold(work, rule, sizes / sizes.sum())
        arrays = self._named({name: tensor.cpu().numpy() for name, tensor in changes.items()}, payload.arrays)
        return Payload("weight_diff", arrays, {"weight": int(sizes.sum())}), _values(work, losses, before)

    def _work(self, payload: Payload, contexts: Sequence[Context]) -> list[Work]:
        work = []
        for context in contexts:
            _held(data := context.data.train)
            batches = list(self._batches(len(data), context))
            work.append(Work(data, batches, context.state, self._halt(len(batches), payload)))
        return work

    def _halt(self, steps: int, sent: Payload) -> Halt | None:
        """When a site may stop, if it may."""
        epochs = self.settings.epochs
        return epochs.halt(steps, sent.values) if isinstance(epochs, Boosted) else None

    def _rule(self, lr: float, sent: Payload, *, personal: bool = False) -> Rule:
        self.module.train()
        settings, along = self.settings, {"common": self._sent(sent.arrays), "values": sent.values}
        terms = self.personal if personal else self.terms
        return make_rule(lr, settings.momentum, decay=settings.weight_decay, terms=terms, **along)

    def _sent(self, model: Arrays) -> dict[str, dict[str, Any]]:
        """What came along for the terms that remember something, by their names: [1, ...]."""
        sent: dict[str, dict[str, Any]] = {}
        for term in (term for term in self.settings.terms if term.remember):
            found = {name.removeprefix(f"{term.name}/"): model[name] for name in model if name not in self.state}
            if not found.keys() >= self.trained.keys():
                raise JobError(f"the term '{term.name}' needs what a controller of its own sends along; none came")
            tensors = {name: torch.from_numpy(np.array(found[name])).to(self.device) for name in self.trained}
            sent[term.name] = {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}
        return sent

    def _named(self, arrays: Arrays, model: Arrays) -> dict[str, np.ndarray]:
        """In the order of the model's own names; what is not trained has not changed."""
        return {
            name: arrays[name] if name in arrays else np.zeros_like(array)
            for name, array in tree.floating(model).items()
        }

    @contextmanager
    def _ready(self, seed: int) -> Iterator[None]:
        """As many threads as help, and random numbers from this seed, for dropout and the like."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with seeded(seed, self.device):
                yield
        finally:
            torch.set_num_threads(before)

    def _use(self, form: Form) -> None:
        self.form, self.forms = form, {"train": f"{form.name}: {form.why}"}
        self.program: Any = form.program
        self.cohorts = {} if form.program is None else {"train": form.program.size}

    def _seconds(self, form: Form, data: Any) -> float:
        """One local step of one site, measured on a first batch."""
        zeros = {
            f"{term.name}/{name}": np.zeros(held.shape, np.float32)
            for term in self.settings.terms
            for name, held in self.trained.items()
        }
        rows = np.arange(min(len(data), self.settings.batch_size))
        moves = self._rule(self.settings.lr, Payload("weights", zeros, {"mu": 0.0}))
        program, times = form.program, []
        if program is None:
            x, y = self._tensors(data.take(rows))
            step, _ = self._stepper(moves, {})
        for _ in range(3):
            began = time.perf_counter()
            if program is not None:
                program.train([Work(data, [rows])] * program.size, moves)
            else:
                float(step(x, y))  # read, so that a GPU has come to the end of it
            times.append(time.perf_counter() - began)
        return min(times[1:]) / (1 if program is None else program.size)

    def _lr(self, context: Context) -> float:
        return self.settings.lr * self.settings.lr_decay ** max(0, context.round - 1)

    def _batches(self, samples: int, context: Context) -> Iterator[np.ndarray]:
        """The batches of one local training."""
        settings, epochs = self.settings, self.settings.epochs
        if not isinstance(epochs, int):
            epochs = epochs(context.stream("epochs"))
        if samples <= settings.batch_size:  # a batch is a sum: in whatever order, so none is drawn
            return itertools.islice(
                itertools.repeat(np.arange(samples), settings.steps or epochs), settings.max_batches
            )
        order = batches(
            samples,
            settings.batch_size,
            random=context.stream("batches"),
            epochs=epochs,
            steps=settings.steps,
            tail=self.tail,
        )
        return itertools.islice(order, settings.max_batches)

    def _take(self, model: Arrays) -> None:
        """Copy weights into the module, in place."""
        along = tuple(f"{term.name}/" for term in self.settings.terms if term.remember)
        if odd := [name for name in sorted(model.keys() ^ self.state.keys()) if not name.startswith(along or "\0")]:
            raise JobError(f"the global model and the module differ in '{odd[0]}': is it the same model code?")
        for name, tensor in self.state.items():
            if tensor.device.type == "cpu":
                np.copyto(tensor.numpy(), model[name])
            else:
                tensor.copy_(torch.from_numpy(np.array(model[name])))

    def _train(self, payload: Payload, context: Context) -> Payload:
        x, y = self._tensors(context.data.train)
        before, batches = self._before(payload, [context]), list(self._batches(len(x), context))
        if self.personal:
            self._train_own_alone(payload, context, batches)
        (step, learned), losses = self._stepper(self._rule(self._lr(context), payload), context.state), list[Any]()
        halt = self._halt(len(batches), payload)
        for batch in batches:
            index = torch.from_numpy(batch).to(self.device)
            losses.append(step(x[index], y[index]))
            if halt and halt(losses):
                break
        # Read once: asking for each step's loss would stop a GPU at every step.
        mean_loss = halt.loss(losses) if halt else float(torch.stack(losses).mean())
        arrays = {name: tensor.cpu().numpy() for name, tensor in self.state.items()}
        for name, change in learned(len(losses)).items():
            arrays[name] = payload.arrays[name] + change[0].cpu().numpy()
        arrays |= {name: array for name, array in payload.arrays.items() if name not in arrays}
        return Payload("weights", arrays, {"weight": len(x), "metrics": {"loss": mean_loss, **before[0]}})

    def _train_own(self, payload: Payload, contexts: Sequence[Context], work: Sequence[Work]) -> None:
        """The sites' own models, for terms that are personal: first, as whatever trains next takes the same memory.

        With random numbers of their own, so that the global model is what it would be without them.
        """
        if self.personal:
            rule = self._rule(self._lr(contexts[0]), payload, personal=True)
            with seeded(contexts[0].number(PERSONAL), self.device):
                own = self.program.train_on(work, rule, [site.state.get(PERSONAL, {}) for site in work])
            for context, model in zip(contexts, own, strict=True):
                context.state[PERSONAL] = model

    def _train_own_alone(self, payload: Payload, context: Context, batches: Sequence[np.ndarray]) -> None:
        """The same by the loop; the module is left as it came."""
        x, y = self._tensors(context.data.train)
        start = {name: held.detach().clone().unsqueeze(0) for name, held in self.trained.items()}
        self._take({**payload.arrays, **context.state.get(PERSONAL, {})})
        with seeded(context.number(PERSONAL), self.device):
            step, _ = self._stepper(self._rule(self._lr(context), payload, personal=True), {}, start)
            for batch in batches:
                index = torch.from_numpy(batch).to(self.device)
                step(x[index], y[index])
        context.state[PERSONAL] = {name: np.array(tensor.cpu().numpy()) for name, tensor in self.state.items()}
        self._take(payload.arrays)

    def _evaluate(self, payload: Payload, context: Context) -> Payload:
        x, y = self._tensors(context.data.test)
        metrics = self._judged(x, y)
        if own := context.state.get(PERSONAL):
            self._take({**payload.arrays, **own})
            metrics |= {f"{PERSONAL}_{name}": value for name, value in self._judged(x, y).items()}
        return Payload("metrics", {}, {"weight": len(x), "metrics": metrics})

    def _judged(self, x: Any, y: Any) -> dict[str, float]:
        outputs = self._outputs(x)
        metrics = {name: float(metric(outputs, y)) for name, metric in self._metrics(outputs, y).items()}
        return metrics | {"loss": float(self.loss(outputs, y))}

    def _outputs(self, x: Any) -> Any:
        """The module's, with the weights of now."""
        self.module.eval()
        with torch.inference_mode():
            # Cloned, as PyTorch's own memory is aligned and an array's may not be: the last bits depend on it.
            return torch.cat([self.module(part.clone()) for part in x.split(EVALUATION_BATCH)])

    def _before(self, payload: Payload, contexts: Sequence[Context]) -> list[dict[str, float]]:
        """Metrics that the controller wants of the model as it came: `loss_before`, over all training data."""
        if "loss_before" not in payload.values.get("wants", ()):
            return [{} for _ in contexts]
        tensors = (self._tensors(context.data.train) for context in contexts)
        return [{"loss_before": float(self.loss(self._outputs(x), y))} for x, y in tensors]

    def _metrics(self, outputs: Any, targets: Any) -> Mapping[str, Metric]:
        labels = not targets.is_floating_point() and outputs.ndim == 2
        return self.settings.metrics or ({"accuracy": _accuracy} if labels else {})

    def _optimizer(self, lr: float) -> Callable[[Sequence[Any]], None]:
        """A fresh optimiser: gradients -> one step of the parameters in place."""
        if callable(self.settings.optimizer):
            return wrapped(self.settings.optimizer(self.parameters), self.parameters)
        return sgd(self.parameters, lr, self.settings.momentum, self.settings.weight_decay)

    def _stepper(
        self, rule: Rule, remembered: MutableMapping[str, Any], near: Mapping[str, Any] | None = None
    ) -> tuple[Callable[[Any, Any], Any], Callable[[int], dict[str, Any]]]:
        """A local training that starts from the weights of now; the site's own, if it stays near others.

        Returns:
            One step of it: (x, y) -> the loss before it; and at its end: steps -> the change of what is remembered.
        """
        update, terms = self._optimizer(rule.lr), self.personal if near else self.terms
        like = {name: parameter.detach() for name, parameter in self.trained.items()}
        memory = Memory(terms, rule, sites=[remembered], like=like)
        now = {name: tensor.unsqueeze(0) for name, tensor in like.items()}
        start = near or ({name: tensor.clone() for name, tensor in now.items()} if terms else {})

        def step(x: Any, y: Any) -> Any:
            loss = self.loss(self.module(x), y)
            gradients = torch.autograd.grad(loss, self.parameters)
            if terms:
                named = {name: gradient.unsqueeze(0) for name, gradient in zip(self.trained, gradients, strict=True)}
                changed = memory.apply(named, now, start)
                gradients = [changed[name].squeeze(0) for name in self.trained]
            update(gradients)
            return loss.detach()

        return step, lambda steps: memory.learn(start, now, np.array([steps]))

    def _tensors(self, data: Any) -> tuple[Any, Any]:
        _held(data)
        x, y = (torch.from_numpy(writable(data[column])).to(self.device) for column in ("x", "y"))
        # Numbers as NumPy makes them by default are not what PyTorch computes with: float64 beside float32
        # weights, int32 labels.
        x = x.to(self.parameters[0].dtype) if x.is_floating_point() else x
        return x, (y.to(self.parameters[0].dtype) if y.is_floating_point() else y.long())


def _held(data: Any) -> None:
    if data is None or not len(data):
        raise DataError("this site holds no such data")


def _values(work: Sequence[Work], losses: np.ndarray, before: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """What each site says beside its arrays."""
    return [
        {"weight": len(site.data), "metrics": {"loss": float(loss), **more}}
        for site, loss, more in zip(work, losses, before, strict=True)
    ]


def _accuracy(outputs: Any, targets: Any) -> Any:
    return (outputs.argmax(1) == targets).double().mean()
