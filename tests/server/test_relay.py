"""A relay: a server, two relays and two sites behind each, over TLS on loopback, against the flat federation."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

import koinon
from koinon.operate.afar import fetch
from koinon.provision import Admin, Project, Relay, Server, provision, revoke
from koinon.site import bundle, jobfile
from koinon.site.child import environment
from koinon.site.kit import open_kit
from koinon.transport.http import Link
from koinon.transport.tls import client_context
from server.world import running, wait

GROUPS = {"west": ["site-1", "site-2"], "east": ["site-3", "site-4"]}
JOB = """
import time
from pathlib import Path
import numpy as np
import koinon

@koinon.task("train")
def slowly(model, data, context):
    with (Path({folder!r}) / "visits" / "all.txt").open("a") as visits:
        visits.write(f"{{context.site}} {{context.round}}\\n")
    time.sleep(0.05 if context.site == "site-1" else 0.8)
    noise = context.stream("train").normal(size=model["w"].shape)
    return {{"w": model["w"] + noise * len(data)}}, len(data), {{"loss": 1.0}}

def job(kind: str = "digits", rounds: int = 3):
    data = koinon.data.digits().split(koinon.dirichlet(0.5), sites=4)
    if kind == "slow":
        return koinon.Job(koinon.FedAvg(rounds=rounds), slowly, model={{"w": np.zeros(50)}}, data=data)
    rule = koinon.coordinate_median() if kind == "median" else koinon.mean()
    regression = koinon.numpy.SoftmaxRegression(features=64, classes=10, lr=0.2)
    upload = koinon.exclude("bias") if kind == "exclude" else None
    return koinon.Job(koinon.FedAvg(rounds=rounds, aggregator=rule), regression, data=data, upload=upload)
"""


class Federation:
    """Kits, and the processes that run with them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, dict[str, subprocess.Popen[bytes]]()
        with contextlib.ExitStack() as probes:
            found = [probes.enter_context(contextlib.closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(3)]
            self.ports = dict(
                zip(["server", "west.server", "east.server"], (one.getsockname()[1] for one in found), strict=True)
            )
        relays = {
            name: Relay([f"127.0.0.1:{self.ports[f'{name}.server']}"], sites=sites) for name, sites in GROUPS.items()
        }
        sites = dict.fromkeys([site for group in GROUPS.values() for site in group], "")
        server = Server([f"127.0.0.1:{self.ports['server']}"])
        admins = {"admin": Admin("project_admin"), "gone": Admin("lead")}
        self.project = Project("hearts", server, sites=sites, relays=relays, admins=admins)
        provision(self.project, folder)
        for name, port in self.ports.items():
            file = self.kit(name) / "settings.toml"
            file.write_text(f"{file.read_text().replace('0.0.0.0', '127.0.0.1').partition('[data]')[0]}")
            assert f"127.0.0.1:{port}" in file.read_text()
        for name in ["server", *GROUPS, *sites]:
            self.start(name)
        kit = open_kit(self.kit("admin"))
        self.link = Link(kit.servers, lambda: client_context(kit))
        (folder / "visits").mkdir()
        (folder / "job.py").write_text(JOB.format(folder=str(folder)))

    def kit(self, name: str) -> Path:
        """Somebody's."""
        return self.folder / "kits" / name

    def start(self, name: str) -> None:
        """Start somebody."""
        command = ["-m", "koinon.server" if name == "server" else "koinon.transport.site"]
        command = ["-m", "koinon.operate.cli", "site"] if name in GROUPS else command
        more = ["--relay", str(self.kit(f"{name}.server"))] if name in GROUPS else []
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, *command, "--kit", str(self.kit(name)), *more],
                env=environment(None),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self, name: str, how: int = signal.SIGTERM) -> int:
        """End somebody; the exit status."""
        process = self.running.pop(name)
        process.send_signal(how)
        try:
            return process.wait(20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def submit(self, **settings: str) -> str:
        """A job for both relays."""
        order = SimpleNamespace(file=str(self.folder / "job.py"), settings=settings, seed=7, rounds=None, fast=False)
        data = bundle.pack(order, open_kit(self.kit("admin")), sites=list(GROUPS))
        until = time.monotonic() + 30
        while True:
            try:
                return self.link.submit(data)
            except koinon.errors.LinkError:
                assert time.monotonic() < until, self.logs()
                time.sleep(0.1)

    def over(self, job: str) -> dict:
        """What became of a job."""
        with contextlib.suppress(AssertionError):
            wait(lambda: self.link.job(job)["state"] not in ("submitted", "running"), 120)
        return self.link.job(job)

    def file(self, job: str, name: str) -> bytes:
        """Of a job's run folder."""
        self.link.file(job, name, path := self.folder / f"{job}-{Path(name).name}")
        return path.read_bytes()

    def logs(self) -> str:
        """What everybody says, and the processes of the relays' jobs."""
        logs = [*self.folder.glob("*.log"), *self.folder.glob("kits/*.server/run/jobs/*/log.txt")]
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in logs)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """One that runs."""
    federation = Federation(tmp_path_factory.mktemp("relays"))
    try:
        yield federation
    finally:
        for name in list(federation.running):
            federation.stop(name, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["digits", pytest.param("exclude", marks=pytest.mark.slow)])
