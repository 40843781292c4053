"""Survival of breast cancer patients in six regions: linear Cox regression, federated in seven ways.

    koinon run examples/tcga.py --set data=path/to/tcga_brca --set strategy=fedadam --seed 42

Fed-TCGA-BRCA (Terrail et al., FLamby, 2022): 1,088 patients, 39 clinical features, the published split and settings.
"""

import csv
from pathlib import Path

import numpy as np
import torch

import koinon


def patients(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """{"train": columns, "test": columns}: features x, (event, time) y, and the region of each patient."""
    rows: dict[str, list] = {"train": [], "test": []}
    with (folder / "train_test_split.csv").open() as folds, (folder / "brca.csv").open() as lines:
        fold = {row["pid"]: row["fold2"].split("_") for row in csv.DictReader(folds)}
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


def job(data: str = "../shared/data/tcga_brca", strategy: str = "fedavg", rounds: int = 5) -> koinon.Job:
    adaptive, tables = {"beta1": 0.9, "tau": 1e-8}, patients(Path(data))
    strategies = {  # what the server does, the step size at the sites, and what else acts on a step
        "fedavg": (koinon.FedAvg(rounds), 0.1),
        "fedprox": (koinon.FedAvg(rounds), 0.1, koinon.proximal(0.1)),
        "fedadam": (koinon.FedAvg(rounds, optimizer=koinon.adam(0.1, beta2=0.999, **adaptive)), 0.01),
        "fedyogi": (koinon.FedAvg(rounds, optimizer=koinon.yogi(0.1, beta2=0.999, **adaptive)), 0.01),
        "fedadagrad": (koinon.FedAvg(rounds, optimizer=koinon.adagrad(1.0, **adaptive)), 0.01),
        "scaffold": (koinon.Scaffold(rounds), 0.01, koinon.control_variates()),
        "cyclic": (koinon.Cyclic(rounds, order="random"), 0.01),
    }
    assert strategy in strategies, f"there is no strategy '{strategy}': {koinon.errors.nearest(strategy, strategies)}"
    controller, lr, *terms = strategies[strategy]
    local = {"loss": cox, "metrics": {"c_index": c_index}, "lr": lr, "terms": terms, "steps": 100, "batch_size": 8}
    train = koinon.torch.LocalSGD(model=lambda: torch.nn.Linear(39, 1, bias=False), **local)
    regions = koinon.data.arrays(tables["train"], test=tables["test"]).split(koinon.by("region"), test="both")
    return koinon.Job(controller, train, data=regions, score="c_index")
