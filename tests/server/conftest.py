"""Both databases, for the tests that run on each."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


class PostgreSQL:
    """One that listens at a socket in a folder of its own, and nowhere else."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="koinon-pg-"))
        who = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        if who:
            shutil.chown(self.folder, "postgres", "postgres")  # it does not run as root
        self._how = {"cwd": self.folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **who}
        data = self.folder / "data"
        subprocess.run(["initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N"], check=True, **self._how)
        self._control = ["pg_ctl", "-D", data, "-w", "-l", self.folder / "log.txt"]

    def start(self) -> None:
        """Start it; nothing if it runs."""
        options = f"-c listen_addresses= -c unix_socket_directories={self.folder} -c fsync=off"
        subprocess.run([*self._control, "-o", options, "start"], check=False, **self._how)

    def stop(self) -> None:
        """End it, as if its machine had lost power."""
        subprocess.run([*self._control, "-m", "immediate", "stop"], check=False, **self._how)

    def store(self, schema: str) -> str:
        """The URL of an empty store: a schema, since a database takes a second."""
        psycopg = pytest.importorskip("psycopg")
        with psycopg.connect(host=str(self.folder), user="postgres", dbname="postgres", autocommit=True) as db:
            db.execute(f"CREATE SCHEMA {schema}")
        return f"postgresql:///postgres?host={self.folder}&user=postgres&options=-csearch_path%3D{schema}"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A running PostgreSQL.  Skips where there is none."""
    if not shutil.which("initdb") or not shutil.which("pg_ctl"):
        pytest.skip("PostgreSQL is not installed: no initdb and pg_ctl on the path")
    pytest.importorskip("psycopg")
    server = PostgreSQL()
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.sqlite'}"
    store: str = request.getfixturevalue("postgresql").store(f"t{abs(hash(tmp_path))}")
    return store
