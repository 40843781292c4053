"""An entry is whole or absent, whoever races, is killed, or has no room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from koinon.data import cache
from koinon.data.cache import Kept

ARRAYS = {"order": np.arange(1000, dtype=np.int32), "empty": np.zeros((0, 3)), "names": np.array(["a", "bé"])}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("KOINON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Makes an entry, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Kept:
        self.times += 1
        return ARRAYS, {"classes": ["a", "b"]}


def test_what_was_made_once_is_not_made_again():
    """The second time gives memory maps with the same content."""
    make = Maker()
    for _ in range(2):
        arrays, about = cache.keep("splits", "key", make)
        assert about == {"classes": ["a", "b"]}
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], array)
            assert arrays[name].dtype == array.dtype
    assert make.times == 1
    assert not arrays["order"].flags.writeable


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "0.npy").write_bytes((entry / "0.npy").read_bytes()[:-8]),
        lambda entry: (entry / "0.npy").write_bytes(b""),
        lambda entry: (entry / "0.npy").write_bytes(b"not an array"),
        lambda entry: (entry / "0.npy").unlink(),
        lambda entry: (entry / "entry.json").unlink(),
        lambda entry: (entry / "entry.json").write_text('{"arrays": '),
        lambda entry: (entry / "entry.json").write_text(json.dumps({"arrays": [3], "about": {}})),
        lambda entry: (entry / "entry.json").write_text("[]"),
        lambda entry: np.save(entry / "0.npy", np.arange(7)),
    ],
)
def test_a_damaged_entry_is_made_again(damage, folder: Path):
    """Not fatal, and afterwards whole again."""
    make = Maker()
    cache.keep("splits", "key", make)
    damage(folder / "splits" / "key")
    arrays, _ = cache.keep("splits", "key", make)
    assert make.times == 2
    np.testing.assert_array_equal(arrays["order"], ARRAYS["order"])
    cache.keep("splits", "key", make)
    assert make.times == 2


@pytest.mark.parametrize("where", ["/dev/null/cache", "a file"])
def test_a_disk_that_cannot_be_written_to_costs_a_warning(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The data come all the same, made each time."""
    (tmp_path / "a file").touch()
    monkeypatch.setenv("KOINON_CACHE", str(tmp_path / where))
    make = Maker()
    for times in (1, 2):
        with pytest.warns(RuntimeWarning, match="nothing was cached"):
            arrays, _ = cache.keep("splits", "key", make)
        assert make.times == times
        np.testing.assert_array_equal(arrays["order"], ARRAYS["order"])


def test_a_full_disk_leaves_no_draft(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What was half written is removed."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        cache.keep("splits", "key", Maker())
    assert list((folder / "splits").iterdir()) == []


def test_an_error_while_making_leaves_nothing(folder: Path):
    """No entry is begun before its content is there."""
    with pytest.raises(ZeroDivisionError):
        cache.keep("splits", "key", lambda: 1 / 0)
    assert not folder.exists()


RACE = """
import sys, numpy as np
from koinon.data import cache
sys.stdin.readline()
for turn in range(20):
    arrays, _ = cache.keep("splits", f"key-{turn}", lambda: ({"x": np.full(50_000, turn)}, {}))
    assert (arrays["x"] == turn).all()
"""


def test_processes_may_race_for_an_entry(folder: Path):
    """Four processes make the same twenty entries at the same moment: all read what they should, no draft remains."""
    racers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", RACE], stdin=subprocess.PIPE, env=dict(os.environ))
        for _ in range(4)
    ]
    for racer in racers:
        racer.stdin.write(b"go\n")
        racer.stdin.flush()
    for racer in racers:
        racer.stdin.close()
    assert [racer.wait() for racer in racers] == [0, 0, 0, 0]
    assert sorted(entry.name for entry in (folder / "splits").iterdir()) == sorted(f"key-{turn}" for turn in range(20))


def test_the_draft_of_a_killed_process_is_not_taken_for_an_entry(folder: Path):
    """Whatever lies beside."""
    draft = folder / "splits" / ".draft-abc"
    draft.mkdir(parents=True)
    (draft / "0.npy").write_bytes(b"half")
    make = Maker()
    cache.keep("splits", "key", make)
    assert make.times == 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KOINON_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/koinon")),
        ({}, Path.home() / ".cache" / "koinon"),
    ],
)
def test_where_the_cache_lies(environment: dict[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch):
    """Koinon's own variable, then the desktop's, then the home."""
    for name in ("KOINON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache.folder() == expected


def test_clearing_removes_what_the_cache_made_and_nothing_else(folder: Path):
    """KOINON_CACHE may name a folder that holds other things."""
    cache.keep("splits", "key", Maker())
    (folder / "mine.txt").touch()
    cache.clear()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        ((np.zeros(2, np.int32),), (np.zeros(1, np.int64),)),
        ((np.zeros((2, 3)),), (np.zeros((3, 2)),)),
        ((np.array(["a"]),), (np.array(["b"]),)),
        ((np.arange(4).reshape(2, 2),), (np.arange(4).reshape(2, 2).T,)),
    ],
)
def test_different_content_has_different_keys(one: tuple, other: tuple):
    """Type, shape and order count."""
    assert cache.digest(*one) != cache.digest(*other)
    assert cache.digest(*one) == cache.digest(*one)
