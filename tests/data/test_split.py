"""A split says who holds which samples, of both sets, and makes nothing that nobody asks for."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import koinon.data as data
from koinon.data import Partition, Source
from koinon.data.names import LATELY, Names
from koinon.data.split import _distinct
from koinon.errors import DataError, SettingsError


@pytest.fixture(autouse=True, scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KOINON_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path()


def numbered(y: np.ndarray, held_out: np.ndarray | None) -> Source:
    """Samples whose x is their own number."""
    test = None if held_out is None else (np.arange(len(held_out)), held_out)
    return data.arrays(np.arange(len(y)), y, test=test)


CODES = st.lists(st.integers(0, 4), min_size=30, max_size=120).map(np.array)


@given(CODES, CODES, st.integers(1, 12), st.sampled_from([0.05, 0.5, 100.0]))
def test_the_sites_hold_all_of_both_sets(y: np.ndarray, held_out: np.ndarray, sites: int, alpha: float):
    """Training and held-out samples: each at exactly one site, with their own labels."""
    split = numbered(y, held_out).split(data.dirichlet(alpha), sites, test="sites", cache=False)
    held = [split.site(number) for number in range(sites)]
    trains = np.concatenate([site.train.x for site in held])
    tests = np.concatenate([site.test.x for site in held if site.test is not None])
    assert sorted(trains) == list(range(len(y)))
    assert sorted(tests) == list(range(len(held_out)))
    np.testing.assert_array_equal(np.concatenate([site.train.y for site in held]), y[trains])
    assert split.evaluators == [name for name, site in zip(split.names, held, strict=True) if site.test is not None]


@given(CODES, CODES, st.integers(1, 12))
def test_held_out_samples_follow_the_training_samples_class_by_class(y, held_out, sites):
    """A site's share of a class among the held-out samples is its share in training, rounded up or down."""
    split = numbered(y, held_out).split(data.dirichlet(0.3), sites, test="sites", cache=False)
    table, labels = split.table(), np.array(split.labels, int)
    for number in range(sites):
        test = split.site(number).test
        for column, label in enumerate(labels):
            exact = (held_out == label).sum() * table[number, column] / max(table[:, column].sum(), 1)
            count = 0 if test is None else (test.y == label).sum()
            if table[:, column].any():
                assert np.floor(exact - 1e-9) <= count <= np.ceil(exact + 1e-9)


def test_equal_claims_are_served_in_turn():
    """Ten held-out samples of each of ten classes over 100 like sites: one each, not ten for the first ten."""
    y = np.tile(np.arange(10), 100)
    split = numbered(np.sort(y), np.repeat(np.arange(10), 10)).split(data.shards(10), 100, seed=1)
    same = numbered(y, np.repeat(np.arange(10), 10)).split(
        Partition("rows", lambda codes, sites, random: (np.arange(1000), np.arange(101) * 10)), 100
    )
    assert {len(same.site(number).test) for number in range(100)} == {1}
    assert sum(len(site.test) for site in map(split.site, range(100)) if site.test is not None) == 100


Y = np.arange(60) % 3


@pytest.mark.parametrize(
    ("sites", "test", "at_sites", "at_server"),
    [
        (100, None, True, False),
        (101, None, False, True),
        (3, "server", False, True),
        (3, "both", True, True),
        (101, "sites", True, False),
    ],
)
def test_who_holds_the_held_out_set(sites: int, test, at_sites: bool, at_server: bool):
    """Asked for, or by the number of sites."""
    split = numbered(np.arange(303) % 3, Y).split(data.iid(), sites, test=test)
    assert any(split.site(number).test is not None for number in range(sites)) is at_sites
    assert bool(split.evaluators) is at_sites
    assert (split.server is not None) is at_server
    if at_server:
        assert len(split.server) == len(Y)


