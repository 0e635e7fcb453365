"""How does the default rule do on kinds of problems that it was not trained on?

Sine networks, a partial differential equation, badly conditioned regression, factors of a matrix, adapters of a
trained network, a graph, contrasts, denoising, sums of numbers and quantiles: none has a relative among the tasks of
the meta-training. Opponents are tuned as in ``python -m odeopt suite``. Runs are kept as they are done. (The laws of
alignment and trust were chosen with a look at problems like these; the weights were not.)
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from unseen_problems import problems

import odeopt
from odeopt.cli import arguments
from odeopt.suite import evaluate_suite, learned, opponents, untrained

RULE = "port-hamiltonian-spectral"
OPPONENTS = ("adamw", "muon", "prodigy")
NAMES = tuple(problems(torch.empty(0, 1), torch.empty(0), ""))  # whatever the images


def main(argv: list[str] | None = None) -> None:
    """Run the rule and its opponents, print tables and draw the figure."""
    args = parse(argv)
    dataset = arguments.dataset(args)
    images = dataset.train_images.flatten(1).float() / 255
    chosen = problems(images, dataset.train_labels, dataset.name)
    if args.problems:
        chosen = {key: chosen[key] for key in args.problems}
    if args.steps is not None:
        chosen = {key: replace(problem, n_steps=args.steps) for key, problem in chosen.items()}
    rule = odeopt.load_pretrained(RULE)
    contenders = {name: opponents()[0][name] for name in OPPONENTS}
    for each in (learned(rule, RULE), learned(untrained(rule), f"{RULE}, untrained")):
        contenders[each.name] = each
    suite = evaluate_suite(chosen, contenders, path=args.out / "unseen.json", n_runs=args.runs, device=args.device)
    print(suite.table(markdown=args.markdown))
    figure = suite.plot(args.out / "unseen.png", title="Kinds of problems that no training had")
    print(f"\nsaved {args.out / 'unseen.json'} and {figure}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.parser(
        __doc__,
        "dataset data_dir markdown",
        on_interrupt=arguments.RESUMES,
        runs={"default": 2, "help": "paired runs"},
        device={"default": "cpu"},
        out={"default": "runs/unseen"},
    )
    add = parser.add_argument
    add("--problems", nargs="+", metavar="NAME", choices=NAMES, help=f"some of {', '.join(NAMES)} (default: all)")
    add("--steps", type=arguments.positive, help="of every run, in place of its own number")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
