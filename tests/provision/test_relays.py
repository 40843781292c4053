"""Kits of a federation with relays: two for each relay, and sites that dial it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from koinon import provision as trust
from koinon.errors import KitError, SettingsError
from koinon.provision import Project, Relay, Server
from koinon.provision.project import checked
from koinon.site.kit import ServerSettings, open_kit, settings

PROJECT = Project(
    "hearts",
    Server(["federation.example.org"]),
    sites=dict.fromkeys(["a", "b", "c"], "North"),
    relays={"west": Relay(["west.example.org:9000"], organisation="West", sites=["a", "b"])},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A provisioned project."""
    trust.provision(PROJECT, tmp_path / "hearts")
    return tmp_path / "hearts"


def test_a_relay_is_a_site_above_and_a_server_below(folder: Path):
    """Its own half dials the server; the other half listens where its group dials."""
    above, below = "https://federation.example.org:8443", "https://west.example.org:9000"
    said = dict.fromkeys(("a", "b"), ("site", below, "west"))
    said |= {"c": ("site", above, ""), "west": ("site", above, ""), "west.server": ("server", below, "")}
    for name, what in said.items():
        kit = open_kit(folder / "kits" / name)
        assert (kit.role, *kit.servers, kit.relay) == what
    served = settings(open_kit(folder / "kits" / "west.server"), ServerSettings)
    whole = settings(open_kit(folder / "kits" / "server"), ServerSettings)
    assert (served.listen, served.sites, whole.sites) == ("0.0.0.0:9000", ["a", "b"], [])
    assert served.standstill < whole.standstill and served.round < whole.round


def test_a_site_moves_behind_a_relay(folder: Path):
    """With its next kit, and the same key."""
    moved = msgspec.structs.replace(
        PROJECT, relays={"west": msgspec.structs.replace(PROJECT.relays["west"], sites=["c"])}
    )
    key = open_kit(folder / "kits" / "c").key.read_bytes()
    kit = open_kit(trust.renew(moved, folder, "c"))
    assert (kit.servers, kit.relay, kit.key.read_bytes()) == (("https://west.example.org:9000",), "west", key)


def test_who_is_shut_out_is_so_at_every_server(folder: Path):
    """A relay too; a server is not shut out by a list that it keeps itself."""
    text = trust.revoke(PROJECT, folder, "west").read_text()
    assert [(folder / "kits" / name / "revoked.json").read_text() for name in ("server", "west.server")] == [text] * 2
    with pytest.raises(KitError, match="the server is what shuts others out"):
        trust.revoke(PROJECT, folder, "west.server")


@pytest.mark.parametrize(
    ("relays", "wrong"),
    [
        ({"west": Relay(["w"], sites=["d"])}, "a relay names 'd', which is no site"),
        ({"west": Relay(["w"], sites=["a"]), "east": Relay(["e"], sites=["a"])}, "'a' is in two relays' groups"),
        ({"west": Relay([], sites=["a"])}, "'west.server' has no address"),
        ({"a": Relay(["w"], sites=["b"])}, "'a' is there twice"),
        ({"west": Relay(["w w"], sites=["b"])}, "'w w' is no"),
    ],
)
def test_what_cannot_be_is_refused(relays: dict[str, Relay], wrong: str):
    """Before anything is made."""
    with pytest.raises(SettingsError, match=wrong):
        checked(msgspec.structs.replace(PROJECT, relays=relays))
