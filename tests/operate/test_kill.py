"""Any process may be killed at any moment: a resumed run ends in the bits of one that was never disturbed."""

import json
import shutil
import signal
import time
from collections import Counter

import pytest

from koinon.tracking import read, state_of
from operate.conftest import JOBS, UNDRAWN

DIES = """
import os, signal
from koinon.site import Agent
answer, left = Agent.answer, [{pieces}]
def counted(self, task, sites, states, aggregator):
    left[0] -= len(sites)
    if left[0] < 0:
        os.kill(os.getpid(), signal.{signal})
    return answer(self, task, sites, states, aggregator)
Agent.answer = counted
"""
"""A process that kills itself before the n-th site's work."""

CLOCK = {"seconds"}


def numbers(run):
    """Every row but the times, with how often it is there."""
    return Counter((row.round, row.site, row.name, repr(row.value)) for row in run.rows if row.name not in CLOCK)


def names(run):
    return Counter((row.round, row.site, row.name) for row in run.rows)


def assert_same(run, whole):
    assert (run.path / "last.safetensors").read_bytes() == (whole.path / "last.safetensors").read_bytes()
    assert (run.path / "best.safetensors").read_bytes() == (whole.path / "best.safetensors").read_bytes()
    assert numbers(run) == numbers(whole)
    assert names(run) == names(whole)
    assert run.info["best"] == whole.info["best"]


@pytest.fixture
def jobs(here):
    shutil.copyfile(JOBS, here / "jobs.py")
    return here / "jobs.py"


KINDS = ["chain", "blurred", "torch", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("numpy", "feedback"))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_in_the_same_bits(koinon, process, here, jobs, kind):
    """Killed with SIGKILL in the middle of rounds 1 and 3, whatever the sites and the server have to remember."""
    if kind == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    assert koinon("run", jobs, "--set", f"kind={kind}", "--out", "whole").code == 0
    whole = read(here / "whole")
    for pieces, last in ((2, 0), (18, 2)):  # a round is 4 sites' training (or 3) and 4 sites' evaluation
        dies = DIES.format(pieces=pieces, signal="SIGKILL")
        child = process("run", jobs, "--set", f"kind={kind}", "--out", f"run-{pieces}", before=dies)
        assert child.wait() == -signal.SIGKILL
        run = read(here / f"run-{pieces}")
        assert state_of(run.info) == "killed"
        assert max((row.round for row in run.series("loss")), default=0) == last
        said = koinon("resume", f"run-{pieces}")
        assert said.code == 0, said.err
        assert said.last.endswith("report.html")
        again = read(here / f"run-{pieces}")
        assert again.info["state"] == "finished"
        assert_same(again, whole)


def test_a_run_may_be_killed_again_and_again(koinon, process, here, jobs):
    """Its every process is killed in its second round, until none is left."""
    assert koinon("run", jobs, "--out", "whole").code == 0
    dies = UNDRAWN + DIES.format(pieces=12, signal="SIGKILL")
    codes = [process("run", jobs, "--out", "run", before=dies).wait()]
    while codes[-1]:
        codes.append(process("resume", "run", before=dies).wait())
    assert codes == [-signal.SIGKILL] * 3 + [0]
    assert_same(read(here / "run"), read(here / "whole"))


def test_a_kill_from_outside(koinon, process, here, jobs):
    """Wherever it hits: in a round or in a commit."""
    arguments = ("run", jobs, "--rounds", 100, "--out")
    assert koinon(*arguments, "whole").code == 0
    child = process(*arguments, "run")
    committed = here / "run" / "commit.json"
    while not (committed.exists() and json.loads(committed.read_text())["round"] >= 3):
        assert child.poll() is None
        time.sleep(0.001)
    child.kill()
    child.wait()
    assert 3 <= json.loads(committed.read_text())["round"] < 100
    assert koinon("resume", "run").code == 0
    assert_same(read(here / "run"), read(here / "whole"))


@pytest.mark.parametrize(
    ("pieces", "words"), [(20, "`koinon resume run` goes on after round 2"), (2, "nothing was committed yet")]
)
def test_ctrl_c_says_where_the_run_is(process, here, jobs, pieces, words):
    """By its folder and its last commit, if it has one."""
    before = DIES.format(pieces=pieces, signal="SIGINT")
    assert process("run", jobs, "--out", "run", before=before).communicate()[1] == f"stopped: {words}\n"


