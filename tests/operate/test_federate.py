"""The command line of a real federation, against one on this machine that all tests here share."""

import json
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from koinon import provision as trust
from koinon.provision import poc as proof
from koinon.site.kit import open_kit
from koinon.tracking import read
from operate.conftest import JOBS

JOB = """
import sys, time
import numpy as np, koinon

@koinon.task("train")
def train(model, data, context):
    time.sleep(pause)
    if where == "train" and context.round == 2:
        return {"w": model["v"]}, 1, {}
    return {"w": model["w"] + 1}, len(data), {}

def job(at: str = "", rounds: int = 4, sleep: float = 0.0):
    global where, pause
    where, pause = at, sleep
    if at == "site" and "koinon.site.worker" in sys.orig_argv:
        import no_such_library
    if at == "server" and "koinon.server.controller" in sys.orig_argv:
        raise RuntimeError("not here")
    data = koinon.data.arrays(np.ones((40, 1)), np.arange(40) % 2).split(koinon.iid(), sites=2)
    return koinon.Job(koinon.FedAvg(rounds), train, model={"w": np.zeros(1)}, data=data)
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """The folder of a proof of concept with two sites."""
    folder = tmp_path_factory.mktemp("federation") / "poc"
    proof.start(folder, ["site-1", "site-2"])
    yield folder
    pids = [row["process"] for row in proof.status(folder)]
    proof.stop(folder)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.fixture
def kit(federation, here):
    """The admin's kit; the federation is found as `poc`, and there are job files."""
    (here / "poc").symlink_to(federation)
    shutil.copyfile(JOBS, here / "jobs.py")
    (here / "own.py").write_text(JOB)
    return here / "poc/kits/admin"


def submitted(koinon, kit):
    """The last job, as the server describes it."""
    return json.loads(koinon("jobs", "--kit", kit, "--json").out)[-1]


def follows(child):
    """Wait until a run has committed a round."""
    for line in child.stdout:
        if re.match(r"round +1/", line):
            return
    raise AssertionError(child.stderr.read())


# -- a job ---------------------------------------------------------------------------------------------------


def test_a_job_ends_in_the_bits_of_a_simulation_and_can_be_fetched_again(koinon, kit, here, federation):
    """With its report; what is shown names the folder here; no site had to wait for its server."""
    said = koinon("run", "jobs.py", "--on", "poc", "--sites", 2, "--rounds", 2)
    assert said.code == 0, said.err
    for site in "site-1", "site-2":
        asks, answers, *_ = (federation / "kits" / site / "log.txt").read_text().splitlines()
        assert "asks https://localhost:" in asks and answers.endswith("INFO    the server answers")
    assert said.out.startswith("run runs/jobs-1  2 rounds  2 sites") and said.last == "runs/jobs-1/report.html"
    assert koinon("run", "jobs.py", "--set", "sites=2", "--rounds", 2, "--on", 1, "--reproducible").code == 0
    bits = [(here / run / "last.safetensors").read_bytes() for run in ("runs/jobs-1", "runs/jobs-2")]
    assert bits[0] == bits[1]
    job = submitted(koinon, kit)
    assert (job["name"], job["state"], job["round"], job["submitter"]) == ("jobs", "finished", 2, "admin")
    assert koinon("fetch", job["id"], "--kit", kit).last == f"runs/{job['id']}"
    again = read(here / "runs" / job["id"])
    assert (again.path / "last.safetensors").read_bytes() == bits[0]
    assert [row[2:] for row in again.rows] == [row[2:] for row in read(here / "runs/jobs-1").rows]
    listed = koinon("jobs", "--kit", kit).out
    assert re.search(rf"{job['id']} +jobs +finished +2 +admin +\d{{4}}-\d\d-\d\d \d\d:", listed)
    there = koinon("sites", "--kit", kit).out.splitlines()
    assert [line.split()[:2] for line in there[1:]] == [["site-1", "True"], ["site-2", "True"]]
    assert koinon("stop", job["id"], "--kit", kit).err == f"error: job '{job['id']}' is finished already\n"


