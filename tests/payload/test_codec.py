"""Bytes <-> payloads: what goes in comes out, and nothing else comes in."""

import contextlib
import json
import pickle

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from koinon.errors import PayloadError
from koinon.payload import Payload, codec

DTYPES = st.sampled_from(["float16", "float32", "float64", "int8", "int64", "uint8", "bool", "complex64", ">f4"])
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
NAMES = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name not in (codec.MARK, "__metadata__")
)
LEAVES = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8)
PLAIN = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))


def same(left, right):
    """Equal in structure, types, shapes and bits."""
    if isinstance(left, np.ndarray):
        right = right.astype(right.dtype.newbyteorder("="))  # what crosses is in this machine's order
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right and type(left) is type(right)


@given(st.dictionaries(NAMES, ARRAYS, max_size=4), st.dictionaries(NAMES, PLAIN, max_size=4))
def test_a_payload_survives_the_crossing(arrays, values):
    """Kind, names, order, types, shapes and bits; and `size` says how many bytes it took."""
    payload = Payload("weights", arrays, values)
    data = codec.encode(payload)
    back = codec.decode(data)
    assert codec.size(payload) == len(data)
    assert back.kind == "weights"
    assert same(dict(back.arrays), arrays)
    assert same(back.values, values)


NUMBERS = st.floats() | st.floats().map(np.float64) | st.integers(-9, 9)
SAID = st.dictionaries(st.text(min_size=1, max_size=4) | st.sampled_from(["loss", "weight", "größe", "top 5"]), NUMBERS)


@given(st.fixed_dictionaries({"weight": NUMBERS, "metrics": SAID}) | SAID, st.integers(0, 3))
def test_the_size_of_what_sites_mostly_say(values, arrays):
    """Numbers by name, which are not written down to be counted: whatever the names and the numbers."""
    payload = Payload("weight_diff", {str(n): np.zeros((n, 2), np.float32) for n in range(arrays)}, values)
    assert codec.size(payload) == len(codec.encode(payload))


def test_what_a_stranger_names_is_not_remembered():
    """Who sends other long names each time fills no memory with them; their size is right all the same."""
    codec._around.cache_clear()
    for values in ({"a" * 2000: 1}, {f"n{place}": 1.0 for place in range(400)}, {"top 5": 1}):
        payload = Payload("weight_diff", {}, values)
        assert codec.size(payload) == len(codec.encode(payload))
    assert codec._around.cache_info().currsize == 0


@given(st.dictionaries(NAMES, ARRAYS, max_size=4), st.dictionaries(NAMES, PLAIN, max_size=4))
def test_a_file_of_a_payload_is_as_its_bytes(tmp_path_factory, arrays, values):
    """Whoever reads one can read the other, and they are as long."""
    payload, path = Payload("weight_diff", arrays, values), tmp_path_factory.getbasetemp() / "payload"
    codec.save(payload, path)
    back = codec.load(path)
    assert back.kind == "weight_diff" and same(dict(back.arrays), arrays) and same(back.values, values)
    assert path.read_bytes() == codec.encode(payload)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 200))
def test_a_damaged_file_is_refused_or_loads_a_payload(tmp_path_factory, changes, cut):
    """Whatever a stranger's file holds: PayloadError, or a payload."""
    data = bytearray(codec.encode(Payload("weights", {"w": np.ones(8), "n": np.arange(3)}, {"weight": 1})))
    for position, value in changes:
        data[position % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data[: len(data) - cut])
    with contextlib.suppress(PayloadError):
        assert isinstance(codec.load(path), Payload)


def test_an_array_without_a_wire_form_is_not_saved(tmp_path):
    with pytest.raises(PayloadError, match="no wire form"):
        codec.save(Payload("weights", {"w": np.ones(2, np.complex128)}), tmp_path / "payload")
    with pytest.raises(PayloadError, match="over the limit"):
        codec.save(Payload("weights", {"w": np.ones(100)}), tmp_path / "payload")
        codec.load(tmp_path / "payload", limit=100)


