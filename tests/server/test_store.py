"""The store, on SQLite and PostgreSQL: every transition, and a process that is killed within each."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from koinon.errors import MissingExtra, SettingsError
from koinon.server import store as stores
from koinon.server.blobs import Blobs, measured, place
from koinon.server.store import Answer, Entry, Posted, Store
from server.world import sha

ENTRY = Entry("digits-1", "digits", sha(b"zip"), 3, {"sites": None, "seed": 1}, "ada", "East", 5.0)
STEPS = ["arrived", "placed", "written", "committed", "tidied"]
PAYLOAD, ANSWER = b"the model", b"what a site made of it"
TASK = Posted(ENTRY.id, "1.1-train", "train", 1, sha(PAYLOAD), len(PAYLOAD), ["a", "b"])


class Opened:
    """A store with a job and an open task, which can be opened again."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.reopen()

    def reopen(self) -> Store:
        if hasattr(self, "store"):
            self.store.close()
        self.blobs = Blobs(self.folder)
        self.store = Store(self.url, self.blobs)
        return self.store

    def begin(self) -> Store:
        assert self.store.submit(ENTRY, self.file(b"zip"))
        assert self.post(TASK) == []
        return self.store

    def file(self, data: bytes) -> Path:
        """Bytes that have come whole."""
        path = self.blobs.scratch(data)
        assert measured(path) == (sha(data), len(data))
        return path

    def post(self, task: Posted, payload: bytes = PAYLOAD) -> list[Answer]:
        return self.store.post(task, self.file(payload))

    def accept(self, answer: Answer, data: bytes = ANSWER) -> str:
        path = self.blobs.arriving(answer.owner, answer.digest)
        path.write_bytes(data)
        return self.store.accept(answer, path)

    def lying(self) -> set[str]:
        """What lies in the two folders; of what arrives, anything."""
        return {path.name for path in self.blobs.folder.iterdir()} | {
            path.name for path in self.blobs.partial.iterdir()
        }


@pytest.fixture
def opened(database: str, tmp_path: Path):
    opened = Opened(database, tmp_path)
    yield opened
    opened.store.close()


def answer(site: str = "a", data: bytes = ANSWER, task: Posted = TASK, **more) -> Answer:
    return Answer(task.job, task.key, site, sha(data), len(data), 1.5, False, 100.0, **more)


def test_everything_is_there_after_a_restart(opened: Opened):
    """Jobs, tasks, answers in the order in which they came, sites and the audit."""
    store = opened.begin()
    assert not store.submit(ENTRY, opened.file(b"zip"))
    store.update(ENTRY.id, state="running", sites=["a", "b"])
    assert opened.accept(replace(answer("b", b"2"), at=7.0), b"2") == "accepted"
    assert opened.accept(replace(answer("a", b"1"), at=8.0), b"1") == "accepted"
    store.saw("a", "North")
    store.saw("a", "South")
    store.record("submitted", ENTRY.id, name="ada", role="lead", organisation="East")
    store = opened.reopen()
    assert store.swept == 0
    assert store.jobs() == [replace(ENTRY, state="running", sites=["a", "b"])]
    assert store.tasks() == store.tasks(ENTRY.id) == [TASK]
    assert [one.site for one in store.answers(ENTRY.id)] == [one.site for one in store.answers(ENTRY.id, TASK.key)]
    assert store.answers(ENTRY.id)[0] == replace(answer("b", b"2"), at=7.0)
    assert [(row["name"], row["organisation"]) for row in store.sites()] == [("a", "South")]
    assert [(row["name"], row["act"], row["of"]) for row in store.audit()] == [("ada", "submitted", ENTRY.id)]
    assert opened.lying() == {sha(b"zip"), sha(PAYLOAD), sha(b"1"), sha(b"2")}


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        (answer("a"), "duplicate"),
        (answer("a", b"other bytes"), "duplicate"),
        (answer("b"), "accepted"),
        (answer("c"), "unknown"),
        (replace(answer("b"), task="1.1-train"), "unknown"),
        (replace(answer("b"), job="another"), "unknown"),
    ],
)
def test_what_becomes_of_an_answer(opened: Opened, said: Answer, verdict: str):
    """After site a has answered; what does not count leaves nothing."""
    store = opened.begin()
    assert opened.accept(answer("a")) == "accepted"
    assert store.verdict(said) == verdict
    assert opened.accept(said) == verdict
    assert len(store.answers(TASK.job, TASK.key)) == 1 + (verdict == "accepted")
    assert opened.lying() == {sha(b"zip"), sha(PAYLOAD), sha(ANSWER)}


def test_an_answer_that_the_server_gave_makes_the_sites_own_late(opened: Opened):
    """It does not count as the site's: what that learned meanwhile is not to be kept."""
    store = opened.begin()
    assert opened.accept(answer("a", b"gave up", given_up=True), b"gave up") == "accepted"
    assert store.verdict(answer("a")) == "late"
    assert store.answered(TASK.job, "a", [TASK.key]) == set()
    assert opened.accept(answer("b")) == "accepted"
    assert store.answered(TASK.job, "b", [TASK.key, "x"]) == {TASK.key}


