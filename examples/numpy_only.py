"""Federated learning without any framework: softmax regression, and a training function of one's own.

koinon run examples/numpy_only.py
koinon run examples/numpy_only.py --set own=true
"""

import numpy as np

import koinon


@koinon.task("train")
def train(model, data, context):
    """One pass of a perceptron: any library, any loop can stand here."""
    weight = model["weight"].copy()
    mistakes = 0
    for i in context.stream("order").permutation(len(data)):
        guess = int((data.x[i] @ weight).argmax())
        if guess != data.y[i]:
            weight[:, data.y[i]] += 0.1 * data.x[i]
            weight[:, guess] -= 0.1 * data.x[i]
            mistakes += 1
    return {"weight": weight}, len(data), {"loss": mistakes / len(data)}


@koinon.task("evaluate")
def evaluate(model, data, context):
    return len(data), {"accuracy": np.mean((data.x @ model["weight"]).argmax(1) == data.y)}


def job(own: bool = False, alpha: float = 0.5, rounds: int = 10) -> koinon.Job:
    data = koinon.data.digits().split(koinon.dirichlet(alpha), sites=8)
    if own:
        first = {"weight": np.zeros((64, 10), np.float32)}
        return koinon.Job(koinon.FedAvg(rounds=rounds), train, evaluate, model=first, data=data)
    regression = koinon.numpy.SoftmaxRegression(features=64, classes=10, lr=0.5, epochs=2, batch_size=16)
    return koinon.Job(koinon.FedAvg(rounds=rounds), regression, data=data)
