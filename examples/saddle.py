"""Measure how many steps optimizers need to leave a saddle that they are started beside.

Two landscapes: the monkey saddle, whose Hessian vanishes at the saddle, and a saddle in a hundred dimensions
with one descending direction. Runs start 0.001 beside the saddle; it is left when the loss has fallen a tenth
of the way from it to the minimum.
"""

from __future__ import annotations

import argparse
import time

import torch

import odeopt
from odeopt.cli import arguments
from odeopt.evaluation import EVALUATION_SEED, Comparison, compare
from odeopt.evaluation.baselines import FAMILIES, PLAIN_SGD, build, tune_all
from odeopt.files import write_json
from odeopt.report import draw_table, plot_escape
from odeopt.tasks import HighDimSaddle, MonkeySaddle
from odeopt.tasks.landscapes import Saddle

RULES = ("port-hamiltonian", "port-hamiltonian-mnist", "port-hamiltonian-quadratic")
HAND_DESIGNED = (*(family for family in FAMILIES if family.name in ("Adam", "Momentum")), PLAIN_SGD)
HEADERS = [
    ("rule", ""),
    ("lower quartile", "[steps]"),
    ("median", "[steps]"),
    ("upper quartile", "[steps]"),
    ("never left", "[runs]"),
    ("not finite", "[runs]"),
    ("final loss", "[median]"),
]


def main(argv: list[str] | None = None) -> None:
    """Run the comparison on both landscapes."""
    args = parse(argv)
    began = time.perf_counter()
    learned = {name: odeopt.load_pretrained(name) for name in RULES}
    landscapes = {
        "monkey saddle": MonkeySaddle(device=args.device),
        f"saddle in {args.dim} dimensions": HighDimSaddle(args.dim, rotated=True, device=args.device),
    }
    losses, thresholds, content = {}, {}, {}
    for name, task in landscapes.items():
        tuned = tune_all(
            task,
            n_steps=args.steps,
            n_tasks=args.runs,
            score=lambda losses, task=task: escape_score(task, losses),
            families=HAND_DESIGNED,
        )
        comparison = compare(
            learned | build(tuned, HAND_DESIGNED),
            task,
            n_steps=args.steps,
            n_runs=args.runs,
            seed=EVALUATION_SEED + args.seed,
            score="final",
        )
        print(f"\n{name}, {args.runs} runs of {args.steps} steps\n")
        lines = rows(task, comparison)
        content[name] = {line[0].split(" (")[0]: line[2] for line in lines}
        print(draw_table(HEADERS, lines))
        # settings differ between the landscapes, which share one legend
        losses[name] = {rule.split(" (lr")[0]: result.losses for rule, result in comparison.results.items()}
        thresholds[name] = task.escape_value
    is_learned = dict.fromkeys(RULES, True) | {family.name: False for family in HAND_DESIGNED}
    title = f"Leaving saddles, {args.runs} runs; hand-designed rules tuned on separate runs"
    path = plot_escape(losses, thresholds, is_learned, args.out / "saddle.png", title=title)
    write_json(args.out / "saddle.json", content)  # the medians
    print("\nHand-designed rules: tuned on separate runs of each landscape, for the mean step at which it is")
    print(f"left and stays left.\nFigure: {path}")
    print(f"\nDone in {time.perf_counter() - began:.0f} s on {args.device}.")


def escape_score(task: Saddle, losses: torch.Tensor) -> torch.Tensor:
    """Step at which each run has left the saddle; runs that end above it again count as never leaving.

    Among runs that never leave, those that end lower are better: a fraction of the descent is added.
    """
    has_left = losses[-1] < task.escape_value
    remaining = (losses[-1] - task.minimum_value) / (task.saddle_value - task.minimum_value)
    return torch.where(has_left, task.escape_step(losses).double(), len(losses) + remaining)


def rows(task: Saddle, comparison: Comparison) -> list[list[str]]:
    """Quartiles of the escape step, runs that never escape, and where each rule ends."""
    never, lines = comparison.n_steps + 1, []
    for name, result in comparison.results.items():
        steps = task.escape_step(result.losses)
        # runs that never leave are the longest, so quartiles stay what they are
        quartiles = steps.double().quantile(torch.tensor([0.25, 0.5, 0.75]).double(), interpolation="higher")
        cells = [f"{step:.0f}" if step < never else f"> {comparison.n_steps}" for step in quartiles]
        final = result.losses[-1]
        lines.append([
            name,
            *cells,
            f"{int((steps == never).sum())}/{comparison.n_runs}",
            f"{int((~final.isfinite()).sum())}/{comparison.n_runs}",
            f"{final.nan_to_num(float('inf'), float('inf')).median():.4f}",
        ])  # fmt: skip
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and check them before any work is done."""
    parser = arguments.parser(
        __doc__,
        "device out",
        runs={"default": 200, "help": "starting points per landscape"},
        seed={"help": "changes the starting points"},
    )
    add = parser.add_argument
    add("--steps", type=arguments.positive, default=500, help="optimizer steps per run")
    add("--dim", type=arguments.positive, default=100, help="dimensions of the second landscape, 2 or more")
    args = parser.parse_args(argv)
    if args.dim < 2:
        parser.error(f"--dim should be 2 or more; found {args.dim}")
    return args


if __name__ == "__main__":
    main()
