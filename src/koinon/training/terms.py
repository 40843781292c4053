"""Local terms: what a method adds to the gradient of each local step.

A term is written once, with the operators that NumPy, PyTorch and JAX share, and serves one site as well as a
cohort: every array has the sites as its first axis, [K, ...]; K is 1 where one site is trained alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from koinon.errors import JobError, SettingsError

Named: TypeAlias = Mapping[str, Any]
"""Parameter name -> array [K, ...], of the framework that trains."""


CONTROL = "control"
"""Under this name control variates travel: `control/weight`."""


@dataclass(frozen=True)
class Term:
    """A transformation of the gradient.

    Args:
        name: what a run's record calls it.
        apply: (gradient, weights, start, state) -> gradient.  `start` are the weights with which the local training
            began, equal for all sites: [1, ...].  Writes nothing in place.  Weight decay and momentum act on what it
            returns.  `state["values"]` are the plain values that the controller sent along.
        linear: it returns a g + b w + c start, the same a, b, c for every entry and step, and uses no state.
        remember: for a term whose sites remember arrays of the weights' shapes, and whose controller sends others
            along as `name/weight`: (state, start, end, rate) -> what each site remembers from now on.  `state` is
            {"own": what it remembers, zeros at first [K, ...]; "common": what was sent [1, ...]}; `end` are the
            weights after the training, `rate` the step size times the steps taken [K].  The change of what is
            remembered goes back under the same names.
        personal: it acts on a second training, of a model of the site's own, which goes on from what that was last
            time; `start` is still the global model as it came, and so is the model of a site that begins.
    """

    name: str
    apply: Callable[[Named, Named, Named, Mapping[str, Any]], Named]
    linear: bool = False
    remember: Callable[[Mapping[str, Any], Named, Named, Any], Named] | None = None
    personal: bool = False


def coefficients(terms: Sequence[Term]) -> tuple[float, float, float] | None:
    """(a, b, c) of a g + b w + c start, if that is what these terms come to, so that it can be done in one pass.

    >>> coefficients([proximal(0.5)])
    (1.0, 0.5, -0.5)
    """
    if not all(term.linear for term in terms):
        return None
    gradient, weights, start = ({"": row} for row in np.eye(3)[:, None])
    for term in terms:
        gradient = dict(term.apply(gradient, weights, start, {}))
    a, b, c = gradient[""][0].tolist()
    return a, b, c


def proximal(mu: float | None = None) -> Term:
    """Stay near the global model (FedProx; Li et al., 2020): adds mu/2 ||w - start||^2 to the loss.

    g <- g + mu (w - start).

    Args:
        mu: 0 is FedAvg; by default what the controller sends along, as `koinon.FedProx` does.

    Raises:
        SettingsError: mu is negative.
    """
    if mu is not None and not mu >= 0:
        raise SettingsError(f"proximal: mu must be 0 or more, not {mu}")

    def apply(gradient: Named, weights: Named, start: Named, state: Mapping[str, Any]) -> Named:
        near = state["values"].get("mu") if mu is None else mu
        if near is None:
            raise JobError("proximal() needs mu, or a controller that sends it along: koinon.FedProx")
        return {name: g + near * (weights[name] - start[name]) for name, g in gradient.items()}

    return Term("proximal()" if mu is None else f"proximal({mu:g})", apply, linear=mu is not None)


def ditto(pull: float) -> Term:
    """A model of each site's own, near the global one (Ditto; Li et al., 2021).

    Beside the global model w, which is trained as without this, a site trains its own v over the same batches:

        v <- v - lr (g(v) + pull (v - w)),  with w as it came.

    v begins as the first w that the site gets, stays there from round to round, and never leaves it.  Whoever holds it
    evaluates both: `accuracy` and `loss` are w's, `personal_accuracy` and `personal_loss` are v's.

    Args:
        pull: lambda in the paper, which tries 0.05 to 2; 0 is training by oneself.

    Raises:
        SettingsError: pull is negative or not finite.
    """
    if not 0 <= pull < math.inf:
        raise SettingsError(f"ditto: the pull must be 0 or more, not {pull}")
    return replace(proximal(pull), name=f"ditto({pull:g})", personal=True)


def clip_gradient(bound: float) -> Term:
    """Scale each site's gradient down to a Euclidean norm of at most `bound`, over all arrays together.

    g <- g * min(1, bound / ||g||).

    Raises:
        SettingsError: bound is not a positive number.
    """
    if not bound > 0:
        raise SettingsError(f"clip_gradient: the bound must be above 0, not {bound}")

    def apply(gradient: Named, weights: Named, start: Named, state: Mapping[str, Any]) -> Named:
        squares = sum((g * g).reshape(len(g), -1).sum(1) for g in gradient.values())
        scale = (squares / bound**2).clip(1) ** -0.5
        return {name: g * scale.reshape(-1, *[1] * (g.ndim - 1)) for name, g in gradient.items()}

    return Term(f"clip_gradient({bound:g})", apply)


def control_variates() -> Term:
    """Take the site's drift out of each of its steps (SCAFFOLD; Karimireddy et al., 2020).

    g <- g - c_i + c;  after T steps of size lr (their option II)  c_i <- c_i - c + (start - end) / (T lr).

    For plain SGD, and the controller `koinon.Scaffold`, which sends c and gathers its changes.
    """

    def apply(gradient: Named, weights: Named, start: Named, state: Mapping[str, Any]) -> Named:
        own, common = state["own"], state["common"]
        return {name: g - own[name] + common[name] for name, g in gradient.items()}

    def remember(state: Mapping[str, Any], start: Named, end: Named, rate: Any) -> Named:
        own, common = state["own"], state["common"]
        drift = {name: (start[name] - w) / rate.reshape(-1, *[1] * (w.ndim - 1)) for name, w in end.items()}
        return {name: own[name] - common[name] + d for name, d in drift.items()}

    return Term(CONTROL, apply, remember=remember)
