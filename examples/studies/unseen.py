"""How does the default rule do on kinds of problems that it was not trained on?

Sine networks, a partial differential equation, badly conditioned regression, factors of a matrix, adapters of a
trained network, a graph, contrasts, denoising, sums of numbers, experts and quantiles: none has a relative among the
tasks of the meta-training. Opponents are tuned as in ``python -m odeopt suite``. Runs are kept as they are done. (The
laws of alignment and trust were chosen with a look at problems like these; the weights were not.)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from unseen_problems import problems

import odeopt
from odeopt.cli import arguments
from odeopt.suite import evaluate_suite, learned, opponents, untrained
from odeopt.suite.problems import Problem

RULE = "port-hamiltonian-spectral"
OPPONENTS = ("adamw", "muon", "prodigy")
NAMES = tuple(problems(torch.empty(0, 1), torch.empty(0), ""))  # whatever the images


def main(argv: list[str] | None = None) -> None:
    """Run the rule and its opponents, print tables and draw the figure."""
    study("unseen", "Kinds of problems that no training had", __doc__, problems, NAMES, argv)


def study(
    name: str,
    title: str,
    description: str,
    make_problems: Callable[[Tensor, Tensor, str], dict[str, Problem]],
    names: Iterable[str],
    argv: list[str] | None,
) -> None:
    """Read the command line and run the rule and its opponents on problems of these names, some of images."""
    args = parse(argv, name, description, names)
    dataset = arguments.dataset(args)
    images = dataset.train_images.flatten(1).float() / 255
    compare(name, title, make_problems(images, dataset.train_labels, dataset.name), OPPONENTS, args)


def compare(
    name: str,
    title: str,
    problems: Mapping[str, Problem],
    opponents_: Iterable[str],
    args: argparse.Namespace,
    **options: str,
) -> None:
    """Run the rule with some options, trained and not, and opponents on those of the problems that are asked for."""
    rule = odeopt.load_pretrained(RULE).with_options(**options)
    contenders = {key: opponents()[0][key] for key in opponents_}
    for each in (learned(rule, RULE), learned(untrained(rule), f"{RULE}, untrained")):
        contenders[each.name] = each
    path = args.out / f"{name}.json"
    suite = evaluate_suite(chosen(problems, args), contenders, path=path, n_runs=args.runs, device=args.device)
    print(suite.table(markdown=args.markdown))
    print(f"\nsaved {path} and {suite.plot(path.with_suffix('.png'), title=title)}")


def chosen(problems: Mapping[str, Problem], args: argparse.Namespace) -> dict[str, Problem]:
    """Those of the problems that are asked for, of as many steps as are asked for."""
    found = {key: problems[key] for key in args.problems or problems}
    return {key: replace(problem, n_steps=args.steps or problem.n_steps) for key, problem in found.items()}


def parse(argv: list[str] | None, name: str, description: str, names: Iterable[str]) -> argparse.Namespace:
    """Read the command line of a study of problems of these names."""
    return make_parser(name, description, names).parse_args(argv)


def make_parser(name: str, description: str, names: Iterable[str]) -> argparse.ArgumentParser:
    """Make the options of a study of problems of these names."""
    parser = arguments.parser(
        description,
        "dataset data_dir markdown",
        on_interrupt=arguments.RESUMES,
        runs={"default": 2, "help": "paired runs"},
        device={"default": "cpu"},
        out={"default": f"runs/{name}"},
    )
    add = parser.add_argument
    add("--problems", nargs="+", metavar="NAME", choices=names, help=f"some of {', '.join(names)} (default: all)")
    add("--steps", type=arguments.positive, help="of every run, in place of its own number")
    return parser


if __name__ == "__main__":
    main()