def test_without_a_held_out_set_nobody_holds_one():
    """And asking for it is an error that says so."""
    source = numbered(Y, None)
    split = source.split(data.iid(), 3)
    assert (split.server, split.site(0).test, split.evaluators) == (None, None, [])
    with pytest.raises(DataError, match="no held-out set for test='server'"):
        source.split(data.iid(), 3, test="server").site(0)


HOSPITAL = {"x": np.arange(6), "y": np.array([0, 1] * 3), "hospital": np.array(["s", "n", "s", "w", "n", "s"])}


def test_a_natural_id_makes_the_sites():
    """In order of first appearance, named by their values, and the held-out rows go where they belong."""
    test = {"x": np.arange(3), "y": np.zeros(3, int), "hospital": np.array(["n", "n", "s"])}
    split = data.arrays(HOSPITAL, test=test).split(data.by("hospital"))
    assert (split.sites, list(split.names), split.evaluators) == (3, ["s", "n", "w"], ["s", "n"])
    assert [split.site(number).train.x.tolist() for number in range(3)] == [[0, 2, 5], [1, 4], [3]]
    assert [site.test and site.test.x.tolist() for site in map(split.site, range(3))] == [[2], [0, 1], None]


@pytest.mark.parametrize(
    ("column", "sites", "says"),
    [("hospital", 4, "makes 3 sites, not 4"), ("hospitl", None, "did you mean 'hospital'")],
)
def test_a_natural_id_that_does_not_fit_is_refused(column: str, sites: int | None, says: str):
    """The number of sites is the data's, not the caller's."""
    with pytest.raises(DataError, match=says):
        _ = data.arrays(HOSPITAL, test=None).split(data.by(column), sites).names


def test_a_held_out_id_without_training_samples_is_refused():
    """Nobody could evaluate it."""
    test = {**HOSPITAL, "hospital": np.array(["s"] * 5 + ["x"])}
    with pytest.raises(DataError, match="held-out set has 'x'"):
        _ = data.arrays(HOSPITAL, test=test).split(data.by("hospital")).names


def test_the_table_counts_training_samples():
    """Per site and class; the labels are its columns."""
    source = data.arrays(np.zeros(6), ["b", "a", "b", "b", "a", "b"], test=None)
    split = source.split(data.iid(data.explicit([4, 2])))
    assert (split.sites, split.labels, split.table().sum(axis=1).tolist()) == (2, ("a", "b"), [4, 2])
    for number in range(2):
        assert split.table()[number].tolist() == np.bincount(split.site(number).train.y, minlength=2).tolist()


@pytest.mark.parametrize("y", [np.linspace(0, 1, 12), np.zeros((12, 2)), None], ids=["real", "pairs", "none"])
def test_a_real_valued_target_has_no_classes(y: np.ndarray | None):
    """iid works, with one column in the table; what needs classes says so."""
    source = data.arrays(np.zeros((12, 3)), y)
    split = source.split(data.iid(), 2)
    assert (split.labels, split.table().tolist(), split.describe()["classes"]) == (("samples",), [[5], [5]], 0)
    with pytest.raises(DataError, match=r"needs classes.*use iid\(\) or by\(\)"):
        source.split(data.dirichlet(0.3), 2).site(0)


def test_a_site_without_training_samples_is_named():
    """With the setting that mends it."""
    split = data.digits().split(data.dirichlet(1e-6, at_least=0), sites=50)
    with pytest.raises(DataError, match=r"site 'site-\d+' has no training samples.*at_least=1"):
        split.site(0)


def test_the_same_seed_gives_the_same_split_with_and_without_the_cache():
    """And another seed another."""
    splits = [data.digits().split(data.dirichlet(0.3), seed=s, cache=c) for s, c in ((7, 1), (7, 1), (7, 0), (8, 1))]
    first, again, uncached, other = (split.site(3) for split in splits)
    for same in (again, uncached):
        np.testing.assert_array_equal(first.train.x, same.train.x)
        np.testing.assert_array_equal(first.test.x, same.test.x)
    assert not np.array_equal(first.train.x, other.train.x)


