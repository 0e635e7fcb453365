"""Does the step size of the untrained spectral rule transfer between depths?

Perceptrons on images, of one width and several depths, are trained at several learning rates: without the law of
depth, and with it (``depth_power`` of :class:`odeopt.PortHamiltonianUpdate`). Where step sizes transfer, the best
learning rate is the same for all.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import odeopt
from odeopt.cli import arguments
from odeopt.files import write_json
from odeopt.meta.files import load_config
from odeopt.progress import tqdm
from odeopt.report import draw_table, new_figure, save_figure, style, use_plain_numbers
from odeopt.tasks import MLPClassification

POWERS = {"steps alike at any depth": 0.0, "steps that fall with the depth": 1.0}
_LAST = 0.05  # of the losses, whose mean judges a run


def main(argv: list[str] | None = None) -> None:
    """Train the networks, print a table and draw the figure."""
    args = parse(argv)
    rule = load_config("port-hamiltonian-spectral").build_rule().to(args.device)
    rules = {name: rule.with_options(depth_power=power) for name, power in POWERS.items()}
    of_task = {"batch_size": 64, "activation": "relu", "device": args.device}
    dataset = arguments.dataset(args)
    tasks = {depth: MLPClassification(dataset, [args.width] * depth, **of_task) for depth in args.depths}
    found = {}
    for name, depth, rate in tqdm(list(product(rules, tasks, args.rates)), desc="runs"):
        found[name, depth, rate] = final_loss(rules[name], tasks[depth], rate, args).item()
    losses = {name: [[found[name, depth, rate] for rate in args.rates] for depth in args.depths] for name in rules}
    content = {"depths": args.depths, "rates": args.rates, "losses": losses}
    print(table(content, markdown=args.markdown))
    write_json(args.out / "depth.json", content)
    print(f"Figure: {plot(content, args.out / 'depth.png')}")


@torch.no_grad()
def final_loss(rule: odeopt.UpdateRule, task: MLPClassification, rate: float, args: argparse.Namespace) -> Tensor:
    """Geometric mean over networks of the mean of the last losses, 0-d; infinite if one diverges."""
    run = odeopt.unroll(
        rule,
        task,
        indices=torch.arange(args.runs, device=args.device),
        n_steps=args.steps,
        total_steps=args.steps,
        update_scale=rate,
    )
    last = run.losses[-max(1, round(_LAST * args.steps)) :].mean(0)
    return last.log().mean().exp().nan_to_num(torch.inf)


def table(content: Mapping[str, Any], *, markdown: bool) -> str:
    """Draw the loss of each depth over the learning rate, and the best rate."""
    rows = [
        [name, str(depth), *(f"{x:.3f}" for x in losses), f"{content['rates'][losses.index(min(losses))]:g}"]
        for name, by_depth in content["losses"].items()
        for depth, losses in zip(content["depths"], by_depth, strict=True)
    ]
    rates = [(f"{rate:g}", "loss at lr") for rate in content["rates"]]
    return draw_table([("", ""), ("hidden layers", ""), *rates, ("best lr", "")], rows, markdown=markdown)


def plot(content: Mapping[str, Any], path: Path) -> Path:
    """Draw a panel without and one with the law: losses over the learning rate, a line per depth."""
    with style():
        figure, panels = new_figure(7.6, 3.4, n_columns=len(POWERS))
        least = [min(losses) for by_depth in content["losses"].values() for losses in by_depth]
        bottom, top = 0.9 * min(least), max(least)
        colors = torch.linspace(0.15, 0.85, len(content["depths"])).tolist()
        for axes, (name, by_depth) in zip(panels, content["losses"].items(), strict=True):
            for depth, losses, shade in zip(content["depths"], by_depth, colors, strict=True):
                color, best = (0.1, 0.45 * shade + 0.2, shade), losses.index(min(losses))
                label = f"{depth} hidden layer{'s' * (depth != 1)}"
                axes.plot(content["rates"], losses, color=color, label=label)
                axes.plot(content["rates"][best], losses[best], "o", color=color)
            axes.set(xscale="log", yscale="log", xlabel="lr", title=name)
            axes.set_xticks(content["rates"], [f"{rate:g}" for rate in content["rates"]])
            axes.minorticks_off()
            axes.set_ylim(bottom, 2 * top)
            use_plain_numbers(axes.yaxis)
        panels[0].set_ylabel("training loss")
        panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return save_figure(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.parser(
        __doc__,
        "dataset data_dir markdown",
        runs={"default": 2, "help": "networks"},
        device={"default": "cpu"},
        out={"default": "runs/depth"},
    )
    add = parser.add_argument
    add("--width", type=arguments.positive, default=64, help="of all hidden layers")
    add("--depths", nargs="+", type=arguments.natural, default=[0, 1, 2, 3, 4, 8], help="numbers of hidden layers")
    add("--rates", nargs="+", type=float, default=[0.25, 0.5, 1.0, 2.0, 4.0, 8.0], help="learning rates")
    add("--steps", type=arguments.positive, default=200, help="of a run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
