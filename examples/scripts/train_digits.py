"""A training script as one has it: a PyTorch network, a loop, a command line.  New are the lines that name koinon."""

import argparse

import torch
from torch.nn.functional import cross_entropy

import koinon


def network():
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))


def train(net, x, y, *, lr, epochs):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(16):
            optimizer.zero_grad()
            loss = cross_entropy(net(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
    return loss.item()


def accuracy(net, x, y):
    with torch.no_grad():
        return (net(x).argmax(1) == y).float().mean().item()


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--lr", type=float, default=0.05)
    options.add_argument("--epochs", type=int, default=1)
    given = options.parse_args()
    net = network()
    while model := koinon.receive():
        net.load_state_dict({name: torch.from_numpy(array) for name, array in model.arrays.items()})
        torch.manual_seed(model.number("torch"))
        data = model.data.test if model.task == "evaluate" else model.data.train
        x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
        if model.task == "evaluate":
            koinon.send(samples=len(x), accuracy=accuracy(net, x, y))
        else:
            loss = train(net, x, y, lr=given.lr, epochs=given.epochs)
            koinon.send(net.state_dict(), samples=len(x), loss=loss)


if __name__ == "__main__":
    main()
