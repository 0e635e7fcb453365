"""Image datasets on disk, in memory; the one door to torchvision, which downloads them.

The files lie in torchvision's layout (``DATA_DIR/MNIST/raw/train-images-idx3-ubyte`` and so on), so that a
folder can be shared with ``torchvision.datasets``. They are read here rather than there so that a damaged
file is named.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib
import math
import os
import socket
import struct
import sys
import tempfile
import zlib
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from odeopt.checks import require, require_one_of

from .random import permutation


class DatasetUnavailable(RuntimeError):  # noqa: N818 (a condition to fall back from)
    """A dataset is not on disk and could not be downloaded."""


class DatasetCorrupt(RuntimeError):  # noqa: N818
    """A dataset's file is truncated or damaged."""


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images in memory.

    Attributes:
        name: Name of the dataset, as in :data:`DATASETS`.
        train_images: uint8, 0 to 255, shape ``(n_train, n_pixels)``.
        train_labels: int64, 0 to ``n_classes - 1``, shape ``(n_train,)``.
        test_images: uint8, shape ``(n_test, n_pixels)``.
        test_labels: int64, shape ``(n_test,)``.
        n_classes: Number of classes.
        image_shape: Height and width in pixels.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    n_classes: int
    image_shape: tuple[int, int]


