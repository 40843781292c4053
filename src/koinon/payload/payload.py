"""A payload: named arrays and plain values, and a word that says what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Arrays: TypeAlias = Mapping[str, "np.ndarray"]
"""Named arrays: a model, an update, a state.  The order of names is part of it."""

Plain: TypeAlias = Any
"""None, bool, int, float, str, and lists and string-keyed dicts of these."""

Kind: TypeAlias = Literal["weights", "weight_diff", "metrics", "statistics"]
"""What a payload holds; a closed list, checked where bytes come in."""


@dataclass
class Payload:
    """What crosses between server and site.

    Args:
        kind: `weights` (a whole model), `weight_diff` (a site's change to it), `metrics` or `statistics`.
        arrays: named arrays, each of its own dtype and shape.
        values: plain values beside them, such as `{"samples": 128}`.
    """

    kind: Kind
    arrays: Arrays = field(default_factory=dict)
    values: Mapping[str, Plain] = field(default_factory=dict)
