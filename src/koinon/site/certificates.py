"""Who somebody is: a certificate's name, role and organisation, who may issue it, and who was shut out.

    root (10 years, kept by the operator)
     ├── server, admins, sites          90 days, made by the operator
     └── issuer (kept by the server)    may sign certificates of sites and nothing else
          └── sites                     renewed

That the issuer cannot make a server or an admin stands in its own certificate (for clients only, subjects that begin
with OU=site, no further issuers), so that OpenSSL refuses such a chain in the handshake; `verify` refuses it too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, cast, get_args

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from koinon.errors import KitError, Refused
from koinon.site import signing

Role = Literal["server", "site", "project_admin", "org_admin", "lead", "member"]
"""What somebody may do: a certificate's OU."""

LEEWAY = timedelta(hours=1)
"""By how much the clocks of a federation may differ: a certificate holds from so long before it was made."""


@dataclass(frozen=True)
class Identity:
    """What a certificate says of its owner.

    Args:
        name: unique in the project.
        role: what its owner may do.
        organisation: may be empty.
        serial: the certificate's number.
        since: when the certificate was made.
        until: when it ends.
    """

    name: str
    role: Role
    organisation: str
    serial: int
    since: datetime
    until: datetime


def identity(der: bytes) -> Identity:
    """Whom a certificate in DER form names; it is not verified here.

    Raises:
        Refused: it is none, or none of Koinon's.
    """
    try:
        return identified(x509.load_der_x509_certificate(der))
    except signing.UNREADABLE as cause:
        raise Refused(f"this is no certificate: {cause}") from cause


def identified(leaf: x509.Certificate) -> Identity:
    """Whom a certificate names; it is not verified here.

    Raises:
        Refused: it is none of Koinon's.
    """

    def said(kind: x509.ObjectIdentifier) -> str:
        return "".join(str(entry.value) for entry in leaf.subject.get_attributes_for_oid(kind))

    role, who = said(NameOID.ORGANIZATIONAL_UNIT_NAME), said(NameOID.COMMON_NAME)
    if role not in get_args(Role) or not who:
        raise Refused(f"the certificate of '{leaf.subject.rfc4514_string()}' names no role that Koinon knows")
    since, until = leaf.not_valid_before_utc + LEEWAY, leaf.not_valid_after_utc
    return Identity(who, cast(Role, role), said(NameOID.ORGANIZATION_NAME), leaf.serial_number, since, until)


def verify(chain: bytes, root: bytes, *, direct: bool = False, at: datetime | None = None) -> Identity:
    """Whom a chain of PEM certificates, the owner's own first, names.

    Args:
        chain: the certificate, then the issuer if there is one.
        root: the project's root, in PEM form.
        direct: whether the root itself must have signed it, as it does for all but sites.
        at: the time at which it must hold; by default now.

    Raises:
        Refused: it is not of this project, not valid at this time, or may not say what it says.
    """
    try:
        leaf, *issuers = x509.load_pem_x509_certificates(chain)
        found, usage = identified(leaf), leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        store = verification.Store(x509.load_pem_x509_certificates(root))
        builder = verification.PolicyBuilder().store(store).max_chain_depth(1).time(at or now())
        policies = {"ca_policy": verification.ExtensionPolicy.webpki_defaults_ca(), "ee_policy": _LEAF}
        path = builder.extension_policies(**policies).build_client_verifier().verify(leaf, issuers).chain
    except (x509.ExtensionNotFound, verification.VerificationError, *signing.UNREADABLE) as cause:
        raise Refused(f"the certificate is not of this project, or does not hold now: {cause}") from cause
    if len(path) > 2 and (direct or found.role != "site"):
        raise Refused(f"the root itself must have signed the certificate of {found.role} '{found.name}'; it has not")
    if list(usage) != [_usage(found.role)]:
        raise Refused(f"the certificate of {found.role} '{found.name}' is for another use than that role's")
    return found


_LEAF = (
    verification.ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, verification.Criticality.CRITICAL, None)
    .require_present(x509.KeyUsage, verification.Criticality.CRITICAL, None)
    .require_present(x509.ExtendedKeyUsage, verification.Criticality.AGNOSTIC, None)
)


@dataclass(frozen=True)
class Revoked:
    """Who was shut out, as the project's root signed it.

    Args:
        names: name -> the time before which its certificates are void.
        issued: when the list was signed; the later list holds.
        text: the signed list, to hand on; empty if there is none.
    """

    names: dict[str, datetime]
    issued: datetime
    text: str = ""

    @staticmethod
    def load(source: Path | str, root: bytes) -> Revoked:
        """The list in a file, or in a text; nobody is revoked where there is no file, or an empty text.

        Raises:
            Refused: the root, a PEM certificate, did not sign it.
        """
        try:
            if not source or (isinstance(source, Path) and not source.exists()):
                return Revoked({}, datetime.min.replace(tzinfo=UTC))
            text = source.read_text() if isinstance(source, Path) else source
            value = signing.unsigned(json.loads(text), root)
            names = {str(name): datetime.fromisoformat(time) for name, time in value["names"].items()}
            return Revoked(names, datetime.fromisoformat(value["issued"]), text)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
            raise Refused(f"this is no list of revoked names: {cause}") from cause

    def refuses(self, who: Identity) -> str | None:
        """Why somebody is shut out; None if not."""
        void = self.names.get(who.name)
        if void is None or who.since > void:
            return None
        return f"'{who.name}' was revoked by the project's operator"


