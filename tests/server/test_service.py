"""The server over real TLS: every call, who may make it, and what comes of what is wrong."""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from koinon import provision as trust
from koinon.site import certificates
from koinon.site.kit import renewal_request, verify
from koinon.task.wire import VERSION, Poll, encode
from koinon.transport.tls import client_context
from server.scripted import payload
from server.world import World, place_of, running, sha, wait

ANSWER = b"what a site made of it"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server with sites a, b and c and a limit of 5 MB."""
    with running(
        tmp_path_factory.mktemp("world") / "p",
        sites=3,
        settings="largest_gb = 0.005\ndisk_gb = 0.0\njobs_at_once = 99\n",
    ) as world:
        yield world


@pytest.fixture
def task(world: World) -> Iterator[dict[str, Any]]:
    """A task of sites a and b, of a job that waits for both."""
    job = world.submit(sites=["a", "b"], size=300_000)
    yield world.assigned("a")
    world.call("boss", "POST", f"/v1/jobs/{job}/stop")
    world.finished(job)


def test_a_round_as_it_should_be(world: World):
    """Poll, fetch, answer, and the job is over; its files and events can be read, and who did what."""
    job = world.submit(sites=["a", "b"], rounds=2, size=200_000)
    assert world.state(job)["submitter"] == "lead"
    task = world.assigned("a")
    assert (task["job"], task["name"], task["round"], task["size"]) == (job, "train", 1, 200_000)
    status, data = world.call("a", "GET", f"/v1/blobs/{task['digest']}")
    assert (status, data, sha(data)) == (200, payload(1, 200_000), task["digest"])
    status, rest = world.call("a", "GET", f"/v1/blobs/{task['digest']}", headers={"Range": "bytes=150000-"})
    assert (status, rest, world.headers["Content-Range"]) == (206, data[150_000:], "bytes 150000-199999/200000")
    assert world.call("a", "GET", f"/v1/blobs/{task['digest']}", headers={"Range": "bytes=200001-"})[0] == 416
    status, bundle = world.call("b", "GET", f"/v1/blobs/{task['bundle']}")
    assert (status, sha(bundle), len(bundle)) == (200, task["bundle"], task["bundle_size"])
    world.put("a", task, ANSWER)
    assert not any(world.poll("a", holding={job: [task["task"]]}, jobs=[job]).values())
    threads = [threading.Thread(target=world.work, args=(site, job)) for site in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = world.finished(job)
    assert (said["state"], said["reason"], said["round"]) == ("finished", "", 2)
    assert world.poll("c", jobs=[job, "unknown"])["ended"] == sorted([job, "unknown"])
    status, files = world.call("member", "GET", f"/v1/jobs/{job}/files")
    assert (status, {"commit.json", "events.jsonl"} <= {file["name"] for file in files}) == (200, True)
    commit = world.call("member", "GET", f"/v1/jobs/{job}/files/commit.json")[1]
    assert json.loads(commit)["log"][0] == {"a": ANSWER.decode(), "b": f"b {task['task']}"}
    status, events = world.call("lead", "GET", f"/v1/jobs/{job}/events?after=0")
    assert (status, len(events.splitlines()), world.headers["Koinon-State"]) == (200, 2, "finished")
    assert world.call("lead", "GET", f"/v1/jobs/{job}/events?after={len(events)}")[1] == b""
    assert job in [entry["id"] for entry in world.call("member", "GET", "/v1/jobs")[1]]
    sites = {row["name"]: row for row in world.call("member", "GET", "/v1/sites")[1]}
    assert sites["a"]["connected"] and sites["a"]["organisation"] == "North"
    assert abs(sites["a"]["last_seen"] - time.time()) < 30


def test_what_ails_a_site_is_told(world: World):
    """In the log once, whatever it holds, and in the list of sites until it is over."""

    def trouble() -> str:
        rows = world.call("member", "GET", "/v1/sites")[1]
        return str(next(row["trouble"] for row in rows if row["name"] == "b"))

    before = world.log.stat().st_size
    for _ in range(2):
        world.poll("b", troubles={"j": "no room\n2026-01-01 ERROR forged"})
    told = world.log.read_bytes()[before:].decode()
    assert told.count("site 'b' cannot go on for now: {'j': 'no room\\n2026") == 1 and "\n2026-01-01" not in told
    assert trouble().startswith("no room")
    world.poll("b")
    assert trouble() == ""


def test_a_poll_waits_until_there_is_something_to_say(world: World):
    """And no longer; nothing new is said after the time it asked for."""
    began = time.monotonic()
    assert world.poll("c", wait=0.3)["assignments"] == []
    assert 0.3 <= time.monotonic() - began < 5
    orders: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: orders.append(world.poll("c", wait=20)))
    thread.start()
    job = world.submit(sites=["c"])
    thread.join(10)
    assert [one["job"] for one in orders[0]["assignments"]] == [job]
    world.call("boss", "POST", f"/v1/jobs/{job}/stop")
    assert wait(lambda: world.poll("c", wait=5, jobs=[job])["ended"]) == [job]


def test_what_a_site_holds_is_its_own_and_what_nobody_waits_for_is_dropped(world: World, task: dict[str, Any]):
    """Who does not hold it any more gets it again, as after a restart of the site."""
    job, key = task["job"], task["task"]
    assert world.assigned("a") == task
    assert world.poll("a", holding={job: [key]})["assignments"] == []
    assert world.poll("a", holding={job: [key, "0.1-train"]})["dropped"] == {job: ["0.1-train"]}
    assert world.poll("c", holding={job: [key]})["dropped"] == {job: [key]}


def test_an_answer_is_taken_up_where_it_was_cut(world: World, task: dict[str, Any]):
    """A receipt says how much is there, however the upload ended; a wrong offset gets one too."""
    data, place = bytes(range(256)) * 2000, place_of(task)
    query = f"?digest={sha(data)}&size={len(data)}"
    line = world.line("a")
    line.putrequest("PUT", f"{place}{query}&offset=0&seconds=1&failed=0")
    line.putheader("Content-Length", str(len(data)))
    line.endheaders(data[:300_000])
    there = wait(lambda: (said := world.call("a", "GET", place + query)[1])["offset"] == 300_000 and said)
    assert there == {"offset": 300_000, "verdict": ""}
    line.close()
    assert world.put("a", task, data, offset=7) == (409, there)
    assert world.put("a", task, data, offset=300_000) == (200, {"offset": len(data), "verdict": "accepted"})
    for said in (world.call("a", "GET", place + query), world.put("a", task, data), world.put("a", task, b"other")):
        assert (said[0], said[1]["verdict"]) == (200, "duplicate")


def test_an_answer_may_come_in_chunks_and_only_its_last_byte_counts(world: World, task: dict[str, Any]):
    """Each a call of its own, as through a proxy that allows no large ones."""
    data, place = bytes(100_000), f"{place_of(task)}?digest={sha(bytes(100_000))}&size=100000&seconds=1&failed=0"
    for offset in range(0, 100_000, 30_000):
        status, said = world.call("a", "PUT", f"{place}&offset={offset}", data[offset : offset + 30_000])
        assert (status, said["offset"]) == (200, min(offset + 30_000, 100_000))
    assert said["verdict"] == "accepted"


def test_the_later_of_two_uploads_goes_on(world: World, task: dict[str, Any]):
    """The line of the first may be dead without the server knowing."""
    data = bytes(400_000)
    line = world.line("a")
    line.putrequest("PUT", f"{place_of(task)}?digest={sha(data)}&size={len(data)}&offset=0&seconds=1&failed=0")
    line.putheader("Content-Length", str(len(data)))
    line.endheaders(data[:1000])
    query = f"{place_of(task)}?digest={sha(data)}&size={len(data)}"
    wait(lambda: world.call("a", "GET", query)[1]["offset"] == 1000)
    assert world.put("a", task, data, offset=1000)[1]["verdict"] == "accepted"
    with pytest.raises((OSError, http.client.HTTPException)):
        line.getresponse()


def test_a_failure_is_an_answer(world: World):
    """With the reason in JSON; the controller is told that it is one."""
    job = world.submit(sites=["a"])
    task = world.assigned("a")
    assert world.put("a", task, b"no JSON", failed=1)[0] == 422
    assert world.put("a", task, b" " * 65537, failed=1)[0] == 413
    failure = json.dumps({"reason": "no data", "traceback": "…"}).encode()
    assert world.put("a", task, failure, failed=1)[1]["verdict"] == "accepted"
    world.finished(job)
    heard = world.call("lead", "GET", f"/v1/jobs/{job}/files/heard.jsonl")[1].splitlines()
    assert [(said["failed"], said["site"], said["seconds"]) for said in map(json.loads, heard)] == [(True, "a", 1.5)]


def test_a_late_answer_is_refused_politely(world: World):
    """Nobody waits for it any more: before a byte of it is sent, and after."""
    job = world.submit(sites=["a", "b"], quorum=1)
    ours, theirs = world.assigned("a"), world.assigned("b")
    assert world.put("a", ours, ANSWER)[1]["verdict"] == "accepted"
    world.finished(job)
    query = f"{place_of(theirs)}?digest={sha(ANSWER)}&size={len(ANSWER)}"
    assert world.call("b", "GET", query) == (200, {"offset": len(ANSWER), "verdict": "late"})
    assert world.put("b", theirs, ANSWER) == (200, {"offset": len(ANSWER), "verdict": "late"})


WRONG = [
    ({"digest": sha(b"other")}, 422, "others than it announced"),
    ({"digest": "../../key.pem"}, 400, "SHA-256"),
    ({"digest": sha(ANSWER).upper()}, 400, "SHA-256"),
    ({"size": 10**12}, 413, "over the limit"),
    ({"size": 5}, 400, "more than the 5"),
    ({"size": -1}, 400, "size is to be a number"),
    ({"size": 10**30}, 400, "size is to be a number"),
    ({"offset": "x"}, 400, "offset is to be a number"),
    ({"seconds": "nan"}, 400, "seconds is to be a number"),
    ({"headers": {"Content-Length": str(100 << 30)}}, 400, "more than the"),
    ({"headers": {"Transfer-Encoding": "chunked"}}, 411, "Content-Length"),
]


@pytest.mark.parametrize(("wrong", "status", "said"), WRONG)
def test_a_wrong_answer_is_refused_and_nothing_of_it_stays(
    world: World, task: dict[str, Any], wrong: Any, status: int, said: str
):
    """Before its bytes are read, where that can be; then the right one is taken."""
    if "Transfer-Encoding" in wrong.get("headers", {}):
        got = world.call("a", "PUT", f"{place_of(task)}?digest={sha(ANSWER)}&size=22&offset=0", iter([ANSWER]))
    elif "Content-Length" in wrong.get("headers", {}):
        line = world.line("a")
        line.putrequest("PUT", f"{place_of(task)}?digest={sha(ANSWER)}&size=22&offset=0")
        line.putheader("Content-Length", wrong["headers"]["Content-Length"])
        line.endheaders()
        response = line.getresponse()
        got = response.status, json.loads(response.read())
        line.close()
    else:
        got = world.put("a", task, ANSWER, **wrong)
    assert got[0] == status and said in got[1]["error"], got
    assert not list((world.run / "partial").iterdir())
    world.lines.pop("a").close()
    assert world.put("a", task, ANSWER)[1]["verdict"] == "accepted"


def test_a_site_gets_and_answers_its_own_tasks_only(world: World, task: dict[str, Any]):
    """Whatever it claims: who it is stands in its certificate."""
    assert world.put("c", task, ANSWER)[0] == 404
    assert world.put("a", {**task, "task": "9.1-train"}, ANSWER)[0] == 404
    assert world.put("a", {**task, "job": "another"}, ANSWER)[0] == 404
    assert world.call("c", "GET", f"{place_of(task)}?digest={sha(ANSWER)}&size=5")[0] == 404
    for digest in (task["digest"], task["bundle"]):
        assert world.call("c", "GET", f"/v1/blobs/{digest}")[0] == 404
        assert world.call("b", "GET", f"/v1/blobs/{digest}")[0] == 200
    for digest in (sha(b"unknown"), "..%2F..%2Fkey.pem", "%2E%2E/%2E%2E/key.pem"):
        assert world.call("a", "GET", f"/v1/blobs/{digest}")[0] == 404
    assert "refused GET /v1/blobs" in world.log.read_text() and "site 'c' of North" in world.log.read_text()


ROLES = {
    "lead": {"submit", "stop", "read"},
    "local": {"submit", "stop", "read"},
    "boss": {"submit", "stop", "read"},
    "member": {"read"},
    "a": {"work"},
}
CALLS = [
    ("POST", "/v1/poll", "work"),
    ("GET", "/v1/blobs/x", "work"),
    ("GET", "/v1/results/x/y", "work"),
    ("PUT", "/v1/results/x/y", "work"),
    ("POST", "/v1/jobs", "submit"),
    ("POST", "/v1/jobs/x/stop", "stop"),
    ("GET", "/v1/jobs", "read"),
    ("GET", "/v1/jobs/x", "read"),
    ("GET", "/v1/jobs/x/files", "read"),
    ("GET", "/v1/jobs/x/files/y", "read"),
    ("GET", "/v1/jobs/x/events", "read"),
    ("GET", "/v1/sites", "read"),
]


@pytest.mark.parametrize("who", ROLES)
def test_who_may_call_what(world: World, who: str):
    """403 for whom it is not, and no other reason before that."""
    for method, path, act in CALLS:
        status, said = world.call(who, method, path, b"" if method in ("POST", "PUT") else None)
        assert (status == 403) == (act not in ROLES[who]), (method, path, status, said)
        assert status != 403 or re.search(f"'{who}' .*may not {act} here", said["error"])


@pytest.mark.parametrize(("who", "allowed"), [("lead", True), ("other", False), ("local", True), ("boss", True)])
def test_who_may_stop_a_job(world: World, who: str, allowed: bool):
    """Its submitter, an admin of the same organisation, an admin of the project; it is stopped then, and says so."""
    job = world.submit(sites=["a"])
    status, said = world.call(who, "POST", f"/v1/jobs/{job}/stop")
    assert status == (200 if allowed else 403), said
    if not allowed:
        assert "'lead' submitted it" in said["error"]
        world.call("boss", "POST", f"/v1/jobs/{job}/stop")
    assert (world.finished(job)["state"], world.state(job)["reason"]) == ("stopped", "on demand")


def test_a_bundle_is_checked_before_it_is_taken(world: World):
    """Its signature and who submits it; too long a one is refused unread; the same one again is the same job."""
    data = world.bundle("lead")
    for wrong, status in ((data[:-1], 422), (data.replace(b"job = None", b"job = 1/0 "), 422), (b"", 422)):
        got, said = world.call("lead", "POST", "/v1/jobs", wrong)
        assert (got, bool(said["error"])) == (status, True)
    got, said = world.call("boss", "POST", "/v1/jobs", data)
    assert got == 403 and "'lead' signed" in said["error"]
    line = world.line("lead")
    line.putrequest("POST", "/v1/jobs")
    line.putheader("Content-Length", str(65 << 20))
    line.endheaders()
    assert line.getresponse().status == 413
    line.close()
    ids = {world.call("lead", "POST", "/v1/jobs", data)[1]["job"] for _ in range(2)}
    said = [line for line in world.log.read_text().splitlines() if "submitted" in line and min(ids) in line]
    assert (
        len(ids) == 1 and len(said) == 2 and all(f"lead 'lead' of East: submitted {min(ids)}" in line for line in said)
    )
    world.call("boss", "POST", f"/v1/jobs/{min(ids)}/stop")
    assert not list((world.run / "partial").glob("scratch-*"))


def test_nothing_outside_a_run_folder_is_read(world: World):
    """Neither by a name nor by a link that a job's own code has put there."""
    job = world.submit(sites=["a"])
    run = world.run / "jobs" / job / "run"
    wait(run.is_dir)
    (run / "link").symlink_to(world.folder / "kits" / "server" / "key.pem")
    (run / "away").symlink_to(world.folder / "kits" / "server")
    names = [file["name"] for file in world.call("boss", "GET", f"/v1/jobs/{job}/files")[1]]
    assert "link" not in names and not [name for name in names if "away" in name]
    for name in ("link", "away/key.pem", "../log.txt", "..%2F..%2F..%2F..%2Fkey.pem", "%2Fetc%2Fpasswd", "none"):
        assert world.call("boss", "GET", f"/v1/jobs/{job}/files/{name}")[0] == 404
    world.call("boss", "POST", f"/v1/jobs/{job}/stop")


