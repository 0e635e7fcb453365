"""``python -m odeopt solvers``: compare ODE solvers."""

from __future__ import annotations

import argparse

import torch

from odeopt.cli import arguments
from odeopt.solvers import available_problems, comparable_methods, compare_solvers


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    problems, methods = available_problems(), comparable_methods()
    parser = commands.add_parser(
        "solvers",
        help="compare ODE solvers: error, evaluations, seconds, energy, gradients and orders",
        description="Run solvers over tolerances or sizes of steps on common problems, against accurate references.",
    )
    parser.add_argument("--problems", nargs="+", metavar="NAME", help=f"problems, {', '.join(problems)}, or classes "
                        f"of them, {', '.join(dict.fromkeys(problems.values()))} (default: all)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"methods, {', '.join(methods)}, or kinds, "
                        "fixed, adaptive, structure (default: all)")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=("float64", "float32"), default=["float64"], help="precisions "
                        "(default: float64)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one problem each of most classes, unless "
                        "--problems are given, and fewer settings")  # fmt: skip
    out = {"default": "runs/solvers", "help": "folder of solvers.json and of the figures (default: %(default)s)"}
    arguments.add(parser, "markdown", device={"default": "cpu"}, out=out)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare solvers, print and draw; return the exit status."""
    problems, settings = args.problems, {}
    if args.quick:
        problems = problems or ["A3", "B4", "D1", "pendulum", "quadratic"]
        settings = {"tolerances": (1e-3, 1e-6), "n_steps": (2, 8, 32), "max_evals": 800, "n_repeats": 1}
        settings["max_gradient_evals"] = 100
    dtypes = [getattr(torch, name) for name in dict.fromkeys(args.dtypes)]
    comparison = compare_solvers(problems, args.methods, dtypes=dtypes, device=args.device, **settings)
    comparison.save(args.out / "solvers.json")
    print(comparison.table(markdown=args.markdown))
    saved = [args.out / "solvers.json", *comparison.figures(args.out)]
    print(f"\nsaved {', '.join(map(str, saved))}")
    return 0
