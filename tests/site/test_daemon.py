"""A running site against a server that is an object: real folders, real processes, and whatever may happen to them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from koinon import provision as trust
from koinon.errors import LinkError, Refused, SettingsError
from koinon.provision import Admin, Project, Server
from koinon.site import bundle, certificates, daemon, kit, landlock, status
from koinon.site.child import Child
from koinon.site.daemon import Daemon
from koinon.site.kit import Kit, SiteSettings, open_kit
from koinon.task.wire import Assignment, Orders

PROJECT = Project("p", Server(["localhost:1"]), sites={"north": "N"}, admins={"ada": Admin("lead", "A")})

WORKER = """
import json, os, pathlib, sys, time
from koinon.site import child
line = child.parent()
heard = line.hear()
order = next(heard)
started = pathlib.Path("started")
started.write_text(started.read_text() + "+" if started.exists() else "+")
print("begun", os.getpid(), flush=True)
line.say(ready=True)
for message in heard:
    asked = json.loads(pathlib.Path(message["payload"]).read_text())
    current = pathlib.Path(order["job"]) / "state.safetensors"
    if asked == "broken":
        line.say(broken="no data: mount the disk", traceback=f"Traceback in {sys.prefix}/lib/x.py")
        break
    if asked == "die" or (asked == "die once" and started.read_text() == "+"):
        print("last words in", os.getcwd(), flush=True)
        os.kill(os.getpid(), 9)
    job = pathlib.Path(order["job"]).parent
    if asked == "look":
        for path in [*job.parents[2].rglob("*"), job.parents[2] / "settings.toml"]:
            try:
                path.is_file() and path.open("r+").close()
            except OSError:
                continue
            if path.is_file() and not {job / "code", job / "work"} & {*path.parents} and path.name != "bundle.zip":
                print("seen", path, flush=True)
        for folder in [job, *job.parents[:3], job / "spool", job / "payloads", job.parent / "other"]:
            for plant in lambda new: new.write_text(""), lambda new: new.symlink_to("key.pem"):
                try:
                    plant(folder / "planted")
                    print("planted in", folder, flush=True)
                except OSError:
                    pass
    if asked == "leak":
        os.unlink("log.txt")
        os.symlink(job / "../../../key.pem", "log.txt")
        os.kill(os.getpid(), 9)
    if asked == "link":
        os.symlink(job / "../../../key.pem", message["answer"])
        line.say(done=message["task"]["id"], seconds=0.5, failed=None)
        continue
    if asked == "fail":
        said = f"KeyError: 'label' in '{order['data']['train']}', \\ud800, {job.parents[2] / 'key.pem'}"
        trace = f'File "{job / "code/job.py"}", line 1'
        line.say(done=message["task"]["id"], seconds=0.5, failed=said, traceback=trace)
        continue
    if asked == "mute":
        line.say(done=message["task"]["id"], seconds=0.5, failed="")
        continue
    while asked == "hang":
        time.sleep(0.01)
    said = {
        "task": message["task"], "state": current.read_text() if current.exists() else "",
        "site": order["site"], "data": order["data"], "settings": order["manifest"]["settings"], "pid": os.getpid()}
    pathlib.Path(message["answer"]).write_text(json.dumps(said))
    if asked == "learn":
        pathlib.Path(message["state"]).write_text("learned in " + message["task"]["id"])
    line.say(done=message["task"]["id"], seconds=0.5, failed=None)
