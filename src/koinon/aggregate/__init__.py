"""HOW RESULTS BECOME ONE: aggregators fold a round's updates, optimizers step the global model."""

from koinon.aggregate.aggregator import Aggregator, State, collect
from koinon.aggregate.mean import mean
from koinon.aggregate.optimizers import Optimizer, sgd

__all__ = ["Aggregator", "Optimizer", "State", "collect", "mean", "sgd"]
