"""Images as arrays: uint8 [n, channels, height, width], read as float32 in [-1, 1].

Readers of the formats in which image sets come: files in folders, columns of encoded images, IDX, CIFAR's batches.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np

from koinon.data.dataset import Array, Dataset
from koinon.errors import DataError, extra

SCALE = (1 / 127.5, -1.0)
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})


def image_set(pixels: Array, y: Array, classes: tuple[str, ...] | None = None) -> Dataset:
    """Images and their labels as a Dataset, x / 127.5 - 1 when read."""
    return Dataset({"x": pixels, "y": y}, scale={"x": SCALE}, classes=classes)


def decode(images: Iterable[tuple[str, bytes]], size: tuple[int, int] | None = None) -> Array:
    """Encoded images (where each comes from, its bytes) as one array; one channel if all of them are grey.

    Raises:
        DataError: one cannot be decoded, has more than 8 bits, or differs in size and `size` is None.
    """
    pixels: list[Array] = []
    first = ""
    for where, data in images:
        one = _pixels(where, data, size)
        first = first or where
        if pixels and one.shape[:2] != pixels[0].shape[:2]:
            shapes = f"{one.shape[:2]}, '{first}' {pixels[0].shape[:2]}"
            raise DataError(f"image '{where}' has (height, width) {shapes}: bring them to one size, e.g. with size=")
        pixels.append(one)
    if len({one.shape for one in pixels}) > 1:  # grey images among coloured ones
        pixels = [np.broadcast_to(one, (*one.shape[:2], 3)) for one in pixels]
    return np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))


def _pixels(where: str, data: bytes, size: tuple[int, int] | None) -> Array:
    pillow = extra("PIL.Image", "data")
    try:
        with pillow.open(io.BytesIO(data)) as image:
            if image.mode[0] in "IF":
                raise DataError(f"image '{where}' has more than 8 bits a channel: convert it, or use arrays()")
            image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            if size is not None:
                image = image.resize((size[1], size[0]))
            array = np.asarray(image)
    except (OSError, ValueError, SyntaxError, struct.error, pillow.DecompressionBombError) as cause:
        raise DataError(f"image '{where}' cannot be decoded: {cause}") from cause
    return array[..., None] if array.ndim == 2 else array


def read_folder(folder: Path, size: tuple[int, int] | None, classes: tuple[str, ...]) -> Dataset:
    """folder/<class>/<image>: labels are positions in `classes`."""
    files = [(number, file) for number, name in enumerate(classes) for file in image_files(folder / name)]
    pixels = decode(((str(file), file.read_bytes()) for _, file in files), size)
    return image_set(pixels, np.array([number for number, _ in files], np.int64), classes)


def image_files(folder: Path) -> list[Path]:
    """The image files of one folder, by name."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)


def read_idx(images: Path, labels: Path) -> Dataset:
    """A pair of IDX files, plain or .gz: uint8 [n, height, width] and uint8 [n] (LeCun's format of MNIST)."""
    pixels, y = _idx(images, 3), _idx(labels, 1)
    if len(pixels) != len(y):
        raise DataError(f"'{images}' has {len(pixels)} images, '{labels}' has {len(y)} labels")
    return image_set(pixels[:, None], y.astype(np.int64))


def _idx(path: Path, dimensions: int) -> Array:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as cause:
        raise DataError(f"'{path}' cannot be read: {cause}") from cause
    head = 4 + 4 * dimensions
    # Magic number: two zero bytes, 8 for uint8, the number of dimensions; then the dimensions, big-endian.
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < head:
        raise DataError(f"'{path}' is not an IDX file of uint8 with {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", data[4:head])
    body = np.frombuffer(data, np.uint8, offset=head)
    if body.size != int(np.prod(shape, dtype=object)):
        raise DataError(f"'{path}' says {shape} in its head, but {body.size} bytes follow: is it cut short?")
    return body.reshape(shape)


def read_batches(blobs: Iterable[tuple[str, bytes]], label: str) -> Dataset:
    """CIFAR's pickled batches (where each comes from, its bytes) as one set.

    Pickle can run any code; these are read by an unpickler that knows arrays, numbers, text, lists and dicts only.
    """
    pixels, labels = [], []
    for where, blob in blobs:
        try:
            batch = _ArraysOnly(io.BytesIO(blob), encoding="bytes").load()
            x, y = np.asarray(_get(batch, "data")), np.asarray(_get(batch, label))
        except DataError as refusal:
            raise DataError(f"'{where}': {refusal}") from refusal
        except Exception as cause:  # a damaged pickle may raise nearly anything
            raise DataError(f"'{where}' is not one of CIFAR's batches: {cause!r}") from cause
        if x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3072 or y.dtype.kind != "i" or y.shape != x.shape[:1]:
            raise DataError(f"'{where}' is not one of CIFAR's batches: it holds {x.dtype} {x.shape} and {y.shape}")
        pixels.append(x.reshape(-1, 3, 32, 32))
        labels.append(y.astype(np.int64))
    return image_set(np.concatenate(pixels), np.concatenate(labels))


def _get(batch: Any, name: str) -> Any:
    return batch[name.encode()] if name.encode() in batch else batch[name]


def _latin1(text: str, codec: str) -> bytes:
    # How Python 3 writes bytes in the old pickle protocols; the codec is always this one.
    return text.encode("latin1")


_REBUILD: Any = np.empty(0).__reduce__()[0]


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that finds the four names by which NumPy's arrays are written, and nothing else."""

    _known: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _REBUILD,
        ("numpy._core.multiarray", "_reconstruct"): _REBUILD,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        found = self._known.get((module, name))
        return found if found is not None else self._refuse(f"{module}.{name}")

    def persistent_load(self, reference: Any) -> Any:
        self._refuse("a persistent reference")

    def _refuse(self, what: str) -> NoReturn:
        raise DataError(f"refused: the pickle asks for {what}, which no array needs; get the file from its publisher")