def test_a_run_folder_is_listed_while_its_job_writes(world: World):
    """What is gone by the time that it is looked at is no file of it, and no fault of the server's."""
    job, over = world.submit(sites=["a"]), threading.Event()
    run = world.run / "jobs" / job / "run"
    wait(run.is_dir)

    def write() -> None:
        while not over.is_set():
            for number in range(100):
                (run / f"{number}.tmp").write_bytes(b"")
            for number in range(100):
                (run / f"{number}.tmp").unlink()

    writing = threading.Thread(target=write)
    writing.start()
    try:
        for number in range(100):
            assert world.call("boss", "GET", f"/v1/jobs/{job}/files")[0] == 200
            assert world.call("boss", "GET", f"/v1/jobs/{job}/files/{number}.tmp")[0] in (200, 404)
    finally:
        over.set()
        writing.join()
    world.call("boss", "POST", f"/v1/jobs/{job}/stop")


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (encode(Poll(version=(1, 1))), 200, ""),
        (encode(Poll(version=(1, 2))), 400, "update one"),
        (encode(Poll(version=(2, 0))), 400, "update one"),
        (b"{", 400, "no Poll"),
        (b'{"wait": "long"}', 400, "no Poll"),
        (b"[" * 100_000, 400, "no Poll"),
        (b'{"from": "a later version", "wait": 0}', 200, ""),
        (b" " * (1 << 20) + b"{}", 413, "over the limit"),
    ],
)
def test_what_a_poll_says_is_checked(world: World, body: bytes, status: int, said: str):
    """A version one minor step away is understood, and words of a later one are ignored."""
    body = body.replace(b'"wait":25.0', b'"wait":0')
    got = world.call("c", "POST", "/v1/poll", body)
    assert got[0] == status and said in got[1].get("error", ""), got


