"""What do kinetic energy, schedule and held-out losses buy once a rule is meta-trained?

Variants that differ in one of them are trained alike, by ``trained_energies.toml`` beside this file, from each of a few
meta-seeds; and compared, with themselves before the training and with tuned AdamW, on problems of ``laws.py``, at a
learning rate of one and told the length of the run. Trained rules and runs are kept as they are done.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from itertools import product
from math import inf
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from kinetic import SPECTRAL
from kinetic import VARIANTS as ENERGIES
from laws import NAMES, problems
from unseen import chosen, make_parser
from variants import train_variants

from odeopt.cli import arguments
from odeopt.meta.files import Config, load_config
from odeopt.report import PALETTE, draw_table, new_figure, panel_grid, save_figure, style, use_plain_numbers
from odeopt.rules import UpdateRule
from odeopt.suite import Suite, evaluate_suite, learned, opponents, untrained
from odeopt.suite.opponents import REFERENCE

FIT = "spectral, trained to fit alone"
COMPARED = ("spectral", "quadratic", "relativistic", "quadratic and spectral", "spectral, of the sum")
VARIANTS: dict[str, Mapping[str, Any]] = {
    **{name: {"schedule": "power", **ENERGIES[name]} for name in COMPARED},
    "spectral, no schedule": SPECTRAL | {"initial_matrix_kappa": 0.04, "schedule": "none"},
    "spectral, learned polynomial": {"schedule": "power", **ENERGIES["spectral"], "matrix_polynomial": "learned"},
    FIT: {"schedule": "power", **ENERGIES["spectral"]},
}
SAME_START = (FIT, "spectral, learned polynomial")  # before the training they are what the spectral one is
KINDS, UNTRAINED = ("train", "held_out"), ", untrained"
MEASURED = ("transformer", "perceptron", "convnet", "vit", "few-examples")


def main(argv: list[str] | None = None) -> None:
    """Train, compare, print the table and draw the figure."""
    parser = make_parser("trained_energies", __doc__, NAMES)
    add = parser.add_argument
    add("--seeds", type=arguments.positive, default=2, help="meta-trainings of each variant")
    add("--rows", type=arguments.expression, default=".*", help="only variants in whose name this expression is found")
    add("--meta-steps", type=arguments.positive, help="of each training (None: those of the configuration)")
    add("--folder", type=Path, default=Path("runs/trained_energies"), help="where trained rules are kept")
    parser.set_defaults(problems=MEASURED)
    args = parser.parse_args(argv)
    contenders = {REFERENCE: opponents()[0][REFERENCE]}
    for name, rules in trained(args).items():
        if name not in SAME_START:
            contenders[f"{name}{UNTRAINED}"] = learned(untrained(rules[0]), f"{name}{UNTRAINED}")
        for seed, rule in enumerate(rules):
            title = f"{name}, meta-seed {seed}"
            contenders[title] = learned(rule, title)
    path = args.out / "trained_energies.json"
    every = chosen(problems(args.dataset, args.data_dir), args)
    found = evaluate_suite(every, contenders, path=path, n_runs=args.runs, device=args.device)
    print(table(found, markdown=args.markdown))
    print(f"\nsaved {path} and {plot(found, path.with_suffix('.png'))}")


def trained(args: argparse.Namespace) -> dict[str, list[UpdateRule]]:
    """Train what is not trained yet: the rules of each variant, one for each meta-seed."""
    config = load_config(Path(__file__).with_suffix(".toml"))
    if args.dataset != "mnist":
        config = config.with_dataset(args.dataset)
    variants = {name: options for name, options in VARIANTS.items() if args.rows.search(name)}
    rules: dict[str, list[UpdateRule]] = {}
    for name, options in variants.items():
        own = configuration(config, args.meta_steps, is_to_fit=name == FIT)
        where = {"n_seeds": args.seeds, "data_dir": args.data_dir, "device": args.device}
        rules |= train_variants(own, {name: options}, args.folder, **where)
    return rules


def configuration(config: Config, n_meta_steps: int | None, *, is_to_fit: bool) -> Config:
    """The training of a variant: to fit is to have no held-out losses among the meta-losses."""
    training = config.training
    objective = dataclasses.replace(training.objective, held_out=0.0) if is_to_fit else training.objective
    n_meta_steps = n_meta_steps or training.n_meta_steps
    return dataclasses.replace(
        config, training=dataclasses.replace(training, objective=objective, n_meta_steps=n_meta_steps)
    )


def by_variant(found: Suite) -> dict[str, list[str]]:
    """Names of the rules of each variant, one for each meta-seed; the untrained ones are variants of their own."""
    groups: dict[str, list[str]] = {}
    for name in found.contenders:
        if name != REFERENCE:
            groups.setdefault(re.sub(r", meta-seed \d+$", "", name), []).append(name)
    return groups


def table(found: Suite, *, markdown: bool = False) -> str:
    """Training / held-out loss over tuned AdamW's: geometric means of paired runs and meta-seeds."""
    lines = []
    for name, members in by_variant(found).items():
        lines.append([name])
        for problem in found.outcomes:
            ratios = ([found.ratio(problem, each, kind).mean for each in members] for kind in KINDS)
            means = (geometric_mean(of) if 0 < min(of) <= max(of) < inf else inf for of in ratios)
            lines[-1].append(
                " / ".join("diverged" if mean == inf else "<0.01" if mean < 0.005 else f"{mean:.2f}" for mean in means)
            )
    return draw_table([(title, "") for title in ("variant", *found.outcomes)], lines, markdown=markdown)


def plot(found: Suite, path: Path) -> Path:
    """Draw the ratios to AdamW: a panel for each problem and kind of loss, a row for each variant."""
    groups = by_variant(found)
    trained = [name for name in groups if not name.endswith(UNTRAINED)]
    with style():
        figure, _ = new_figure(12.6, 0.55 * len(trained) + 2.0, n_columns=0)
        panels = panel_grid(figure, len(KINDS) * len(found.outcomes), len(found.outcomes), sharey=True)
        for axes, (kind, problem) in zip(panels, product(KINDS, found.outcomes), strict=True):
            axes.axvline(1.0, color="black", linestyle="--", linewidth=0.8)
            for row, name in enumerate(trained):
                ratios = [found.ratio(problem, each, kind).mean for each in groups[name]]
                axes.plot(ratios, [row] * len(ratios), "o", color=PALETTE[0], label="trained, each meta-seed")
                for each in groups.get(f"{name}{UNTRAINED}", ()):
                    before = found.ratio(problem, each, kind).mean
                    axes.plot(before, row, "D", color=PALETTE[1], fillstyle="none", label="untrained")
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            if high < 30 * low:  # over more decades they would overlap
                use_plain_numbers(axes.xaxis, (1, 2, 4, 7) if high > 2.5 * low else range(1, 10))
            axes.set_yticks(range(len(trained)), trained)
            axes.set_title(f"{problem}, {'training' if kind == 'train' else 'held-out'} loss")
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        by_label = dict(zip(labels, handles, strict=True))
        figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(f"Losses over tuned AdamW's, {found.n_runs} paired runs")
        return save_figure(figure, path)


if __name__ == "__main__":
    main()
