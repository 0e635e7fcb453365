"""Command line: ``python -m odeopt train`` and ``python -m odeopt tune``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from odeopt import arguments, artifacts
from odeopt.baselines import make_baselines_table
from odeopt.meta.config import available_configs, load_config
from odeopt.meta.trainer import meta_train
from odeopt.tasks import DatasetCorrupt, DatasetUnavailable


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m odeopt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="meta-train a rule from a configuration")
    train.add_argument("--config", required=True, help=f"a TOML file, or one of {', '.join(available_configs())}")
    train.add_argument("--out", type=Path, help="where the rule goes (default: runs/NAME.safetensors)")
    train.add_argument("--folder", type=Path, help="checkpoint and TensorBoard scalars; an interrupted run "
                       "is continued from here (default: runs/NAME)")  # fmt: skip
    train.add_argument(
        "--data-dir", type=Path, help="where image datasets lie (default: ODEOPT_DATA or a cache folder)"
    )
    train.add_argument("--device", type=arguments.device, default="cpu", help="where to train (default: %(default)s)")
    train.add_argument("--stop-after", type=float, metavar="SECONDS", help="stop at the next validation after "
                       "so long; the same command continues")  # fmt: skip
    train.add_argument("--overwrite", action="store_true", help="replace the file that --out names")

    tune = commands.add_parser("tune", help="tune the hand-designed optimizers and write their table")
    tune.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    tune.add_argument("--data-dir", type=Path, help="as for train")

    args = parser.parse_args(argv)
    try:
        return {"train": _train, "tune": _tune}[args.command](args)
    except (ValueError, OSError, DatasetCorrupt, DatasetUnavailable) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2


def _train(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    out = args.out or Path("runs") / f"{config.name}.safetensors"
    if out.exists() and not args.overwrite:
        raise FileExistsError(f"Parameter `--out` should be a new file, or --overwrite be given. Found `{out}`.")
    out.parent.mkdir(parents=True, exist_ok=True)
    rule = config.build_rule().to(args.device)
    task = config.build_task(data_dir=args.data_dir, device=args.device)
    folder = args.folder or Path("runs") / config.name
    result = meta_train(rule, task, config.training, folder=folder, stop_after=args.stop_after)
    n_done, n_wanted = len(result.meta_losses), config.training.n_meta_steps
    print(
        f"{config.name}: {n_done} of {n_wanted} meta-steps in {result.seconds:.0f} s; best validation loss "
        f"{result.best_score:.4f} at meta-step {result.best_step}; skipped {result.n_skipped_outliers} outliers "
        f"and {result.n_skipped_nonfinite} non-finite meta-gradients"
    )
    if n_done < n_wanted:
        print(f"stopped early; the same command continues from {folder}")
        return 0
    artifacts.save(rule, out, trained_for=config.trained_for(result), overwrite=args.overwrite)
    print(f"saved {out}")
    return 0


def _tune(args: argparse.Namespace) -> int:
    make_baselines_table(args.out, data_dir=args.data_dir, progress_bar=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
