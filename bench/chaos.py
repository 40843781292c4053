"""A real federation on this machine that is killed, cut, slowed and repeated: it ends, and ends in the same bits.

    python bench/chaos.py --kills 200            SIGKILL to servers, sites and the processes of jobs, at random moments
    python bench/chaos.py --cut 0.3 --delay 0.5 --down 60 --twin 1
    unshare -n bash -c 'ip link set lo up; iptables -A INPUT -m statistic --mode random --probability 0.05 -j DROP;
                        python bench/chaos.py --jobs 2'                              (packet loss, as root)

The line between sites and server is a proxy of this program, which cuts a share of the connections at a random byte,
delays every piece, is down for a while in each job, and counts.  A twin is a second process with a copy of a site's
kit: all that this site sends arrives twice, in any order.  One JSON line a job and one for all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from koinon import tracking
from koinon.operate import afar
from koinon.operate.session import Order
from koinon.provision import poc
from koinon.site import bundle
from koinon.site.kit import open_kit

JOB = Path(__file__).with_name("chaos_job.py")


class Line:
    """A TCP proxy between the sites and the server."""

    def __init__(self, port: int, to: int, cut: float, delay: float, seed: int) -> None:
        self.to, self.cut, self.delay, self.random = to, cut, delay, random.Random(seed)
        self.down, self.counts = False, Counter[str]()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=256)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Let nobody in any more."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                ours, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(ours,), daemon=True).start()

    def _serve(self, ours: socket.socket) -> None:
        self.counts["connections"] += 1
        left = [int(10 ** self.random.uniform(2, 6)) if self.random.random() < self.cut else 1 << 60]
        try:
            theirs = socket.create_connection(("127.0.0.1", self.to), 5)
        except OSError:
            ours.close()
            return
        both = [
            threading.Thread(target=self._pump, args=pair, daemon=True)
            for pair in ((ours, theirs, "up", left), (theirs, ours, "down", left))
        ]
        for one in both:
            one.start()
        for one in both:
            one.join()
        for end in (ours, theirs):
            with contextlib.suppress(OSError):
                end.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )  # as a cut line: no farewell
            end.close()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str, left: list[int]) -> None:
        with contextlib.suppress(OSError):
            while (piece := source.recv(1 << 16)) and left[0] > 0:
                while self.down:
                    time.sleep(0.1)
                if self.delay:
                    time.sleep(self.random.uniform(0, 2 * self.delay))
                left[0] -= len(piece)
                self.counts[way] += len(piece)
                self.counts["cut"] += left[0] <= 0
                sink.sendall(piece)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Victims:
    """The processes of a proof of concept: they are killed, and started again as a supervisor would."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.kills = folder, random.Random(seed), Counter[str]()
        self.mains: dict[str, int] = json.loads((folder / "processes.json").read_text())

    def all(self) -> list[tuple[str, int]]:
        """What runs: (kind, process)."""
        found, mains = [], {pid: name for name, pid in self.mains.items()}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            with contextlib.suppress(OSError, IndexError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if int(entry.name) in mains:
                    found.append(("server" if mains[int(entry.name)] == "server" else "site", int(entry.name)))
                elif parent in mains and words[2] in (b"koinon.server.controller", b"koinon.site.worker"):
                    found.append((words[2].decode().rpartition(".")[2], int(entry.name)))
        return found

    def kill(self) -> None:
        """One of them, each kind as often as the others."""
        running = self.all()
        kind = self.random.choice(sorted({kind for kind, _ in running}))
        pid = self.random.choice([pid for one, pid in running if one == kind])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills[kind] += 1
        for name, main in self.mains.items():
            if main == pid:
                os.waitpid(pid, 0)
                time.sleep(self.random.uniform(0, 0.5))
                self.mains[name] = poc.started(self.folder / "kits" / name, "server" if name == "server" else "site")
        (self.folder / "processes.json").write_text(json.dumps(self.mains))


def proxied(folder: Path, arguments: argparse.Namespace, seed: int) -> Line:
    """Put a line in front of the server: it moves to another port."""
    settings = folder / "kits" / "server" / "settings.toml"
    port = int(re.search(r':(\d+)"', settings.read_text())[1])  # type: ignore[index]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        other = probe.getsockname()[1]
    poc.stop(folder)
    settings.write_text(settings.read_text().replace(f":{port}", f":{other}"))
    line = Line(port, other, arguments.cut, arguments.delay, seed)
    mains = {
        name: poc.started(folder / "kits" / name, "server" if name == "server" else "site")
        for name in ["server", *(path.name for path in sorted((folder / "kits").glob("site-*[0-9]")))]
    }
    (folder / "processes.json").write_text(json.dumps(mains))
    return line


def forgotten(folder: Path) -> list[Path]:
    """What sites still keep of a job, once they have had the time to hear that it is over."""
    until = time.monotonic() + 60
    while True:
        kept = [path for path in (folder / "kits").glob("site-*[0-9]/run/jobs/*") if not path.name.startswith(".")]
        if not kept or time.monotonic() > until:
            return kept
        time.sleep(0.1)


def one(arguments: argparse.Namespace, seed: int, kills: int) -> dict[str, Any]:
    """A job from an empty folder to its end; what happened, and the model's bytes."""
    folder = Path(tempfile.mkdtemp(prefix="koinon-chaos-"))
    settings = {"sites": str(arguments.sites), "rounds": str(arguments.rounds), "memory": str(arguments.memory)}
    order, twins = Order(file=str(JOB), settings=settings, seed=1, on="poc"), []
    names = [f"site-{number}" for number in range(1, arguments.sites + 1)]
    poc.start(folder, names)
    line = proxied(folder, arguments, seed)
    victims, over = Victims(folder, seed), threading.Event()
    for name in names[: arguments.twin]:
        twin = folder / "kits" / f"{name}-twin"
        shutil.copytree(folder / "kits" / name, twin, ignore=shutil.ignore_patterns("run"))
        twins.append(poc.started(twin, "site"))

    def torment() -> None:
        until = time.monotonic() + victims.random.uniform(1, 5)
        while arguments.down and time.monotonic() < until and not over.is_set():
            time.sleep(0.1)
        if arguments.down:
            line.down = True
            over.wait(arguments.down)
            line.down = False
        while sum(victims.kills.values()) < kills and not over.wait(victims.random.expovariate(1 / arguments.pause)):
            victims.kill()

    thread = threading.Thread(target=torment, daemon=True)
    began, events = time.monotonic(), []
    try:
        kit = open_kit(poc.admin(folder))
        link = afar.linked(kit.path)
        packed = bundle.pack(order, kit, sites=names)
        id = afar.patiently(lambda: link.submit(packed))
        thread.start()
        reason = afar.follow(link, id, [events.append])
        over.set()
        thread.join()
        afar.patiently(lambda: afar.fetch(link, id, folder / "run"))
        link.close()
        spools = forgotten(folder)
    finally:
        over.set()
        poc.stop(folder)
        line.close()
        for twin in twins:
            os.killpg(twin, signal.SIGKILL)
            os.waitpid(twin, 0)
    run = tracking.read(folder / "run")
    counted = [row.value for row in run.rows if row.name == "train_tasks" and row.round == arguments.rounds]
    left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout.split()
    said = {
        "state": run.info["state"],
        "reason": reason,
        "seconds": round(time.monotonic() - began, 1),
        "kills": dict(victims.kills),
        "line": dict(line.counts),
        "answers_counted": counted == [arguments.rounds] * len(names),
        "resumed": sum(event.kind == "start" for event in events) - 1,
        "processes_left": len(left),
        "spools_left": len(spools),
        "model": (folder / "run" / "last.safetensors").read_bytes(),
    }
    shutil.rmtree(folder)
    return said


def main() -> None:
    """Jobs without disturbance, and then with, until there were enough kills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.5, help="mean seconds between kills")
    parser.add_argument("--cut", type=float, default=0.0, help="share of the connections that are cut")
    parser.add_argument("--delay", type=float, default=0.0, help="mean seconds by which each piece is late")
    parser.add_argument("--down", type=float, default=0.0, help="seconds without a line, once a job")
    parser.add_argument("--twin", type=int, default=0, help="sites of which there are two")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=1, help="at least so many")
    arguments = parser.parse_args()
    arguments.memory = not arguments.twin
    quiet = argparse.Namespace(**{**vars(arguments), "cut": 0.0, "delay": 0.0, "down": 0.0, "twin": 0})
    still = one(quiet, 0, 0)
    model = still.pop("model")
    print(json.dumps({"job": "undisturbed", **still}), flush=True)
    total, number, same = Counter[str](), 0, True
    while number < arguments.jobs or sum(total.values()) < arguments.kills:
        number += 1
        found = one(arguments, number, arguments.kills - sum(total.values()))
        found["same_bits"] = found.pop("model") == model
        found["sent_again"] = round(found["line"]["up"] / still["line"]["up"] - 1, 3)
        total.update(found["kills"])
        same = same and found["same_bits"] and found["answers_counted"]
        print(json.dumps({"job": number, **found}), flush=True)
    print(json.dumps({"jobs": number, "kills": sum(total.values()), **total, "all_the_same": same}))


if __name__ == "__main__":
    main()