def test_a_site_that_fails_says_where(koinon, kit, here):
    """Its traceback, then who failed and why; the job is `failed`, and what it has left is here."""
    said = koinon("run", "own.py", "--on", "poc", "--set", "at=train")
    assert said.code == 1
    trace, _, words = said.err.partition("error: ")
    assert trace.startswith("Traceback") and 'return {"w": model["v"]}, 1, {}' in trace
    assert "failed: round 2: 0 of 2 sites answered 'train', 1 are needed" in words
    assert "failed ('site-1', 'site-2'): KeyError: 'v'" in words and words.endswith(
        "what it has left is in runs/own-1\n"
    )
    assert read(here / "runs/own-1").info["state"] == "failed"
    assert "KeyError: 'v'" in (here / "runs/own-1/failures.log").read_text()
    assert submitted(koinon, kit)["state"] == "failed" and "KeyError" not in koinon("jobs", "--kit", kit).out


def test_a_site_that_cannot_import_says_what_it_lacks(koinon, kit):
    """Each of them."""
    said = koinon("run", "own.py", "--on", "poc", "--set", "at=site")
    assert said.code == 1 and "2 of 2 sites cannot take part, 1 are needed" in said.err
    for site in "site-1", "site-2":
        assert re.search(f"'{site}': .*own.py: No module named 'no_such_library': is it installed here?", said.err)


def test_a_server_that_cannot_build_the_job_says_why(koinon, kit):
    """In one line, which names no folder of it."""
    said = koinon("run", "own.py", "--on", "poc", "--set", "at=server")
    why = r"failed: at the server: own.py, line \d+: RuntimeError: not here"
    assert said.code == 1 and re.fullmatch(rf"error: job 'own-\w+' {why}\n(what it has left.*\n)?", said.err)


def test_whoever_goes_away_leaves_the_job_running(koinon, kit, process, here):
    """Ctrl-C says how to come back to it."""
    child = process("run", "own.py", "--on", "poc", "--set", "sleep=0.3", "--rounds", 6)
    follows(child)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    job = submitted(koinon, kit)["id"]
    assert child.returncode == 130, err
    assert err.startswith(f"job '{job}' goes on without you: `koinon fetch {job} --kit")
    assert not (here / "runs").exists()
    part = koinon("fetch", job, "--kit", kit, "--out", "part")
    assert (part.last, submitted(koinon, kit)["state"]) == ("part", "running")
    assert part.err == f"job '{job}' goes on: this is what it has committed so far\n"
    while submitted(koinon, kit)["state"] == "running":
        time.sleep(0.1)
    assert submitted(koinon, kit)["state"] == "finished"
    assert koinon("fetch", job, "--kit", kit, "--out", "back").last == "back"
    assert max(row.round for row in read(here / "back").rows) == 6


def test_a_job_that_is_stopped_keeps_what_it_has_committed(koinon, kit, process, here):
    """Whoever follows it is told."""
    child = process("run", "own.py", "--on", "poc", "--set", "sleep=0.2", "--rounds", 500)
    follows(child)
    job = submitted(koinon, kit)["id"]
    said = koinon("stop", job, "--kit", kit)
    assert (said.code, said.out.splitlines()[0][: len(job) + 13]) == (0, f"job '{job}' stops;"), said.err
    _, err = child.communicate()
    assert child.returncode == 1
    assert err == f"error: job '{job}' stopped: on demand\nwhat it has left is in runs/own-1\n"
    run = read(here / "runs/own-1")
    assert run.info["state"] == "stopped" and run.rows and submitted(koinon, kit)["state"] == "stopped"


# -- wrong use -----------------------------------------------------------------------------------------------