def test_a_certificate_is_renewed_for_its_owner(world: World):
    """It holds, for the same name; not for another's."""
    status, chain = world.call("a", "POST", "/v1/renew", renewal_request(world.kit("a")))
    assert status == 200 and verify(chain, world.kit("a").root.read_bytes()).name == "a"
    status, said = world.call("a", "POST", "/v1/renew", renewal_request(world.kit("b")))
    assert status == 400 and "only for itself" in said["error"]
    assert world.call("a", "POST", "/v1/renew", b"nonsense")[0] == 400


def test_whoever_looks_is_told_the_version(world: World):
    """Whatever the role; it is no refusal in the log, and a site that looks is not there yet."""
    world.poll("a")
    seen = world.call("member", "GET", "/v1/sites")[1][0]["last_seen"]
    time.sleep(0.2)
    before, spoken = world.log.read_text().count("refused"), ".".join(map(str, VERSION))
    for who in ("a", "member"):
        assert world.call(who, "GET", "/v1/version") == (200, {"version": spoken})
        assert world.headers["Koinon-Version"] == spoken
    assert world.log.read_text().count("refused") == before
    assert world.call("member", "GET", "/v1/sites")[1][0]["last_seen"] == pytest.approx(seen, rel=0, abs=0.1)


def test_calls_that_do_not_exist(world: World):
    """Say so in the same form as every refusal; and nobody writes lines of their own into the log."""
    for path in ("/v1/%0A2026-01-01%20ERROR%20forged", "/v1/jobs/%0A2026-01-01%20ERROR%20forged"):
        assert world.call("boss", "GET", path)[0] == 404
    assert not [line for line in world.log.read_text().splitlines() if line.startswith("2026-01-01")]
    for method, path in (("GET", "/"), ("DELETE", "/v1/jobs"), ("GET", "/v2/poll"), ("GET", "/v1/jobs/none")):
        status, said = world.call("boss", method, path)
        assert status == 404 and said["error"]


