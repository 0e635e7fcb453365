"""What does each law buy that the default rule has in use, and had not in training?

The rule without one of them at a time, with query, key and value (or gates) as one matrix, and the whole one before its
meta-training, on eleven problems like those of the suite, but smaller, on which the laws were chosen: losses over those
of the whole rule, below which nothing is gained by leaving the law out. Runs are kept as they are done.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import nn
from unseen import RULE, chosen, parse

import odeopt
from odeopt.report import draw_table
from odeopt.rules import UpdateRule
from odeopt.suite import Contender, Suite, evaluate_suite, learned, networks, opponents, untrained
from odeopt.suite.opponents import REFERENCE
from odeopt.suite.problems import Characters, Images, Picture, Pixels, Problem, evidence_bound, next_character

WHOLE, UNTRAINED = "whole", "untrained"
LAWS = {
    WHOLE: {},
    "without alignment": {"alignment_rate": 0.0, "alignment_horizon": 0.0},
    "without trust": {"trust_ratio": 0.0},
    "matrices of few rows as others": {"narrow": 0},
    "rows alike": {"row_power": 0.0},
    "decay that grows early, as in training": {"decay_growth": 16.0, "decay_onset": 1.0},
    "decay that does not grow": {"decay_growth": 1.0, "decay_onset": 1.0},
}
AS_ONE = "blocks as one matrix"
NAMES = ("transformer", "deep-transformer", "perceptron", "deep-perceptron", "convnet", "vit", "vae", "coordinates",
         "recurrent", "few-examples", "sigmoid")  # fmt: skip


def perceptron(images: Images, *widths: int, activation: type[nn.Module] = nn.ReLU) -> partial:
    """Make a maker of perceptrons."""
    return partial(networks.Perceptron, images.side**2, widths, 10, activation)


def transformer(text: Characters, width: int, n_layers: int) -> partial:
    """Make a maker of transformers."""
    return partial(networks.CharacterTransformer, text.n_characters, text.context, width=width, n_layers=n_layers)


def problems(dataset: str, data_dir: str | None) -> dict[str, Problem]:
    """Make all problems."""
    images, few = Images(dataset, data_dir), Images(dataset, data_dir, n_examples=500)
    pixels, text, short = Pixels(8, dataset, data_dir), Characters(), Characters(32, 8)
    vae = partial(networks.VariationalAutoencoder, pixels.side**2, width=64, n_latents=8)
    vit = partial(networks.VisionTransformer, images.side, width=32, n_layers=2)
    recurrent = partial(networks.CharacterGRU, short.n_characters, n_embedded=32, width=64)
    every = [
        (250, transformer(text, 64, 2), text, next_character),
        (300, transformer(short, 48, 3), short, next_character),
        (600, perceptron(images, 64, 64), images),
        (400, perceptron(images, 128, 128, 128, 128), images),
        (300, partial(networks.ResidualNet, (4, 8)), images),
        (300, vit, images),
        (500, vae, pixels, evidence_bound),
        (1000, partial(networks.CoordinateNetwork, 2, (64, 64)), Picture(24), F.mse_loss),
        (250, recurrent, short, next_character),
        (600, perceptron(few, 50), few),
        (300, perceptron(images, 20, activation=nn.Sigmoid), images),
    ]
    return {name: Problem(name, name, *parts) for name, parts in zip(NAMES, every, strict=True)}


def table(found: Suite, variants: Iterable[str] = (*LAWS, AS_ONE), *, markdown: bool = False) -> str:
    """Training / held-out loss of each variant over that of the whole rule, geometric means of paired runs."""
    names, rows = [name for name in (*variants, UNTRAINED) if name != WHOLE], []
    for problem, of in found.outcomes.items():
        rows.append([problem])
        for name in names:
            losses = [(getattr(of[name], kind) / getattr(of[WHOLE], kind)).log() for kind in ("train", "held_out")]
            rows[-1].append(" / ".join(f"{x.mean().exp().item():.2f}" for x in losses))
    return draw_table([(title, "") for title in ("problem", *names)], rows, markdown=markdown)


def varied(variants: Mapping[str, dict]) -> dict[str, UpdateRule]:
    """Make the default rule with the options of each variant."""
    rule = odeopt.load_pretrained(RULE)
    return {name: rule.with_options(**options) for name, options in variants.items()}


def as_one(rule: UpdateRule) -> Contender:
    """Make a contender of a rule that steps matrices of several blocks by the singular values of the whole."""

    def make(model: nn.Module, n_steps: int, lr: float) -> odeopt.LearnedOptimizer:
        groups = [{**group, "n_blocks": 1} for group in odeopt.param_groups(model)]
        return odeopt.LearnedOptimizer(groups, rule, lr=lr, total_steps=n_steps)

    by_block = learned(rule, AS_ONE)
    return dataclasses.replace(by_block, make=make, settings=by_block.settings | {"groups": AS_ONE})


def compare(args: argparse.Namespace, name: str, title: str, rules: Mapping[str, UpdateRule | Contender]) -> None:
    """Run the rules, and the whole one before its meta-training; print the table and draw the figure."""
    contenders = {REFERENCE: opponents()[0][REFERENCE]}
    contenders |= {key: each if isinstance(each, Contender) else learned(each, key) for key, each in rules.items()}
    contenders[UNTRAINED] = learned(untrained(rules[WHOLE]), UNTRAINED)
    contenders[WHOLE] = dataclasses.replace(contenders[WHOLE], title=RULE)  # drawn as in the other figures
    path = args.out / f"{name}.json"
    every = chosen(problems(args.dataset, args.data_dir), args)
    found = evaluate_suite(every, contenders, path=path, n_runs=args.runs, device=args.device)
    print(table(found, rules, markdown=args.markdown))
    print(f"\nsaved {path} and {found.plot(path.with_suffix('.png'), title=title)}")


def main(argv: list[str] | None = None) -> None:
    """Compare the rule with itself without each law."""
    args, rules = parse(argv, "laws", __doc__, NAMES), varied(LAWS)
    rules[AS_ONE] = as_one(rules[WHOLE])
    compare(args, "laws", "Laws of the default rule", rules)


if __name__ == "__main__":
    main()
