"""Simulated training against the plain PyTorch loop in the same run, on the workloads of ../shared/bench/peers.

    python bench/simulation.py --repeats 3            # W1 to W3, skewed sizes, an executor that does nothing
    python bench/simulation.py --only many skew

Arms run one after the other, each in a fresh process, for their start, memory and first round: `other_cpu` above 0.1
says that the machine was not quiet, `calib_ms` how fast it was.  Then all live side by side and take turns, and the
ratio is that of two turns that follow each other.  Prints JSON lines: every record, then medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peer_koinon
import turns

HERE, CORES = Path(__file__).resolve().parent, len(os.sched_getaffinity(0))
ARMS = {
    "loop": [f"{peer_koinon.PEERS}/peer_raw.py", "--threads", "1"],
    "loop, processes": [f"{peer_koinon.PEERS}/peer_raw.py", "--procs", str(CORES)],
    "koinon, one process": [str(HERE / "peer_koinon.py"), "--on", "1"],
    "koinon": [str(HERE / "peer_koinon.py"), "--on", str(CORES), "--wait"],
    "koinon, not waiting": [str(HERE / "peer_koinon.py"), "--on", str(CORES)],
}
TURNS = 20
A_TURN = {"mlp-100": 10, "cnn-8": 1, "many": 2}
"""Rounds, so that a turn is a second of the plain loop's."""

SIZES = {"equal": "equal()", "log-normal": "lognormal(1.0)", "Zipf": "power_law(1.0)"}


def tell(bench: str, **said: object) -> None:
    """One line."""
    print(json.dumps({"bench": f"simulation: {bench}", **said}), flush=True)


def versus(workload: str, repeats: int) -> None:
    """Clients a second of every arm, over those of the plain loop with one thread."""
    records: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(repeats):
        for arm, command in ARMS.items():
            done = subprocess.run(
                [sys.executable, *command, "--workload", workload], stdout=subprocess.PIPE, check=True, text=True
            )
            record = json.loads(done.stdout)
            shown = ("clients_per_s", "startup_s", "peak_anon_mb", "other_cpu", "calib_ms", "loss")
            first = record["round_s"][0] / record["round_median_s"]
            records[arm].append({name: record[name] for name in shown} | {"first_round": round(first, 2)})
            tell(workload, arm=arm, **records[arm][-1])
    for arm, own in records.items():
        medians = {name: statistics.median(one[name] for one in own) for name in own[0]}
        tell(f"{workload}, median of {repeats}", arm=arm, **medians)
    size, arms = A_TURN[workload], list(ARMS)[:-1]  # in turns, nobody is not waiting
    wanted = ["--workload", workload, "--rounds", (TURNS + 1) * size]
    rounds = turns.taken([[turns.__file__, size, *ARMS[arm], *wanted] for arm in arms])
    seconds = {arm: turns.medians(own, size) for arm, own in zip(arms, rounds, strict=True)}
    cohort = peer_koinon.common.WORKLOADS[workload]["cohort"]
    for arm, own in seconds.items():
        rates = {"clients_per_s": round(cohort / statistics.median(own), 1), "most": round(cohort / min(own), 1)}
        tell(f"{workload}, {TURNS} turns", arm=arm, **turns.ratio(seconds["loop"], own), **rates)


def timed(job: object, on: int) -> list[float]:
    """Seconds of each round."""
    import koinon

    moments: list[float] = []

    def hear(event: koinon.tracking.Event) -> None:
        if event.kind in ("round", "end"):
            moments.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        koinon.simulate(job, on=koinon.Here(on, wait=True), out=Path(folder) / "run", sinks=[hear])
    return np.diff(moments).tolist()


def nothing(repeats: int) -> None:
    """What a client costs besides its training: an executor that gives 100,480 weights back as they are."""
    import koinon

    @koinon.task("train")
    def train(model, data, context):
        return model, len(data), {}

    model = {"weight": np.zeros((784, 128), np.float32), "bias": np.zeros(128, np.float32)}
    zeros = {"x": np.zeros((20_000, 2), np.float32), "y": np.zeros(20_000, np.int64)}
    for name in ("equal", "log-normal"):  # updates that weigh the same need no product each
        sizes = koinon.iid(sizes=eval(f"koinon.{SIZES[name]}"))
        split = koinon.data.arrays(zeros, test=None).split(sizes, sites=1000, cache=False)
        pace = peer_koinon.common.speed()
        seconds = timed(koinon.Job(koinon.FedAvg(rounds=5 * repeats), train, model=model, data=split), on=1)
        middle, least = (round(1e3 * of(seconds)) for of in (statistics.median, min))
        tell("no training", sizes=name, microseconds_a_client=middle, least=least, calib_ms=pace)


def floors(repeats: int) -> None:
    """What this machine allows a thread: products at its matrix rate, bytes at its copy rate."""
    import torch

    torch.set_num_threads(1)
    weights, rows = torch.randn(128, 784), torch.randn(1024, 784)
    block, other = np.ones(1 << 26, np.uint8), np.ones(1 << 26, np.uint8)

    def rate(work: Callable[[], object], amount: float) -> float:
        seconds = []
        for _ in range(20 * repeats):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return amount / statistics.median(seconds)

    flops = rate(lambda: torch.mm(rows, weights.t()), 2.0 * rows.numel() * len(weights))
    copied = rate(lambda: np.copyto(other, block), float(block.nbytes))
    for workload, samples in (("mlp-100", 60), ("many", 20)):
        # Forward, and the gradient by the weights; of the last layer also that by its inputs.
        work = 2 * samples * (2 * 784 * 128 + 3 * 128 * 10)
        tell(
            f"floors of {workload}",
            gflops=round(flops / 1e9, 1),
            gigabytes_a_second=round(copied / 1e9, 1),
            products_us=round(1e6 * work / flops),
            gather_us=round(1e6 * samples * 784 * 4 / copied),
        )


def skew(repeats: int) -> None:
    """Samples a second where clients differ in size, over those where they do not: 1,000 clients of 60 on average."""
    import torch_models

    import koinon

    random = np.random.default_rng(0)
    data = koinon.data.arrays(random.standard_normal((60_000, 784), np.float32), np.arange(60_000) % 10, test=None)
    rates: dict[str, list[float]] = {name: [] for name in SIZES}
    for _ in range(repeats):
        for name, sizes in SIZES.items():
            split = data.split(koinon.iid(sizes=eval(f"koinon.{sizes}")), sites=1000, cache=False)
            executor = koinon.torch.LocalSGD(model=lambda: torch_models.build("mlp"), lr=0.1, batch_size=20)
            seconds = timed(koinon.Job(koinon.FedAvg(rounds=4), executor, data=split), on=CORES)
            rates[name].append(60_000 / statistics.median(seconds[1:]))
    for name, own in rates.items():
        ratio = statistics.median(one / equal for one, equal in zip(own, rates["equal"], strict=True))
        tell("skewed sizes", sizes=name, samples_a_second=round(statistics.median(own)), over_equal=round(ratio, 2))


OTHERS = {"nothing": nothing, "skew": skew, "floors": floors}


def main() -> None:
    """Measure."""
    parts = [*peer_koinon.common.WORKLOADS, *OTHERS]
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--only", nargs="+", choices=parts, default=parts)
    given = arguments.parse_args()
    for part in given.only:
        if part in OTHERS:
            OTHERS[part](given.repeats)
        else:
            versus(part, given.repeats)


if __name__ == "__main__":
    main()