def test_a_closed_tasks_answers_live_until_its_round_is_committed(opened: Opened):
    """A controller that dies in between gets them again; afterwards nothing of them is left."""
    store = opened.begin()
    opened.accept(answer("a"))
    store.close_task(TASK)
    assert store.verdict(answer("b")) == "late" and store.verdict(answer("a")) == "duplicate"
    assert store.tasks() == [] and opened.lying() == {sha(b"zip"), sha(ANSWER)}
    assert opened.post(TASK) == [answer("a")]
    assert store.verdict(answer("b")) == "accepted"
    store.close_task(TASK)
    store.committed(ENTRY.id, 0)
    assert sha(ANSWER) in opened.lying()
    store.committed(ENTRY.id, 1)
    assert store.jobs()[0].round == 1
    assert opened.lying() == {sha(b"zip")}
    assert store.verdict(answer("a")) == "duplicate" and store.verdict(answer("b")) == "late"


def test_a_task_whose_commit_was_lost_is_asked_anew(opened: Opened):
    """Its answers' bytes are gone."""
    store = opened.begin()
    opened.accept(answer("a"))
    store.close_task(TASK)
    store.committed(ENTRY.id, 1)
    assert opened.post(TASK) == []
    assert opened.accept(answer("a")) == "accepted"


@pytest.mark.parametrize("other", [replace(TASK, digest=sha(b"another")), replace(TASK, sites=["a", "c"])])
def test_the_same_id_that_asks_something_else_is_another_task(opened: Opened, other: Posted):
    """The one before is forgotten with its answers, and what is still under way to it is late."""
    store = opened.begin()
    opened.accept(answer("a"))
    assert other.key != TASK.key
    assert opened.post(other, b"another" if other.digest != TASK.digest else PAYLOAD) == []
    assert store.tasks() == [other]
    assert store.verdict(answer("b")) == "late"
    assert store.verdict(answer("a", task=other)) == "accepted"
    assert opened.lying() == {sha(b"zip"), other.digest}


def test_a_job_that_is_over_keeps_its_bundle_alone(opened: Opened):
    """Even the same bytes in another job stay there for that."""
    store = opened.begin()
    another = replace(ENTRY, id="digits-2")
    store.submit(another, opened.file(b"zip"))
    theirs = replace(TASK, job=another.id)
    opened.post(theirs)
    opened.accept(answer("a"))
    store.update(ENTRY.id, state="failed", reason="why")
    assert opened.lying() == {sha(b"zip"), sha(PAYLOAD)}
    assert store.verdict(answer("b")) == "late"
    assert store.tasks() == [theirs]


def test_what_no_row_names_is_swept_at_the_start(opened: Opened):
    """What is under way to an open task stays; what is under way to any other goes."""
    store = opened.begin()
    (opened.blobs.folder / sha(b"lost")).write_bytes(b"lost")
    opened.blobs.scratch(b"half a bundle")
    kept = opened.blobs.arriving(place(TASK.job, TASK.key, "a"), sha(ANSWER))
    kept.write_bytes(ANSWER[:5])
    opened.blobs.arriving(place(TASK.job, "old", "a"), sha(ANSWER)).write_bytes(b"x")
    store = opened.reopen()
    assert store.swept == 3
    assert opened.lying() == {sha(b"zip"), sha(PAYLOAD), kept.name}


def test_bytes_that_could_not_be_written_down_are_still_there(opened: Opened, monkeypatch: pytest.MonkeyPatch):
    """A database that fails costs nothing but a second attempt."""
    opened.begin()
    path = opened.blobs.arriving(answer().owner, sha(ANSWER))
    path.write_bytes(ANSWER)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_verdict", fail)
        with pytest.raises(OSError, match="No space"):
            opened.store.accept(answer(), path)
    assert path.read_bytes() == ANSWER
    assert opened.store.accept(answer(), path) == "accepted"


def accept_and_die(url: str, folder: Path, wanted: str) -> int:
    """Accept in a process of its own that is killed at a step: its exit status, 0 once it has acknowledged."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        stores.reached = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == wanted else None
        blobs = Blobs(folder)
        os._exit(Store(url, blobs).accept(answer(), blobs.arriving(answer().owner, answer().digest)) != "accepted")
    finally:
        os._exit(2)


@pytest.mark.parametrize("step", [*STEPS, "none"])
def test_killed_at_any_step_an_answer_counts_once_and_what_is_acknowledged_is_there(opened: Opened, step: str):
    """kill -9 within `accept`; then the site sends the same again, as it had no acknowledgement."""
    opened.begin()
    opened.blobs.arriving(answer().owner, sha(ANSWER)).write_bytes(ANSWER)
    code = accept_and_die(opened.url, opened.folder, step)
    assert code == (0 if step == "none" else -signal.SIGKILL)
    store = opened.reopen()
    counted = store.answers(TASK.job, TASK.key)
    assert len(counted) == (step in ("committed", "tidied", "none"))
    for one in counted:
        assert opened.blobs.path(one.digest).read_bytes() == ANSWER
    assert opened.accept(answer()) == ("duplicate" if counted else "accepted")
    assert store.answers(TASK.job, TASK.key) == [answer()]
    assert opened.lying() == {sha(b"zip"), sha(PAYLOAD), sha(ANSWER)}


def test_every_step_of_accept_is_killed_at():
    """A step that is added is added to the test."""
    source = Path(stores.__file__).read_text()
    assert [line.split('"')[1] for line in source.splitlines() if "reached(" in line and '"' in line] == STEPS


def test_no_such_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Said in one line, without a password."""
    for url in ("nonsense", "oracle://x", f"sqlite:///{tmp_path}/none/store", "postgresql://u:secret@127.0.0.1:1/x"):
        with pytest.raises(SettingsError) as told:
            Store(url, Blobs(tmp_path))
        assert "secret" not in str(told.value)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtra, match=r"koinon\[postgresql\]"):
        Store("postgresql:///x", Blobs(tmp_path))
