"""Who may come in: what a connection's certificate says is asked at every call."""

from __future__ import annotations

import json
import logging
import ssl
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from koinon import provision as trust
from koinon.errors import KitError, Refused
from koinon.provision import Project, Server
from koinon.server.__main__ import Lines, main
from koinon.server.access import Denied, Door
from koinon.site import certificates
from koinon.site.kit import Kit, open_kit

PROJECT = Project("hearts", Server(["127.0.0.1:0"]), sites={"a": "North"})


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    """A server's; the site's is beside it."""
    trust.provision(PROJECT, tmp_path)
    return open_kit(tmp_path / "kits" / "server")


class Line:
    """A connection that shows a certificate."""

    def __init__(self, pem: str) -> None:
        der = ssl.PEM_cert_to_DER_cert(pem)
        self.get_extra_info = lambda name: SimpleNamespace(getpeercert=lambda binary_form: der)
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


def line(kit: Kit) -> Any:
    """A connection of site a."""
    text = (kit.path.parent / "a" / "certificate.pem").read_text()
    return Line(text[: text.index("-----END CERTIFICATE-----") + 25])


def test_a_certificate_that_ends_while_it_is_connected_is_refused(kit: Kit, monkeypatch: pytest.MonkeyPatch):
    """Until then it is let in."""
    door, connected = Door(kit), line(kit)
    assert (door.enter(connected).name, door.known(connected)) == ("a", "site 'a' of North")
    later = certificates.now() + timedelta(days=91)
    monkeypatch.setattr(certificates, "now", lambda: later)
    with pytest.raises(Denied, match="ended at") as told:
        door.enter(connected)
    assert (told.value.status, told.value.cut) == (403, True)


def test_who_is_revoked_is_cut_off_when_the_list_changes(kit: Kit):
    """A list that the root did not sign changes nothing, and a server does not begin with it."""
    door, connected = Door(kit), line(kit)
    door.enter(connected)
    assert not door.refresh()
    (kit.path / "revoked.json").write_text("nonsense")
    assert not door.refresh() and door.enter(connected).name == "a"
    with pytest.raises(Refused):
        Door(kit)
    trust.revoke(PROJECT, kit.path.parents[1], "a")
    assert door.refresh() and connected.aborted and not door.refresh()
    with pytest.raises(Denied, match="revoked"):
        door.enter(connected)
    assert door.known(None) == "somebody"


def test_the_command_line_says_in_a_line_why_it_cannot_begin(kit: Kit, capfd: pytest.CaptureFixture[str]):
    """With the exit status 1, and no traceback."""
    site, settings = kit.path.parent / "a", kit.path / "settings.toml"
    for folder, text, said in (
        (site, "", "not of a server"),
        (kit.path, "speed = 3\n", "there is no setting 'speed'"),
        (kit.path, 'listen = "nowhere"\n', "cannot listen at 'nowhere'"),
        (kit.path, 'listen = "192.0.2.1:0"\n', "cannot listen at '192.0.2.1:0'"),
    ):
        settings.write_text(text)
        assert main(["--kit", str(folder)]) == 1
        heard = capfd.readouterr().err
        assert said in heard and "Traceback" not in heard
    assert KitError.__name__ not in heard
    logging.getLogger().handlers.clear()


def test_a_line_for_machines():
    """JSON with the time, the level, the room, what happened, and the traceback if there is one."""
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("koinon.server", logging.ERROR, "", 1, "it %s", ("broke",), sys.exc_info())
    said = json.loads(Lines().format(record))
    assert (said["level"], said["where"], said["what"]) == ("error", "koinon.server", "it broke")
    assert said["at"] == record.created and "ValueError: why" in said["traceback"]