def refused(world: World, context: ssl.SSLContext) -> bool:
    """Whether a connection with this context gets no answer."""
    with socket.create_connection(("127.0.0.1", world.port), 10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as line:
                line.sendall(b"GET /v1/jobs HTTP/1.1\r\nHost: x\r\n\r\n")
                return line.recv(100) == b""
        except OSError:
            return True


def _more(world: World, before: int) -> bool:
    return world.log.read_text().count("refused somebody") > before


def test_who_shows_no_certificate_of_this_project_that_holds_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """None, another project's, or one that has ended; and the log says why."""
    kit = world.kit("a")
    trust.provision(world.project, tmp_path / "other")
    then = certificates.now() - timedelta(days=100)
    monkeypatch.setattr(certificates, "now", lambda: then)
    more = structs.replace(world.project, sites={**world.project.sites, "ended": ""})
    trust.provision(more, world.folder)  # whom it did not have before
    monkeypatch.undo()
    other, ended = (folder / "kits" / name for folder, name in ((tmp_path / "other", "a"), (world.folder, "ended")))
    for shown in (None, other, ended):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(kit.root)
        if shown:
            context.load_cert_chain(shown / "certificate.pem", shown / "key.pem")
        time.sleep(1.1)  # one line a second
        before = world.log.read_text().count("refused somebody")
        assert refused(world, context)
        wait(partial(_more, world, before))
    assert "expired" in world.log.read_text()
    assert not refused(world, client_context(kit))
    with socket.create_connection(("127.0.0.1", world.port), 10) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        plain.settimeout(10)
        assert not plain.recv(1000).startswith(b"HTTP")
