"""Optimize random least-squares problems with learned and with hand-designed optimizers, and compare them.

Every rule takes a hundred steps on the same problems f(theta) = |W theta - y|^2 in ten dimensions, W and y
standard normal, from theta = 0.
"""

from __future__ import annotations

import argparse
import time

import odeopt
from odeopt.cli import arguments
from odeopt.evaluation import EVALUATION_SEED, compare
from odeopt.evaluation.baselines import baselines_for
from odeopt.files import write_json
from odeopt.tasks import RandomQuadratic

KINDS = ("port-hamiltonian", "port-hamiltonian-coordinatewise", "lstm", "hamiltonian")
RULES = ("port-hamiltonian", *(f"{kind}-quadratic" for kind in KINDS))


def main(argv: list[str] | None = None) -> None:
    """Run the comparison."""
    args = parse(argv)
    began = time.perf_counter()
    task = RandomQuadratic(device=args.device)
    learned = {name: odeopt.load_pretrained(name) for name in RULES}
    hand_designed, origin = baselines_for(task, task, n_steps=args.steps, n_tasks=500, score="final")
    comparison = compare(
        learned | hand_designed,
        task,
        n_steps=args.steps,
        n_runs=args.runs,
        seed=EVALUATION_SEED + args.seed,
        score="final",
    )
    title = f"Random quadratics, {task.dim} dimensions, {args.runs:,} problems"
    write_json(args.out / "quadratic.json", comparison.as_json())
    path = comparison.plot(args.out / "quadratic.png", title=title)
    print(f"\n{title}\n\n{comparison.table()}\nHand-designed rules: {origin}.\nFigure: {path}")
    print(f"\nDone in {time.perf_counter() - began:.0f} s on {args.device}.")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and check them before any work is done."""
    parser = arguments.parser(
        __doc__,
        "device out",
        runs={"default": 2000, "help": "number of problems"},
        seed={"help": "changes the problems"},
    )
    add = parser.add_argument
    add("--steps", type=arguments.positive, default=100, help="optimizer steps per problem; for other numbers than the "
        "default the hand-designed rules are tuned first")  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
