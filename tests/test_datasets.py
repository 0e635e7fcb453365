"""Datasets: read, refused where damaged, downloaded whole or not at all, replaced by digits where missing."""

import os
import re
import socket
import struct
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch

from odeopt.tasks import (
    DatasetCorrupt,
    DatasetUnavailable,
    MLPClassification,
    datasets,
    default_data_dir,
    load_dataset,
    load_dataset_or_digits,
)
from odeopt.tasks.random import permutation

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = datasets._FILES


def idx(values):
    """Bytes of an IDX file."""
    return struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape) + bytes(values.flatten().tolist())


def files(n_train=20, n_test=10):
    """A small dataset as torchvision lays it out: 4 x 3 pixels, ten classes."""
    generator = torch.Generator().manual_seed(0)
    contents = {}
    for names, n in (((IMAGES, LABELS), n_train), ((TEST_IMAGES, TEST_LABELS), n_test)):
        images = torch.randint(0, 256, (n, 4, 3), generator=generator)
        contents |= {names[0]: idx(images), names[1]: idx(torch.arange(n) % 10)}
    return contents


def write(raw, contents):
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (raw / name).write_bytes(content)


@pytest.fixture
def raw(tmp_path):
    """Folder of a complete Fashion-MNIST, the one whose bytes are not fixed by a checksum."""
    raw = tmp_path / "FashionMNIST" / "raw"
    write(raw, files())
    return raw


@pytest.fixture
def torchvision(monkeypatch):
    """Stand for torchvision: ``download(raw)`` is what its classes do to their folder."""
    fake = SimpleNamespace(calls=0, download=lambda raw: write(raw, files()))

    def dataset_class(name):
        def construct(root, download):
            fake.calls += 1
            assert download
            fake.download(Path(root) / name / "raw")

        return construct

    fake.datasets = SimpleNamespace(**{name: dataset_class(name) for name in ("MNIST", "FashionMNIST", "KMNIST")})
    monkeypatch.setattr(datasets, "import_torchvision", lambda: fake)
    return fake


def no_network(raw):
    raise RuntimeError("Error downloading x:\nTried https://mirror, got:\n<urlopen error no route>\n")


# Reading


def test_reads_what_torchvision_reads(tmp_path, raw):
    data = load_dataset("fashion-mnist", tmp_path)
    for train, images, labels in (
        (True, data.train_images, data.train_labels),
        (False, data.test_images, data.test_labels),
    ):
        theirs = datasets.import_torchvision().datasets.FashionMNIST(str(tmp_path), train=train)
        assert torch.equal(theirs.data.flatten(1), images)
        assert torch.equal(theirs.targets, labels)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    assert (data.name, data.n_classes, data.image_shape) == ("fashion-mnist", 10, (4, 3))


@pytest.mark.skipif("ODEOPT_DATA" not in os.environ, reason="ODEOPT_DATA names no folder with MNIST")
def test_real_mnist_is_torchvisions():
    data = load_dataset("mnist", download=False)
    assert data.train_images.shape == (60_000, 784)
    assert data.test_images.shape == (10_000, 784)
    theirs = datasets.import_torchvision().datasets.MNIST(os.environ["ODEOPT_DATA"], train=False)
    assert torch.equal(theirs.data.flatten(1), data.test_images)
    assert torch.equal(theirs.targets, data.test_labels)
    # Published: the number of images of each digit in the training set.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(data.train_labels).tolist() == counts


def test_reads_once_per_process(tmp_path, raw, monkeypatch):
    first, digits = load_dataset("fashion-mnist", tmp_path), load_dataset("digits")
    monkeypatch.setattr(Path, "read_bytes", None)  # nothing can be read from here on
    monkeypatch.setattr("sklearn.datasets.load_digits", None)
    assert load_dataset("fashion-mnist", str(tmp_path)) is first
    assert load_dataset("digits") is digits


def test_other_folder_is_another_dataset(tmp_path, raw):
    write(tmp_path / "other" / "FashionMNIST" / "raw", files(n_train=30))
    sizes = [len(load_dataset("fashion-mnist", folder).train_labels) for folder in (tmp_path, tmp_path / "other")]
    assert sizes == [20, 30]


