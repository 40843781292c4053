"""Bytes <-> named arrays and plain values.

The form is a safetensors file, readable by anything that reads safetensors: every array is a tensor under
its path ("model/fc1.weight"), and the metadata entry `koinon` holds the rest as JSON, in which
`{"$array": path}` stands where an array was.  Nothing in it can be executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import safetensors
import safetensors.numpy

from koinon.errors import PayloadError
from koinon.payload.payload import Arrays, Kind, Payload, Plain

MARK = "$array"
WIRE = ("U64", "I64", "F64", "C64", "F32", "U32", "I32", "F16", "U16", "I16", "I8", "U8", "BOOL")
"""The types of arrays that a file may hold, as safetensors calls them, and in its order: the widest first."""

_json = partial(json.dumps, separators=(",", ":"), ensure_ascii=False)

LONG = 1 << 10
"""Characters of all names of a mapping from which on their count is not remembered."""

MAX_BYTES = 16 << 30
"""What `decode` takes before it refuses, unless told otherwise."""


def encode(payload: Payload) -> bytes:
    """A payload as bytes.

    Raises:
        PayloadError: a value is neither plain nor an array, or an array has a dtype without a wire form.
    """
    return pack(vars(payload))


def decode(data: bytes, limit: int = MAX_BYTES) -> Payload:
    """The payload in these bytes.

    Raises:
        PayloadError: more bytes than `limit`, not a safetensors file, or not a payload.
    """
    if len(data) > limit:
        raise PayloadError(f"a payload of {len(data):,} bytes is over the limit of {limit:,}")
    return _payload(unpack(data))


def _payload(tree: Any) -> Payload:
    """What was decoded, if it is a payload."""
    if not isinstance(tree, dict) or set(tree) != {"kind", "arrays", "values"}:
        raise PayloadError("these bytes hold no payload: kind, arrays and values are expected")
    if not isinstance(tree["arrays"], dict) or not isinstance(tree["values"], dict):
        raise PayloadError("these bytes hold no payload: arrays and values must be named")
    if not all(isinstance(array, np.ndarray) for array in tree["arrays"].values()):
        raise PayloadError("these bytes hold no payload: something else stands among its arrays")
    if tree["kind"] not in get_args(Kind):
        raise PayloadError(f"a payload has no kind {tree['kind']!r}: known are {', '.join(get_args(Kind))}")
    return Payload(tree["kind"], tree["arrays"], tree["values"])


def save(payload: Payload, path: Path) -> None:
    """The bytes of a payload in a file, without a second copy of its arrays in memory.

    Raises:
        PayloadError: as `encode`.
    """
    head, arrays = _laid_out(vars(payload))
    with path.open("wb") as file:
        file.write(head)
        file.writelines(np.ascontiguousarray(array).data for array in arrays)


def load(path: Path, limit: int = MAX_BYTES) -> Payload:
    """The payload in a file, as `decode` has it from bytes."""
    if (length := path.stat().st_size) > limit:
        raise PayloadError(f"a payload of {length:,} bytes is over the limit of {limit:,}")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _payload(_restored(file.metadata(), arrays))
    except (safetensors.SafetensorError, OSError) as cause:
        raise PayloadError(f"these bytes are no safetensors file: {cause}") from cause


def size(payload: Payload) -> int:
    """How many bytes `encode` would make, without making them.

    A virtual site's answer is counted and never written.  Most hold named numbers beside their arrays, and to write
    even those would take longer than all else that happens to the answer.
    """
    said, mappings = 0, [payload.values]
    for values in mappings:
        try:
            said += _around(tuple(values))
        except ValueError:
            return _size(payload)
        for value in values.values():
            kind = type(value)
            if kind is int or (kind is float and math.isfinite(value)):
                said += len(repr(value))
            elif kind is dict:
                mappings.append(value)
            else:
                return _size(payload)
    text, body = _bare(payload.kind, tuple([(name, a.dtype, a.shape) for name, a in payload.arrays.items()]))
    return 8 + -(-(text + said) // 8) * 8 + body


def _size(payload: Payload) -> int:
    """The same of any payload."""
    head, arrays = _laid_out(vars(payload))
    return len(head) + sum(array.nbytes for array in arrays)


@lru_cache(maxsize=1 << 10)
def _around(names: tuple[str, ...]) -> int:
    """Bytes of a mapping without its values, in JSON within JSON.

    Raises:
        ValueError: it must be written to be known; or it is long, and a stranger's: what raises is not kept.
    """
    plain = all(type(name) is str and name.isidentifier() and name.isascii() for name in names)
    if not plain or (length := sum(map(len, names))) > LONG:
        raise ValueError(names)
    return length + len(r"\"\": , ") * len(names) or len("{}")  # the braces take the last comma's place


@lru_cache(maxsize=64)
def _bare(kind: Kind, like: tuple[tuple[str, np.dtype, tuple[int, ...]], ...]) -> tuple[int, int]:
    """Bytes of the head's text, but for its values, and of such arrays.  Who sends the same model says the rest."""
    none = Payload(kind, {name: np.broadcast_to(np.zeros((), dtype), shape) for name, dtype, shape in like})
    head, arrays = _laid_out(vars(none))
    return len(head.rstrip()) - 8 - len("{}"), sum(array.nbytes for array in arrays)


