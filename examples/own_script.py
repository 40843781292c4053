"""A training script that exists already, attached to a federation: it is started once a site and stays alive.

koinon run examples/own_script.py
koinon run examples/own_script.py --set lr=0.1
"""

import torch
from scripts.train_digits import network

import koinon


def job(rounds: int = 5, lr: float = 0.05, seed: int = 0) -> koinon.Job:
    torch.manual_seed(seed)
    return koinon.Job(
        koinon.FedAvg(rounds=rounds),
        koinon.Script("scripts/train_digits.py", args=["--lr", str(lr)], tasks=("train", "evaluate")),
        model={name: tensor.numpy() for name, tensor in network().state_dict().items()},
        data=koinon.data.digits().split(koinon.dirichlet(0.5), sites=4),
    )
