"""Handshakes over loopback: who gets in, and who does not."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from koinon import provision as trust
from koinon.provision import Admin, Project, Server
from koinon.site import certificates, kit, signing
from koinon.site.certificates import Identity, Signer, identity, renew
from koinon.site.kit import Kit, open_kit, owner
from koinon.transport.tls import client_context, server_context

DAY = timedelta(days=1)
PROJECT = Project(
    "hearts",
    Server(["federation.example.org:8443"], names=["localhost", "127.0.0.1"]),
    sites={"hospital-1": "Charité"},
    admins={"ada": Admin("lead")},
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's folder."""
    folder = tmp_path_factory.mktemp("tls") / "hearts"
    trust.provision(PROJECT, folder)
    return folder


@pytest.fixture
def kits(made: Path, tmp_path: Path) -> Path:
    """Its kits, to be changed."""
    shutil.copytree(made, tmp_path / "hearts")
    return tmp_path / "hearts" / "kits"


def meet(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost") -> Identity:
    """Whom the server sees, after a word in either direction; raises what the side that refused says."""
    seen: list[Identity] = []
    wrong: list[OSError] = []

    def serve() -> None:
        try:
            line, _ = listener.accept()
            with line, server.wrap_socket(line, server_side=True) as secure:
                seen.append(identity(secure.getpeercert(binary_form=True) or b""))
                secure.sendall((secure.version() or "").encode())
                secure.recv(1)
        except OSError as error:
            wrong.insert(0, error)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), 10) as line,
                client.wrap_socket(line, server_hostname=host) as secure,
            ):
                assert secure.recv(16) == b"TLSv1.3"
        except OSError as error:
            wrong.append(error)
        thread.join(10)
    if wrong:
        raise next((error for error in wrong if isinstance(error, ssl.SSLCertVerificationError)), wrong[0])
    return seen[0]


def pair(kits: Path, client: str = "hospital-1") -> tuple[Kit, Kit]:
    """The server's kit and a client's."""
    return open_kit(kits / "server"), open_kit(kits / client)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "federation.example.org"])
def test_both_sides_know_each_other(kits: Path, host: str):
    """A site and an admin, by every name of the server."""
    for name in ("hospital-1", "ada"):
        server, client = pair(kits, name)
        assert meet(server_context(server), client_context(client), host) == owner(client)


def test_a_renewed_site_gets_in(kits: Path):
    """With the issuer between it and the root."""
    server, site = pair(kits)
    before = owner(site)
    kit.install(site, renew(server.issuer, kit.renewal_request(site), before, kit.revoked(server)))
    seen = meet(server_context(server), client_context(site))
    assert seen == owner(site) and seen.serial != before.serial


def test_nobody_is_anonymous(kits: Path):
    """Without a certificate there is no connection."""
    server, site = pair(kits)
    bare = ssl.create_default_context(cafile=site.root)
    with pytest.raises(ssl.SSLError, match="did not return a certificate"):
        meet(server_context(server), bare)


def test_nothing_older_than_tls_1_3(kits: Path):
    """From either side."""
    server, site = pair(kits)
    for ends in ((True, False), (False, True)):
        contexts = server_context(server), client_context(site)
        for context, old in zip(contexts, ends, strict=True):
            if old:
                context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError, match=r"(?i)version|protocol"):
            meet(*contexts)


def test_another_project_is_nobody(kits: Path, tmp_path: Path):
    """Of the same name, with the same participants: neither its sites nor its server."""
    trust.provision(PROJECT, tmp_path / "other")
    (server, site), (other_server, other_site) = pair(kits), pair(tmp_path / "other" / "kits")
    for one, two in ((server, other_site), (other_server, site)):
        with pytest.raises(ssl.SSLCertVerificationError):
            meet(server_context(one), client_context(two))
    trusting = client_context(other_site)
    trusting.load_verify_locations(site.root)
    with pytest.raises(ssl.SSLCertVerificationError):
        meet(server_context(server), trusting)


