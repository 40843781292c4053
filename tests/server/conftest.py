"""Both databases, for the tests that run on each."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The folder of the socket of a PostgreSQL that listens nowhere else.  Skips where there is none."""
    if not shutil.which("initdb") or not shutil.which("pg_ctl"):
        pytest.skip("PostgreSQL is not installed: no initdb and pg_ctl on the path")
    pytest.importorskip("psycopg")
    folder = Path(tempfile.mkdtemp(prefix="koinon-pg-"))
    who = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    if who:
        shutil.chown(folder, "postgres", "postgres")  # it does not run as root
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    quiet = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL, **who}
    subprocess.run(["initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-N"], **quiet)
    control = ["pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log.txt"]
    try:
        subprocess.run([*control, "-o", options, "start"], **quiet)
        yield str(folder)
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **{**quiet, "check": False})
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.sqlite'}"
    folder, name = request.getfixturevalue("postgresql"), f"t{abs(hash(tmp_path))}"
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(host=folder, user="postgres", dbname="postgres", autocommit=True) as db:
        db.execute(f"CREATE SCHEMA {name}")  # a database takes a second
    return f"postgresql:///postgres?host={folder}&user=postgres&options=-csearch_path%3D{name}"
