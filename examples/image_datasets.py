"""Small image data sets for the examples, from scikit-learn or from their published files.

Nothing is downloaded. Files are checked before they are used. A missing, truncated or wrong file is
a `UserError` with a text of one sentence.
"""

import gzip
import lzma
import math
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from storage import UserError, why

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10")
IDX_WANTED = (
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte, each as it is or gzipped (.gz)"
)
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = ("test_batch.bin",)
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_TARBALL = "cifar-10-binary.tar.gz"
CIFAR_WANTED = (
    f"{', '.join(CIFAR_TRAIN)} and {CIFAR_TEST[0]}, or the folder {CIFAR_FOLDER} with them, or "
    f"{CIFAR_TARBALL}"
)
CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then the planes of red, green and blue
CIFAR_RECORDS = 10_000  # in each file
IDX_MAGIC = {"images": 2051, "labels": 2049}  # unsigned bytes in three dimensions, and in one


class Labelled(NamedTuple):
    """Images, float32 in 0..1 of shape (count, height, width, channels), and their classes.

    Examples also use it for rows of pixels and other targets.
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Training data and test data."""

    train: Labelled
    test: Labelled


def load_dataset(name: str, folder: Path | None = None) -> Dataset:
    """Load one of the data sets in NAMES; all but the digits are read from files in folder."""
    if name == "digits":
        return load_split_digits()
    if name in ("mnist", "fashion-mnist"):
        return Dataset(read_idx_pair(folder, "train"), read_idx_pair(folder, "t10k"))
    if name == "cifar10":
        return Dataset(read_cifar(folder, CIFAR_TRAIN), read_cifar(folder, CIFAR_TEST))
    raise UserError(f"the data set must be one of {', '.join(NAMES)}, not {name!r}")


def draw_batch(
    data: Labelled, size: int, seed: int, step: int, *, drop_last: bool = True
) -> Labelled:
    """Return the batch of a step. It depends only on the arguments; each epoch has its own order.

    If `size` does not divide the images, the last batch of an epoch is smaller or omitted.
    """
    count = len(data.labels)
    if drop_last and size > count:
        raise UserError(f"--batch-size must be at most {count}, the images to learn, got {size}")
    epoch, position = divmod(step, count // size if drop_last else -(-count // size))
    order = np.random.default_rng((seed, epoch)).permutation(count)
    chosen = order[position * size : (position + 1) * size]
    return Labelled(data.images[chosen], data.labels[chosen])


def load_split_digits() -> Dataset:
    """Load scikit-learn's 1797 digits of 8 x 8 pixels, half for training, half for testing.

    The test set is large because the examples compare accuracies: with 899 images the accuracy of
    one network is known to about half a point.
    """
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=0
    )
    return Dataset(Labelled(images[train], labels[train]), Labelled(images[test], labels[test]))


def read_idx_pair(folder: Path | None, part: str) -> Labelled:
    """Read one part of MNIST or Fashion-MNIST, "train" or "t10k"."""
    images = read_idx(folder, f"{part}-images-idx3-ubyte", "images")
    labels = read_idx(folder, f"{part}-labels-idx1-ubyte", "labels")
    if len(images) != len(labels):
        raise UserError(
            f"the {part} files in {folder} must hold as many labels as images, "
            f"but hold {len(images)} images and {len(labels)} labels: replace both"
        )
    return labelled(images[..., None], labels, f"{part}-labels-idx1-ubyte in {folder}")


def read_idx(folder: Path | None, name: str, kind: str) -> np.ndarray:
    """Read an IDX file, gzipped or not: a magic number, the dimensions, then the bytes."""
    path = find_file(folder, (name, f"{name}.gz"), IDX_WANTED)
    content = read_bytes(path)
    magic = int.from_bytes(content[:4], "big")
    if magic != IDX_MAGIC[kind]:
        raise UserError(
            f"{path} must begin with the magic number {IDX_MAGIC[kind]} of IDX {kind}, "
            f"but begins with {magic}: replace the file"
        )
    start = 4 + 4 * (magic & 0xFF)  # the magic number's last byte counts the dimensions
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    if len(content) != start + math.prod(shape) or 0 in shape:
        raise UserError(
            f"{path} must hold {start + math.prod(shape)} bytes by its own header of "
            f"{' x '.join(map(str, shape))}, and not be empty, but holds {len(content)}: "
            "replace the file"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_cifar(folder: Path | None, names: tuple[str, ...]) -> Labelled:
    """Read CIFAR-10's binary version from DIR, its folder in DIR or its tarball in DIR."""
    records = []
    for name in names:
        path = find_file(folder, (name, f"{CIFAR_FOLDER}/{name}", CIFAR_TARBALL), CIFAR_WANTED)
        content = read_bytes(path, member=f"{CIFAR_FOLDER}/{name}")
        if len(content) != CIFAR_RECORDS * CIFAR_RECORD:
            raise UserError(
                f"{name} ({path}) must hold {CIFAR_RECORDS} records of {CIFAR_RECORD} bytes, "
                f"{CIFAR_RECORDS * CIFAR_RECORD} in all, but holds {len(content)}: "
                "replace the file"
            )
        records.append(np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD))
    joined = np.concatenate(records)
    images = joined[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return labelled(images, joined[:, 0], f"{', '.join(names)} in {folder}")


def find_file(folder: Path | None, names: tuple[str, ...], wanted: str) -> Path:
    """Return the first of the names that is a file in the folder."""
    if folder is None:
        raise UserError(f"this data set is read from files: --data-dir must hold {wanted}")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} must hold {wanted}, but {names[0]} is not there: put it there")


def read_bytes(path: Path, member: str = "") -> bytes:
    """Read a file, decompressed if its name says so; from a tarball, read the member."""
    try:
        if path.name.endswith(".tar.gz"):
            with tarfile.open(path) as tarball:
                file = tarball.extractfile(member)
                return file.read() if file else b""
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, KeyError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        part = f" (its {member})" if path.name.endswith(".tar.gz") else ""
        raise UserError(f"{path}{part} cannot be read, replace it: {why(error)}") from error


def labelled(images: np.ndarray, labels: np.ndarray, source: str) -> Labelled:
    """Scale bytes to 0..1, and check that there are ten classes."""
    if labels.max() > 9:
        raise UserError(f"labels must be 0 to 9, but one of {source} is {labels.max()}")
    return Labelled(images / np.float32(255), labels.astype(np.int32))