def test_files_that_changed_are_read_again(tmp_path, raw):
    first = load_dataset("fashion-mnist", tmp_path)
    write(raw, files(n_train=30))
    assert len(load_dataset("fashion-mnist", tmp_path).train_labels) == 30
    (raw / IMAGES).write_bytes(wrong_magic((raw / IMAGES).read_bytes()))  # of the same size
    later = (raw / LABELS).stat().st_mtime_ns + 10**9  # some file systems count seconds only
    os.utime(raw / IMAGES, ns=(later, later))
    with pytest.raises(DatasetCorrupt, match=f"{IMAGES} is corrupt"):
        load_dataset("fashion-mnist", tmp_path)
    assert len(first.train_labels) == 20  # what was handed out stays


def test_tasks_share_the_images_as_bytes(tmp_path, raw):
    data = load_dataset("fashion-mnist", tmp_path)
    tasks = [MLPClassification(data, widths=(2,), split=split) for split in ("meta-train", "evaluation")]
    assert {task.images.data_ptr() for task in tasks} == {data.train_images.data_ptr()}
    assert tasks[0].images.dtype == torch.uint8


def test_digits_are_scikit_learns_in_a_fixed_split():
    from sklearn.datasets import load_digits

    data, bunch = load_dataset("digits"), load_digits()
    assert data.train_images.shape == (1437, 64)
    assert data.test_images.shape == (360, 64)
    assert (data.n_classes, data.image_shape) == (10, (8, 8))
    assert data.train_images.max() == 255
    images, labels = (
        torch.cat((data.train_images, data.test_images)),
        torch.cat((data.train_labels, data.test_labels)),
    )
    levels = (images.double() * 16 / 255).round().long()  # undoes the scaling exactly
    key = lambda images, labels: sorted((*row, label) for row, label in zip(images, labels, strict=True))  # noqa: E731
    assert key(levels.tolist(), labels.tolist()) == key(bunch.data.astype(int).tolist(), bunch.target.tolist())
    assert torch.bincount(data.test_labels).min() > 20  # 36 of each are expected
    assert levels[:10].tolist() != bunch.data[:10].astype(int).tolist()  # shuffled


# Damage


def short_header(content):
    return content[:5]


def truncated(content):
    return content[:-1]


def overlong(content):
    return content + b"\0"


def wrong_magic(content):
    return b"\0\0\x0d\x03" + content[4:]


def label_ten(content):
    return content[:-1] + b"\x0a"


def one_fewer(content):
    return struct.pack(">2I", 2049, len(content) - 9) + content[8:-1]


def other_size(content):
    return content[:8] + struct.pack(">2I", 3, 4) + content[16:]


def empty(content):
    return struct.pack(">2I", 2049, 0)


@pytest.mark.parametrize(
    ("file", "damage", "match"),
    [
        (IMAGES, short_header, "5 bytes, fewer than its header"),
        (TEST_IMAGES, truncated, "has 135 bytes where its header announces 136"),
        (LABELS, overlong, "has 29 bytes where its header announces 28"),
        (IMAGES, wrong_magic, "magic number is 3331, not 2051"),
        (TEST_LABELS, label_ten, "label 10, out of 0 to 9"),
        (LABELS, one_fewer, "19 labels for 20 images"),
        (TEST_IMAGES, other_size, f"images are 3 x 4, not 4 x 3 as in {IMAGES}"),
        (LABELS, empty, "0 labels for 20 images"),
    ],
)
def test_damaged_file_is_named(tmp_path, raw, torchvision, file, damage, match):
    (raw / file).write_bytes(damage((raw / file).read_bytes()))
    for load in (load_dataset, load_dataset_or_digits):
        with pytest.raises(DatasetCorrupt, match=f"{re.escape(str(raw / file))} is corrupt: .*{re.escape(match)}"):
            load("fashion-mnist", tmp_path)
    assert torchvision.calls == 0  # the user's file is not overwritten
    write(raw, files())
    assert len(load_dataset("fashion-mnist", tmp_path).train_labels) == 20  # a failure is not remembered


def test_empty_dataset_is_corrupt(tmp_path, raw):
    write(raw, files(n_test=0))
    with pytest.raises(DatasetCorrupt, match=f"{TEST_LABELS} is corrupt: it holds no label"):
        load_dataset("fashion-mnist", tmp_path)