# the classes of torchvision, which name the folders too
_CLASSES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
_FILES = {  # and the MD5 of those of MNIST
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_N_CLASSES = 10
_TIMEOUT = 20.0  # seconds without an answer from a server, where the operating system may wait for minutes
DATASETS = (*_CLASSES, "digits")


def load_dataset(name: str, data_dir: str | Path | None = None, *, download: bool = True) -> ImageDataset:
    """Read a dataset, downloading it first where it is missing.

    Files are read once per process: a second call returns the same object, which is not to be written into,
    unless the files have changed on disk.

    Args:
        name: ``"mnist"``, ``"fashion-mnist"``, ``"kmnist"`` (28 x 28 pixels, 60,000 + 10,000 images), or
            ``"digits"`` (8 x 8, 1,437 + 360 images, bundled with scikit-learn, never downloaded). A number behind a
            stroke averages squares of so many pixels: ``"mnist/2"`` has 14 x 14.
        data_dir: Folder in torchvision's layout; :func:`default_data_dir` if None.
        download: Whether a missing dataset may be downloaded.

    Returns:
        The images, on the CPU.

    Raises:
        ValueError: If there is no dataset of this name.
        DatasetUnavailable: If the files are missing and cannot be downloaded, or may not be.
        DatasetCorrupt: If a file is truncated or damaged.
    """
    name, _, factor = name.partition("/") if isinstance(name, str) else (name, "", "")
    require_one_of(DATASETS, name=name)
    if factor:
        return _pooled(load_dataset(name, data_dir, download=download), factor)
    if name == "digits":
        return _digits()
    folder = Path(data_dir) if data_dir is not None else default_data_dir()
    folder = folder.expanduser().resolve()
    raw = _raw_folder(folder, name)
    if not all((raw / file).is_file() for file in _FILES):
        if not download:
            raise _unavailable(name, folder, "downloading is off")
        _download(name, folder)
    states = [(raw / file).stat() for file in _FILES]
    return _read(name, raw, tuple((state.st_size, state.st_mtime_ns) for state in states))


@lru_cache(maxsize=8)
def _pooled(dataset: ImageDataset, factor: str) -> ImageDataset:
    """Average squares of pixels, once per process."""
    k = int(factor) if factor.isdecimal() else 0
    is_factor = k >= 1 and all(side % k == 0 for side in dataset.image_shape)
    wanted = f"one that ends in a number that divides {dataset.image_shape}"
    require(is_factor, "name", f"{dataset.name}/{factor}", wanted)
    height, width = (side // k for side in dataset.image_shape)

    def pool(images: Tensor) -> Tensor:
        squares = images.view(len(images), height, k, width, k)
        return squares.float().mean(dim=(2, 4)).round().to(images.dtype)

    train, test = pool(dataset.train_images), pool(dataset.test_images)
    return _dataset(f"{dataset.name}/{factor}", train, dataset.train_labels, test, dataset.test_labels)


def load_dataset_or_digits(
    name: str, data_dir: str | Path | None = None, *, download: bool = True
) -> tuple[ImageDataset, str | None]:
    """Read a dataset, or scikit-learn's handwritten digits where it is unavailable.

    Args:
        name: See :func:`load_dataset`.
        data_dir: See :func:`load_dataset`.
        download: See :func:`load_dataset`.

    Returns:
        The dataset, whose ``name`` says which one it is; and None, or the sentence to show to the user: what
        is missing where, how to fetch it, and that the digits stand in.

    Raises:
        ValueError: If there is no dataset of this name.
        DatasetCorrupt: If a file is truncated or damaged.
    """
    try:
        return load_dataset(name, data_dir, download=download), None
    except DatasetUnavailable as error:
        return _digits(), f"{str(error).removesuffix('.')}; using scikit-learn's handwritten digits instead."


def default_data_dir() -> Path:
    """Folder of the datasets: environment variable ``ODEOPT_DATA``, else ``odeopt`` in the user's cache."""
    if data := os.environ.get("ODEOPT_DATA"):
        return Path(data)
    cache = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "odeopt"


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators do not fit the installed torch.

    A wheel of torchvision built for CUDA, beside a torch built for the CPU, cannot load its operators, and
    its import stops where it describes one of them (``operator torchvision::nms does not exist``). The
    datasets need none of them, so those whose absence stops the import are declared, without code, and the
    import is repeated. Any other failure passes through.

    Returns:
        The module.

    Raises:
        ImportError: If torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    _declare_operators()
    return importlib.import_module("torchvision")


@cache
def _declare_operators() -> None:
    """Declare the operators, once in a process."""
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _raw_folder(folder: Path, name: str) -> Path:
    return folder / _CLASSES[name] / "raw"


def _unavailable(name: str, folder: Path, reason: str) -> DatasetUnavailable:
    """One sentence: what is missing where, why, and the command to fetch it."""
    raw = _raw_folder(folder, name)
    missing = ", ".join(file for file in _FILES if not (raw / file).is_file())
    # Not torchvision's own command: its import may fail (see import_torchvision).
    code = f"from odeopt.tasks.datasets import load_dataset; load_dataset('{name}', '{folder.as_posix()}')"
    return DatasetUnavailable(
        f"{_CLASSES[name]} is not in the folder {folder}: as torchvision lays it out, {raw} should hold "
        f"{missing}{_misplaced(name, folder)}; it was not downloaded ({reason}); "
        f'fetch it with: python -c "{code}"'
    )


def _misplaced(name: str, folder: Path) -> str:
    """Say which folder nearby holds the files in the wrong place or packed, if one does, and what to do."""
    raw, kind = _raw_folder(folder, name), _CLASSES[name]
    others = {*_CLASSES.values()} - {kind}  # whose files have the same names
    nearby = [path for pattern in ("*/raw", f"*/{kind}/raw") for path in sorted(folder.glob(pattern))]
    for found in (raw, folder / kind, folder / "raw", folder, *nearby):
        owner = found.parent.name if found.name == "raw" else found.name
        is_plain = [os.path.isfile(found / file) for file in _FILES]  # False also where `found` cannot be read
        is_packed = [os.path.isfile(found / f"{file}.gz") for file in _FILES]
        if owner in others or not all(map(max, is_plain, is_packed)):
            continue
        todo = [] if all(is_plain) else ["unpack them with gunzip"]
        if found.name == "raw" and owner == kind and found != raw:
            todo.append(f"pass {found.parent.parent} as the folder")
        elif found != raw:
            todo.append(f"move them to {raw}")
        return f" (files of these names are in {found}; {' and '.join(todo)})"
    return ""


def _download(name: str, folder: Path) -> None:
    """Download through torchvision into a folder aside, check, and move whole files into place."""
    timeout = socket.getdefaulttimeout()
    try:
        dataset_class = getattr(import_torchvision().datasets, _CLASSES[name])
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder, ignore_cleanup_errors=True) as aside:
            socket.setdefaulttimeout(_TIMEOUT)  # torchvision sets none of its own
            dataset_class(aside, download=True)
            fetched, raw = _raw_folder(Path(aside), name), _raw_folder(folder, name)
            _read.__wrapped__(name, fetched)  # checks the files; what will be moved is not to be remembered
            raw.mkdir(parents=True, exist_ok=True)
            for file in _FILES:
                os.replace(fetched / file, raw / file)
    except (OSError, RuntimeError, ImportError, EOFError, zlib.error, http.client.HTTPException) as error:
        # torchvision's text runs over many lines, one per mirror; the last says why. The whole is chained.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
        raise _unavailable(name, folder, reason) from error
    finally:
        socket.setdefaulttimeout(timeout)


@lru_cache(maxsize=8)
def _read(name: str, raw: Path, stamps: tuple[tuple[int, int], ...] = ()) -> ImageDataset:
    """Read and check the four files of a dataset, once per process and version of the files."""
    files = [raw / file for file in _FILES]
    parts = [_read_idx(file, _FILES[file.name] if name == "mnist" else None) for file in files]
    train_images, train_labels, test_images, test_labels = parts
    if test_images.shape[1:] != train_images.shape[1:]:
        found = "{} x {}, not {} x {}".format(*test_images.shape[1:], *train_images.shape[1:])
        raise _corrupt(files[2], f"its images are {found} as in {files[0].name}")
    for file, images, labels in ((files[1], train_images, train_labels), (files[3], test_images, test_labels)):
        if len(labels) != len(images):
            raise _corrupt(file, f"it holds {len(labels)} labels for {len(images)} images")
        if len(labels) == 0 or int(labels.max()) >= _N_CLASSES:
            found = f"label {int(labels.max())}, out of 0 to {_N_CLASSES - 1}" if len(labels) else "no label"
            raise _corrupt(file, f"it holds {found}")
    return _dataset(name, *parts)


def _read_idx(path: Path, md5: str | None) -> Tensor:
    """Read a file of bytes in the IDX format: magic number and sizes (big-endian words), then the bytes."""
    n_dims = 3 if "idx3" in path.name else 1
    magic = 0x0800 + n_dims
    content = bytearray(path.read_bytes())
    n_header = 4 * (1 + n_dims)
    if len(content) < n_header:
        raise _corrupt(path, f"it has {len(content)} bytes, fewer than its header")
    found, *shape = struct.unpack(f">{1 + n_dims}I", content[:n_header])
    if found != magic:
        raise _corrupt(path, f"its magic number is {found}, not {magic}")
    n_values = math.prod(shape)
    if len(content) != n_header + n_values:
        raise _corrupt(path, f"it has {len(content)} bytes where its header announces {n_header + n_values}")
    if md5 is not None and (digest := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        raise _corrupt(path, f"its MD5 is {digest}, not {md5}")
    if n_values == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(content, dtype=torch.uint8, offset=n_header).reshape(shape)


def _corrupt(path: Path, reason: str) -> DatasetCorrupt:
    return DatasetCorrupt(f"The file {path} is corrupt: {reason}. Delete it, and it will be downloaded again.")


@cache
def _digits() -> ImageDataset:
    """Scikit-learn's 1,797 digits: shuffled, four fifths for training, levels 0 to 16 scaled to 0 to 255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8)  # on the CPU
    labels = torch.from_numpy(bunch.target)
    order = permutation(len(images), seed=0, stream="datasets/digits")
    images, labels = images[order], labels[order]
    n_train = len(images) * 4 // 5
    return _dataset("digits", images[:n_train], labels[:n_train], images[n_train:], labels[n_train:])


def _dataset(
    name: str, train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor
) -> ImageDataset:
    """A dataset of ten classes from images of shape ``(n, height, width)``."""
    height, width = train_images.shape[1:]
    return ImageDataset(
        name=name,
        train_images=train_images.flatten(1),
        train_labels=train_labels.long(),
        test_images=test_images.flatten(1),
        test_labels=test_labels.long(),
        n_classes=_N_CLASSES,
        image_shape=(height, width),
    )
