"""What the doctor says of a job and its data."""

import numpy as np
import pytest

import koinon
from koinon.errors import JobError, SettingsError
from koinon.operate import doctor
from koinon.payload import Payload, codec

MODEL = {"w": np.zeros((4, 3), np.float32), "head": np.zeros(3, np.float32), "count": np.array(0)}
SOURCE = koinon.data.arrays(np.ones((20, 4)), np.arange(20) % 2)


@koinon.task("train")
def train(model, data, context):
    return dict(model), len(data), {}


def job(**parts):
    return koinon.Job(koinon.FedAvg(1), train, **{"model": MODEL, **parts})


def test_each_array_has_its_fate():
    """Averaged, kept at the site, or left as it is; bytes are those of the wire."""
    said = doctor.job(job(upload=koinon.exclude("head")))
    assert [
        (array["name"], array["shape"], array["type"], array["bytes"], array["fate"]) for array in said["arrays"]
    ] == [
        ("w", [4, 3], "float32", 48, "averaged"),
        ("head", [3], "float32", 12, "never leaves its site"),
        ("count", [], "int64", 8, "not averaged: stays as it is"),
    ]
    assert said["down_bytes"] == len(codec.encode(Payload("weights", MODEL)))
    assert said["up_bytes_unfiltered"] == len(codec.encode(Payload("weight_diff", {"w": MODEL["w"]})))
    assert said["notes"] == []


@pytest.mark.parametrize(("shows", "seen"), [("each", "each site's update"), ("sum", "the sum of the updates only")])
def test_it_says_what_the_server_sees(shows, seen):
    """As the filters have it."""
    assert doctor.job(job(upload=koinon.Filter("veil", shows=shows)))["server_sees"] == seen


def test_it_knows_where_the_data_come_from():
    """From a source, a split, or nowhere."""
    assert doctor.job(job(data=SOURCE))["data"] == {"source": "arrays"}
    assert doctor.job(job(data=SOURCE.split(koinon.iid(), sites=2)))["data"]["sites"] == 2
    assert doctor.job(job())["data"] == {"source": "none: give data= to simulate()"}


def test_a_batch_norm_has_a_note():
    """Its running statistics are averaged, which people stumble over."""
    (note,) = doctor.job(job(model={"norm.running_var": np.ones(3, np.float32)}))["notes"]
    assert "group norm" in note


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ({"data": [1, 2, 3]}, SettingsError, "data= is a list"),
        ({"model": None}, JobError, "no first model"),
        ({"upload": koinon.exclude("haed")}, JobError, "did you mean 'head'"),
    ],
)
def test_a_job_that_cannot_start_is_found_out(parts, error, words):
    """In the words in which it would fail."""
    with pytest.raises(error, match=words):
        doctor.job(job(**parts))


@pytest.mark.parametrize(("library", "extra"), [("torch", "torch"), ("PIL", "data"), ("matplotlib", "plot")])
def test_what_is_missing_is_named_with_the_way_to_get_it(monkeypatch, library, extra):
    """As a line for the shell."""
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else found(name))
    machine = doctor.machine()
    assert machine[f"extra {extra}"] == f"missing: pip install 'koinon[{extra}]'"
    if library == "torch":
        assert machine["gpu"] == "unknown without PyTorch"
