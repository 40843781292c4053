"""What an operator does: make kits, sign requests, renew, revoke.  What is made is never made again by itself.

PROJECT/root.pem, root.key, revoked.json       the root stays with the operator
PROJECT/kits/NAME/, kits/NAME.zip              what a participant gets
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, cast

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from koinon.errors import KitError, nearest
from koinon.provision import authority, templates
from koinon.provision.project import Project, named
from koinon.site import certificates, signing
from koinon.site.certificates import Revoked, Role
from koinon.site.kit import Manifest

_OWN = ("kit.json", "certificate.pem", "key.pem", "issuer.key", "settings.toml", "revoked.json")
"""What the manifest does not name: it changes, or is secret, and is bound to the root by its own signature."""


class _Who(NamedTuple):
    name: str
    role: Role
    organisation: str


def provision(project: Project, folder: Path) -> list[Path]:
    """Make the kits that are not there yet, and the project's root if there is none.

    Args:
        project: who takes part.
        folder: of the project; the root and its key are made there.

    Returns:
        The folders of the new kits; beside each is the same as a .zip.

    Raises:
        KitError: the folder belongs to another project, or somebody's role or organisation has changed.
    """
    _folder(folder)
    _folder(folder / "kits")
    signer, made = authority.root(folder, project.name), []
    for name, (role, organisation) in project.participants().items():
        who = _who(project, folder, name)
        if who != (name, role, organisation):
            raise KitError(
                f"'{name}' has a kit as {who.role} of '{who.organisation}', not as {role} of '{organisation}': "
                "revoke it, and give the new one another name"
            )
        if not (folder / "kits" / name / "kit.json").exists() and name not in project.own_keys:
            made.append(_make(project, folder, who, signer))
    return made


def sign(project: Project, folder: Path, request: Path) -> Path:
    """Make a kit without a key for the name that a request (see `request`) bears: its owner adds the key.

    Raises:
        KitError: there is no such participant.
        Refused: the file is no request, or is not signed with the key that it is for.
    """
    subject, key = certificates.requested(request.read_bytes())
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    name = str(names[0].value) if names else ""
    _folder(folder / "kits")
    return _make(project, folder, _who(project, folder, name), authority.root(folder, project.name), key)


def renew(project: Project, folder: Path, name: str) -> Path:
    """Make a participant's certificate anew, in the kit that is in the project's folder; its settings stay.

    A revoked participant gets a new key too, and can take part again.

    Raises:
        KitError: there is no such kit, or it was revoked and its key is its owner's own.
    """
    path = _kit(folder, name)
    if name in _revoked(folder).names:
        if not (path / "key.pem").exists():
            raise KitError(f"'{name}' was revoked and keeps its own key: ask it for a request with a new one, and sign")
        signing.new_key(path / "key.pem")
    return _make(project, folder, _who(project, folder, name), authority.root(folder, project.name))


def revoke(project: Project, folder: Path, name: str) -> Path:
    """Shut a participant out: its certificates up to now are void, and one that is made later holds again.

    Returns:
        The signed list, revoked.json; it is in the server's kit too, and must get to where the server runs.

    Raises:
        KitError: there is no such kit, or it is the server's.
    """
    kit = _kit(folder, name)
    if name == project.server.name:
        raise KitError("the server is what shuts others out: stop it, and make a new project if its key is lost")
    at, names = certificates.now(), _revoked(folder).names
    present = certificates.identified(certificates.load(kit / "certificate.pem")[0])
    # The server's clock may be ahead, and what it renewed by that clock must be void too.
    names = {**names, name: max(at + certificates.LEEWAY / 2, present.since)}
    said = {"issued": at.isoformat(), "names": {name: time.isoformat() for name, time in names.items()}}
    text = json.dumps(signing.signed(said, folder / "root.key"), indent=2).encode()
    signing.put(folder / "revoked.json", text)
    if (server := folder / "kits" / project.server.name).exists():
        signing.put(server / "revoked.json", text)
        _pack(server)
    return folder / "revoked.json"


def request(name: str, folder: Path) -> Path:
    """Make a key of one's own, and the request for the kit that fits it.

    Returns:
        request.pem, which goes to the operator; key.pem beside it goes nowhere but into the kit that comes back.

    Raises:
        KitError: there is a key already.
        SettingsError: this cannot be a name.
    """
    named(name)
    _folder(folder)
    if (folder / "key.pem").exists():
        raise KitError(f"'{folder / 'key.pem'}' is there already: name another folder")
    key = signing.new_key(folder / "key.pem")
    signing.put(folder / "request.pem", certificates.request(key, certificates.name(name, "")))
    return folder / "request.pem"


def _make(
    project: Project, folder: Path, who: _Who, signer: certificates.Signer, key: ec.EllipticCurvePublicKey | None = None
) -> Path:
    """A kit, whole or not at all; one that is there gets a new certificate and keeps its settings and key."""
    path = folder / "kits" / who.name
    draft = path if path.exists() else path.with_name(f".{who.name}.draft")
    if draft != path:
        shutil.rmtree(draft, ignore_errors=True)
        _folder(draft)
    public = _public(draft, key)
    made = certificates.now()
    if void := _revoked(folder).names.get(who.name):
        made = max(made, void + timedelta(seconds=1))
    hosts = project.server.hosts() if who.role == "server" else ()
    subject, life = certificates.name(*who), timedelta(days=project.days)
    chain = signer.leaf(subject, public, made=made, life=life, role=who.role, hosts=hosts)
    signing.put(draft / "certificate.pem", chain)
    files = templates.files(project, who.name, who.role)
    files["root.pem"] = (folder / "root.pem").read_text()
    if who.role == "server":
        files["issuer.pem"] = authority.issuer(draft / "issuer.key", signer, project.name, project.days)
        if (folder / "revoked.json").exists():
            signing.put(draft / "revoked.json", (folder / "revoked.json").read_bytes())
    if (draft / "settings.toml").exists():
        files.pop("settings.toml", None)  # it is its owner's
    for place, text in files.items():
        (draft / place).parent.mkdir(parents=True, exist_ok=True)
        signing.put(draft / place, text.encode(), 0o755 if place == "start.sh" else 0o644)
    _seal(project, draft, who, sorted(files.keys() - {"settings.toml"}), folder / "root.key")
    _pack(draft, path)
    draft.replace(path)
    return path


def _public(path: Path, key: ec.EllipticCurvePublicKey | None) -> ec.EllipticCurvePublicKey:
    """The key that a kit's certificate is for: that of a request, the one it has, or a new one."""
    if key is not None:
        (path / "key.pem").unlink(missing_ok=True)
        return key
    if (path / "key.pem").exists():
        return signing.private_key(path / "key.pem").public_key()
    if (path / "certificate.pem").exists():
        present = certificates.load(path / "certificate.pem")[0].public_key()
        return cast(ec.EllipticCurvePublicKey, present)
    return signing.new_key(path / "key.pem").public_key()


