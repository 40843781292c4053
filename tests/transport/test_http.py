"""The asking half of the wire, against a small TLS server that breaks off wherever it is told to, and a real proxy."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from koinon import provision as trust
from koinon.errors import LinkError, Refused, SettingsError
from koinon.provision import Admin, Project, Server
from koinon.site.kit import Kit, open_kit
from koinon.task.errands import Answer
from koinon.task.wire import Assignment, Orders, Poll, Receipt, encode
from koinon.transport import http, route
from koinon.transport.check import check
from koinon.transport.http import PIECE, Link
from koinon.transport.tls import client_context, server_context
from transport.peer import DATA, DIGEST, Handler, Peer

CHUNK = 4 << 20
"""What may be sent again of an upload that was cut."""


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's kits; of another project, in `other`."""
    folder = tmp_path_factory.mktemp("http")
    server = Server(["localhost:1"], names=["127.0.0.1"])
    for name in "mine", "other":
        project = Project(name, server, sites={"north": "N"}, admins={"ada": Admin("lead")})
        trust.provision(project, folder / name)
    return folder


@pytest.fixture
def peer(kits: Path) -> Iterator[Peer]:
    """A server."""
    server = Peer(open_kit(kits / "mine/kits/server"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def kit(kits: Path, monkeypatch: pytest.MonkeyPatch) -> Kit:
    """A site's kit, and no proxy."""
    for name in "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY":
        monkeypatch.delenv(name, raising=False)
    return open_kit(kits / "mine/kits/north")


@pytest.fixture
def link(kit: Kit, peer: Peer) -> Iterator[Link]:
    """The site's way to the server."""
    made = Link([peer.address], lambda: client_context(kit))
    yield made
    made.close()


@pytest.fixture
def answer(tmp_path: Path) -> tuple[Answer, Path]:
    """Something to deliver."""
    (path := tmp_path / "answer").write_bytes(DATA)
    return Answer("j", "1.0-fit / a", "0" * 64, DIGEST, len(DATA), 1.5, False), path


# -- what is asked -------------------------------------------------------------------------------------------


def test_a_poll_says_what_is_held_and_brings_orders(link: Link, peer: Peer):
    """One connection for any number of them."""
    peer.orders = Orders([Assignment("j", "1-train", "train", 1, DIGEST, len(DATA), DIGEST)], {"j": ["0"]}, ["k"])
    for _ in range(3):
        assert link.poll(Poll(holding={"j": ["0"]}, jobs=["j", "k"], wait=7.0)) == peer.orders
    assert (peer.poll.holding, peer.poll.jobs, peer.poll.wait) == ({"j": ["0"]}, ["j", "k"], 7.0)
    assert peer.lines == 1


def test_what_an_admin_asks(link: Link, peer: Peer, tmp_path: Path):
    """Ids and names are quoted; a file comes whole."""
    assert link.submit(b"zip") == "zip"
    assert link.job("a/b")["asked"] == "/v1/jobs/a%2Fb"
    assert link.events("j", 17)[1] == "running"
    link.stop("j")
    link.file("j", "models/best one", tmp_path / "best")
    assert json.loads((tmp_path / "best").read_text())["asked"] == "/v1/jobs/j/files/models/best%20one"
    peer.answers += [(200, b'[{"name": "n"}]')] * 3
    assert link.jobs() == link.files("j") == link.sites() == [{"name": "n"}]
    assert link.renew(b"request")
    assert ("GET", "/v1/jobs/j/events?after=17") in peer.asked and ("POST", "/v1/jobs/j/stop") in peer.asked


# -- transfers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [[], [0], [1], [PIECE + 1, 7, len(DATA) - 1 - PIECE - 8]])
def test_a_fetch_goes_on_where_it_was_cut(link: Link, peer: Peer, tmp_path: Path, cut: list[int]):
    """After every cut the file is not there yet, and only the rest is asked for."""
    peer.cut = cut[::-1]
    for _ in range(len(cut)):
        with pytest.raises(LinkError, match=r"was cut|broke off"):
            link.fetch(DIGEST, len(DATA), tmp_path / DIGEST)
        assert not (tmp_path / DIGEST).exists()
    link.fetch(DIGEST, len(DATA), tmp_path / DIGEST)
    assert (tmp_path / DIGEST).read_bytes() == DATA and [*tmp_path.iterdir()] == [tmp_path / DIGEST]
    assert link.received <= len(DATA)


@pytest.mark.parametrize("sent", [DATA[:-1] + b"?", DATA + b"?"], ids=["changed", "longer"])
def test_other_bytes_are_not_taken(link: Link, peer: Peer, tmp_path: Path, sent: bytes):
    """Nothing is left of them, and the right ones are taken afterwards."""
    peer.blobs[DIGEST] = sent
    with pytest.raises(LinkError, match="other bytes than it announced"):
        link.fetch(DIGEST, len(DATA), tmp_path / DIGEST)
    assert not [*tmp_path.iterdir()]
    peer.blobs[DIGEST] = DATA
    link.fetch(DIGEST, len(DATA), tmp_path / DIGEST)


def test_a_spoiled_partial_file_is_fetched_anew(link: Link, tmp_path: Path):
    """A disk that lost what was written to it costs another try, not the site."""
    (tmp_path / f"{DIGEST}.part").write_bytes(b"spoiled")
    with pytest.raises(LinkError, match="other bytes"):
        link.fetch(DIGEST, len(DATA), tmp_path / DIGEST)
    link.fetch(DIGEST, len(DATA), tmp_path / DIGEST)


def test_an_upload_cut_at_nine_tenths_sends_less_than_two_chunks_again(link: Link, peer: Peer, answer):
    """It goes on at the byte up to which the server has it."""
    peer.cut = [int(0.9 * len(DATA))]
    with pytest.raises(LinkError, match="was cut"):
        link.push(*answer)
    assert link.push(*answer) == "accepted"
    assert peer.parts == DATA and peer.arrived == len(DATA) and link.sent - len(DATA) < 2 * CHUNK
    assert ("PUT", peer.asked[-1][1]) == peer.asked[-1] and "1.0-fit%20%2F%20a" in peer.asked[-1][1]


def test_an_upload_starts_where_the_server_says(link: Link, peer: Peer, answer):
    """Between the question and the upload the server may have lost some of it, or got more."""
    peer.answers = [(200, encode(Receipt(1000)))]
    assert link.push(*answer) == "accepted" and peer.parts == DATA


def test_what_was_complete_before_is_not_sent_again(link: Link, peer: Peer, answer):
    """The reply was lost, the answer was not."""
    peer.answers = [(200, encode(Receipt(len(DATA), "duplicate")))]
    assert link.push(*answer) == "duplicate" and link.sent == 0


def test_bytes_that_arrive_as_others_are_sent_once_more(link: Link, peer: Peer, answer):
    """And then the server's word counts; if the site's own disk changed them, that is said."""
    peer.parts = bytearray(b"x" * 100)
    assert link.push(*answer) == "accepted"
    peer.answers = [(200, encode(Receipt())), (422, b'{"error": "other bytes"}')] * 2
    with pytest.raises(Refused, match="other bytes"):
        link.push(*answer)
    peer.parts.clear()
    answer[1].write_bytes(DATA[:-1] + b"?")
    with pytest.raises(Refused, match="changed on this site's disk"):
        link.push(*answer)


def test_a_refusal_ends_an_upload_early(link: Link, peer: Peer, answer):
    """What is too large is not sent to its end only to be told so."""
    answer[1].write_bytes(b"x" * (64 << 20))
    peer.answers = [(200, encode(Receipt())), (413, b'{"error": "too large: send less"}')]
    with pytest.raises(Refused, match="too large"):
        link.push(Answer("j", "t", "0" * 64, DIGEST, 64 << 20, 1.0, False), answer[1])
    assert link.sent < 64 << 20


def test_nobody_knows_the_task(link: Link, peer: Peer, answer):
    """Which is a verdict like another."""
    peer.answers = [(404, b'{"error": "site north was not asked"}')]
    assert link.push(*answer) == "unknown"


# -- refusals and cut lines ----------------------------------------------------------------------------------

SAID = b'{"error": "who, and what to do"}'
STATUS = [(403, Refused), (400, Refused), (413, Refused), (500, LinkError), (503, LinkError), (507, LinkError)]


@pytest.mark.parametrize(("status", "kind"), STATUS)
def test_what_the_server_says_is_handed_on(link: Link, peer: Peer, status: int, kind: type[Exception]):
    """Whether trying again helps is in the class; a message of another form does not hide the status."""
    peer.answers = [(status, SAID), (status, b"<html>")]
    with pytest.raises(kind, match=r"^who, and what to do$"):
        link.poll(Poll(wait=1))
    with pytest.raises(kind, match=rf"localhost:\d+ answered {status}"):
        link.poll(Poll(wait=1))
    assert link.poll(Poll(wait=1)) == Orders()


def test_who_is_shut_out_keeps_its_answer(link: Link, peer: Peer, answer):
    """It may be let in again; nothing is wrong with the answer."""
    peer.answers = [(403, SAID)]
    with pytest.raises(LinkError, match="who, and what"):
        link.push(*answer)


@pytest.mark.parametrize("text", [b"", b"[]", b'{"assignments": 3}', b"\xff", b"[" * 100_000])
def test_no_answer_is_too_strange(link: Link, peer: Peer, text: bytes):
    """A server that speaks of something else is told so."""
    peer.answers = [(200, text)]
    with pytest.raises(Refused, match="no Orders"):
        link.poll(Poll(wait=1))


def test_an_answer_without_end_is_not_read(link: Link, peer: Peer, monkeypatch: pytest.MonkeyPatch):
    """Memory is bounded."""
    monkeypatch.setattr(http, "SAID", 1000)
    peer.answers = [(200, b"x" * 2000)]
    with pytest.raises(Refused, match="more than"):
        link.jobs()


def test_a_connection_that_was_closed_while_idle_is_made_anew(link: Link, peer: Peer):
    """Whoever closed it, the call does not notice."""
    link.poll(Poll(wait=1))
    for line in link._idle:
        line.sock.shutdown(socket.SHUT_RDWR)
    assert link.poll(Poll(wait=1)) == Orders() and peer.lines == 2


def test_a_server_that_does_not_answer_is_given_up(kit: Kit, monkeypatch: pytest.MonkeyPatch):
    """After a while in which nothing moved."""
    monkeypatch.setattr(route, "CONNECT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        link = Link([f"https://127.0.0.1:{silent.getsockname()[1]}"], lambda: client_context(kit))
        with pytest.raises(LinkError, match="does not answer: a firewall"):
            link.jobs()


def test_servers_are_tried_in_turn(kit: Kit, peer: Peer):
    """The first that can be reached; if none can, what is wrong with each."""
    closed = f"https://localhost:{free_port()}"
    link = Link([closed, peer.address], lambda: client_context(kit))
    assert link.poll(Poll(wait=1)) == Orders()
    link = Link([closed, "https://nowhere.invalid:1"], lambda: client_context(kit))
    with pytest.raises(LinkError, match=r"nobody listens at localhost:\d+.*; the name nowhere.invalid cannot be"):
        link.jobs()


def test_a_server_that_ails_gives_way_to_the_next(kit: Kit, peer: Peer, kits: Path):
    """At the next call."""
    second = Peer(open_kit(kits / "mine/kits/server"))
    link = Link([peer.address, second.address], lambda: client_context(kit))
    peer.answers = [(503, SAID)]
    with pytest.raises(LinkError):
        link.poll(Poll(wait=1))
    assert link.poll(Poll(wait=1)) == Orders() and second.asked
    second.shutdown()
    second.server_close()


def test_strangers_are_told_apart(kits: Path, kit: Kit, peer: Peer):
    """A server of another project, and a site of another."""
    stranger = open_kit(kits / "other/kits/north")
    with pytest.raises(LinkError, match="cannot be trusted"):
        Link([peer.address], lambda: client_context(stranger)).jobs()
    context = client_context(kit)
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.load_verify_locations(kit.root)
    links = Link([peer.address], lambda: context)
    links._context = anonymous
    with pytest.raises(LinkError, match=r"does not speak TLS with this kit|was cut"):
        links.jobs()
    links.refresh()
    assert links.poll(Poll(wait=1)) == Orders()


# -- proxies -------------------------------------------------------------------------------------------------


@contextmanager
def proxy(user: str = "") -> Iterator[tuple[int, list[str]]]:
    """A CONNECT proxy, which wants `user` if it is given; its port, and what it was asked."""
    asked: list[str] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def serve(line: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head and (more := line.recv(4096)):
            head += more
        asked.append(head.split(b"\r\n")[0].decode())
        if user and b"Proxy-Authorization: Basic " + b64encode(user.encode()) not in head:
            line.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return line.close()
        host, port = head.split()[1].decode().rsplit(":", 1)
        try:
            far = socket.create_connection((host, int(port)), 5)
        except OSError:
            line.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return line.close()
        line.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        threading.Thread(target=pump, args=(line, far), daemon=True).start()
        return pump(far, line)

    def accept() -> None:
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(line,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1], asked
        listener.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.mark.parametrize(("user", "given"), [("", ""), ("ann:p@ss word", "ann:p%40ss%20word@")])
def test_a_proxy_lets_through(kit: Kit, peer: Peer, monkeypatch: pytest.MonkeyPatch, user: str, given: str):
    """TLS goes from end to end; one tunnel for any number of calls."""
    with proxy(user) as (port, asked):
        monkeypatch.setenv("https_proxy", f"http://{given}127.0.0.1:{port}")
        link = Link([peer.address], lambda: client_context(kit))
        assert link.poll(Poll(wait=1)) == link.poll(Poll(wait=1)) == Orders()
        assert len(asked) == 1 and asked[0].startswith(f"CONNECT localhost:{peer.server_port} ")
        link.close()


def test_a_proxy_that_does_not(kit: Kit, peer: Peer, monkeypatch: pytest.MonkeyPatch):
    """What it wants, what it cannot reach, that it is not there; no password is in any message."""
    with proxy("ann:secret") as (port, _):
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{port}")
        with pytest.raises(LinkError, match=r"proxy 127.0.0.1:\d+ does not let .*: it wants a name and a password"):
            Link([peer.address], lambda: client_context(kit)).jobs()
        monkeypatch.setenv("HTTPS_PROXY", f"http://ann:secret@127.0.0.1:{port}")
        with pytest.raises(LinkError, match="502") as failed:
            Link([f"https://localhost:{free_port()}"], lambda: client_context(kit)).jobs()
        assert "secret" not in str(failed.value)
    monkeypatch.setenv("HTTPS_PROXY", f"http://ann:secret@127.0.0.1:{free_port()}")
    with pytest.raises(LinkError, match=r"nobody listens at the proxy 127\.0\.0\.1:\d+: is https_proxy right"):
        Link([peer.address], lambda: client_context(kit)).jobs()
    monkeypatch.setenv("no_proxy", "example.org,localhost")
    assert Link([peer.address], lambda: client_context(kit)).poll(Poll(wait=1)) == Orders()
    monkeypatch.setenv("HTTPS_PROXY", "socks5://ann:secret@h:1")
    monkeypatch.delenv("no_proxy")
    with pytest.raises(SettingsError, match=r"'h:1' is no address such as http"):
        Link([peer.address], lambda: client_context(kit))


# -- check ---------------------------------------------------------------------------------------------------


@pytest.fixture
def ours(kits: Path, kit: Kit, peer: Peer, tmp_path: Path) -> Path:
    """A site's kit whose server is the peer."""
    project = Project("mine", Server([f"localhost:{peer.server_port}"]), sites={"north": "N"})
    trust.provision(project, tmp_path / "mine")
    peer.tls = server_context(open_kit(tmp_path / "mine/kits/server"))
    return tmp_path / "mine/kits/north"


ROWS = dict.fromkeys(["kit", "name", "port", "TLS", "clock", "version", "disk"], True)


def rows(folder: Path) -> dict[str, bool]:
    return {row.name: row.ok for row in check(folder)}


def test_a_site_that_can_join(ours: Path, peer: Peer):
    """Everything is looked at, and nothing is asked for that would change anything."""
    assert rows(ours) == ROWS
    assert peer.asked == [("GET", "/v1/version")]
    peer.answers.append((404, b'{"error": "there is nothing at GET /v1/version"}'))  # a server of before
    assert rows(ours) == ROWS


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (403, b'{"error": "\'north\' was revoked\\nby the operator"}', "'north' was revoked"),
        (502, b"<html>", "it says 502, and not why"),
        (403, b'["north"]', "it says 403, and not why"),
    ],
)
def test_a_site_that_is_refused_hears_why(ours: Path, peer: Peer, status: int, text: bytes, said: str):
    """All else may be well."""
    peer.answers.append((status, text))
    found = check(ours)
    assert {row.name: row.ok for row in found} == ROWS | {"server": False}
    (row,) = (row for row in found if row.name == "server")
    assert said in row.said and "\n" not in row.said


def test_a_site_whose_data_are_not_there(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before a job fails of it; words that name no file are the jobs' own."""
    (tmp_path / "train.csv").touch()
    said = f'train = "{tmp_path}/train.csv"\ntest = 0.2\ntarget = "label"\nscans = "{tmp_path}/scans"\n'
    (ours / "settings.toml").write_text(f"[data]\n{said}")
    found = [(row.ok, row.said.removeprefix(f"train = '{tmp_path}/")) for row in check(ours) if row.name == "data"]
    assert found == [(True, "train.csv' can be read by this user"), (False, f"scans = '{tmp_path}/scans' is not there")]
    monkeypatch.setattr(os, "access", lambda *_: False)  # root, who may be running this, may read everything
    found = [(row.ok, row.said) for row in check(ours) if row.name == "data"]
    assert found[0] == (False, f"train = '{tmp_path}/train.csv' cannot be read by this user")
    (ours / "settings.toml").write_text('[data]\ntrain = "train.csv"\n')
    (row,) = (row for row in check(ours) if row.name == "data")
    assert not row.ok and "give the full path" in row.said
    for strange in ("/" + 300 * "x", "/\\u0000"):  # the system raises, as it does for a folder that may not be entered
        (ours / "settings.toml").write_text(f'[data]\ntrain = "{strange}"\n')
        (row,) = (row for row in check(ours) if row.name == "data")
        assert not row.ok and "cannot be read by this user: " in row.said


def test_a_site_that_cannot(ours: Path, peer: Peer, kits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Each thing that is wrong is in its own line, and never an exception."""
    assert rows(tmp_path) == {"kit": False}
    monkeypatch.setattr(Handler, "date_time_string", lambda *_: "Mon, 01 Jan 2024 00:00:00 GMT")
    (ours / "settings.toml").write_text("disk_gb = 1e9\n")
    assert rows(ours) == ROWS | {"clock": False, "disk": False}
    (ours / "settings.toml").write_text("disc_gb = 1\n")
    assert rows(ours)["settings"] is False
    (ours / "settings.toml").write_text("")
    with proxy("ann:secret") as (port, _):
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert rows(ours) == {"kit": True, "name": True, "port": True, "proxy": False, "disk": True}
        monkeypatch.setenv("https_proxy", f"http://ann:secret@127.0.0.1:{port}")
        assert rows(ours)["proxy"] and rows(ours)["TLS"]
        monkeypatch.delenv("https_proxy")
    peer.tls = server_context(open_kit(kits / "other/kits/server"))
    assert rows(ours)["TLS"] is False
    peer.shutdown()
    peer.server_close()
    assert rows(ours) == {"kit": True, "name": True, "port": False, "disk": True}
