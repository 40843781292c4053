"""The four standard image sets: from a folder in any of their usual layouts, or from their publishers."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeAlias

from koinon.data import cache, images
from koinon.data.dataset import Dataset
from koinon.data.download import Remote, fetch
from koinon.data.sources import files_key, read_parquet
from koinon.data.split import Pair, Source
from koinon.errors import DataError

Layout: TypeAlias = tuple[Callable[..., Pair], tuple[Path, ...]]
"""A reader, and the files it reads."""


@dataclass(frozen=True)
class Standard:
    """A published image set.

    Args:
        name: the function that gives it.
        remotes: its files at the publisher's.
        layouts: folder -> the layouts it may have there, the preferred first.
        expects: these layouts in words.
        classes: the classes' names, where labels are numbers without names.
    """

    name: str
    remotes: tuple[Remote, ...]
    layouts: Callable[[Path], list[Layout]]
    expects: str
    classes: tuple[str, ...] | None = None

    def source(self, path: str | Path | None) -> Source:
        """The set from `path`, or, if it is None, downloaded into the cache at first use."""
        folder = None if path is None else Path(path)
        return Source(self.name, partial(_read, self, folder), partial(_key, self, folder))


def cifar10(path: str | Path | None = None) -> Source:
    """CIFAR-10: 60,000 colour images of 32 x 32 in 10 classes (Krizhevsky, 2009), 10,000 of them held out.

    Args:
        path: a folder with cifar-10-batches-py/, cifar-10-python.tar.gz, or train.parquet and test.parquet;
            None downloads 170 MB from the publisher into the cache.

    Raises:
        DataError: (when read) the folder holds none of these, a file is corrupt, or there is no network.
    """
    return CIFAR10.source(path)


def cifar100(path: str | Path | None = None) -> Source:
    """CIFAR-100: 60,000 colour images of 32 x 32 in 100 classes (Krizhevsky, 2009); `path` as in `cifar10`."""
    return CIFAR100.source(path)


def mnist(path: str | Path | None = None) -> Source:
    """MNIST: 70,000 handwritten digits of 28 x 28 (LeCun et al., 1998), 10,000 of them held out.

    Args:
        path: a folder with the four IDX files, plain or .gz, or train.parquet and test.parquet;
            None downloads 11 MB into the cache.
    """
    return MNIST.source(path)


def fashion_mnist(path: str | Path | None = None) -> Source:
    """Fashion-MNIST: 70,000 articles of clothing of 28 x 28 (Xiao et al., 2017); `path` as in `mnist`."""
    return FASHION_MNIST.source(path)


def _layout(standard: Standard, path: Path | None) -> Layout:
    folder = path
    if folder is None:
        folder = cache.folder() / "downloads" / standard.name
        instead = f"download it elsewhere and give its folder, koinon.data.{standard.name}(path=...)"
        for remote in standard.remotes:
            fetch(remote, folder, instead)
    for reader, files in standard.layouts(folder):
        if all(file.is_file() for file in files):
            return reader, files
    raise DataError(f"no {standard.name} in '{folder}': expected there {standard.expects}")


def _read(standard: Standard, path: Path | None) -> Pair:
    reader, files = _layout(standard, path)
    train, test = reader(*files)
    if standard.classes is None or test is None:
        return train, test
    return replace(train, classes=standard.classes), replace(test, classes=standard.classes)


def _key(standard: Standard, path: Path | None) -> str:
    _, files = _layout(standard, path)
    return files_key(files, standard.name)


def _cifar_layouts(inner: str, train: Sequence[str], archive: str, label: str, folder: Path) -> list[Layout]:
    batches: list[Layout] = [
        (partial(_batches, label), tuple(place / name for name in (*train, _HELD_OUT[label])))
        for place in (folder, folder / inner)
    ]
    packed = partial(_archive, tuple(f"{inner}/{name}" for name in (*train, _HELD_OUT[label])), label)
    label_column = "label" if label == "labels" else "fine_label"
    return [
        *batches,
        (packed, (folder / archive,)),
        (packed, (folder,)),  # the archive itself was named
        *_parquet_layouts(folder, label_column),
    ]


def _idx_layouts(folders: Sequence[str], folder: Path) -> list[Layout]:
    layouts: list[Layout] = []
    for inner, dash, packed in product(("", "raw", *folders), ("-", "."), ("", ".gz")):
        names = (f"{part}{dash}{kind}-ubyte{packed}" for part, kind in _IDX_FILES)
        layouts.append((_idx, tuple(folder / inner / name for name in names)))
    return layouts + _parquet_layouts(folder, "label")


def _parquet_layouts(folder: Path, label: str) -> list[Layout]:
    return [(partial(_parquet, label), (folder / "train.parquet", folder / "test.parquet"))]


def _batches(label: str, *files: Path) -> Pair:
    blobs = [(str(file), file.read_bytes()) for file in files]
    return images.read_batches(blobs[:-1], label), images.read_batches(blobs[-1:], label)


def _archive(names: tuple[str, ...], label: str, archive: Path) -> Pair:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as packed:
            for member in packed:
                file = packed.extractfile(member) if member.name in names else None
                if file is not None:
                    found[member.name] = file.read()
    except (OSError, EOFError, tarfile.TarError, ValueError) as cause:
        raise DataError(f"'{archive}' cannot be read as an archive: {cause}") from cause
    if missing := [name for name in names if name not in found]:
        raise DataError(f"'{archive}' has no '{missing[0]}'")
    blobs = [(f"{archive}: {name}", found[name]) for name in names]
    return images.read_batches(blobs[:-1], label), images.read_batches(blobs[-1:], label)


def _idx(*files: Path) -> Pair:
    return images.read_idx(*files[:2]), images.read_idx(*files[2:])


def _parquet(label: str, train: Path, test: Path) -> Pair:
    return _labelled(train, label), _labelled(test, label)


def _labelled(path: Path, label: str) -> Dataset:
    return read_parquet(path, target=label)


def _remotes(base: str, sums: Iterable[tuple[str, str]]) -> tuple[Remote, ...]:
    return tuple(Remote(f"{base}/{name}", md5) for name, md5 in sums)


_HELD_OUT = {"labels": "test_batch", "fine_labels": "test"}
_IDX_FILES = (("train-images", "idx3"), ("train-labels", "idx1"), ("t10k-images", "idx3"), ("t10k-labels", "idx1"))
_IDX_NAMES = "train-images-idx3-ubyte and its three companions, plain or .gz, or train.parquet and test.parquet"
_TORONTO = "https://www.cs.toronto.edu/~kriz"

CIFAR10 = Standard(
    "cifar10",
    _remotes(_TORONTO, [("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")]),
    partial(
        _cifar_layouts,
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "cifar-10-python.tar.gz",
        "labels",
    ),
    "cifar-10-batches-py/ with data_batch_1..5 and test_batch, cifar-10-python.tar.gz, or {train,test}.parquet",
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
CIFAR100 = Standard(
    "cifar100",
    _remotes(_TORONTO, [("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")]),
    partial(_cifar_layouts, "cifar-100-python", ("train",), "cifar-100-python.tar.gz", "fine_labels"),
    "cifar-100-python/ with train and test, cifar-100-python.tar.gz, or train.parquet and test.parquet",
)
MNIST = Standard(
    "mnist",
    _remotes(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        [
            ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
            ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
            ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
        ],
    ),
    partial(_idx_layouts, ("MNIST/raw",)),
    _IDX_NAMES,
)
FASHION_MNIST = Standard(
    "fashion_mnist",
    _remotes(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        [
            ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
            ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
            ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
        ],
    ),
    partial(_idx_layouts, ("FashionMNIST/raw",)),
    _IDX_NAMES,
    ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