ADMIN = ["--kit", "poc/kits/admin"]
WRONG = {
    "nowhere": (["run", "own.py", "--on", "pco"], ["--on pco", "poc, or the folder of a kit"]),
    "alone": (["run", "own.py", "--on", "poc", "--alone"], ["--alone trains on every site's data here", "leave"]),
    "more sites than the job has": (["run", "own.py", "--on", "poc", "--sites", "3"], ["2 sites", "out --sites 3"]),
    "more sites than there are": (["run", "jobs.py", "--on", "poc"], ["'poc' has 2 sites", "asks site-3, site-4 too"]),
    "a folder that exists": (["run", "own.py", "--on", "poc", "--out", "poc"], ["'poc' exists", "--out"]),
    "another folder that exists": (["fetch", "x", *ADMIN, "--out", "poc"], ["'poc' exists", "--out"]),
    "a job that is none": (["run", "none.py", "--on", "poc"], ["no job file 'none.py'", "did you mean 'own.py'?"]),
    "a setting that is none": (["run", "own.py", "--on", "poc", "--set", "att=1"], ["'att'", "did you mean 'at'?"]),
    "no such job": (["fetch", "x", *ADMIN], ["there is no job 'x'"]),
    "no such job to stop": (["stop", "x", *ADMIN], ["there is no job 'x'"]),
    "no kit": (["jobs", "--kit", "poc"], ["'poc' is no kit: there is no kit.json in it"]),
    "a kit in its archive": (["sites", "--kit", "poc/kits/admin.zip"], ["is a file: unpack it"]),
    "a site's kit": (["jobs", "--kit", "poc/kits/site-1"], ["is the kit of site 'site-1', not of an admin"]),
    "a server's kit": (["jobs", "--kit", "poc/kits/server"], ["is the kit of server 'server', not of an admin"]),
    "a site as the submitter": (["run", "own.py", "--on", "poc/kits/site-1"], ["site 'site-1'"]),
    "a second server": (["poc", "start"], ["proof of concept in 'poc' already", "`koinon poc stop`"]),
    "a server with a site's kit": (["server", "--kit", "poc/kits/site-1"], ["kit of site 'site-1', not of a server"]),
    "a site with an admin's kit": (["site", *ADMIN], ["kit of project_admin 'admin', not of a site"]),
    "a site with a changed kit": (["site", "--kit", "changed"], ["changed/root.pem' or", "was changed since"]),
    "a server with a lost key": (["server", "--kit", "keyless"], ["keyless/key.pem' is missing"]),
    "a site with a key for all": (["site", "--kit", "open"], ["key that others may read", "chmod 600"]),
    "a site that does what else": (["site", "chekc", *ADMIN], ["koinon site chekc", "koinon site check --kit DIR"]),
    "no server": (["jobs", "--kit", "far"], ["nobody listens at localhost:", "is the server running"]),
    "a job for no server": (["run", "own.py", "--on", "far"], ["nobody listens at localhost:"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """A kit whose server is not there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("far") / "p"
    who = {"sites": {"north": ""}, "admins": {"ada": trust.Admin("lead")}}
    trust.provision(trust.Project("p", trust.Server([f"localhost:{port}"]), **who), folder)
    return folder / "kits"


@pytest.mark.parametrize(("arguments", "words"), WRONG.values(), ids=WRONG.keys())
def test_wrong_use_costs_one_line(koinon, kit, far, here, arguments, words):
    """And nothing is begun."""
    kits = here / "poc/kits"
    for name, of in {"changed": "site-1", "keyless": "server", "open": "site-1", "far": far / "ada"}.items():
        shutil.copytree(kits / of, here / name, ignore=shutil.ignore_patterns("run"))
    (here / "changed/root.pem").write_text((far / "ada/root.pem").read_text())
    (here / "keyless/key.pem").unlink()
    (here / "open/key.pem").chmod(0o644)
    before, jobs = {*here.iterdir()}, koinon("jobs", *ADMIN, "--json").out
    said = koinon(*arguments)
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    for word in words:
        assert word in said.err
    assert {*here.iterdir()} == before and koinon("jobs", *ADMIN, "--json").out == jobs


# -- whether a site could join -------------------------------------------------------------------------------


def test_a_site_that_may_join_gets_green_lines(koinon, kit):
    """A line for everything that was looked at."""
    said = koinon("site", "check", "--kit", "poc/kits/site-1")
    assert said.code == 0, said.out
    rows = [line.split()[:2] for line in said.out.splitlines()[1:]]
    assert rows == [[name, "ok"] for name in ("kit", "name", "port", "TLS", "clock", "version", "disk")]
    assert [row[""] for row in json.loads(koinon("site", "check", "--kit", "poc/kits/site-2", "--json").out)] == [
        "ok"
    ] * 7


def test_a_site_that_may_not_join_is_told_what_to_do(koinon, kit, far, here):
    """In the line that says NO; the exit code is for scripts."""
    shutil.copytree(far / "north", here / "north")
    (here / "north/settings.toml").write_text("disk_gb = 1e9\n")
    rows = {
        "north": {"port": "is the server running, and is its port open?", "disk": "make room"},
        "poc/kits/admin": {"kit": "it is project_admin 'admin' of 'poc'"},
        "nowhere": {"kit": "is no kit"},
    }
    for folder, wrong in rows.items():
        said = koinon("site", "check", "--kit", folder)
        no = {line.split()[0]: line for line in said.out.splitlines()[1:] if line.split()[1] == "NO"}
        assert said.code == 1 and no.keys() == wrong.keys()
        assert all(words in no[name] for name, words in wrong.items())
        assert said.err == "error: this site cannot take part yet: see the lines that say NO\n"


# -- trust ---------------------------------------------------------------------------------------------------

PROJECT = """
name = "hearts"
own_keys = ["south"]
[server]
addresses = ["localhost:8443"]
[sites]
north = "Nord"
south = ""
[admins]
ada = { role = "lead", organisation = "Nord" }
"""


def test_an_operator_makes_kits_adds_renews_and_revokes(koinon, here):
    """Each command names what it made; what is there stays as it is."""
    (here / "project.toml").write_text(PROJECT)
    said = koinon("provision", "project.toml")
    waits = "'south' makes its own key: --sign its request"
    assert said.out.splitlines() == [*(f"hearts/kits/{name}" for name in ("server", "north", "ada")), waits], said.err
    before = (here / "hearts/kits/north/certificate.pem").read_bytes()
    assert koinon("provision", "project.toml").out == f"{waits}\n"
    added = koinon("provision", "project.toml", "--add-site", "east:Ost", "--add-admin", "bob:member")
    assert added.out.splitlines() == ["hearts/kits/east", "hearts/kits/bob", waits]
    assert koinon("provision", "project.toml", "--add-site", "east:Ost").out == f"'east' has a kit already\n{waits}\n"
    assert (open_kit(here / "hearts/kits/east").organisation, open_kit(here / "hearts/kits/bob").role) == (
        "Ost",
        "member",
    )
    assert (here / "hearts/kits/north/certificate.pem").read_bytes() == before
    assert koinon("provision", "project.toml", "--renew", "north").last == "hearts/kits/north"
    assert (here / "hearts/kits/north/certificate.pem").read_bytes() != before
    said = koinon("provision", "project.toml", "--revoke", "north")
    assert said.out == "hearts/revoked.json: put it into the server's kit, where it runs\n"
    assert "north" in (here / "hearts/kits/server/revoked.json").read_text()
    for words, wanted in {
        ("--revoke", "nroth"): "did you mean 'north'?",
        ("--renew", "west"): "there is no kit of 'west'",
        ("--add-admin", "eve:king"): "king",
        ("--add-site", "a/b"): "a/b",
        ("--add-site", "north"): "'north' is in the project already",
        ("--revoke", "ada", "--renew", "ada"): "--renew and --revoke are not done at once: do it in two steps",
        ("--sign", "no.pem", "--revoke", "ada"): "--sign and --revoke are not done at once",
        ("--renew", "ada", "--add-site", "west"): "--renew and --add-site are not done at once",
        ("--revoke", "ada", "--add-admin", "eve:lead"): "--revoke and --add-admin are not done at once",
    }.items():
        said = koinon("provision", "project.toml", *words)
        assert said.code == 1 and wanted in said.err and said.err.count("\n") == 1
    keys = [line for path in here.rglob("*.key") for line in path.read_text().splitlines()[1:-1]]
    assert keys and not [line for line in keys if line in said.out + added.out]


def test_a_site_may_keep_its_own_key(koinon, here):
    """It asks, the operator signs, and the kit opens with the key that never left."""
    (here / "project.toml").write_text(PROJECT)
    koinon("provision", "project.toml")
    said = koinon("kit", "request", "south", "--out", "mine")
    assert said.out.startswith("mine/request.pem: send it to the operator"), said.err
    assert koinon("kit", "request", "south", "--out", "mine").err.startswith("error: 'mine/key.pem' is there already")
    key = trust.fingerprint(here / "mine/request.pem")
    assert said.last == f"'south', key {key}: the operator asks for it by telephone"
    said = koinon("provision", "project.toml", "--sign", "mine/request.pem", "--add-site", "east")
    assert said.out.splitlines() == [
        f"site 'south', key {key}: compare it by telephone",
        "hearts/kits/south",
        "'east' has no kit: add it without --sign",
    ]
    assert koinon("provision", "project.toml").out == "everybody has a kit already\n"
    made = here / "hearts/kits/south"
    assert not (made / "key.pem").exists()
    shutil.copy2(here / "mine/key.pem", made)
    assert open_kit(made).name == "south"
    (here / "no.pem").write_text("nothing")
    for request, words in {"no.pem": "request", "missing.pem": "there is no request 'missing.pem'"}.items():
        said = koinon("provision", "project.toml", "--sign", request)
        assert (said.code, said.err.count("\n")) == (1, 1) and words in said.err