"""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Far:
    """A server: hands out tasks until they are answered, and does to each call what the tests want done to it."""

    def __init__(self, zipped: bytes) -> None:
        self.blobs = {digest(zipped): zipped}
        self.bundle, self.tasks, self.answers, self.polls = zipped, {}, {}, []
        self.drop: dict[str, list[str]] = {}
        self.end: list[str] = []
        self.wrong: dict[str, list[Exception]] = {"poll": [], "fetch": [], "push": []}
        self.down = self.deaf = False
        self.verdict, self.fetched, self.revoked, self.chain, self.refreshed = "accepted", [], "", b"", 0
        self.job = bundle.job_id("job", zipped)

    def ask(self, task: str, what: str, **other: Any) -> None:
        data = json.dumps(what).encode()
        self.blobs[digest(data)] = data
        of = {"job": self.job, "bundle": digest(self.bundle), "bundle_size": len(self.bundle)} | other
        self.tasks[task] = Assignment(task=task, name="train", round=1, digest=digest(data), size=len(data), **of)

    def _fate(self, call: str) -> None:
        if self.wrong[call]:
            raise self.wrong[call].pop(0)
        if self.down or (self.deaf and call == "push"):
            raise LinkError("nobody listens at localhost:1")

    def poll(self, poll):
        time.sleep(0.005)
        self._fate("poll")
        holding, jobs, self.troubles = poll.holding, poll.jobs, poll.troubles
        self.polls.append((holding, jobs))
        held = {task for tasks in holding.values() for task in tasks}
        news = [one for task, one in self.tasks.items() if task not in held and task not in self.answers]
        return Orders(news, self.drop, [job for job in self.end if job in jobs], self.revoked)

    def fetch(self, digest, size, into):
        self._fate("fetch")
        self.fetched.append(digest)
        assert len(self.blobs[digest]) == size
        into.write_bytes(self.blobs[digest])

    def push(self, answer, path):
        self._fate("push")
        data = path.read_bytes()
        assert (digest(data), len(data)) == (answer.digest, answer.size)
        self.answers[answer.task] = (answer, json.loads(data))
        return self.verdict

    def renew(self, request):
        self.request = request
        return self.chain

    def refresh(self):
        self.refreshed += 1


class Here:
    """A site that runs in this process, and may be started anew."""

    def __init__(self, kit: Kit, far: Far) -> None:
        self.kit, self.far, self.daemon = kit, far, None
        self.settings = SiteSettings(poll=0.01, data={"train": "/data/x.csv"})

    def start(self) -> Daemon:
        self.daemon = Daemon(self.kit, self.settings, self.far, partial(Child, "scripted_worker"))
        self.thread = threading.Thread(target=self.daemon.run, daemon=True)
        self.thread.start()
        return self.daemon

    def stop(self) -> None:
        if self.daemon:
            self.daemon.stop()
            self.thread.join(20)
            assert not self.thread.is_alive()

    @property
    def folder(self) -> Path:
        return self.kit.run / "jobs" / self.far.job

    def answered(self, task: str) -> dict[str, Any]:
        until(lambda: task in self.far.answers)
        return self.far.answers[task][1]


def until(holds: Callable[[], Any]) -> None:
    """Wait for it; half a minute is for ever."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Kits, and a signed bundle."""
    folder = tmp_path_factory.mktemp("daemon")
    trust.provision(PROJECT, folder / "p")
    (folder / "job.py").write_text("import koinon\n")
    order = SimpleNamespace(file=str(folder / "job.py"), settings={"lr": "1"}, seed=0, rounds=1, fast=False)
    return folder / "p/kits", bundle.pack(order, open_kit(folder / "p/kits/ada"))


