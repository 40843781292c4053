"""Processes that take turns: the ratio of their speeds holds on a machine whose pace drifts within seconds.

Each works some rounds while the others wait, over and over.  A process whose rounds are its own to time calls
`turn` where a turn begins, and prints what it has found at the end.  A script of ../shared/bench/peers does so when
it is run by this one:

    python bench/turns.py ROUNDS_A_TURN SCRIPT --workload W --rounds N
"""

from __future__ import annotations

import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAID = os.dup(1) if __name__ == "__main__" else 1


def turn() -> None:
    """Let the others work, and come back when it is this process's turn."""
    os.write(SAID, b"next\n")
    sys.stdin.readline()


def taken(commands: Sequence[Sequence[object]]) -> list[Any]:
    """What these say in the end, as JSON, having worked in turns.  All must take equally many."""
    runs, said = [], ["next\n"] * len(commands)
    for command in commands:
        arguments = [sys.executable, *map(str, command)]
        runs.append(subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        runs[-1].stdout.readline()  # it is ready
    while said[0] == "next\n":
        for place, run in enumerate(runs):
            print(file=run.stdin, flush=True)
            said[place] = run.stdout.readline()
    for run in runs:
        run.communicate()
    return [json.loads(line) for line in said]


def medians(rounds: Sequence[float], size: int) -> list[float]:
    """Of each turn but the first, in which code and pages are new, the median round."""
    return [statistics.median(rounds[start : start + size]) for start in range(size, len(rounds), size)]


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times as fast, turn by turn: the median, and the quartiles."""
    low, middle, high = statistics.quantiles([one / other for one, other in zip(slow, fast, strict=True)])
    return {"ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def peer(size: int, script: str) -> None:
    """Run one of the peers' scripts in turns of so many rounds; what it says in the end are their seconds."""
    import peer_koinon

    seconds: list[float] = []
    began = 0.0

    def begins(number: int) -> None:
        nonlocal began
        ends()
        if len(seconds) % size == 0:
            turn()
        began = time.perf_counter()

    def ends() -> None:
        if began:
            seconds.append(time.perf_counter() - began)

    os.environ["FLBENCH_CHILD"] = "1"
    os.dup2(2, 1)  # what else is said stays out of the way
    common = peer_koinon.common
    common.round_begins, common.rounds_end, common.result = begins, ends, lambda *_, **__: None
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    os.write(SAID, json.dumps(seconds).encode() + b"\n")


if __name__ == "__main__":
    _, size, script, *_ = sys.argv
    sys.argv = sys.argv[2:]
    peer(int(size), script)
