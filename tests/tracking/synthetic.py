"""Runs that never ran: realistic numbers, made from a seed, for what reads runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from koinon.tracking.events import FEDERATION
from koinon.tracking.run import Row, Run


def synthetic(
    path: Path, sites: int = 8, rounds: int = 20, *, metric: str = "accuracy", alone: bool = False, missing: float = 0.0
) -> Run:
    """A run of `rounds` on `sites` unequal sites; each evaluation is `missing` with that probability."""
    chance = np.random.default_rng(7)
    names = [f"site-{number + 1}" for number in range(sites)]
    shares = chance.dirichlet([0.4] * 10, size=sites)
    sizes = chance.lognormal(5, 0.6, sites).astype(int) + 20
    table = np.array([chance.multinomial(size, share) for size, share in zip(sizes, shares, strict=True)])
    ceiling = 0.94 - chance.gamma(1.2, 0.03, sites)
    rows, clock = [], 0.5

    def row(round: int, site: str, name: str, value: float, after: float = 0.0) -> None:
        rows.append(Row(path.name, round, site, name, float(value), clock + after))

    for round in range(1, rounds + 1):
        level = 1 - np.exp(-round / 4)
        slow = sizes / 400 * chance.lognormal(0, 0.2, sites) + 0.05
        for site, name in enumerate(names):
            row(round, name, "seconds", slow[site], after=slow[site] + 0.01 * (site % 7))
            for what, value in {
                "bytes_up": 48_600,
                "bytes_down": 48_700,
                "train_samples": int(sizes[site] * 0.8),
            }.items():
                row(round, name, what, value)
            row(round, name, "train_loss", 2.2 * np.exp(-round / 4) + 0.1)
        clock += float(slow.max()) + 0.05
        reached = np.clip(ceiling * level + chance.normal(0, 0.008, sites), 0, 1)
        for site, name in enumerate(names):
            if chance.random() >= missing:
                row(round, name, metric, reached[site])
                row(round, name, "loss", 2.3 * (1 - reached[site]) + 0.1)
                row(round, name, "samples", sizes[site] // 5)
        row(round, FEDERATION, metric, np.average(reached, weights=sizes))
        row(round, FEDERATION, "loss", 2.3 * (1 - np.average(reached, weights=sizes)) + 0.1)
        row(round, FEDERATION, "train_loss", 2.2 * np.exp(-round / 4) + 0.1)
        for what, value in {"bytes_up": 48_600 * sites, "bytes_down": 48_700 * sites, "answered": sites}.items():
            row(round, FEDERATION, what, value)
        row(round, FEDERATION, "seconds", float(slow.max()) + 0.05)
    for site, name in enumerate(names if alone else []):
        row(rounds, name, f"alone_{metric}", np.clip(ceiling[site] - 0.05 + chance.normal(0, 0.04), 0, 1))
    partition = {
        "how": "dirichlet", "alpha": 0.4, "names": names, "labels": [str(label) for label in range(10)],
        "table": table[:200].tolist(),
    }  # fmt: skip
    info = {
        "name": path.name, "job": "fedavg", "state": "finished", "reason": "", "seed": 7, "rounds": rounds,
        "sites": sites, "began": "2026-11-21T10:33:05+00:00", "score": metric, "partition": partition,
        "settings": {"controller": {"name": "FedAvg", "rounds": rounds}, "training": {"lr": 0.1, "epochs": 1}},
        "versions": {"koinon": "0.1.0", "numpy": np.__version__},
    }  # fmt: skip
    return Run(path, info, rows)
