"""IN WHICH ORDER: one file a workflow, what a controller sees, and which sites take part."""

from koinon.control.asynchronous import FedBuff
from koinon.control.conduct import about, conduct, opened
from koinon.control.cross_site import CrossSite
from koinon.control.cyclic import Cyclic
from koinon.control.evaluate import Evaluate
from koinon.control.fairness import QFedAvg
from koinon.control.fedavg import FedAvg
from koinon.control.federation import Federation, Sites, Store, Transport
from koinon.control.fedprox import FedProx
from koinon.control.hierarchical import Hierarchical
from koinon.control.loadaboost import LoAdaBoost
from koinon.control.sampler import Known, Sampler, by_size, by_speed, everyone, fraction, power_of_choice
from koinon.control.scaffold import Scaffold

__all__ = [
    "CrossSite",
    "Cyclic",
    "Evaluate",
    "FedAvg",
    "FedBuff",
    "FedProx",
    "Federation",
    "Hierarchical",
    "Known",
    "LoAdaBoost",
    "QFedAvg",
    "Sampler",
    "Scaffold",
    "Sites",
    "Store",
    "Transport",
    "about",
    "by_size",
    "by_speed",
    "conduct",
    "everyone",
    "fraction",
    "opened",
    "power_of_choice",
]
