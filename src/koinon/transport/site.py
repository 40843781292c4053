"""A site's main process: `python -m koinon.transport.site --kit DIR [--log json] [--status-port N]`."""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from koinon.errors import KitError, KoinonError
from koinon.site import status
from koinon.site.daemon import Daemon
from koinon.site.kit import Kit, SiteSettings, open_kit, settings
from koinon.transport import tls
from koinon.transport.http import Link

_log = logging.getLogger("koinon.site")


class Lines(logging.Formatter):
    """A log for machines: a JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        said = {"time": f"{record.created:.3f}", "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)


def main(given: Sequence[str] | None = None) -> int:
    """Run a site until it is told to stop (SIGTERM, SIGINT); 1 if its kit or its settings forbid to start."""
    parser = argparse.ArgumentParser(prog="koinon site")
    parser.add_argument("--kit", required=True)
    parser.add_argument("--log", choices=["text", "json"], default="text")
    parser.add_argument("--status-port", type=int)
    options = parser.parse_args(given)
    logs(options.log)
    try:
        kit = open_kit(options.kit)
        lock = locked(kit)
        link = Link(kit.servers, lambda: tls.client_context(kit))
        daemon = Daemon(kit, settings(kit, SiteSettings), link)
        if options.status_port is not None:
            port = status.serve(daemon, options.status_port).server_port
            _log.info("status on http://127.0.0.1:%d/healthz and /metrics", port)
    except (KoinonError, OSError) as error:
        _log.error("%s", error)
        return 1
    for which in (signal.SIGTERM, signal.SIGINT):
        # Not in the handler itself: it may have interrupted whoever holds the lock that `stop` takes.
        signal.signal(which, lambda *_: threading.Thread(target=daemon.stop).start())
    daemon.run()
    lock.close()
    return 0


def locked(kit: Kit) -> IO[str]:
    """The file whose lock says that a kit is in use: it is let go when this process ends, however it ends.

    Raises:
        KitError: another process has it.
    """
    kit.run.mkdir(exist_ok=True)
    lock = (kit.run / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as cause:
        lock.close()
        raise KitError(f"'{kit.path}' is in use: another process runs as {kit.role} '{kit.name}'") from cause
    return lock


def logs(form: str) -> None:
    """Everything that a main process has to say goes to standard error, a line each."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    plain.converter = time.gmtime
    handler.setFormatter(Lines() if form == "json" else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler])


if __name__ == "__main__":
    sys.exit(main())
