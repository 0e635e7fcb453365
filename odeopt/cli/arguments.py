"""Command-line arguments that several programs read: types for argparse, which checks them before any work."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from odeopt.tasks import DatasetCorrupt, ImageDataset, load_dataset_or_digits


def positive(text: str) -> int:
    """Read a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a positive integer; found {text}")
    return int(text)


def natural(text: str) -> int:
    """Read an integer of at least zero that fits into 63 bits, as seeds have to."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"should be an integer of at least 0 and below 2^63; found {text}")
    return int(text)


def device(text: str) -> torch.device:
    """Read a device that is there; ``auto`` is CUDA where there is one, else the CPU."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not to be had: {str(error).splitlines()[0]}") from error


def folder(text: str) -> Path:
    """Make a folder, unless it is there, and see that it can be written to."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"should be a folder that can be written to; found {text} ({error})"
        ) from error
    return path


def dataset(args: argparse.Namespace) -> ImageDataset:
    """Load the images that ``args`` names, or the digits with a notice; exit where their files are damaged."""
    try:
        found, notice = load_dataset_or_digits(args.dataset, args.data_dir)
    except DatasetCorrupt as error:
        sys.exit(str(error))
    if notice:
        print(notice)
    return found
