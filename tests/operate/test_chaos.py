"""A federation that is killed, cut, slowed and doubled ends by itself, in the bits of a simulation (bench/chaos.py)."""

import argparse
import importlib.util
from pathlib import Path

import pytest

import koinon
from koinon.simulate import Here

BENCH = Path(__file__).parents[2] / "bench"
QUIET = {"cut": 0.0, "delay": 0.0, "down": 0.0, "twin": 0, "pause": 0.4, "sites": 2, "memory": True}


def module(name):
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def ends_the_same(here):
    """Torment a job: it ends, counts every answer once, has the bits of a simulation, and nothing is left of it."""

    def run(rounds, *, kills=0, **misfortunes):
        found = module("chaos").one(argparse.Namespace(**QUIET | misfortunes, rounds=rounds), 1, kills)
        job = module("chaos_job").job(2, rounds, memory=misfortunes.get("memory", True))
        koinon.simulate(job, seed=1, on=Here(1, reproducible=True), out="simulated")
        assert found["state"] == "finished" and found["answers_counted"], found["reason"]
        assert found["model"] == (here / "simulated/last.safetensors").read_bytes()
        assert (found["processes_left"], found["spools_left"]) == (0, 0)
        return found

    return run


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_whatever_is_killed(ends_the_same, kills):
    """SIGKILL at random moments to the server, a site, a controller or a job's process at a site."""
    found = ends_the_same(10 if kills < 10 else 60, kills=kills)
    assert sum(found["kills"].values()) >= kills / 2


def test_whatever_the_line_does(ends_the_same):
    """30 % of connections cut at a random byte, late pieces, and a site of which there are two."""
    found = ends_the_same(4, cut=0.3, delay=0.02, twin=1, memory=False)
    assert found["line"]["cut"]
