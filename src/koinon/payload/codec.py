"""Bytes <-> named arrays and plain values.

The form is a safetensors file, readable by anything that reads safetensors: every array is a tensor under
its path ("model/fc1.weight"), and the metadata entry `koinon` holds the rest as JSON, in which
`{"$array": path}` stands where an array was.  Nothing in it can be executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import safetensors
import safetensors.numpy

from koinon.errors import PayloadError
from koinon.payload.payload import Arrays, Kind, Payload, Plain

MARK = "$array"
WIRE = ("U64", "I64", "F64", "F32", "U32", "I32", "F16", "U16", "I16", "I8", "U8", "BOOL")
"""The types of arrays that a file may hold, as safetensors calls them, and in its order: the widest first."""

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
    arrays: dict[str, np.ndarray] = {}
    skeleton = _flatten(vars(payload), "", arrays)
    header: dict[str, Any] = {"__metadata__": {"koinon": json.dumps(skeleton)}}
    kinds, end = {name: _kind(name, array) for name, array in arrays.items()}, 0
    order = sorted(arrays, key=lambda name: (WIRE.index(kinds[name]), name))
    for name in order:
        after = end + arrays[name].nbytes
        header[name] = {"dtype": kinds[name], "shape": arrays[name].shape, "data_offsets": (end, after)}
        end = after
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)


def _kind(name: str, array: np.ndarray) -> str:
    """What safetensors calls an array's type."""
    kind = "BOOL" if array.dtype == bool else f"{array.dtype.kind.upper()}{array.dtype.itemsize * 8}"
    if kind not in WIRE or not array.dtype.isnative:
        raise PayloadError(f"'{name}' is of type {array.dtype}, which has no wire form")
    return kind


def load(path: Path, limit: int = MAX_BYTES) -> Payload:
    """The payload in a file, as `decode` has it from bytes."""
    if (length := path.stat().st_size) > limit:
        raise PayloadError(f"a payload of {length:,} bytes is over the limit of {limit:,}")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            skeleton = (file.metadata() or {}).get("koinon")
            if skeleton is None:
                raise PayloadError("these bytes are a safetensors file that Koinon did not write")
            return _payload(_restored(skeleton, {name: file.get_tensor(name) for name in file.keys()}))  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as cause:
        raise PayloadError(f"these bytes are no safetensors file: {cause}") from cause


def size(payload: Payload) -> int:
    """How many bytes `encode` would make, without making them."""
    nested: dict[str, np.ndarray] = {}
    text = json.dumps(_flatten(payload.values, "values", nested))
    named = tuple((f"arrays/{name}", array.dtype.str, array.shape) for name, array in payload.arrays.items())
    more = tuple((name, array.dtype.str, array.shape) for name, array in nested.items())
    header = _bare_header(payload.kind, named, named + more)
    header += len(text) + text.count('"') + text.count("\\")  # it stands there as a string
    return 8 + -(-header // 8) * 8 + sum(array.nbytes for array in [*payload.arrays.values(), *nested.values()])


def pack(tree: Plain | Arrays, **notes: str) -> bytes:
    """Any nesting of string-keyed dicts and lists around arrays and plain values, as bytes.

    Args:
        tree: what to pack.
        notes: further metadata for whoever opens the file with another program; `unpack` ignores them.

    Raises:
        PayloadError: something in it is neither.
    """
    arrays: dict[str, np.ndarray] = {}
    skeleton = _flatten(tree, "", arrays)
    return _dump(arrays, skeleton, **notes)


def unpack(data: bytes) -> Any:
    """What `pack` was given.

    Raises:
        PayloadError: not the bytes of a tree.
    """
    try:
        arrays = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        if "koinon" not in metadata:
            raise PayloadError("these bytes are a safetensors file that Koinon did not write")
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as cause:
        raise PayloadError(f"these bytes are no safetensors file: {cause}") from cause
    except RecursionError as cause:
        raise PayloadError("these bytes hold values nested without end") from cause
    return _restored(metadata["koinon"], arrays)


def _restored(skeleton: str, arrays: Mapping[str, np.ndarray]) -> Any:
    """A tree from its skeleton as JSON, and its arrays."""
    try:
        return _restore(json.loads(skeleton), arrays)
    except KeyError as cause:
        raise PayloadError(f"the array {cause} is announced but missing") from cause
    except (ValueError, TypeError) as cause:
        raise PayloadError(f"these bytes hold no tree: {cause}") from cause
    except RecursionError as cause:
        raise PayloadError("these bytes hold values nested without end") from cause


def _dump(arrays: dict[str, np.ndarray], skeleton: Plain, **notes: str) -> bytes:
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        data = safetensors.numpy.save(contiguous, {"koinon": json.dumps(skeleton), **notes})
    except (KeyError, ValueError, safetensors.SafetensorError) as cause:
        raise PayloadError(f"an array of this type has no wire form: {cause}") from cause
    if not notes:
        return data
    # The library writes several metadata in no fixed order; equal trees are to be equal bytes.
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _flatten(tree: Any, path: str, arrays: dict[str, np.ndarray]) -> Plain:
    """The tree with a mark in place of each array; the arrays go into `arrays` under their paths."""
    if isinstance(tree, np.ndarray):
        if path in arrays:
            raise PayloadError(f"two arrays have the path '{path}'")
        arrays[path] = tree
        return {MARK: path}
    if isinstance(tree, Mapping):
        if MARK in tree or not all(isinstance(key, str) for key in tree):
            raise PayloadError(f"'{path}' has a key that may not cross: keys are strings other than '{MARK}'")
        return {key: _flatten(value, f"{path}/{key}" if path else key, arrays) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_flatten(value, f"{path}/{index}", arrays) for index, value in enumerate(tree)]
    if isinstance(tree, np.generic):
        tree = tree.item()
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise PayloadError(f"'{path}' is a {type(tree).__name__}; only arrays and plain values may cross")


def _restore(skeleton: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(skeleton, dict):
        if set(skeleton) == {MARK}:
            return arrays[skeleton[MARK]]
        return {key: _restore(value, arrays) for key, value in skeleton.items()}
    if isinstance(skeleton, list):
        return [_restore(value, arrays) for value in skeleton]
    return skeleton


_Signature: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]


@lru_cache(maxsize=64)
def _bare_header(kind: str, named: _Signature, signature: _Signature) -> int:
    """Length of the safetensors header of a payload of such arrays, before padding and without its values.

    The header holds every array's place in the file, so it depends on the signature alone: a model's is
    measured once.
    """
    marks = {name.removeprefix("arrays/"): {MARK: name} for name, _, _ in named}
    skeleton = {"kind": kind, "arrays": marks, "values": ""}
    data = _dump({name: np.zeros(shape, dtype) for name, dtype, shape in signature}, skeleton)
    length = int.from_bytes(data[:8], "little")
    return len(data[8 : 8 + length].rstrip(b" ")) - len(r"\"\"")
