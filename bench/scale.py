"""A million virtual clients: dealing, sampling, start and memory, and what the many cost the few who are asked.

    python bench/scale.py
    python bench/scale.py --executor mlp --workers 2

Prints one JSON line a measure.  A registered client has 20 samples of 10 float32 features: 0.8 GB on the disk for
a million of them, in a temporary folder, memory-mapped; wider features would cost disk, not start or memory.  Every
run is a process of its own.  Those with 10,000 and with 1,000,000 registered clients live side by side and take
turns of five rounds, one waiting while the other works, so that their ratio holds on a machine whose speed drifts
within seconds.

    ready           from the start of the interpreter to the first round: imports, opening, dealing, the run folder
    clients_a_second   of the median round, the first left out
    ratio           of their speeds in two turns that follow each other: the median, and the quartiles
    peak_mb         most memory at any time, of the process and its workers, pages that they share counted in each
    peak_anonymous_mb   the same without pages of files, which the system may drop whenever it needs the room
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import turns

SAMPLES, FEATURES, CLASSES = 20, 10, 10

TURN = 5
"""Rounds that a run works before the other one does."""


def dirichlet(repeats: int) -> dict[str, float]:
    """Seconds to deal 1,000,000 samples to 100,000 clients."""
    import koinon

    y = np.random.default_rng(0).integers(0, CLASSES, 1_000_000)
    source, seconds = koinon.data.arrays(np.zeros(len(y), np.float32), y, test=None), []
    for seed in range(repeats):
        begin = time.perf_counter()
        source.split(koinon.dirichlet(0.3), 100_000, seed=seed, cache=False).site(0)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": round(statistics.median(seconds), 3)}


def sampling(repeats: int) -> dict[str, float]:
    """Milliseconds to draw and name 1,000 of 1,000,000 clients."""
    import koinon
    from koinon.data.names import Names

    select, names, random = koinon.fraction(0.001).select, Names(1_000_000), np.random.default_rng(0)
    seconds = []
    for _ in range(20 * repeats):
        begin = time.perf_counter()
        assert len(select(names, random)) == 1000
        seconds.append(time.perf_counter() - begin)
    return {"milliseconds": round(1e3 * statistics.median(seconds), 3)}


def write(folder: Path, clients: int) -> None:
    """The clients' samples, and whose each is."""
    random = np.random.default_rng(0)
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (clients * SAMPLES, FEATURES))
    y = np.lib.format.open_memmap(folder / "y.npy", "w+", np.uint8, (clients * SAMPLES,))
    np.save(folder / "client.npy", np.repeat(np.arange(clients, dtype=np.int32), SAMPLES))
    for start in range(0, len(x), 1 << 18):
        part = slice(start, min(start + (1 << 18), len(x)))
        x[part] = random.standard_normal((part.stop - start, FEATURES), np.float32)
        y[part] = x[part, :CLASSES].argmax(1)


def perceptron():
    """A network of 10-32-10."""
    from torch import nn

    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def run(given: argparse.Namespace, began: float) -> None:
    """A federation of `--run` clients, of which each round asks `--cohort`; told as one JSON line."""
    peaks = {"VmRSS": 0, "RssAnon": 0}
    threading.Thread(target=watch, args=(peaks,), daemon=True).start()
    with tempfile.TemporaryDirectory(dir=given.folder) as out:
        os.environ["KOINON_CACHE"] = out
        ready, rounds = simulated(given, Path(out), began)
    peak = {"peak_mb": peaks["VmRSS"] >> 10, "peak_anonymous_mb": peaks["RssAnon"] >> 10}
    print(json.dumps({"ready": round(ready, 2), "rounds": rounds, **peak}))


