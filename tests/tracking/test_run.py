"""Reading a run back: its table, its models, and what is said where there is none."""

import os
import shutil

import numpy as np
import pytest

from koinon.errors import RunError
from koinon.tracking import FEDERATION, SERVER, Commit, Event, Folder, Row, folders, read

INFO = {"seed": 0, "rounds": 2, "score": "accuracy"}


def written(path):
    folder = Folder.create(path, INFO)
    for round in (1, 2):
        for site in ("north", "south"):
            folder(Event("metric", 1.0, round, site, {"accuracy": round / 10, "samples": 5}))
        folder(Event("metric", 1.0, round, SERVER, {"accuracy": 0.5}))
        folder.commit(Commit(round, {"model": {"w": np.full(2, round)}}, metrics={"accuracy": round / 10}))
    return read(path)


def test_what_was_measured_is_read_back(tmp_path):
    """All rows, in the order in which they were measured, with their types."""
    run = written(tmp_path / "run")
    assert run.rows[:2] == [
        Row("run", 1, "north", "accuracy", 0.1, 1.0),
        Row("run", 1, "north", "samples", 5.0, 1.0),
    ]
    assert len(run.rows) == 2 * (2 * 2 + 1 + 1)
    assert run.name == "run"


def test_series_and_tables_pick_from_the_rows(tmp_path):
    """`series` is one line over the rounds, `by_site` leaves the federation and the server out."""
    run = written(tmp_path / "run")
    assert [(row.round, row.value) for row in run.series("accuracy")] == [(1, 0.1), (2, 0.2)]
    assert [row.value for row in run.series("accuracy", SERVER)] == [0.5, 0.5]
    assert {row.site for row in run.series("accuracy")} == {FEDERATION}
    assert run.by_site("samples") == {"north": {1: 5.0, 2: 5.0}, "south": {1: 5.0, 2: 5.0}}
    assert run.series("nothing") == []


@pytest.mark.parametrize(("which", "value"), [("last", 2), ("best", 2)])
def test_models_are_read_back(tmp_path, which, value):
    """By name, as arrays."""
    assert written(tmp_path / "run").model(which)["w"].tolist() == [value, value]


def test_a_run_without_a_commit_has_no_model(tmp_path):
    """And says why."""
    Folder.create(tmp_path / "run", INFO)
    with pytest.raises(RunError, match="run 'run' has no last model"):
        read(tmp_path / "run").model()


def test_a_folder_without_a_table_has_no_rows(tmp_path):
    """The settings can be read all the same."""
    Folder.create(tmp_path / "run", INFO)
    (tmp_path / "run" / "metrics.csv").unlink()
    assert read(tmp_path / "run").rows == []


def test_the_numbers_of_a_folder_that_is_gone_are_not_nothing(tmp_path):
    """They are read when they are first asked for."""
    written(tmp_path / "run")
    before, after = read(tmp_path / "run"), read(tmp_path / "run")
    assert before.rows
    shutil.rmtree(tmp_path / "run")
    assert before.rows
    with pytest.raises(RunError, match="is gone, and its numbers with it"):
        _ = after.rows


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    """A reader may come while a run is being written."""
    run = written(tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open("a") as table:
        table.write("run,3,north,accu")
    assert read(tmp_path / "run").rows == run.rows


@pytest.mark.parametrize(
    ("name", "words"), [("digit-2", "did you mean 'digits-2'"), ("other", "known are"), ("deep/er", "there are none")]
)
def test_where_there_is_no_run_the_nearest_is_named(tmp_path, name, words):
    """Beside the folder that was asked for."""
    for number in (1, 2):
        Folder.create(tmp_path / f"digits-{number}", INFO)
    with pytest.raises(RunError, match=words):
        read(tmp_path / name)


def test_runs_are_listed_oldest_first(tmp_path):
    """And what is no run is not."""
    (tmp_path / "notes").mkdir()
    for number in (2, 1):
        Folder.create(tmp_path / f"run-{number}", INFO)
        os.utime(tmp_path / f"run-{number}" / "run.json", (100 - number, 100 - number))
    assert [path.name for path in folders(tmp_path)] == ["run-2", "run-1"]
    assert folders(tmp_path / "none") == []
