"""``python -m odeopt tune``: tune the hand-designed optimizers and write their table."""

from __future__ import annotations

import argparse
from pathlib import Path

from odeopt.cli import arguments
from odeopt.cli.files import prepare
from odeopt.evaluation.baselines import make_baselines_table


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser("tune", help="tune the hand-designed optimizers and write their table")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    arguments.add(parser, "data_dir overwrite")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune; return the exit status."""
    prepare(args.out, args.overwrite)
    make_baselines_table(args.out, data_dir=args.data_dir, progress_bar=True)
    return 0