def test_the_server_must_be_where_it_was_dialled(kits: Path):
    """A server's certificate is for its own addresses."""
    server, site = pair(kits)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)hostname mismatch"):
        meet(server_context(server), client_context(site), "elsewhere.example.org")


@pytest.mark.parametrize("end", ["server", "hospital-1"])
def test_an_expired_certificate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str):
    """Of a server by its sites, of a site by its server."""
    then = certificates.now() - 91 * DAY
    with monkeypatch.context() as past:
        past.setattr(certificates, "now", lambda: then)
        trust.provision(PROJECT, tmp_path / "hearts")
        old = [open_kit(tmp_path / "hearts" / "kits" / name) for name in ("server", "hospital-1")]
    trust.renew(PROJECT, tmp_path / "hearts", "server" if end != "server" else "hospital-1")
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
        meet(server_context(old[0]), client_context(old[1]))


def test_a_revoked_name_is_known_by_its_certificate(kits: Path):
    """TLS lets it in, so that it can be told why it is refused; after a new kit it is welcome."""
    server, site = pair(kits)
    trust.revoke(PROJECT, kits.parent, "hospital-1")
    revoked = kit.revoked(server)
    assert "was revoked" in (revoked.refuses(meet(server_context(server), client_context(site))) or "")
    trust.renew(PROJECT, kits.parent, "hospital-1")
    assert revoked.refuses(meet(server_context(server), client_context(site))) is None


def forged(kits: Path, signer: str, role: str, use: str) -> Kit:
    """hospital-1's kit with a certificate that somebody signed who has got hold of a key."""
    site = open_kit(kits / "hospital-1")
    folder = {"root": kits.parent, "issuer": kits / "server", "certificate": kits / "hospital-1"}[signer]
    key = folder / {"root": "root.key", "issuer": "issuer.key", "certificate": "key.pem"}[signer]
    by = Signer(certificates.load(folder / f"{signer}.pem")[0], signing.private_key(key))
    above = b"" if signer == "root" else (folder / f"{signer}.pem").read_bytes()
    own = ec.generate_private_key(ec.SECP256R1()) if signer == "certificate" else signing.private_key(site.key)
    subject = certificates.name("hospital-1", role)
    leaf = by.leaf(subject, own.public_key(), made=certificates.now(), life=DAY, role=use, hosts=PROJECT.server.hosts())
    if signer == "certificate":
        site.key.unlink()
        signing.put(site.key, own.private_bytes(*PEM), 0o600)
    site.certificate.write_bytes(leaf + above)
    return site


PEM = (signing.Encoding.PEM, signing.PrivateFormat.PKCS8, signing.NoEncryption())


@pytest.mark.parametrize(
    ("signer", "role", "use", "says"),
    [
        ("root", "site", "site", "purpose"),
        ("issuer", "site", "site", "purpose"),
        ("issuer", "server", "server", "purpose|permitted subtree"),
        ("issuer", "site", "server", "purpose"),
        ("certificate", "server", "server", "invalid CA|purpose|issuer"),
    ],
)
def test_a_site_cannot_act_as_the_server(kits: Path, signer: str, role: str, use: str, says: str):
    """Even with the server's addresses in its certificate, even with the server's issuer: clients refuse it."""
    _, admin = pair(kits, "ada")
    with pytest.raises(ssl.SSLCertVerificationError, match=says):
        meet(server_context(forged(kits, signer, role, use)), client_context(admin))


@pytest.mark.parametrize(
    ("signer", "role", "use", "says"),
    [
        ("issuer", "lead", "site", "permitted subtree"),
        ("issuer", "project_admin", "site", "permitted subtree"),
        ("certificate", "site", "site", "invalid CA|issuer"),
        ("root", "server", "server", "purpose"),
    ],
)
def test_who_may_not_be_a_client(kits: Path, signer: str, role: str, use: str, says: str):
    """An admin whom the server's issuer made, whoever a site made, and a server."""
    server, _ = pair(kits)
    with pytest.raises(ssl.SSLCertVerificationError, match=says):
        meet(server_context(server), client_context(forged(kits, signer, role, use)))
