"""CIFAR-10 over eight sites with the small network of NVIDIA's FLARE 2.0 announcement.

    koinon run examples/cifar10.py --set data=path/to/cifar10 --set alpha=0.5 --rounds 10

Without `data` the images are downloaded once. Dirichlet(alpha): the smaller, the more the sites differ.
"""

import torch
from torch import nn
from torch.nn import functional as F

import koinon


class SimpleNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(F.relu(self.fc2(x)))


def job(
    data: str | None = None, alpha: float = 0.5, sites: int = 8, rounds: int = 15, epochs: int = 1, lr: float = 0.01
) -> koinon.Job:
    return koinon.Job(
        koinon.FedAvg(rounds=rounds),
        koinon.torch.LocalSGD(model=SimpleNetwork, lr=lr, momentum=0.9, epochs=epochs, batch_size=32),
        data=koinon.data.cifar10(data).split(koinon.dirichlet(alpha), sites=sites),
    )
