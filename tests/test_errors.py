"""What errors say: the nearest known name, the missing extra, and one root to catch them all."""

import sys

import pytest

from koinon import errors
from koinon.errors import JobError, KoinonError, MissingExtra, QuorumNotReached, extra, in_a_line, nearest

TREE = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_every_error_is_caught_by_the_root_and_says_its_words(error):
    """`except KoinonError` is enough; the message is the text of the error."""
    with pytest.raises(KoinonError, match="what happened"):
        raise error("what happened")


def test_a_mismatch_of_filters_is_an_error_of_the_job():
    """Who catches JobError catches it too."""
    with pytest.raises(JobError):
        raise errors.FilterMismatch("mean and hide")


@pytest.mark.parametrize(
    ("name", "known", "ending"),
    [
        ("alhpa", ["alpha", "sites"], "did you mean 'alpha'?"),
        ("round", ["rounds", "seed"], "did you mean 'rounds'?"),
        ("zzz", ["seed", "alpha"], "known are alpha, seed"),
        ("zzz", [], "there are none"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(name, known, ending):
    """Or all that are known, in order."""
    assert nearest(name, known) == ending


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (JobError("no file"), "no file"),
        (KeyError("label"), "KeyError: 'label'"),
        (MemoryError(), "out of memory: a smaller model, smaller batches or fewer workers need less"),
        (MemoryError("8 GiB"), "out of memory (8 GiB): a smaller model, smaller batches or fewer workers need less"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "out of memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes): "
            "a smaller model, smaller batches or fewer workers need less",
        ),
        (JobError("site 'a' failed: out of memory (8 GiB)"), "site 'a' failed: out of memory (8 GiB)"),
    ],
)
def test_whatever_ends_a_run_is_told_in_a_line(error, line):
    """Koinon's own errors by their words, others with their class; what is too large, with what to do."""
    assert in_a_line(error) == line


def test_a_quorum_error_carries_a_traceback():
    """Empty where no site sent one."""
    assert QuorumNotReached("0 of 3").traceback == ""
    assert QuorumNotReached("0 of 3", "Traceback …").traceback == "Traceback …"


def test_an_extra_that_is_there_is_imported():
    """Also a module within a package."""
    assert extra("json.decoder", "data") is sys.modules["json.decoder"]


@pytest.mark.parametrize("module", ["no_such_library", "no_such_library.part"])
def test_an_extra_that_is_missing_says_how_to_get_it(module):
    """The line can be pasted into a shell; the import's own error is the cause."""
    with pytest.raises(MissingExtra, match=r"needs no_such_library: pip install 'koinon\[data\]'") as caught:
        extra(module, "data")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_library_that_lacks_a_library_of_its_own_is_not_mistaken(tmp_path, monkeypatch):
    """Its own error goes through: the extra is installed, but broken."""
    (tmp_path / "broken_library.py").write_text("import what_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs"):
        extra("broken_library", "data")
