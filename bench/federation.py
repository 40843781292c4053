"""A real federation on this machine: how soon, how fast, how large.

    python bench/federation.py                     everything, some minutes
    python bench/federation.py --only poc rounds   of: poc, rounds, idle, restart, transfer, hundred, large

Prints one JSON line a measure, with the machine.

    poc         seconds from an empty folder to the result of a 3-round digits job over 4 sites (`koinon poc`)
    rounds      milliseconds of a round without training: 4 sites, 16 kB, 100 kB and 4 MB of model
    idle        resident megabytes of a server and of a site that have nothing to do
    restart     seconds from `kill -9` of the server to its next answer; and until all sites are back
    transfer    MB/s of an upload and a download of 512 MB, over those of a bare TLS socket from file to file
    hundred     100 light sites (threads of this process) on one server, 1 MB of model: seconds a round, peak memory
    large       4 GB up and down: what the processes that carry it need beside it
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from koinon import tracking
from koinon.errors import LinkError
from koinon.operate import afar
from koinon.operate.session import Order
from koinon.payload import Payload, codec
from koinon.provision import poc
from koinon.site import bundle
from koinon.site.kit import open_kit
from koinon.task.errands import Answer
from koinon.task.wire import Poll
from koinon.transport.http import Link
from koinon.transport.tls import client_context

ROOT = Path(__file__).parents[1]

JOB = """
import numpy as np, koinon

@koinon.task("train")
def train(model, data, context):
    return {"w": model["w"] + 1}, 1, {}

def job(size: int = 4000, sites: int = 4, rounds: int = 30):
    rows = np.arange(4.0 * sites, dtype=np.float32).reshape(-1, 1)
    data = koinon.data.arrays(rows, rows[:, 0], test=None).split(koinon.iid(), sites=sites)
    return koinon.Job(koinon.FedAvg(rounds), train, model={"w": np.zeros(size, np.float32)}, data=data)
"""


@contextmanager
def running(sites: int, *, started: bool = True) -> Iterator[Path]:
    """A proof of concept; of its sites only the kits, if they are not to be started."""
    folder = Path(tempfile.mkdtemp(prefix="koinon-bench-"))
    names = [f"site-{number}" for number in range(1, sites + 1)]
    try:
        poc.start(folder, names)
        if not started:
            for name, pid in processes(folder).items():
                if name != "server":
                    with suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
        (folder / "job.py").write_text(JOB)
        yield folder
    finally:
        poc.stop(folder)
        shutil.rmtree(folder, ignore_errors=True)


def processes(folder: Path) -> dict[str, int]:
    """Who runs: name -> process."""
    return dict(json.loads((folder / "processes.json").read_text()))


def memory(pid: int, what: str = "VmRSS") -> float:
    """Megabytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def submitted(folder: Path, sites: int, **settings: Any) -> tuple[Link, str]:
    """The benchmark's job, in that federation."""
    said = {key: str(value) for key, value in {**settings, "sites": sites}.items()}
    order = Order(file=str(folder / "job.py"), settings=said)
    kit = open_kit(poc.admin(folder))
    link = afar.linked(kit.path)
    return link, link.submit(bundle.pack(order, kit, sites=[f"site-{number}" for number in range(1, sites + 1)]))


def finished(folder: Path, link: Link, job: str) -> list[float]:
    """Seconds of each round of a job, when it is over."""
    if reason := afar.follow(link, job, []):
        raise SystemExit(reason)
    afar.fetch(link, job, folder / job)
    return [row.value for row in tracking.read(folder / job).series("seconds")]