def _seal(project: Project, path: Path, who: _Who, places: Iterable[str], root: Path) -> None:
    """Write kit.json: what the kit is, and its files' hashes, signed by the root."""
    said = Manifest(
        project=project.name,
        name=who.name,
        role=who.role,
        organisation=who.organisation,
        servers=project.server.urls(),
        made=certificates.now().isoformat(),
        files={place: hashlib.sha256((path / place).read_bytes()).hexdigest() for place in places},
    )
    signing.put(path / "kit.json", json.dumps(signing.signed(msgspec.to_builtins(said), root), indent=2).encode())


def _pack(kit: Path, as_if: Path | None = None) -> None:
    """A kit as a .zip beside it: the same bytes for the same files, and what was private stays so."""
    path, data = as_if or kit, io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted({*_manifest(kit).files, *(name for name in _OWN if (kit / name).exists())}):
            entry = zipfile.ZipInfo(f"{path.name}/{name}")  # its time is that of 1980
            entry.external_attr = (kit / name).stat().st_mode << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, (kit / name).read_bytes())
    signing.put(path.with_name(f"{path.name}.zip"), data.getvalue(), 0o600)


def _who(project: Project, folder: Path, name: str) -> _Who:
    """Who a participant is: as its kit says or, where there is none yet, the project."""
    if (folder / "kits" / name / "kit.json").exists():
        said = _manifest(folder / "kits" / name)
        return _Who(name, said.role, said.organisation)
    everyone = project.participants()
    if name not in everyone:
        raise KitError(f"'{name}' is not in the project: {nearest(name, everyone)}")
    return _Who(name, *everyone[name])


def _kit(folder: Path, name: str) -> Path:
    kits = {path.parent.name: path.parent for path in (folder / "kits").glob("*/kit.json")}
    if name not in kits:
        raise KitError(f"there is no kit of '{name}' in '{folder}': {nearest(name, kits)}")
    return kits[name]


def _manifest(kit: Path) -> Manifest:
    return msgspec.json.decode((kit / "kit.json").read_bytes(), type=Manifest)


def _revoked(folder: Path) -> Revoked:
    return Revoked.load(folder / "revoked.json", (folder / "root.pem").read_bytes())


def _folder(path: Path) -> None:
    """A folder that only its owner may look into."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