def pack(tree: Plain | Arrays, **notes: str) -> bytes:
    """Any nesting of string-keyed dicts and lists around arrays and plain values, as bytes.

    Args:
        tree: what to pack.
        notes: further metadata for whoever opens the file with another program; `unpack` ignores them.

    Raises:
        PayloadError: something in it is neither.
    """
    head, arrays = _laid_out(tree, **notes)
    return b"".join([head, *(np.ascontiguousarray(array).data for array in arrays)])


def unpack(data: bytes) -> Any:
    """What `pack` was given.

    Raises:
        PayloadError: not the bytes of a tree.
    """
    try:
        arrays = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as cause:
        raise PayloadError(f"these bytes are no safetensors file: {cause}") from cause
    return _restored(metadata, arrays)


def _restored(metadata: Mapping[str, str] | None, arrays: Mapping[str, np.ndarray]) -> Any:
    """A tree from its skeleton, which is among the metadata, and its arrays."""
    if not metadata or "koinon" not in metadata:
        raise PayloadError("these bytes are a safetensors file that Koinon did not write")
    try:
        return _restore(json.loads(metadata["koinon"]), arrays)
    except KeyError as cause:
        raise PayloadError(f"the array {cause} is announced but missing") from cause
    except (ValueError, TypeError) as cause:
        raise PayloadError(f"these bytes hold no tree: {cause}") from cause
    except RecursionError as cause:
        raise PayloadError("these bytes hold values nested without end") from cause


def _laid_out(tree: Any, **notes: str) -> tuple[bytes, list[np.ndarray]]:
    """A file's head, and the arrays in the order in which they follow it."""
    named: dict[str, np.ndarray] = {}
    about = {**notes, "koinon": json.dumps(_flatten(tree, "", named))}
    table, order = _table(tuple((name, array.dtype, array.shape) for name, array in named.items()))
    text = f'{{"__metadata__":{_json(dict(sorted(about.items())))}{table and ","}{table}}}'.encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [named[name] for name in order]


@lru_cache(maxsize=64)
def _table(arrays: tuple[tuple[str, np.dtype, tuple[int, ...]], ...]) -> tuple[str, list[str]]:
    """The entries of such arrays in a head, and the order of their names.  A model's are written once."""
    kinds: dict[str, str] = {}
    for name, dtype, _ in arrays:
        kinds[name] = "BOOL" if dtype.kind == "b" else f"{dtype.kind.upper()}{dtype.itemsize * 8}"
        if kinds[name] not in WIRE:
            raise PayloadError(f"'{name}' is of type {dtype}, which has no wire form")
    entries: dict[str, Any] = {}
    end = 0
    for name, dtype, shape in sorted(arrays, key=lambda array: (WIRE.index(kinds[array[0]]), array[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": (begin, end)}
    return _json(entries)[1:-1], list(entries)


def _flatten(tree: Any, path: str, arrays: dict[str, np.ndarray]) -> Plain:
    """The tree with a mark in place of each array; the arrays go into `arrays` under their paths."""
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, np.ndarray):
        if path in arrays:
            raise PayloadError(f"two arrays have the path '{path}'")
        arrays[path] = tree if tree.dtype.isnative else tree.astype(tree.dtype.newbyteorder("="))
        return {MARK: path}
    if isinstance(tree, Mapping):
        if MARK in tree or not all(isinstance(key, str) for key in tree):
            raise PayloadError(f"'{path}' has a key that may not cross: keys are strings other than '{MARK}'")
        return {key: _flatten(value, f"{path}/{key}" if path else key, arrays) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_flatten(value, f"{path}/{index}", arrays) for index, value in enumerate(tree)]
    if isinstance(tree, np.generic):
        return _flatten(tree.item(), path, arrays)
    raise PayloadError(f"'{path}' is a {type(tree).__name__}; only arrays and plain values may cross")


def _restore(skeleton: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(skeleton, dict):
        if set(skeleton) == {MARK}:
            return arrays[skeleton[MARK]]
        return {key: _restore(value, arrays) for key, value in skeleton.items()}
    if isinstance(skeleton, list):
        return [_restore(value, arrays) for value in skeleton]
    return skeleton
