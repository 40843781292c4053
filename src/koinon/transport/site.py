"""A site's main process: `python -m koinon.transport.site --kit DIR [--log json] [--status-port N]`."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence

from koinon.errors import KoinonError
from koinon.site import status
from koinon.site.daemon import Daemon
from koinon.site.kit import SiteSettings, open_kit, settings
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
        link = Link(kit.servers, lambda: tls.client_context(kit))
        daemon = Daemon(kit, settings(kit, SiteSettings), link)
        if options.status_port is not None:
            port = status.serve(daemon, options.status_port).server_port
            _log.info("status on http://127.0.0.1:%d/healthz and /metrics", port)
    except (KoinonError, OSError) as error:
        _log.error("%s", error)
        return 1
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, lambda *_: daemon.stop())
    daemon.run()
    return 0


def logs(form: str) -> None:
    """Everything that a main process has to say goes to standard error, a line each."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    plain.converter = time.gmtime
    handler.setFormatter(Lines() if form == "json" else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler])


if __name__ == "__main__":
    sys.exit(main())
