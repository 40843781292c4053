"""A job file's settings: text from the command line becomes what the function's parameters ask for."""

import sys

import pytest

from koinon.errors import JobError, SettingsError
from koinon.site import jobfile

TEXT = """
import koinon
SEEN = {}
def job(whole: int = 1, part: float = 0.5, flag: bool = False, name: str = "n", maybe: str | None = None,
        many: list[int] = [1], plain=2, seed: int = 7):
    SEEN.update(locals())
    return koinon.Job(koinon.FedAvg(whole), koinon.numpy.SoftmaxRegression(features=1, classes=2))
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "file.py"
    path.write_text(TEXT)
    return path


def seen(path):
    return sys.modules[f"koinon_job_{path.stem}"].SEEN


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("whole=3", 3),
        ("part=1", 1.0),
        ("part=1e-3", 0.001),
        ("flag=true", True),
        ("flag=false", False),
        ("name=3", "3"),
        ("name=a=b", "a=b"),
        ("maybe=path/to", "path/to"),
        ("many=[1, 2]", [1, 2]),
        ("plain=5", 5),
    ],
)
def test_text_becomes_the_parameters_type(file, text, value):
    """Without an annotation, the default's type counts."""
    name, _, given = text.partition("=")
    jobfile.load(file, {name: given})
    assert seen(file)[name] == value
    assert type(seen(file)[name]) is type(value)


@pytest.mark.parametrize("text", ["whole=1.5", "whole=", "part=half", "flag=perhaps", "many=[a]", "plain=x"])
def test_text_of_another_type_is_refused(file, text):
    """By the setting's name and the type that is needed."""
    name, _, given = text.partition("=")
    with pytest.raises(SettingsError, match=f"{name}=.* is needed"):
        jobfile.load(file, {name: given})


@pytest.mark.parametrize(("settings", "seed", "got"), [({}, 3, 3), ({}, None, 7), ({"seed": "5"}, 3, 5)])
def test_a_job_may_ask_for_the_runs_seed(file, settings, seed, got):
    """What was set by name goes first."""
    jobfile.load(file, settings, seed=seed)
    assert seen(file)["seed"] == got


def test_a_job_file_may_import_its_neighbours(file):
    """As a script may."""
    (file.parent / "neighbour_of_file.py").write_text("rounds = 4\n")
    file.write_text("from neighbour_of_file import rounds\n" + TEXT.replace("whole: int = 1", "whole: int = rounds"))
    assert jobfile.load(file, {}).controller.rounds == 4


def test_what_is_no_python_file_is_refused(tmp_path):
    """By its name."""
    (tmp_path / "job.txt").write_text("job = 1")
    with pytest.raises(JobError, match=r"job.txt' is no Python file"):
        jobfile.load(tmp_path / "job.txt", {})


def test_the_cause_is_kept(file):
    """For --debug, and for whoever calls this from a program."""
    file.write_text("1 / 0\n")
    with pytest.raises(JobError, match="line 1: ZeroDivisionError") as caught:
        jobfile.load(file, {})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
