"""``python -m odeopt train``: meta-train a rule from a configuration."""

from __future__ import annotations

import argparse
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from odeopt import artifacts
from odeopt.cli import arguments
from odeopt.cli.files import check_can_be_saved, prepare
from odeopt.meta.distributed import World, joined_world, local_rank
from odeopt.meta.files import START, Config, available_configs, load_config
from odeopt.meta.trainer import meta_train


class Terminated(BaseException):
    """The process was asked to stop; like KeyboardInterrupt, nothing that handles errors should take it for one."""


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "train",
        help="meta-train a rule from a configuration",
        description="Meta-train a rule from a configuration. Under torchrun each rank works on tasks of its own: "
        "two ranks equal one process with twice the tasks. An interrupted run continues, on any number of "
        "ranks, with the same command.",
    )
    parser.add_argument("--config", required=True, help=f"a TOML file, or one of {', '.join(available_configs())}")
    parser.add_argument("--seed", type=arguments.natural, help="meta-seed, in place of the configuration's; NAME below "
                       "is then followed by -seedSEED")  # fmt: skip
    parser.add_argument("--out", type=Path, help="where the rule goes (default: runs/NAME.safetensors)")
    parser.add_argument("--folder", type=Path, help="checkpoint and TensorBoard scalars; an interrupted run "
                       "is continued from here (default: runs/NAME)")  # fmt: skip
    arguments.add(parser, "data_dir", device={"type": _device, "default": "cpu", "help": "where to train (default: "
                  "%(default)s); under torchrun, cuda is one GPU for each rank"})  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compile the rule's steps: a minute, then about twice "
                       "as fast (port-Hamiltonian rules)")  # fmt: skip
    parser.add_argument("--timeout", type=arguments.positive, default=1800, metavar="SECONDS", help="how long a rank "
                       "waits for the others before it counts them as lost (default: %(default)s)")  # fmt: skip
    arguments.add(parser, "stop_after overwrite")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, on all ranks; return the exit status."""
    config = load_config(args.config)
    name = config.name
    if args.seed is not None:
        config, name = config.with_seed(args.seed), f"{name}-seed{args.seed}"
    folder = args.folder or Path("runs") / name
    out = args.out or Path("runs") / f"{name}.safetensors"
    try:
        with _stoppable(folder), joined_world(args.device, timeout=args.timeout) as world:
            return _run_with(world, config, folder, out, args)
    finally:  # the error of an interrupt may be another one
        is_kept = any((each / "checkpoint.pt").exists() for each in _folders(config, folder))
        args.on_interrupt = arguments.FROM_VALIDATION if is_kept else arguments.BEGINS_ANEW


def _folders(config: Config, folder: Path) -> tuple[Path, ...]:
    """Folders of the stages."""
    # apart from the folder of a training without a start, whose checkpoint may not be taken for this one's
    return (folder,) if config.start is None else (folder / START, folder / "main")


def _run_with(world: World, config: Config, folder: Path, out: Path, args: argparse.Namespace) -> int:
    world.broadcast_result(lambda: prepare(out, args.overwrite))
    rule = config.build_rule().to(args.device)
    world.broadcast_result(lambda: check_can_be_saved(config, rule, out))
    task = world.local_first(lambda: config.build_task(data_dir=args.data_dir, device=args.device))
    began, results = time.monotonic(), []
    for stage, where in zip(config.stages, _folders(config, folder), strict=True):
        what = f"{config.name}, start" if stage is config.start else config.name
        left = None if args.stop_after is None else max(0.0, args.stop_after - (time.monotonic() - began))
        result = meta_train(rule, task, stage, folder=where, stop_after=left, compile=args.compile)
        results.append(result)
        n_done, n_wanted = len(result.meta_losses), stage.n_meta_steps
        if world.is_first:
            print(
                f"{what}, meta-seed {stage.seed}: {n_done} of {n_wanted} meta-steps in {result.seconds:.0f} s; best "
                f"validation loss {result.best_score:.4f} at meta-step {result.best_step}; skipped "
                f"{result.n_skipped_outliers} outliers and {result.n_skipped_nonfinite} non-finite meta-gradients"
            )
        has_rule = math.isfinite(result.best_score)
        if n_done < n_wanted:
            if world.is_first:
                best = folder / "best.safetensors"
                if has_rule:
                    artifacts.save(config.in_use(rule), best, trained_for=config.trained_for(*results), overwrite=True)
                kept = f"with the best rule so far in {best}" if has_rule else "before any validation came out finite"
                print(f"stopped early {kept}; the same command continues from {folder}")
            return 0
        if not has_rule:
            raise ValueError(f"{what} ended without a rule: no validation came out finite. Nothing was saved to {out}.")
    if world.is_first:
        artifacts.save(config.in_use(rule), out, trained_for=config.trained_for(*results), overwrite=args.overwrite)
        print(f"saved {out}")
    return 0


@contextmanager
def _stoppable(folder: Path) -> Iterator[None]:
    """Make SIGTERM, which torchrun sends to the ranks that are left when one fails, an exception with a message."""
    told = "told to stop (SIGTERM)"
    if "RANK" in os.environ:
        told = f"Rank {os.environ['RANK']} was {told}, as torchrun does when another rank has stopped"

    def stop(number: int, frame: object) -> None:
        raise Terminated(f"{told}; the same command continues from {folder}.")

    with ExitStack() as stack:
        arguments.install(signal.SIGTERM, stop, stack)
        yield


def _device(text: str) -> torch.device:
    """Read a device that is there; under torchrun, that of this rank."""
    rank = local_rank()
    is_cuda = text.startswith("cuda") or (text == "auto" and torch.cuda.is_available())
    return arguments.device(f"cuda:{rank}" if is_cuda and rank is not None else text)
