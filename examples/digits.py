"""Eight sites that hold different digits learn to read them together: the job of `koinon demo`.

    koinon run examples/digits.py --set alpha=0.1

Put your own model in: change `network`, and give your arrays to `koinon.data.arrays`.
"""

from torch import nn

import koinon


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def job(alpha: float = 0.3, sites: int = 8, rounds: int = 15, lr: float = 0.05, epochs: int = 5) -> koinon.Job:
    return koinon.Job(
        koinon.FedAvg(rounds=rounds),
        koinon.torch.LocalSGD(model=network, loss="cross_entropy", lr=lr, momentum=0.9, epochs=epochs, batch_size=16),
        data=koinon.data.digits().split(koinon.dirichlet(alpha), sites=sites),
    )
