"""Who may say who somebody is: the project's root, and the issuer with which a server renews its sites."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from koinon.errors import KitError
from koinon.site import certificates, signing
from koinon.site.certificates import Signer

ROOT_LIFE = timedelta(days=3652)


def root(folder: Path, project: str) -> Signer:
    """The project's root in its folder; it is made where there is none.

    Raises:
        KitError: the folder is another project's, or holds half a root.
    """
    certificate, key = folder / "root.pem", folder / "root.key"
    name = certificates.name(project, "root")
    if not certificate.exists() and not key.exists():
        private, at = signing.new_key(key), certificates.now()
        made = certificates.issued(name, private.public_key(), by=private, times=(at, at + ROOT_LIFE), below=1)
        signing.put(certificate, made.public_bytes(Encoding.PEM))
    signer = Signer(certificates.load(certificate)[0], signing.private_key(key))
    if signer.certificate.subject != name:
        theirs = signer.certificate.subject.rfc4514_string()
        raise KitError(f"'{folder}' belongs to another project, {theirs}: give '{project}' a folder of its own")
    return signer


def issuer(key: Path, signer: Signer, project: str, days: int) -> str:
    """A new issuer for a server, which can make certificates of sites only: its certificate in PEM form.

    It lives twice as long as the server's own certificate and is made anew with it: as long as the server's holds,
    a site gets the whole time.
    """
    private, at = signing.new_key(key, durable=False), certificates.now()
    sites = x509.NameConstraints([x509.DirectoryName(certificates.name("", "site"))], None)
    clients = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    name, times = certificates.name(project, "issuer"), (at, at + timedelta(days=2 * days))
    made = certificates.issued(name, private.public_key(), by=signer, times=times, below=0, extra=[clients, sites])
    return made.public_bytes(Encoding.PEM).decode()
