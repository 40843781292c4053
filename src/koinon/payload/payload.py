"""A payload: named arrays and plain values, and a word that says what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from koinon.errors import PayloadError

Arrays: TypeAlias = Mapping[str, np.ndarray]
"""Named arrays: a model, an update, a state.  The order of names is part of it."""

Plain: TypeAlias = Any
"""None, bool, int, float, str, and lists and string-keyed dicts of these."""

Kind: TypeAlias = Literal["weights", "weight_diff", "metrics", "statistics"]


@dataclass(frozen=True)
class Payload:
    """What crosses between server and site.

    Args:
        kind: `weights` (a whole model), `weight_diff` (a site's change to it), `metrics` or `statistics`.
        arrays: named arrays, each of its own dtype and shape.
        values: plain values beside them, such as `{"samples": 128}`.

    Raises:
        PayloadError: the kind is unknown.
    """

    kind: Kind
    arrays: Arrays = field(default_factory=dict)
    values: Mapping[str, Plain] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise PayloadError(f"a payload has no kind {self.kind!r}: use one of {', '.join(get_args(Kind))}")

    def with_arrays(self, arrays: Arrays) -> Payload:
        """The same payload around other arrays."""
        return replace(self, arrays=arrays)