def test_a_tree_of_states_survives():
    """Lists of dicts of arrays, as aggregators and filters keep them."""
    state = {"updates": [{"w": np.arange(3)}, {"w": np.ones((2, 2))}], "weights": [1.0, 2.0], "none": None}
    assert same(codec.unpack(codec.pack(state)), state)


def test_strided_arrays_are_sent_in_order():
    """A transposed view arrives as what it shows, not as what lies in memory."""
    array = np.arange(6.0).reshape(2, 3).T
    assert same(codec.unpack(codec.pack({"w": array})), {"w": np.ascontiguousarray(array)})


def test_any_reader_of_safetensors_can_open_it(tmp_path):
    """A model on disk is an ordinary safetensors file, with notes in its metadata."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(codec.pack({"fc.weight": np.ones((2, 2), np.float32)}, round="7"))
    assert safetensors.numpy.load_file(path)["fc.weight"].sum() == 4
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata()["round"] == "7"


def forged(skeleton, arrays=None):
    return safetensors.numpy.save(arrays or {}, {"koinon": json.dumps(skeleton)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 64,  # a header of 2^64 bytes
        (100 << 30).to_bytes(8, "little") + b"{}",  # a header of 100 GiB
        codec.encode(Payload("weights", {"w": np.ones(4)}))[:-1],
        pickle.dumps({"kind": "weights"}),
        safetensors.numpy.save({"w": np.ones(2)}),
        forged([1, 2]),
        forged({"kind": "weights", "arrays": {}}),
        forged({"kind": "code", "arrays": {}, "values": {}}),
        forged({"kind": "weights", "arrays": [], "values": {}}),
        forged({"kind": "weights", "arrays": {"w": {"deeper": 1}}, "values": {}}),
        forged({"kind": "weights", "arrays": {"w": {codec.MARK: "gone"}}, "values": {}}),
        forged({"kind": "weights", "arrays": {}, "values": json.loads("[" * 500 + "]" * 500)}),
        safetensors.numpy.save({}, {"koinon": "[" * 100_000}),
    ],
    ids=lambda data: data[:12].hex(),
)
def test_bytes_that_are_no_payload_are_refused(data):
    """Cut, forged, foreign or absurd bytes raise PayloadError and nothing else."""
    with pytest.raises(PayloadError):
        codec.decode(data)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    """No input makes the decoder raise anything but PayloadError."""
    with pytest.raises(PayloadError):
        codec.decode(data)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_decodes_to_a_payload(position, value):
    """A flipped byte may change a number, never the kind of thing that comes out."""
    data = bytearray(codec.encode(Payload("weights", {"w": np.ones(8)}, {"weight": 1})))
    data[position % len(data)] = value
    with contextlib.suppress(PayloadError):
        assert isinstance(codec.decode(bytes(data)), Payload)


def test_more_than_the_limit_is_refused_before_it_is_read():
    """The limit is on bytes."""
    with pytest.raises(PayloadError, match="over the limit"):
        codec.decode(codec.encode(Payload("weights", {"w": np.ones(100)})), limit=100)


@pytest.mark.parametrize(
    "tree",
    [{"f": print}, {"s": {1, 2}}, {1: "key"}, {codec.MARK: "x"}, {"b": b"bytes"}, {"o": np.array([object()])}],
)
def test_what_is_neither_array_nor_plain_value_may_not_cross(tree):
    """Objects, sets, bytes and keys that are no strings stay at home."""
    with pytest.raises(PayloadError):
        codec.pack(tree)


def test_two_arrays_of_one_path_may_not_cross():
    """A slash in a name must not hide another array."""
    with pytest.raises(PayloadError, match="a/b"):
        codec.pack({"a": {"b": np.ones(1)}, "a/b": np.ones(1)})


def test_a_payload_of_unknown_kind_does_not_come_in():
    """The kinds are a closed list, and the error names them."""
    with pytest.raises(PayloadError, match="weight_diff"):
        codec.decode(codec.encode(Payload("gradients")))  # type: ignore[arg-type]
