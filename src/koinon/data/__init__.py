"""WHO HOLDS WHICH DATA: sources of samples, partitions over sites, and a cache of both."""

from koinon.data import cache
from koinon.data.dataset import Dataset
from koinon.data.partition import Partition, by, classes, dirichlet, iid, shards
from koinon.data.sizes import Sizes, equal, explicit, lognormal, power_law
from koinon.data.sources import arrays, csv, digits, image_folder, npz, parquet
from koinon.data.split import SiteData, Source, Split, sites
from koinon.data.standard import cifar10, cifar100, fashion_mnist, mnist

__all__ = [
    "Dataset",
    "Partition",
    "SiteData",
    "Sizes",
    "Source",
    "Split",
    "arrays",
    "by",
    "cache",
    "cifar10",
    "cifar100",
    "classes",
    "csv",
    "digits",
    "dirichlet",
    "equal",
    "explicit",
    "fashion_mnist",
    "iid",
    "image_folder",
    "lognormal",
    "mnist",
    "npz",
    "parquet",
    "power_law",
    "shards",
    "sites",
]