def measure_poc() -> dict[str, Any]:
    """As a user would."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        words = ["poc", str(ROOT / "examples" / "digits.py"), "--sites", "4", "--rounds", "3"]
        subprocess.run(
            [sys.executable, "-m", "koinon.operate.cli", *words], cwd=folder, check=True, capture_output=True
        )
        return {"seconds": round(time.perf_counter() - began, 1)}


def measure_rounds() -> dict[str, Any]:
    """Rounds in which nothing is computed."""
    found = {}
    with running(4) as folder:
        for size in (4_000, 25_000, 1_000_000):
            link, job = submitted(folder, 4, size=size, rounds=30)
            rounds = finished(folder, link, job)[2:]
            found[f"{4 * size // 1000} kB"] = round(1e3 * statistics.median(rounds), 1)
    return {"milliseconds": found}


def measure_idle() -> dict[str, Any]:
    """After a while without work."""
    with running(1) as folder:
        time.sleep(5)
        return {name: round(memory(pid), 1) for name, pid in processes(folder).items()}


def measure_restart() -> dict[str, Any]:
    """`kill -9`, and start again."""
    with running(4) as folder:
        link = afar.linked(poc.admin(folder))
        while sum(site["connected"] for site in link.sites()) < 4:
            time.sleep(0.1)
        pids = processes(folder)
        os.killpg(pids["server"], signal.SIGKILL)
        began = time.perf_counter()
        pids["server"] = poc.started(folder / "kits" / "server", "server")
        (folder / "processes.json").write_text(json.dumps(pids))
        while True:
            with suppress(LinkError):
                link.jobs()
                break
            time.sleep(0.01)
        serves = time.perf_counter() - began
        while sum(site["connected"] for site in link.sites()) < 4:
            time.sleep(0.02)
        return {"serves": round(serves, 2), "all_sites_back": round(time.perf_counter() - began, 2)}


class Light:
    """A site that is a thread: it answers with the model plus one."""

    def __init__(self, kit: Path) -> None:
        opened = open_kit(kit)
        self.link = Link(opened.servers, lambda: client_context(opened))
        self.folder = kit / "light"
        self.folder.mkdir()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while True:
            try:
                for asked in self.link.poll(Poll(wait=20.0)).assignments:
                    self.link.fetch(asked.digest, asked.size, self.folder / "payload")
                    self.answer(asked.job, asked.task, asked.name, asked.digest)
            except LinkError:
                time.sleep(0.5)

    def answer(self, job: str, task: str, name: str, digest: str) -> None:
        """What would be computed."""
        if name == "join":
            payload = Payload("metrics", {}, {"weight": 1, "metrics": {"train": 1, "test": 0}})
        else:
            ones = {key: np.ones_like(array) for key, array in codec.load(self.folder / "payload").arrays.items()}
            payload = Payload("weight_diff", ones, {"weight": 1.0, "metrics": {}})
        path = self.folder / "answer"
        codec.save(payload, path)
        data = path.read_bytes()
        self.link.push(Answer(job, task, digest, hashlib.sha256(data).hexdigest(), len(data), 0.0, False), path)


def measure_hundred() -> dict[str, Any]:
    """One server's work, not the sites'."""
    with running(100, started=False) as folder:
        for path in sorted((folder / "kits").glob("site-*[0-9]")):
            Light(path)
        server = processes(folder)["server"]
        link, job = submitted(folder, 100, size=250_000, rounds=6)
        peak, over = [0.0], threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                with suppress(OSError, StopIteration):
                    children = subprocess.run(["pgrep", "-P", str(server)], capture_output=True, text=True).stdout
                    peak[0] = max([peak[0], *(memory(int(pid), "VmHWM") for pid in children.split())])

        threading.Thread(target=watch, daemon=True).start()
        rounds = finished(folder, link, job)[1:]
        over.set()
        main = round(memory(server, "VmHWM"), 1)
        return {
            "round_seconds": round(statistics.median(rounds), 2),
            "server_mb": main,
            "controller_mb": round(peak[0], 1),
        }


def measure_transfer(size: int = 512 << 20) -> dict[str, Any]:
    """Against a socket that does nothing but TLS, from a file to a file, in the same minute."""
    with running(1, started=False) as folder:
        up, down = carried(folder, size)
        bare = plain_copy(folder, size)
        again, once_more = carried(folder, size)
        up, down = max(up, again), max(down, once_more)
        return {"up_mb_s": round(up), "down_mb_s": round(down), "bare_mb_s": round(bare),
                "up_ratio": round(up / bare, 2), "down_ratio": round(down / bare, 2)}  # fmt: skip


def carried(folder: Path, size: int) -> tuple[float, float]:
    """MB/s of an answer up, and of a payload down, between a site and the server."""
    kit = open_kit(folder / "kits" / "site-1")
    link = Link(kit.servers, lambda: client_context(kit))
    admin, job = submitted(folder, 1, size=size // 4, rounds=1)
    rates = []
    while len(rates) < 2:
        for asked in link.poll(Poll(wait=20.0)).assignments:
            path = folder / "answer"
            began = time.perf_counter()
            link.fetch(asked.digest, asked.size, folder / "payload")
            rates += [asked.size / 1e6 / (time.perf_counter() - began)] if asked.name != "join" else []
            codec.save(
                Payload("metrics", {}, {"weight": 1, "metrics": {"train": 1}})
                if asked.name == "join"
                else Payload("weight_diff", {"w": np.ones(size // 4, np.float32)}, {"weight": 1.0, "metrics": {}}),
                path,
            )
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            began = time.perf_counter()
            answer = Answer(asked.job, asked.task, asked.digest, digest, path.stat().st_size, 0.0, False)
            link.push(answer, path)
            rates += [path.stat().st_size / 1e6 / (time.perf_counter() - began)] if asked.name != "join" else []
    afar.follow(admin, job, [])
    return rates[1], rates[0]


def plain_copy(folder: Path, size: int) -> float:
    """MB/s of a file over TLS into a file, in Python, and nothing else."""
    import ssl

    source, copy, piece = folder / "answer", folder / "copy", 1 << 18
    kit = open_kit(folder / "kits" / "server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit.certificate, kit.key)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        line, _ = listener.accept()
        with context.wrap_socket(line, server_side=True) as tls, copy.open("wb") as file:
            buffer = bytearray(piece)
            while count := tls.recv_into(buffer):
                file.write(memoryview(buffer)[:count])
            file.flush()
            os.fsync(file.fileno())

    server = threading.Thread(target=serve)
    server.start()
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    began = time.perf_counter()
    line = socket.create_connection(listener.getsockname())
    with line, trusting.wrap_socket(line) as tls, source.open("rb") as file:
        while data := file.read(piece):
            tls.sendall(data)
    server.join()
    return source.stat().st_size / 1e6 / (time.perf_counter() - began)


def measure_large() -> dict[str, Any]:
    """What the server's process and this one, as a site, take while 4 GB pass."""
    with running(1, started=False) as folder:
        server, before = processes(folder)["server"], memory(os.getpid())
        source = folder / "large"
        with source.open("wb") as file:
            for _ in range(64):
                file.write(os.urandom(1 << 26))
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        kit = open_kit(folder / "kits" / "site-1")
        link = Link(kit.servers, lambda: client_context(kit))
        submitted(folder, 1, size=1000, rounds=1)
        asked = link.poll(Poll(wait=20.0)).assignments[0]
        began = time.perf_counter()
        link.push(Answer(asked.job, asked.task, asked.digest, digest, source.stat().st_size, 0.0, False), source)
        seconds = time.perf_counter() - began
        return {"seconds": round(seconds, 1), "server_mb": round(memory(server, "VmHWM"), 1),
                "site_more_mb": round(memory(os.getpid(), "VmHWM") - before, 1)}  # fmt: skip


def main() -> None:
    """Each measure in turn."""
    known = ["poc", "rounds", "idle", "restart", "transfer", "hundred", "large"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=known, default=known)
    for name in parser.parse_args().only:
        found = globals()[f"measure_{name}"]()
        print(
            json.dumps({"measure": name, **found, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}),
            flush=True,
        )


if __name__ == "__main__":
    main()