def test_a_dealing_is_found_again_only_for_the_same_question():
    """Partition, sites, seed, labels and the holder of the held-out set each make another entry."""
    source, other = numbered(Y, Y), numbered(Y[::-1], Y)
    splits = [
        source.split(data.iid(), 4),
        source.split(data.iid(), 4),
        source.split(data.iid(at_least=2), 4),
        source.split(data.iid(), 5),
        source.split(data.iid(), 4, seed=1),
        source.split(data.iid(), 4, test="server"),
        other.split(data.iid(), 4),
    ]
    data.cache.clear()
    for split in splits:
        split.site(0)
    assert len(list((data.cache.folder() / "splits").iterdir())) == 6


def test_a_split_says_what_it_is():
    """Plain values for a run's record."""
    assert data.digits().split(data.dirichlet(0.3), sites=4, seed=3).describe() | {"smallest": 0, "largest": 0} == {
        "source": "digits",
        "partition": "dirichlet(0.3, at_least=1)",
        "sites": 4,
        "seed": 3,
        "samples": 1438,
        "smallest": 0,
        "largest": 0,
        "classes": 10,
        "held_out": 359,
        "held_out_by": "sites",
    }


def test_a_split_pickles_as_its_settings():
    """What a worker needs to open it again, not the samples; before and after the first touch."""
    split = numbered(Y, Y).split(data.dirichlet(0.3), 4)
    before = pickle.dumps(split)
    expected = split.site(1).train.x
    for stored in (before, pickle.dumps(split)):
        assert len(stored) == len(before)
        np.testing.assert_array_equal(pickle.loads(stored).site(1).train.x, expected)


@pytest.mark.parametrize("number", [-1, 8])
def test_there_is_no_site_beyond_the_last(number: int):
    """The message says which there are."""
    with pytest.raises(DataError, match=r"has sites 0\.\.7"):
        data.digits().split(data.iid()).site(number)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sites": 0}, "1 site or more"),
        ({"partition": data.iid(data.explicit([2, 3])), "sites": 3}, "makes 2 sites, not 3"),
        ({"test": "servers"}, "did you mean 'server'"),
    ],
)
def test_settings_are_checked_when_the_split_is_asked_for(arguments: dict, says: str):
    """Before anything is read."""
    with pytest.raises(SettingsError, match=says):
        data.digits().split(**{"partition": data.iid(), **arguments})


def test_names_of_virtual_sites_are_made_when_asked_for():
    """A sequence of text without the text."""
    names = Names(1_000_000)
    assert (names[0], names[-1], names.index("site-500000")) == ("site-1", "site-1000000", 499_999)
    assert [name in names for name in ("site-1", "site-01", "site-0", "site-1000001", "x")] == [True] + [False] * 4
    with pytest.raises(ValueError, match="is not one of"):
        names.index("site-01")
    with pytest.raises(IndexError):
        names[1_000_000]


@pytest.mark.parametrize("values", [None, np.arange(3 * LATELY)[::-1]], ids=["numbered", "natural"])
def test_so_many_names_are_remembered_and_no_more(values: np.ndarray | None):
    """What was forgotten is found all the same."""
    names = Names(3 * LATELY, values)
    said = list(names)
    assert [names.index(name) for name in said] == list(range(3 * LATELY))
    assert len(vars(names)["_lately"]) <= LATELY


