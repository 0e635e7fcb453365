"""Command-line arguments that several programs read: types for argparse, which checks them before any work."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from odeopt.tasks import DATASETS, DatasetCorrupt, ImageDataset, load_dataset_or_digits


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


def seconds(text: str) -> float:
    """Read a time of at least zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"should be a number of seconds of at least 0; found {text}")
    return value


def expression(text: str) -> re.Pattern:
    """Read a regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"should be a regular expression; found {text} ({error})") from error


def device(text: str) -> torch.device:
    """Read a device that is there; ``auto`` is CUDA where there is one, else the CPU."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not available: {str(error).splitlines()[0]}") from error


def folder(text: str) -> Path:
    """Read a folder that can be written to."""
    try:
        return writable(Path(text))
    except OSError as error:
        wanted = "should be a folder that can be written to"
        raise argparse.ArgumentTypeError(f"{wanted}; found {text} ({error})") from error


def writable(path: Path) -> Path:
    """Make a folder, unless it is there, and see that it can be written to; an OSError says that it cannot."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):  # permissions alone do not tell, in /proc for instance
        return path


def threads(text: str) -> int:
    """Let torch compute on so many threads of the CPU; ``auto`` is OMP_NUM_THREADS, or one and a line that says so."""
    if text != "auto":
        torch.set_num_threads(positive(text))
    elif "OMP_NUM_THREADS" not in os.environ:
        # the tensors of most loops are small: a second thread gains little, and loses much beside another process
        torch.set_num_threads(1)
        print("computing on one thread; for more, set --threads or OMP_NUM_THREADS", file=sys.stderr, flush=True)
    return torch.get_num_threads()


def dataset(args: argparse.Namespace) -> ImageDataset:
    """Load the images that ``args`` names, or the digits with a notice; exit where their files are damaged."""
    try:
        found, notice = load_dataset_or_digits(args.dataset, args.data_dir)
    except DatasetCorrupt as error:
        sys.exit(str(error))
    if notice:
        print(notice)
    return found


_SHARED: dict[str, dict[str, Any]] = {
    "dataset": {"choices": DATASETS, "default": "mnist", "help": "images to classify"},
    "data_dir": {"type": Path, "help": "folder of the images, in torchvision's layout (by default the environment "
                 "variable ODEOPT_DATA, else a cache folder); what is missing is downloaded"},
    "runs": {"type": positive, "default": 20, "help": "initialisations, each with its own batches"},
    "tuning_runs": {"type": positive, "default": 4, "help": "runs per setting that is tried in tuning"},
    "device": {"type": device, "default": "auto", "help": "where to compute; auto takes CUDA if there is one "
               "(default: %(default)s)"},
    "seed": {"type": int, "default": 0, "help": "changes initialisations and batches"},
    "out": {"type": folder, "default": "figs", "help": "folder of figures and numbers"},
    "markdown": {"action": "store_true", "help": "print the tables as markdown"},
    "stop_after": {"type": seconds, "metavar": "SECONDS", "help": "stop at the next validation after so long; the same "
                   "command continues"},
    "overwrite": {"action": "store_true", "help": "replace the file that --out names"},
    "threads": {"type": threads, "default": "auto", "help": "threads of the CPU; auto is OMP_NUM_THREADS, else one"},
}  # fmt: skip


RESUMES = "interrupted; what is done is kept, and the same command continues from there"
FROM_VALIDATION = "interrupted; the same command continues from the last validation"
BEGINS_ANEW = "interrupted; nothing was kept, and the same command begins anew"


def install(number: int, handler: Callable[[int, object], None], until: contextlib.ExitStack) -> None:
    """Let a function handle a signal until a stack is closed, where signals arrive: in the main thread alone."""
    with contextlib.suppress(ValueError):
        until.callback(signal.signal, number, signal.signal(number, handler))


class Interrupts:
    """Raises KeyboardInterrupt at Ctrl-C and remembers it: torch and safetensors turn some into errors of their own."""

    def __init__(self):
        self.came, self._restored = False, contextlib.ExitStack()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            install(signal.SIGINT, self, self._restored)

    def __call__(self, number, frame):
        self.came = True
        raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        return self

    def __exit__(self, kind, error, traceback):
        self._restored.close()
        if self.came and isinstance(error, Exception):
            raise KeyboardInterrupt from error


def after(error: BaseException | None) -> str:
    """Words on what came after an interrupt, or in its place; nothing where it is the interrupt itself."""
    is_other = error is not None and not isinstance(error, KeyboardInterrupt)
    return f" (then {type(error).__name__}: {error})" if is_other else ""


class Parser(argparse.ArgumentParser):
    """Parser of a script, after which Ctrl-C ends the script with a line on how to go on in place of a traceback."""

    on_interrupt = BEGINS_ANEW

    def parse_args(self, args=None, namespace=None):
        """Read the arguments; where they are those of the command line, Ctrl-C is a line from now on."""
        if args is None:  # a script reads its command line; a test or a notebook passes a list, and keeps its hooks
            before, interrupts = sys.excepthook, Interrupts()

            def hook(kind, error, traceback):
                if not (interrupts.came or issubclass(kind, KeyboardInterrupt)):
                    return before(kind, error, traceback)
                sys.stderr.write(f"\n{self.prog}: {self.on_interrupt}{after(error)}\n")
                if not issubclass(kind, KeyboardInterrupt):  # of which Python makes the status itself
                    sys.exit(128 + signal.SIGINT)

            sys.excepthook = hook
        return super().parse_args(args, namespace)


def parser(
    description: str, names: str, *, on_interrupt: str = BEGINS_ANEW, **changed: dict[str, Any]
) -> argparse.ArgumentParser:
    """Make the parser of an example, with options that several examples have.

    Args:
        description: Text for ``--help``.
        names: Names of options, separated by spaces.
        on_interrupt: What to say where Ctrl-C ends the script: :data:`RESUMES` where results are kept as they are made.
        changed: Further options by name, with arguments of ``add_argument`` that take the place of the usual ones.
    """
    made = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.on_interrupt = on_interrupt
    add(made, names, **changed, threads={})
    return made


def add(parser: argparse.ArgumentParser, names: str, **changed: dict[str, Any]) -> None:
    """Add options that several programs have; see :func:`parser`."""
    for name, changes in ({key: {} for key in names.split()} | changed).items():
        parser.add_argument(f"--{name.replace('_', '-')}", **{**_SHARED[name], **changes})