def request(key: ec.EllipticCurvePrivateKey, subject: x509.Name) -> bytes:
    """A request, in PEM form, for a certificate that names `subject`, signed with the key that it is for."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def requested(data: bytes) -> tuple[x509.Name, ec.EllipticCurvePublicKey]:
    """Whom a request in PEM form names, and the key that it is for, which its sender holds.

    Raises:
        Refused: it is no request, not signed with its own key, or for another kind of key than P-256.
    """
    try:
        csr = x509.load_pem_x509_csr(data)
        subject, key, valid = csr.subject, csr.public_key(), csr.is_signature_valid
    except signing.UNREADABLE as cause:
        raise Refused(f"this is no request for a certificate: {cause}") from cause
    if not valid:
        raise Refused("the request is not signed with the key that it is for")
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise Refused("the request is for another kind of key than P-256: `koinon kit request` makes one that fits")
    return subject, key


def renew(issuer: Path, data: bytes, who: Identity, revoked: Revoked) -> bytes:
    """A site's next certificate, with the issuer after it, in PEM form: for the same name and organisation.

    It lives half as long as the issuer, which is as long as the project gives certificates.

    Args:
        issuer: the issuer's certificate; its key is beside it, with the ending `.key`.
        data: the site's request.
        who: whom the certificate names with which the site came.
        revoked: who was shut out.

    Raises:
        Refused: it is no site, was revoked, has expired, or asks for something else than it is.
    """
    (subject, key), at = requested(data), now()
    if why := revoked.refuses(who):
        raise Refused(why)
    if who.role != "site":
        raise Refused(f"only sites renew by themselves; '{who.name}' asks for `koinon provision --renew {who.name}`")
    if subject != name(who.name, who.role, who.organisation):
        raise Refused(f"site '{who.name}' asked for a certificate of {subject.rfc4514_string()}: only for itself")
    if not who.since - LEEWAY <= at <= who.until:
        raise Refused(f"the certificate of site '{who.name}' does not hold now, {at:%Y-%m-%d %H:%M} UTC")
    (parent,) = load(issuer)
    since, until = parent.not_valid_before_utc + LEEWAY, parent.not_valid_after_utc
    if at > until:
        raise Refused("the server cannot renew any more; its operator has to: `koinon provision --renew SERVER`")
    signer = Signer(parent, signing.private_key(issuer.with_suffix(".key")))
    return signer.leaf(subject, key, made=at, life=(until - since) / 2) + issuer.read_bytes()


@dataclass(frozen=True)
class Signer:
    """A certificate that signs others, with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def leaf(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        *,
        made: datetime,
        life: timedelta,
        role: Role = "site",
        hosts: Sequence[x509.GeneralName] = (),
    ) -> bytes:
        """A participant's certificate in PEM form; `hosts` are the addresses of a server."""
        extra: list[x509.ExtensionType] = [x509.ExtendedKeyUsage([_usage(role)])]
        extra += [x509.SubjectAlternativeName(hosts)] if hosts else []
        return issued(subject, key, by=self, times=(made, made + life), extra=extra).public_bytes(Encoding.PEM)


def issued(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    *,
    by: Signer | ec.EllipticCurvePrivateKey,
    times: tuple[datetime, datetime],
    below: int | None = None,
    extra: Sequence[x509.ExtensionType] = (),
) -> x509.Certificate:
    """A certificate that ends with its signer's at the latest, or signs itself.

    Args:
        subject: whom it names.
        key: its owner's.
        by: the signer; a root's own key.
        times: when it is made, and when it ends.
        below: how many issuers may come between it and a participant; None if it signs nothing.
        extra: what else it says.
    """
    issuer, private = (by.certificate.subject, by.key) if isinstance(by, Signer) else (subject, by)
    until = min(times[1], by.certificate.not_valid_after_utc) if isinstance(by, Signer) else times[1]
    signs = below is not None
    usage = x509.KeyUsage(not signs, False, False, False, False, signs, signs, False, False)
    builder = (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
        .not_valid_before(times[0] - LEEWAY)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(signs, below), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(private.public_key()), critical=False)
    )
    for extension in extra:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(private, hashes.SHA256())


def name(who: str, role: str, organisation: str = "") -> x509.Name:
    """A subject: the role first, because an issuer is bound to what a subject begins with."""
    parts = {
        NameOID.ORGANIZATIONAL_UNIT_NAME: role,
        NameOID.ORGANIZATION_NAME: organisation,
        NameOID.COMMON_NAME: who,
    }
    return x509.Name([x509.NameAttribute(kind, text) for kind, text in parts.items() if text])


def now() -> datetime:
    """The time in whole seconds, as certificates know it."""
    return datetime.now(UTC).replace(microsecond=0)


def load(path: Path) -> list[x509.Certificate]:
    """The certificates in a PEM file; at least one.

    Raises:
        KitError: there is none.
    """
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
        return [one for one in found if one.public_key()]  # a damaged key is noticed only when it is asked for
    except (OSError, *signing.UNREADABLE) as cause:
        raise KitError(f"'{path}' holds no certificate: {cause}") from cause


def _usage(role: str) -> x509.ObjectIdentifier:
    return ExtendedKeyUsageOID.SERVER_AUTH if role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
