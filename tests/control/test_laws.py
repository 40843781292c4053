"""Exact laws of federated averaging, through the whole path, against independent arithmetic."""

import numpy as np
import pytest

import koinon
from koinon.errors import SettingsError

RANDOM = np.random.default_rng(1)
X = RANDOM.normal(size=(90, 5))
Y = RANDOM.integers(0, 3, 90)
PARTS = {"a": slice(0, 10), "b": slice(10, 40), "c": slice(40, 90)}


def regression(**settings):
    defaults = {"features": 5, "classes": 3, "lr": 0.5, "batch_size": 10, "dtype": "float64"}
    return koinon.numpy.SoftmaxRegression(**{**defaults, **settings})


def run(tmp_path, executor, parts, rounds=1, **settings):
    data = koinon.data.sites({name: (X[rows], Y[rows]) for name, rows in parts.items()})
    job = koinon.Job(koinon.FedAvg(rounds=rounds, **settings), executor, data=data)
    return koinon.simulate(job, out=tmp_path / "-".join(parts), sinks=()).model()


def gradient(weight, bias, x, y):
    """Of the mean cross-entropy of softmax regression."""
    logits = x @ weight + bias
    error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[y]
    return x.T @ error / len(x), error.mean(0)


def test_full_batch_one_step_is_centralised_gradient_descent(tmp_path):
    """Ten rounds of one full-batch step at every site equal ten steps on all data together, to 1e-6."""
    model = run(tmp_path, regression(batch_size=1000), PARTS, rounds=10)
    weight, bias = np.zeros((5, 3)), np.zeros(3)
    for _ in range(10):
        step = gradient(weight, bias, X, Y)
        weight, bias = weight - 0.5 * step[0], bias - 0.5 * step[1]
    assert model["weight"] == pytest.approx(weight, abs=1e-6)
    assert model["bias"] == pytest.approx(bias, abs=1e-6)


def test_one_site_is_plain_sgd(tmp_path):
    """A federation of one: the global model is the site's own, round after round."""
    from koinon.streams import stream

    model = run(tmp_path, regression(), {"a": slice(0, 90)}, rounds=3)
    weight, bias = np.zeros((5, 3)), np.zeros(3)
    for round in (1, 2, 3):
        order = stream(0, "batches", round, "a").permutation(90)
        for start in range(0, 90, 10):
            rows = order[start : start + 10]
            step = gradient(weight, bias, X[rows], Y[rows])
            weight, bias = weight - 0.5 * step[0], bias - 0.5 * step[1]
    assert model["weight"] == pytest.approx(weight, abs=1e-6)


def test_fedavg_is_the_weighted_mean_of_the_trained_models(tmp_path):
    """With sgd(1.0), w = sum_i n_i w_i / sum_i n_i."""
    together = run(tmp_path, regression(), PARTS)
    each = [run(tmp_path, regression(), {name: rows})["weight"] for name, rows in PARTS.items()]
    assert together["weight"] == pytest.approx(np.average(each, axis=0, weights=[10, 30, 50]), abs=1e-12)


def test_half_a_server_step_moves_half_as_far(tmp_path):
    """The optimizer scales the update, from a first model of zeros."""
    whole = run(tmp_path / "whole", regression(), PARTS)
    half = run(tmp_path / "half", regression(), PARTS, optimizer=koinon.sgd(0.5))
    assert half["weight"] == pytest.approx(whole["weight"] / 2, abs=1e-12)


def test_a_strangers_rule_is_used(tmp_path):
    """The coordinate-wise median of three one-site models."""
    median = koinon.collect(
        lambda updates, weights: koinon.zip_map(lambda *layers: np.median(layers, axis=0), *updates), name="median"
    )
    together = run(tmp_path, regression(), PARTS, aggregator=median)
    each = [run(tmp_path, regression(), {name: rows})["weight"] for name, rows in PARTS.items()]
    assert together["weight"] == pytest.approx(np.median(each, axis=0), abs=1e-12)


def test_rounds_must_be_one_or_more():
    """Nothing to run is a mistake."""
    with pytest.raises(SettingsError, match="rounds"):
        koinon.FedAvg(rounds=0)
