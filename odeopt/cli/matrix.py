"""``python -m odeopt matrix``: a rule beside tuned Adam over networks, data, horizons and scales."""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

from odeopt import artifacts
from odeopt.cli import arguments
from odeopt.cli.files import named_rule
from odeopt.evaluation.matrix import evaluate_matrix, grid
from odeopt.suite import untrained
from odeopt.tasks import DatasetUnavailable, load_dataset


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "matrix",
        help="run a rule beside tuned Adam over networks, data, horizons and scales",
        description="Run a rule beside Adam, constant and with cosine decay, tuned for each cell. Cells are kept as "
        "they are done: an interrupted run continues with the same command, and two processes may share one, each "
        "with its own --cells.",
    )
    parser.add_argument("--rule", default="port-hamiltonian", help="a .safetensors file, or one of "
                        f"{', '.join(artifacts.available_pretrained())} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--untrained", action="store_true", help="the rule with its initial weights")
    parser.add_argument("--runs", type=arguments.positive, default=5, help="runs per cell (default: %(default)s)")
    parser.add_argument("--tuning-runs", type=arguments.positive, default=4, help="runs per learning rate that is "
                        "tried (default: %(default)s)")  # fmt: skip
    parser.add_argument("--cells", default="", metavar="PATTERN", help="only cells in whose name this regular "
                        "expression is found")  # fmt: skip
    parser.add_argument("--max-horizon", type=arguments.positive, metavar="STEPS", help="only cells of at most so many "
                        "steps")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="everything on the digits, for at most 50 steps")
    parser.add_argument("--references-from", type=Path, metavar="FILE", help="matrix.json of another rule with the "
                        "same settings, from which Adam's results are taken")  # fmt: skip
    parser.add_argument("--data-dir", type=Path, help="as for train; data sets other than MNIST are left out where "
                        "they are not found")  # fmt: skip
    out = {"default": "runs/matrix", "help": "folder of matrix.json and matrix.png (default: %(default)s)"}
    arguments.add(parser, "markdown", device={"default": "cpu"}, out=out)
    parser.set_defaults(run=run, on_interrupt=arguments.RESUMES)


def run(args: argparse.Namespace) -> int:
    """Fill the matrix, print and draw it; return the exit status."""
    name, rule = named_rule(args.rule)
    if args.untrained:
        name, rule = f"{name}, untrained", untrained(rule)
    select = partial(grid, max_horizon=args.max_horizon or math.inf, pattern=args.cells, quick=args.quick)
    found = []
    for dataset in sorted({cell.dataset for cells in select().values() for cell in cells.values()}):
        try:
            load_dataset(dataset, args.data_dir, download=dataset == "mnist")
            found.append(dataset)
        except DatasetUnavailable as error:
            if dataset == "mnist":
                raise
            print(f"Left out: {error}", file=sys.stderr, flush=True)
    matrix = evaluate_matrix(
        rule,
        select(datasets=found),
        name=name,
        path=args.out / "matrix.json",
        references_from=args.references_from,
        n_runs=args.runs,
        n_tuning_runs=args.tuning_runs,
        data_dir=args.data_dir,
        device=args.device,
    )
    print(matrix.table(markdown=args.markdown))
    print(f"\nsaved {args.out / 'matrix.json'} and {matrix.plot(args.out / 'matrix.png')}")
    return 0