@pytest.mark.parametrize(
    ("values", "nobody"),
    [
        (np.array([7, -2, 2**62]), ["3", "07", "x", str(10**30)]),
        (np.array([7, 2**64 - 1], np.uint64), ["-1", "8"]),
        (np.array(["b", "aa", "c"]), ["a", "bb", ""]),
        (np.array([0.5, -1e9, 3.0]), ["3", "0.50"]),
        (np.array([True, False]), ["true", "1"]),
        (np.array([b"b", b"a"]), ["b"]),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")),
)
def test_a_natural_ids_values_are_names(values: np.ndarray, nobody: list[str]):
    """Each is found by its text, and no other text is."""
    names = Names(len(values), values)
    assert list(names) == names[:] == [str(value) for value in values]
    assert [names.index(name) for name in names] == list(range(len(values)))
    stranger = Names(len(values), values)  # that has named nobody yet
    assert [stranger.index(name) for name in names[:]] == list(range(len(values)))
    for name in nobody:
        assert name not in names
        with pytest.raises(ValueError, match="is not one of"):
            names.index(name)


@pytest.mark.parametrize("source", [data.digits(), data.arrays(HOSPITAL, test=None)], ids=["virtual", "natural"])
def test_nobody_holds_nothing(source: Source):
    """A name that no site has is refused by name."""
    split = source.split(data.iid() if source.name == "digits" else data.by("hospital"))
    with pytest.raises(DataError, match=r"no such site: 'nobody' is not one of '.+' \.\. '.+'"):
        split.site("nobody")


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).integers(-50, 50, 300),
        np.array([-128, 127, 0, 127], np.int8),
        np.array([2**64 - 1, 0, 2**64 - 1], np.uint64),
        np.array([2**64 - 1, 2**64 - 2], np.uint64),
        np.array([-(2**63), 2**63 - 1, 5]),
        np.array(["b", "a", "b"]),
        np.array([True, False, True]),
    ],
    ids=lambda values: f"{values.dtype}-{len(values)}",
)
def test_different_values_are_counted_as_numpy_sorts_them(values: np.ndarray):
    """Near and far numbers, and what is no number."""
    for found, expected in zip(
        _distinct(values), np.unique(values, return_index=True, return_inverse=True), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert _distinct(values)[0].dtype == values.dtype


def test_a_memory_map_is_not_copied(tmp_path: Path):
    """Holding out, dealing and finding a site's samples leave the features where they are."""
    np.save(tmp_path / "x.npy", np.arange(400.0).reshape(100, 4))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    split = data.arrays(x, np.arange(100) % 2, test=0.2).split(data.iid(), 5, test="server")
    for held in (split.site(2).train, split.server):
        assert held.stored["x"].ctypes.data == x.ctypes.data
        np.testing.assert_array_equal(held.y, held.x[:, 0] // 4 % 2)


def test_data_that_lie_by_site_stay_there():
    """Pairs, mappings, datasets, with and without held-out sets; the sites keep their order."""
    split = data.sites(
        {
            "z": {"train": (np.arange(3), ["u", "v", "u"]), "test": (np.array([9]), ["w"])},
            "a": (np.array([7, 8]), np.array(["v", "v"])),
        }
    )
    assert (list(split.names), split.labels, split.evaluators) == (["z", "a"], ("u", "v", "w"), ["z"])
    assert split.table().tolist() == [[2, 1, 0], [0, 2, 0]]
    assert [split.site(number).train.x.tolist() for number in range(2)] == [[0, 1, 2], [7, 8]]
    assert (split.site(0).test.x.tolist(), split.site(1).test) == ([9], None)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({}, "there are none"),
        ({"a": (np.zeros(2), np.zeros(2)), "b": {"x": np.zeros(2)}}, "site 'b' has columns"),
        ({"a": (np.zeros((2, 3)), np.zeros(2)), "b": (np.zeros((2, 4)), np.zeros(2))}, "differ in shape"),
        ({"a": (np.zeros(0), np.zeros(0))}, "site 'a' has no training samples"),
    ],
)
def test_sites_that_do_not_fit_together_are_refused(parts: dict, says: str):
    """By the site's name."""
    with pytest.raises(DataError, match=says):
        data.sites(parts)


def test_a_million_samples_over_a_hundred_thousand_sites():
    """Columns, order and offsets: a site costs nothing until it is asked for."""
    y = np.arange(1_000_000) % 10
    split = data.arrays(np.arange(1_000_000), y, test=None).split(data.dirichlet(0.3), 100_000)
    site = split.site(99_999).train
    np.testing.assert_array_equal(site.x % 10, site.y)
    assert split.table().sum() == 1_000_000