def test_mnist_is_held_to_its_checksums(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    write(raw, files())
    with pytest.raises(DatasetCorrupt, match=rf"{re.escape(str(raw / IMAGES))} is corrupt: its MD5 is \w+, not 6bbc"):
        load_dataset("mnist", tmp_path)


# Download


def test_missing_dataset_is_downloaded_once_and_whole(tmp_path, torchvision):
    folder = tmp_path / "new" / "data"
    data = load_dataset("kmnist", folder)
    assert torch.equal(data.train_labels, torch.arange(20) % 10)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == sorted(
        f"KMNIST/raw/{name}" for name in datasets._FILES
    )
    assert [path.name for path in folder.iterdir()] == ["KMNIST"]
    datasets._read.cache_clear()
    load_dataset("kmnist", folder)
    assert torchvision.calls == 1


def interrupted(raw):
    write(raw, dict(list(files().items())[:2]))
    (raw / TEST_IMAGES).write_bytes(files()[TEST_IMAGES][:50])
    raise URLError("connection reset")


def damaged(raw):
    write(raw, files() | {LABELS: b"<html>not found</html>"})


def not_writable(raw):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("download", "reason"),
    [
        (no_network, "RuntimeError: <urlopen error no route>"),
        (interrupted, "connection reset"),
        (damaged, "is corrupt"),
        (not_writable, "Permission denied"),
    ],
)
def test_failed_download_leaves_nothing_behind(tmp_path, torchvision, download, reason):
    torchvision.download = download
    with pytest.raises(DatasetUnavailable, match=re.escape(reason)):
        load_dataset("kmnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_server_that_does_not_answer_is_given_up_on(tmp_path, torchvision):
    seen = []
    torchvision.download = lambda raw: seen.append(socket.getdefaulttimeout()) or no_network(raw)
    with pytest.raises(DatasetUnavailable, match="no route"):
        load_dataset("kmnist", tmp_path)
    assert seen == [datasets._TIMEOUT]
    assert socket.getdefaulttimeout() is None  # the rest of the program keeps its own


def test_download_completes_a_partial_folder(tmp_path, raw, torchvision):
    (raw / LABELS).unlink()
    assert len(load_dataset("fashion-mnist", tmp_path).train_labels) == 20
    assert torchvision.calls == 1


def test_error_in_the_code_is_not_a_missing_network(tmp_path, torchvision):
    torchvision.download = lambda raw: raw.no_such_attribute
    with pytest.raises(AttributeError, match="no_such_attribute"):
        load_dataset("kmnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_named(tmp_path, torchvision):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetUnavailable, match=re.escape(str(tmp_path / "file"))):
        load_dataset("kmnist", tmp_path / "file")


def test_missing_torchvision_is_a_reason(tmp_path, monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'torchvision'")

    monkeypatch.setattr(datasets, "import_torchvision", missing)
    with pytest.raises(DatasetUnavailable, match="ModuleNotFoundError: No module named 'torchvision'"):
        load_dataset("kmnist", tmp_path)


# Falling back


@pytest.mark.parametrize("download", [True, False])
def test_fallback_says_in_one_sentence_what_to_do(tmp_path, torchvision, download):
    torchvision.download = no_network
    data, notice = load_dataset_or_digits("fashion-mnist", tmp_path, download=download)
    assert data is load_dataset("digits")
    assert notice.startswith(f"FashionMNIST is not in the folder {tmp_path}")
    assert ("no route" if download else "downloading is off") in notice
    assert notice.endswith("; using scikit-learn's handwritten digits instead.")
    assert "\n" not in notice
    assert torchvision.calls == download


def test_command_in_the_sentence_fetches_the_dataset(tmp_path, torchvision):
    _, notice = load_dataset_or_digits("kmnist", tmp_path, download=False)
    exec(re.search(r'python -c "(.*)"', notice).group(1), {})
    assert torchvision.calls == 1
    data, notice = load_dataset_or_digits("kmnist", tmp_path, download=False)
    assert (data.name, notice) == ("kmnist", None)


@pytest.mark.parametrize(
    ("place", "folder", "suffix", "advice"),
    [
        ("data/FashionMNIST/raw", "data/FashionMNIST", "", "pass {tmp}/data as the folder"),
        ("data/FashionMNIST/raw", "data/FashionMNIST/raw", "", "pass {tmp}/data as the folder"),
        ("data/FashionMNIST/raw", ".", "", "pass {tmp}/data as the folder"),
        ("data/FashionMNIST/raw", ".", ".gz", "unpack them with gunzip and pass {tmp}/data as the folder"),
        ("data/FashionMNIST/raw", "data", ".gz", "unpack them with gunzip)"),
        ("data/FashionMNIST", "data", "", "move them to {tmp}/data/FashionMNIST/raw"),
        ("data/fashion/raw", "data", "", "move them to {tmp}/data/FashionMNIST/raw"),
        ("data", "data", ".gz", "unpack them with gunzip and move them to {tmp}/data/FashionMNIST/raw"),
    ],
)
def test_files_in_the_wrong_place_are_found_and_said_where_to_put(tmp_path, place, folder, suffix, advice):
    contents = files()
    packed = dict.fromkeys((IMAGES, TEST_LABELS), suffix)  # the others have been unpacked
    write(tmp_path / place, {name + packed.get(name, ""): content for name, content in contents.items()})
    with pytest.raises(DatasetUnavailable) as caught:
        load_dataset("fashion-mnist", tmp_path / folder, download=False)
    said = str(caught.value)
    missing = [name for name in contents if not (tmp_path / folder / "FashionMNIST/raw" / name).exists()]
    assert f"{(tmp_path / folder).resolve() / 'FashionMNIST' / 'raw'} should hold {', '.join(missing)} (" in said
    assert f"files of these names are in {tmp_path / place}; {advice.format(tmp=tmp_path)}" in said
    # whoever does so has the dataset
    if "move" in advice:
        moved = (tmp_path / place).rename(tmp_path / "moved")
        (tmp_path / "data/FashionMNIST").mkdir(parents=True, exist_ok=True)
        place = moved.rename(tmp_path / "data/FashionMNIST/raw")
    for path in (tmp_path / place).glob("*.gz"):
        path.rename(path.with_suffix(""))
    assert len(load_dataset("fashion-mnist", tmp_path / "data", download=False).train_labels) == 20


@pytest.mark.parametrize("folder", [".", "MNIST", "MNIST/raw"])
def test_another_datasets_files_are_not_taken_for_misplaced_ones(tmp_path, folder):
    write(tmp_path / "MNIST" / "raw", files())
    with pytest.raises(DatasetUnavailable, match=f"should hold {', '.join(datasets._FILES)}; it was not downloaded"):
        load_dataset("kmnist", tmp_path / folder, download=False)


def test_unknown_dataset_is_refused():
    for load in (load_dataset, load_dataset_or_digits):
        with pytest.raises(ValueError, match=r"`name` should be one of mnist, .*, digits\. Found `name = 'svhn'`"):
            load("svhn")


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"ODEOPT_DATA": "/d", "XDG_CACHE_HOME": "/c", "LOCALAPPDATA": "/l"}, Path("/d")),
        ("linux", {"XDG_CACHE_HOME": "/c", "LOCALAPPDATA": "/l"}, Path("/c/odeopt")),
        ("linux", {}, Path("/home/me/.cache/odeopt")),
        ("win32", {"LOCALAPPDATA": "/l"}, Path("/l/odeopt")),
        ("win32", {"ODEOPT_DATA": "/d", "LOCALAPPDATA": "/l"}, Path("/d")),
    ],
)
def test_default_folder(monkeypatch, platform, environment, expected):
    for name in ("ODEOPT_DATA", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(datasets.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert default_data_dir() == expected


def test_default_folder_is_used(monkeypatch, tmp_path, raw):
    monkeypatch.setenv("ODEOPT_DATA", str(tmp_path))
    assert load_dataset("fashion-mnist") is load_dataset("fashion-mnist", tmp_path)


# The import of torchvision


@pytest.mark.parametrize("message", ["operator torchvision::nms does not exist", "something else"])
def test_only_the_missing_operator_is_repaired(monkeypatch, message):
    log = []

    def import_module(name):
        log.append(name)
        if log == ["torchvision"]:
            raise RuntimeError(message)
        return "module"

    monkeypatch.setattr(datasets.importlib, "import_module", import_module)
    monkeypatch.setattr(datasets, "_declare_operators", lambda: log.append("declare"))
    if message == "something else":
        with pytest.raises(RuntimeError, match="something else"):
            datasets.import_torchvision()
        assert log == ["torchvision"]
    else:
        assert datasets.import_torchvision() == "module"
        assert log == ["torchvision", "declare", "torchvision"]


def test_digits_and_permutations_lie_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        digits = datasets._digits.__wrapped__()
        order = permutation(5, seed=0, stream="test")
    assert order.device.type == digits.train_images.device.type == digits.test_labels.device.type == "cpu"
    assert torch.equal(digits.train_images, load_dataset("digits").train_images)
