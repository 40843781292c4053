"""Who may do what at the server, by the certificate of the connection and nothing else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

from koinon.errors import Refused
from koinon.server.store import Entry
from koinon.site import certificates
from koinon.site.kit import Identity, Kit, identity, revoked

_LOG = logging.getLogger("koinon.server")

MAY: Mapping[str, frozenset[str]] = {
    "work": frozenset({"site"}),
    "renew": frozenset({"site", "lead", "member", "org_admin", "project_admin"}),
    "submit": frozenset({"lead", "org_admin", "project_admin"}),
    "read": frozenset({"lead", "member", "org_admin", "project_admin"}),
}
"""Which roles may do what; for `stop` see `stops`."""


class Denied(Refused):
    """A call is refused with this HTTP status; `cut` ends the connection."""

    def __init__(self, status: int, message: str, *, cut: bool = False) -> None:
        super().__init__(message)
        self.status, self.cut = status, cut


def permit(who: Identity, act: str) -> None:
    """Whether somebody has a role that may do this.

    Raises:
        Denied: it has not.
    """
    if who.role not in MAY[act]:
        allowed = ", ".join(sorted(MAY[act]))
        raise Denied(403, f"{said(who)} may not {act} here: that is for {allowed}; ask the operator for such a kit")


def stops(who: Identity, job: Entry) -> None:
    """Whether somebody may end a job: its submitter, an admin of the submitter's organisation or of the project.

    Raises:
        Denied: neither.
    """
    permit(who, "submit")
    own = who.name == job.submitter or (who.role == "org_admin" and who.organisation == job.organisation)
    if not own and who.role != "project_admin":
        raise Denied(403, f"{said(who)} may not stop '{job.id}': '{job.submitter}' submitted it; ask them, or an admin")


def said(who: Identity) -> str:
    """How somebody is named in logs and messages."""
    return f"{who.role} '{who.name}'" + (f" of {who.organisation}" if who.organisation else "")


class Door:
    """Whoever is connected, and who was shut out; `refresh` notices when that changes.

    Raises:
        Refused: revoked.json is not signed by the root.
    """

    def __init__(self, kit: Kit) -> None:
        self._kit, self._file = kit, kit.path / "revoked.json"
        self._stamp, self.revoked = _stamp(self._file), revoked(kit)
        self._inside: WeakKeyDictionary[asyncio.Transport, Identity] = WeakKeyDictionary()

    def enter(self, transport: asyncio.Transport) -> Identity:
        """Who is at the other end of a connection.

        Raises:
            Denied: somebody who was revoked, or whose certificate ended meanwhile.
        """
        who = self._inside.get(transport)
        if who is None:
            try:
                who = identity(transport.get_extra_info("ssl_object").getpeercert(binary_form=True))
            except Refused as no:
                raise Denied(403, str(no), cut=True) from no
            self._inside[transport] = who
        if why := self.revoked.refuses(who):
            raise Denied(403, why, cut=True)
        if who.until < certificates.now():
            until = f"{who.until:%Y-%m-%d %H:%M} UTC"
            raise Denied(403, f"the certificate of {said(who)} ended at {until}: it has to be renewed", cut=True)
        return who

    def known(self, transport: asyncio.Transport | None) -> str:
        """Who is at the other end, for the log."""
        who = self._inside.get(transport) if transport else None
        return said(who) if who else "somebody"

    def refresh(self) -> bool:
        """Read who was shut out, if that has changed, and cut off those who are connected; whether it had changed."""
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return False
        try:
            self.revoked = revoked(self._kit)
        except (Refused, OSError, ValueError) as cause:
            _LOG.error("'%s' is not taken, the list from before holds: %s", self._file, cause)
            self._stamp = stamp
            return False
        self._stamp = stamp
        for transport, who in list(self._inside.items()):
            if why := self.revoked.refuses(who):
                _LOG.warning("cut off %s: %s", said(who), why)
                transport.abort()
        return True


def _stamp(file: Path) -> tuple[int, int, int] | None:
    if not file.exists():
        return None
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