@pytest.fixture
def here(made: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """A site that is not started yet."""
    (tmp_path / "scripted_worker.py").write_text(WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    site = open_kit(made[0] / "north")
    opened = Kit(tmp_path / "north", site.project, site.name, site.role, site.organisation, site.servers)
    os.system(f"cp -r '{site.path}' '{opened.path}'")
    site = Here(opened, Far(made[1]))
    yield site
    site.stop()


# -- the usual -----------------------------------------------------------------------------------------------


def test_a_job_from_its_first_task_to_its_end(here: Here):
    """One process for all tasks; what was learned counts when it is acknowledged; a payload comes once."""
    here.far.ask("1-train", "learn")
    here.far.ask("2-train", "learn")
    here.start()
    first, second = here.answered("1-train"), here.answered("2-train")
    assert first["state"] == "" and second["state"] == "learned in 1-train"
    assert first["pid"] == second["pid"] and first["data"] == {"train": "/data/x.csv"} and first["site"] == "north"
    assert first["settings"] == {"lr": "1"} and first["task"] == {"id": "1-train", "name": "train", "round": 1}
    assert len(here.far.fetched) == 2  # the bundle and the payload
    assert here.far.answers["1-train"][0].seconds == 0.5
    until(lambda: (here.folder / "code/state.safetensors").read_text() == "learned in 2-train")
    here.far.ask("3-train", "other")
    here.answered("3-train")
    assert [path.name for path in (here.folder / "payloads").iterdir()] == [here.far.tasks["3-train"].digest]
    until(lambda: not [*(here.folder / "spool").iterdir()])
    here.far.end = [here.far.job]
    until(lambda: not here.folder.exists())
    assert not alive(first["pid"]) and (here.kit.run / "over").read_text().split() == [here.far.job]
    here.stop()
    here.far.end = []
    here.far.ask("4-train", "learn")
    here.start()
    assert "has ended at this site before" in here.answered("4-train")["reason"]


def test_what_was_learned_in_vain_is_forgotten(here: Here):
    """A late site trains on from where it was, and so does one whose answer was no use."""
    here.start()
    for task, here.far.verdict in {"1-train": "late", "2-train": "unknown", "3-train": "malformed"}.items():
        here.far.ask(task, "learn")
        assert here.answered(task)["state"] == ""
        until(lambda: not [*(here.folder / "spool").iterdir()])
    here.far.ask("4-train", "learn")
    assert here.answered("4-train")["state"] == ""


def test_the_same_answer_twice_is_one_that_counts(here: Here):
    """The acknowledgement was lost: the server says so, and the site goes on from there."""
    here.far.verdict = "duplicate"
    here.far.ask("1-train", "learn")
    here.start()
    here.answered("1-train")
    until(lambda: (here.folder / "code/state.safetensors").exists())


def test_a_failure_is_an_answer(here: Here, caplog: pytest.LogCaptureFixture):
    """The job's own, and that its process cannot even begin; where anything lies is for the site's own log only."""
    here.settings = SiteSettings(poll=0.01, data={"train": "/data/x.csv", "target": "label"})
    here.far.ask("1-train", "fail")
    here.far.ask("2-train", "broken")
    here.far.ask("3-train", "mute")
    here.far.ask("4-train", "learn")
    here.start()
    reason = "KeyError: 'label' in '[data] train', ?, KIT/key.pem"
    assert here.answered("1-train") == {"reason": reason, "traceback": f'File "{here.far.job}/code/job.py", line 1'}
    assert here.far.answers["1-train"][0].failed and here.far.answers["1-train"][0].seconds == 0.5
    broken = {"reason": "no data: mount the disk", "traceback": "Traceback in …/lib/x.py"}
    assert here.answered("2-train") == broken
    assert here.answered("3-train") == {"reason": "", "traceback": ""}
    assert "in '/data/x.csv'" in caplog.text and f"{here.kit.path}/key.pem" in caplog.text
    assert here.answered("4-train")["state"] == ""


@pytest.mark.skipif(not landlock.version(), reason="this system cannot hide files")
def test_a_job_sees_nothing_of_the_site_but_its_own_folder(here: Here):
    """Neither the key, nor the settings that outrank it, nor other jobs, also those that come later."""
    (here.kit.run / "jobs/other").mkdir(parents=True)
    (here.kit.run / "jobs/other/bundle.zip").write_text("")
    (here.kit.run / "over").write_text("")
    here.far.ask("1-train", "learn")
    here.start()
    here.answered("1-train")
    (here.kit.run / "jobs/later").mkdir()
    (here.kit.run / "jobs/later/bundle.zip").write_text("")
    here.far.ask("2-train", "look")
    here.answered("2-train")
    log = (here.folder / "work/log.txt").read_text()
    assert "seen" not in log and "planted" not in log and not [*here.kit.path.rglob("planted")]


def test_a_job_cannot_have_the_site_hand_out_its_key(here: Here):
    """By a link where its answer, or its log, should be; nor write into what a link leads to."""
    key = (here.kit.path / "key.pem").read_bytes()
    here.far.ask("1-train", "link")
    here.far.ask("2-train", "leak")
    here.far.ask("3-train", "learn")
    here.start()
    assert "'answer' is no plain file of its own" in here.answered("1-train")["reason"]
    said = here.answered("2-train")
    assert "was killed" in said["reason"] and "its log cannot be read" in said["traceback"]
    assert here.answered("3-train")["state"] == ""
    assert (here.kit.path / "key.pem").read_bytes() == key
    assert key.splitlines()[1].decode() not in str(here.far.answers)


# -- what dies -----------------------------------------------------------------------------------------------


def test_a_process_that_dies_is_started_again(here: Here):
    """And nobody at the server notices."""
    here.far.ask("1-train", "die once")
    here.start()
    assert here.answered("1-train")["site"] == "north"
    assert (here.folder / "work/started").read_text() == "++" and here.daemon.counts["deaths"] == 1


def test_a_task_that_kills_its_process_three_times_is_given_up(here: Here):
    """The failure says how it died, with the last lines of its log; the next task is not blamed."""
    here.far.ask("1-train", "die")
    here.far.ask("2-train", "learn")
    here.start()
    said = here.answered("1-train")
    assert "was killed" in said["reason"] and "third time" in said["reason"]
    assert said["traceback"].splitlines()[-1] == f"last words in {here.far.job}/work"
    assert here.answered("2-train")["task"]["id"] == "2-train"


def test_a_process_that_is_killed_while_idle_is_no_failure(here: Here):
    """The next task finds another."""
    here.far.ask("1-train", "learn")
    here.start()
    pid = here.answered("1-train")["pid"]
    os.kill(pid, 9)
    until(lambda: here.daemon._hosted[here.far.job].child.code is not None)
    here.far.ask("2-train", "learn")
    assert here.answered("2-train")["pid"] != pid and here.daemon.counts["deaths"] == 0


def test_a_restarted_site_delivers_and_does_not_work_again(here: Here):
    """What was finished lies in the spool; what was not is asked for again, and what is half written goes."""
    here.far.deaf = True
    here.far.ask("1-train", "learn")
    here.start()
    until(lambda: [*(here.folder / "spool").glob("*.json")])
    here.stop()
    assert "1-train" not in here.far.answers and (here.folder / "work/started").read_text() == "+"
    (here.folder / "spool/2-train.answer").write_text("half")
    (here.folder / "spool/3-train.json").write_text('{"job"')
    here.far.polls = []
    here.start()
    until(lambda: here.far.polls)
    here.far.deaf = False
    here.answered("1-train")
    until(lambda: (here.folder / "code/state.safetensors").exists() and not [*(here.folder / "spool").iterdir()])
    assert here.far.polls[0] == ({here.far.job: ["1-train"]}, [here.far.job])
    assert (here.folder / "work/started").read_text() == "+"


def test_a_stopped_site_leaves_no_process(here: Here):
    """Nor an answer to what it was interrupted in; then it is done again."""
    here.far.ask("1-train", "hang")
    here.start()
    until(lambda: (here.folder / "work/started").exists())
    pid = here.daemon._hosted[here.far.job].child.pid
    here.stop()
    assert not alive(pid) and not here.far.answers
    here.far.ask("1-train", "learn")
    here.start()
    here.answered("1-train")


def test_what_nobody_waits_for_is_stopped(here: Here):
    """A dropped task, and an ended job, take their process along."""
    here.far.ask("1-train", "hang")
    here.start()
    until(lambda: (here.folder / "work/started").exists())
    pid = here.daemon._hosted[here.far.job].child.pid
    del here.far.tasks["1-train"]
    here.far.drop = {here.far.job: ["1-train"]}
    here.far.ask("2-train", "learn")
    assert here.answered("2-train")["pid"] != pid and not alive(pid)
    assert here.daemon.counts["deaths"] == 0 and "1-train" not in here.far.answers
    here.far.ask("3-train", "hang")
    until(lambda: here.daemon.errands.holding)
    here.far.end = [here.far.job]
    del here.far.tasks["3-train"]
    until(lambda: not here.folder.exists())


# -- what is refused -----------------------------------------------------------------------------------------


def reason(here: Here) -> str:
    here.far.ask("1-train", "learn")
    here.start()
    said = here.answered("1-train")
    assert here.far.answers["1-train"][0].failed and not (here.folder / "work/started").exists()
    return said["reason"]


def test_a_submitter_whom_the_site_does_not_accept(here: Here):
    """The site's settings outrank the job."""
    here.settings = SiteSettings(poll=0.01, accept=["role:org_admin", "organisation:B", "bob"])
    assert "'north' takes no jobs of lead 'ada' of 'A'" in reason(here)


@pytest.mark.parametrize(
    ("accept", "does"),
    [("ada", True), ("role:lead", True), ("organisation:A", True), ("*", True), ("role:ada", False), ("A", False)],
)
def test_a_submitter_whom_it_accepts(made: tuple[Path, bytes], accept: str, does: bool):
    """By name, role or organisation."""
    who = kit.owner(open_kit(made[0] / "ada"))
    assert daemon.accepts(["bob", accept], who) is does and not daemon.accepts([], who)


def test_a_changed_bundle(here: Here):
    """Whoever changed it."""
    zipped = here.far.bundle.replace(b"import koinon", b"import k0inon")
    here.far.bundle, here.far.job = zipped, bundle.job_id("job", zipped)
    here.far.blobs[digest(zipped)] = zipped
    assert "no bundle: Bad CRC" in reason(here)


def test_a_bundle_under_another_name(here: Here):
    """Nobody runs a job twice by calling it another."""
    here.far.job = "job-000000000000"
    assert "under another name" in reason(here)


def test_a_bundle_for_others(here: Here, made: tuple[Path, bytes], tmp_path: Path):
    """Its submitter named who takes part."""
    (tmp_path / "job.py").write_text("")
    order = SimpleNamespace(file=str(tmp_path / "job.py"), settings={}, seed=0, rounds=1, fast=False)
    zipped = bundle.pack(order, open_kit(made[0] / "ada"), sites=["south"])
    here.far = Far(zipped)
    assert "not for site 'north'" in reason(here)


def test_a_submitter_who_was_revoked(here: Here, tmp_path: Path, made: tuple[Path, bytes]):
    """The list comes with the orders, and is kept if the root signed it."""
    os.system(f"cp -r '{made[0].parent}' '{tmp_path}/project'")
    trust.revoke(PROJECT, tmp_path / "project", "ada")
    here.far.revoked = '{"names": {}, "issued": "2999-01-01", "signature": "AAAA"}'
    here.start()
    until(lambda: len(here.far.polls) > 2)
    assert not kit.revoked(here.kit).names
    here.far.revoked = (tmp_path / "project/revoked.json").read_text()
    until(lambda: "ada" in kit.revoked(here.kit).names)
    here.stop()
    assert "'ada' was revoked" in reason(here)


def test_an_answer_that_is_not_taken_becomes_a_failure(here: Here, caplog: pytest.LogCaptureFixture):
    """The server should at least know why there is none; if it does not even take that, the site goes on."""
    here.far.wrong["push"] = [Refused("5 GB are over the limit")]
    here.far.ask("1-train", "learn")
    here.start()
    assert "was not taken: 5 GB" in here.answered("1-train")["reason"]
    here.far.wrong["push"] = [Refused("no"), Refused("no")]
    here.far.ask("2-train", "learn")
    until(lambda: "'2-train' of job" in caplog.text and not here.daemon.errands.holding.get(here.far.job))
    del here.far.tasks["2-train"]
    here.far.ask("3-train", "learn")
    assert here.answered("3-train")["state"] == ""


# -- what is said --------------------------------------------------------------------------------------------


def test_an_outage_is_said_once(here: Here, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Each reason when it first shows, and then that the server answers again; not at every try."""
    monkeypatch.setattr(daemon.random, "random", lambda: 0.01)
    caplog.set_level(logging.INFO, "koinon.site")
    here.far.ask("1-train", "learn")
    here.far.wrong["poll"] = [LinkError("the name x cannot be resolved"), *[LinkError("refused: wait")] * 5]
    here.far.wrong["push"] = [LinkError("cut")] * 3
    here.far.wrong["fetch"] = [LinkError("cut")] * 3
    here.start()
    here.answered("1-train")
    until(lambda: caplog.text.count("goes on") == 2)
    text = caplog.text
    assert text.count("cannot be resolved; it is tried again") == text.count("refused: wait; it is tried again") == 1
    assert text.count("the server answers again") == 1
    assert text.count("cut; it is tried again") == 2
    whose = f"job '{here.far.job}' of lead 'ada' of 'A' is taken up"
    assert f"{whose} (its bundle's SHA-256: {digest(here.far.bundle)[:12]}…)" in text


def test_nonsense_is_no_reason_to_stop(here: Here, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Neither what cannot be, nor a fault of the site's own; what the orders say with it is not done."""
    monkeypatch.setattr(daemon.random, "random", lambda: 0.0)
    here.far.ask("1-train", "learn", job="../../etc")
    here.far.wrong["poll"] = [ZeroDivisionError()]
    here.start()
    until(lambda: "the server assigns what cannot be" in caplog.text and "fault of Koinon's own" in caplog.text)
    here.far.tasks.clear()
    here.far.ask("2-train", "learn")
    here.answered("2-train")
    assert not (here.kit.run / "etc").exists()


def test_a_full_disk_takes_nothing_and_goes_on(
    here: Here, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """It says so; the server hears that the task is held, that the site lives, and what ails it."""
    here.settings = SiteSettings(poll=0.01, disk_gb=5)
    monkeypatch.setattr(daemon, "LOOK", 0.05)
    monkeypatch.setattr(daemon.Spool, "free_gb", lambda spool: 4.9)
    here.far.ask("1-train", "learn")
    here.start()
    until(lambda: "less than 5 GB are free at" in caplog.text)
    until(lambda: here.far.polls[-1][0] == {here.far.job: ["1-train"]})
    until(lambda: here.far.troubles)
    (reason,) = here.far.troubles.values()
    assert reason.startswith("less than 5 GB are free at 'KIT/run'") and str(here.kit.path) not in reason
    assert not here.folder.exists() and caplog.text.count("less than 5 GB") == 1
    monkeypatch.setattr(daemon.Spool, "free_gb", lambda spool: 5.1)
    here.answered("1-train")
    until(lambda: not here.far.troubles)


def test_a_job_that_ends_while_there_is_trouble_does_not_go_on(
    here: Here, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """It is over, and that is all."""
    here.settings = SiteSettings(poll=0.01, disk_gb=5)
    caplog.set_level(logging.INFO, "koinon.site")
    monkeypatch.setattr(daemon, "LOOK", 0.05)
    monkeypatch.setattr(daemon.Spool, "free_gb", lambda spool: 4.9)
    here.far.ask("1-train", "learn")
    here.start()
    until(lambda: "less than 5 GB are free at" in caplog.text)
    here.far.tasks.clear()
    here.far.end = [here.far.job]
    until(lambda: not here.daemon._hosted)
    assert f"job '{here.far.job}' is over" in caplog.text and "goes on" not in caplog.text


def test_a_machine_that_slept_asks_at_once(here: Here, monkeypatch: pytest.MonkeyPatch):
    """The clock on the wall has gone on, the other has not."""
    site, began = Daemon(here.kit, here.settings, here.far), time.monotonic()
    clock = iter([0.0, 0.0, 8 * 3600.0])
    monkeypatch.setattr(daemon, "time", SimpleNamespace(monotonic=lambda: 0.0, time=lambda: next(clock)))
    site._pause(1.5)
    assert time.monotonic() - began < 1.4


def test_the_certificate_is_renewed_in_time(here: Here, made: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch):
    """Once it is due, and from then on the site shows the new one."""
    here.start()
    until(lambda: len(here.far.polls) > 2)
    assert here.far.refreshed == 0
    here.stop()
    server, before = open_kit(made[0] / "server"), kit.owner(here.kit)
    then = certificates.now() + (before.until - before.since) * 3 / 4
    monkeypatch.setattr(certificates, "now", lambda: then)
    request = kit.renewal_request(here.kit)
    here.far.chain = certificates.renew(server.issuer, request, before, kit.revoked(server))
    here.start()
    until(lambda: here.far.refreshed)
    assert kit.owner(here.kit).until > before.until


def test_a_site_says_how_it_is(here: Here):
    """To its own machine: well or not and why, and figures for Prometheus."""
    here.far.down = True
    here.far.ask("1-train", "fail")
    server = status.serve(here.start(), 0)
    with pytest.raises(SettingsError, match=f"port {server.server_port} cannot be had: another program has it"):
        status.serve(here.daemon, server.server_port)
    address = f"http://127.0.0.1:{server.server_port}"
    until(lambda: here.daemon.unreachable.said)
    with pytest.raises(HTTPError, match="503") as ill:
        urlopen(f"{address}/healthz")
    assert ill.value.read() == b"nobody listens at localhost:1\n"
    here.far.down = False
    here.answered("1-train")
    assert urlopen(f"{address}/healthz").read() == b"ok\n"
    text = urlopen(f"{address}/metrics").read().decode()
    assert 'koinon_site_total{what="failed"} 1' in text and re.search(r"koinon_site_jobs 1\n", text)
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{address}/etc/passwd")
    server.shutdown()
    server.server_close()
