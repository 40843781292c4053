"""Survival of breast cancer patients in six regions: linear Cox regression, federated.

    koinon run examples/tcga.py --set data=path/to/tcga_brca --seed 42

Fed-TCGA-BRCA (Terrail et al., FLamby, 2022): 1,088 patients, 39 clinical features, the published split.
FLamby's pooled concordance index for FedAvg is .735 +- .157; each region's own stands in the report.
"""

import csv
from pathlib import Path

import numpy as np
import torch
from torch import nn

import koinon


def patients(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """{"train": columns, "test": columns}: features x, (event, time) y, and the region of each patient."""
    with (folder / "train_test_split.csv").open() as lines:
        fold = {row["pid"]: row["fold2"].split("_") for row in csv.DictReader(lines)}
    rows: dict[str, list] = {"train": [], "test": []}
    with (folder / "brca.csv").open() as lines:
        for row in csv.DictReader(lines):
            if pid := fold.get(row.pop("pid")):  # a few patients belong to no split
                rows[pid[0]].append((np.array(list(row.values()), np.float32), f"region-{pid[1]}"))
    tables = {name: [np.array(column) for column in zip(*part, strict=True)] for name, part in rows.items()}
    return {name: {"x": v[:, :-2], "y": v[:, -2:], "region": regions} for name, (v, regions) in tables.items()}


def cox(risk: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Negative log partial likelihood (Cox, 1972), with those still at risk taken from the batch."""
    order = torch.argsort(y[:, 1], descending=True)
    risk, event = risk.squeeze(1)[order], y[order, 0]
    return -((risk - torch.logcumsumexp(risk, 0)) * event).mean()


def c_index(risk: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of the pairs of which one is known to have died first, the share in which that one had the higher risk."""
    risk, event, time = risk.squeeze(1), y[:, 0], y[:, 1]
    known = (event[:, None] == 1) & (time[:, None] < time[None, :])
    higher = (risk[:, None] > risk[None, :]).double() + 0.5 * (risk[:, None] == risk[None, :]).double()
    return higher[known].mean()


def job(data: str = "../shared/data/tcga_brca", rounds: int = 5, lr: float = 0.1, steps: int = 100) -> koinon.Job:
    tables = patients(Path(data))
    settings = {"lr": lr, "steps": steps, "batch_size": 8}
    return koinon.Job(
        koinon.FedAvg(rounds=rounds),
        koinon.torch.LocalSGD(
            model=lambda: nn.Linear(39, 1, bias=False), loss=cox, metrics={"c_index": c_index}, **settings
        ),
        data=koinon.data.arrays(tables["train"], test=tables["test"]).split(koinon.by("region"), test="both"),
        score="c_index",
    )