def test_ctrl_c_while_sites_train_alone_leaves_a_finished_run(koinon, process, here, jobs):
    """Its rounds are done: it does not pass for killed, and a resume does the rest."""
    child = process("run", jobs, "--alone", "--out", "run", before=DIES.format(pieces=43, signal="SIGINT"))
    out, err = child.communicate()
    assert "training 4 sites alone" in out
    assert err == "stopped: `koinon resume run` goes on after round 4\n"
    assert read(here / "run").info["state"] == "finished"
    assert len(read(here / "run").by_site("alone_accuracy")) == 1
    assert koinon("resume", "run").code == 0
    assert len(read(here / "run").by_site("alone_accuracy")) == 4


def test_ctrl_c_stops_a_run_that_can_go_on(koinon, process, here, jobs):
    """Exit code 130, one line that says how to go on, and the run is 'stopped'."""
    assert koinon("run", jobs, "--out", "whole").code == 0
    child = process("run", jobs, "--out", "run", before=DIES.format(pieces=20, signal="SIGINT"))
    out, err = child.communicate()
    assert child.returncode == 130
    assert err == "stopped: `koinon resume run` goes on after round 2\n"
    assert "round 2/4" in out
    assert read(here / "run").info["state"] == "stopped"
    assert json.loads(koinon("runs", ".", "--json").out)[-1]["state"] == "stopped"
    assert koinon("resume", "run").code == 0
    assert_same(read(here / "run"), read(here / "whole"))


def test_a_finished_run_goes_on_for_more_rounds(koinon, here, jobs):
    """To the bits of one that had so many from the start; the new number is remembered."""
    assert koinon("run", jobs, "--rounds", 6, "--out", "whole").code == 0
    assert koinon("run", jobs, "--rounds", 3, "--out", "run").code == 0
    said = koinon("resume", "run", "--rounds", 6)
    assert said.code == 0, said.err
    assert_same(read(here / "run"), read(here / "whole"))
    assert read(here / "run").info["rounds"] == 6
    assert json.loads((here / "run" / "command.json").read_text())["rounds"] == 6


def test_a_run_cannot_go_on_for_fewer_rounds_than_it_has(koinon, here, jobs):
    """It stays as it is."""
    assert koinon("run", jobs, "--rounds", 2, "--out", "run").code == 0
    kept = {name: (here / "run" / name).read_bytes() for name in ("run.json", "command.json", "metrics.csv")}
    said = koinon("resume", "run", "--rounds", 1)
    assert said.code == 1
    assert "2 rounds are done already: give --rounds 3 or more" in said.err
    assert kept == {name: (here / "run" / name).read_bytes() for name in kept}


@pytest.mark.parametrize("alone", [[], ["--alone"]], ids=str)
def test_resuming_a_finished_run_changes_nothing(koinon, here, jobs, alone):
    """There is no round left to do, and what was measured is not measured twice."""
    assert koinon("run", jobs, "--out", "run", *alone).code == 0
    before, table = read(here / "run"), (here / "run" / "metrics.csv").read_bytes()
    assert koinon("resume", "run").code == 0
    assert_same(read(here / "run"), before)
    assert (here / "run" / "metrics.csv").read_bytes() == table


def test_a_run_resumes_from_anywhere(koinon, here, jobs, monkeypatch):
    """Also when the job file has gone: the run keeps a copy. Paths mean what they meant when it began."""
    assert koinon("run", "jobs.py", "--rounds", 2, "--out", "run").code == 0
    jobs.unlink()
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    said = koinon("resume", here / "run", "--rounds", 3)
    assert said.code == 0, said.err
    assert said.last == str(here / "run" / "report.html")
    assert read(here / "run").info["state"] == "finished"


def test_equal_seeds_are_equal_bits_and_others_are_not(koinon, here, jobs):
    """For PyTorch, with drop-out, sampled sites and momentum."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        assert koinon("run", jobs, "--set", "kind=torch", "--rounds", 2, "--seed", seed, "--out", name).code == 0
    one, two, other = (read(here / name) for name in ("one", "two", "other"))
    assert_same(one, two)
    assert (one.path / "last.safetensors").read_bytes() != (other.path / "last.safetensors").read_bytes()
    assert {row.site for row in one.rows if row.name == "train_loss"} != {f"site-{n}" for n in range(1, 5)}