def test_two_relays_of_two_sites_are_a_federation_of_four(here: Federation, tmp_path: Path, kind: str):
    """The model of the flat federation, to the rounding of a mean of means; and its metrics."""
    said = here.over(job := here.submit(kind=kind))
    assert said["state"] == "finished", f"{said}\n{here.logs()}"
    told = jobfile.load(here.folder / "job.py", {"kind": kind})
    flat = koinon.simulate(told, seed=7, out=tmp_path / "flat", sinks=[])
    fetch(here.link, job, tmp_path / "run")
    run = koinon.tracking.read(tmp_path / "run")
    for name, array in flat.model().items():
        np.testing.assert_allclose(run.model()[name], array, rtol=0, atol=1e-6)
    for name in ("accuracy", "loss", "train_loss"):
        values, wanted = ([row.value for row in one.series(name)] for one in (run, flat))
        np.testing.assert_allclose(values, wanted, rtol=1e-5)
    assert {row.site for row in run.rows if row.name == "train_loss"} >= set(GROUPS)


def test_a_relay_that_is_killed_loses_nothing(here: Federation):
    """In the middle of a round, when one of its sites has answered and the other works: the bits of another run, and
    nobody trains twice."""
    job = here.submit(kind="slow")
    assert here.over(job)["state"] == "finished", here.logs()
    (here.folder / "visits" / "all.txt").unlink()
    again = here.submit(kind="slow")
    with sqlite3.connect(here.kit("west.server") / "run" / "store" / "koinon.sqlite") as store:
        asked = "SELECT 1 FROM results WHERE job = ? AND site = 'site-1' AND task LIKE '2.%'"
        wait(lambda: store.execute(asked, [again]).fetchone())
    here.stop("west", signal.SIGKILL)
    time.sleep(0.3)
    here.start("west")
    assert here.over(again)["state"] == "finished", here.logs()
    assert here.file(again, "last.safetensors") == here.file(job, "last.safetensors")
    visits = (here.folder / "visits" / "all.txt").read_text().splitlines()
    assert sorted(visits) == sorted(f"site-{n} {round}" for n in range(1, 5) for round in range(1, 4))


def test_what_needs_each_sites_own_update_is_refused(here: Federation):
    """By the relay, with what to do."""
    said = here.over(here.submit(kind="median"))
    assert said["state"] == "failed"
    assert "coordinate_median needs each site's own update, and a relay passes on only their mean" in said["reason"]


def test_a_relay_shuts_out_whom_the_server_shuts_out(here: Federation):
    """Only the server is told so; the relays hear it from it."""
    revoke(msgspec.structs.replace(here.project, relays={}), here.folder, "gone")
    lists = [here.kit(f"{name}.server") / "revoked.json" for name in GROUPS]
    wait(lambda: all(file.exists() and '"gone"' in file.read_text() for file in lists))


def test_a_server_that_knows_its_group_waits_for_all_of_it(tmp_path: Path):
    """Where a job names nobody, `sites` in its settings does, whoever is connected."""
    with running(tmp_path, sites=3, settings='sites = ["a", "b"]\n') as world:
        status, said = world.call("lead", "POST", "/v1/jobs", world.bundle(everybody=True))
        assert status == 200, said
        assert [world.assigned(site)["job"] for site in ("b", "a")] == [said["job"]] * 2
        assert not world.poll("c")["assignments"]