def simulated(given: argparse.Namespace, out: Path, began: float) -> tuple[float, list[float]]:
    """Seconds to the first round, and those of each."""
    import koinon

    natural = given.partition == "by"
    names = ["x", "y", "client"] if natural else ["x", "y"]
    columns = {name: np.load(given.folder / f"{name}.npy", mmap_mode="r")[: given.run * SAMPLES] for name in names}
    if given.executor == "mlp":
        executor = koinon.torch.LocalSGD(model=perceptron, lr=0.1, batch_size=SAMPLES)
    else:
        executor = koinon.numpy.SoftmaxRegression(features=FEATURES, classes=CLASSES, batch_size=SAMPLES)
    ready, rounds, round_began = 0.0, [], 0.0

    def tell(event: koinon.tracking.Event) -> None:
        nonlocal ready, round_began
        if event.kind == "round":
            ready = ready or time.time() - began
            if len(rounds) % TURN == 0:
                turns.turn()
            round_began = time.time()
        elif event.kind == "commit":
            rounds.append(time.time() - round_began)

    partition = koinon.by("client") if natural else koinon.iid()
    split = koinon.data.arrays(columns, test=None).split(partition, given.run)
    sampler = koinon.fraction(given.cohort / given.run)
    job = koinon.Job(koinon.FedAvg(rounds=given.rounds, sampler=sampler), executor, data=split)
    koinon.simulate(job, out=out / "run", on=given.workers, sinks=[tell])
    return ready, rounds


def watch(peaks: dict[str, int]) -> None:
    """Keep the peaks of this process's and its workers' memory, in KiB, as Linux tells it."""
    while True:
        waiting, total = [os.getpid()], dict.fromkeys(peaks, 0)
        while waiting:
            process = Path("/proc") / str(waiting.pop())
            try:
                lines = (process / "status").read_text().splitlines()
                for thread in (process / "task").iterdir():
                    waiting += map(int, (thread / "children").read_text().split())
            except OSError:  # it has ended
                continue
            for name, _, value in (line.partition(":") for line in lines):
                if name in total:
                    total[name] += int(value.split()[0])
        for name in peaks:
            peaks[name] = max(peaks[name], total[name])
        time.sleep(0.05)


def measured(given: argparse.Namespace, rounds: int, *sizes: tuple[int, int]) -> list[dict[str, Any]]:
    """What `run` says of so many (clients, asked), each in a fresh process with an empty cache, in turns."""
    commands = []
    for clients, cohort in sizes:
        commands.append([__file__, "--run", clients, "--cohort", cohort, "--rounds", rounds])
        for name in ("executor", "workers", "partition", "folder"):
            commands[-1] += [f"--{name}", getattr(given, name)]
    return turns.taken(commands)


def told(given: argparse.Namespace, run: dict[str, Any], cohort: int) -> dict[str, Any]:
    """A run's measures, and how it was made."""
    how = {name: getattr(given, name) for name in ("executor", "partition", "workers")} | {"asked": cohort}
    rate = round(cohort / statistics.median(run["rounds"][1:]))
    return how | {"ready": run["ready"], "clients_a_second": rate} | {k: v for k, v in run.items() if "peak" in k}


def main() -> None:
    """Measure everything; or, told so by itself, one run."""
    began = time.time() - time.process_time()  # the interpreter's own start-up hardly waits
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--rounds", type=int, default=105)
    arguments.add_argument("--executor", choices=["softmax", "mlp"], default="softmax")
    arguments.add_argument("--partition", choices=["iid", "by"], default="iid", help="by: they lie client by client")
    arguments.add_argument("--workers", type=int, default=1)
    arguments.add_argument("--clients", type=int, default=1_000_000, help="how many are many")
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--run", type=int, help=argparse.SUPPRESS)
    arguments.add_argument("--cohort", type=int, default=1000, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.run:
        run(given, began)
        return
    tell = lambda bench, **said: print(json.dumps({"bench": f"scale: {bench}", **said}), flush=True)  # noqa: E731
    tell("dirichlet, 1,000,000 samples, 100,000 clients", **dirichlet(given.repeats))
    tell("sampling, 1,000 of 1,000,000", **sampling(given.repeats))
    with tempfile.TemporaryDirectory() as name:
        given.folder = Path(name)
        write(given.folder, given.clients)
        few, many = measured(given, given.rounds, (10_000, given.cohort), (given.clients, given.cohort))
        tell("10,000 registered", **told(given, few, given.cohort))
        tell(f"{given.clients:,} registered", **told(given, many, given.cohort))
        ratio = turns.ratio(turns.medians(few["rounds"], TURN), turns.medians(many["rounds"], TURN))
        tell(f"speed with {given.clients:,} / with 10,000 registered", **ratio)
        for cohort in (100, 1000, 10_000):
            (alone,) = measured(given, 10, (given.clients, cohort))
            tell("memory by cohort", **told(given, alone, cohort))


if __name__ == "__main__":
    main()
