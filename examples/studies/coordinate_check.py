"""Coordinate check: how much a layer's output changes in the first steps, over the width of the network.

A rule transfers to wider networks at one learning rate if its steps change the output of each layer alike at any width
(Yang et al. 2022, Tensor programs V, Fig. 5). The network is a perceptron with two hidden layers in torch's default
start. Its head passes on what the hidden layer changes along the head's rows: under steps of a given operator norm that
grows with the square root of the width.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import odeopt
from odeopt.cli import arguments
from odeopt.files import write_json
from odeopt.progress import tqdm
from odeopt.report import PALETTE, draw_table, new_figure, save_figure, style
from odeopt.suite import untrained

LAYERS = ("first layer", "hidden layer", "head")
_N_INPUTS, _N_OUTPUTS, _BATCH = 64, 10, 64


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and draw the figure."""
    args = parse(argv)
    rule = odeopt.load_pretrained("port-hamiltonian-spectral")
    optimizers = {
        "learned rule": lambda model: odeopt.LearnedOptimizer(odeopt.param_groups(model), rule),
        "untrained rule": lambda model: odeopt.LearnedOptimizer(odeopt.param_groups(model), untrained(rule)),
        "Adam(1e-3)": lambda model: torch.optim.Adam(model.parameters()),
    }
    cells = tqdm(list(itertools.product(optimizers, args.widths)), unit=" cells")
    found = {(name, width): mean_changes(optimizers[name], width, args) for name, width in cells}
    changes = {name: torch.stack([found[name, width] for width in args.widths]) for name in optimizers}
    content = {"widths": args.widths, "steps": args.steps, "layers": LAYERS}
    content["changes"] = {name: values.tolist() for name, values in changes.items()}
    print(table(content, markdown=args.markdown))
    write_json(args.out / "coordinate_check.json", content)
    print(f"Figure: {plot(args.widths, args.steps, changes, args.out / 'coordinate_check.png')}")


def table(content: Mapping[str, Any], *, markdown: bool) -> str:
    """Draw the changes of each layer's output over the width, and how much they grow from the first to the last."""
    rows = [
        [name, layer, str(n_steps), *(f"{x:.3g}" for x in at_width), f"{at_width[-1] / at_width[0]:.2f}"]
        for name, values in content["changes"].items()
        for i, layer in enumerate(content["layers"])
        for k, n_steps in enumerate(content["steps"])
        for at_width in [[by_step[k][i] for by_step in values]]
    ]
    headers = [("optimizer", ""), ("layer", ""), ("steps", ""), *((str(width), "width") for width in content["widths"])]
    return draw_table([*headers, ("growth", "")], rows, markdown=markdown)


def mean_changes(make_optimizer, width: int, args: argparse.Namespace) -> Tensor:
    """Geometric mean over seeds of :func:`changes`."""
    runs = [changes(make_optimizer, width, args.steps, seed, args.device) for seed in range(args.runs)]
    return torch.stack(runs).log().mean(0).exp()


def changes(make_optimizer, width: int, at_steps: list[int], seed: int, device: torch.device) -> Tensor:
    """Train a perceptron on a linear teacher's labels of Gaussian inputs; return the rms change of each layer's output.

    Args:
        make_optimizer: Builds the optimizer from the model.
        width: Of both hidden layers.
        at_steps: Numbers of steps, rising, after which to measure.
        seed: Of network and data.
        device: Where to train.

    Returns:
        Changes on a batch against the start, on the CPU, float32, shape ``(len(at_steps), n_layers)``.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = (_N_INPUTS, width, width, _N_OUTPUTS)
    model = nn.Sequential()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
            model.extend([nn.ReLU()] * (k > 0) + [nn.Linear(n_in, n_out)])
    model.to(device)
    probe = torch.randn(_BATCH, _N_INPUTS, generator=generator).to(device)
    teacher = torch.randn(_N_INPUTS, _N_OUTPUTS, generator=generator).to(device) / math.sqrt(_N_INPUTS)
    begun, optimizer, found = outputs(copy.deepcopy(model), probe), make_optimizer(model), []
    for step in range(1, at_steps[-1] + 1):
        x = torch.randn(_BATCH, _N_INPUTS, generator=generator).to(device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1)).backward()
        optimizer.step()
        if step in at_steps:
            now = outputs(model, probe)
            found.append(torch.stack([(a - b).square().mean().sqrt() for a, b in zip(now, begun, strict=True)]))
    return torch.stack(found).cpu()


@torch.no_grad()
def outputs(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Outputs of the linear layers."""
    found = []
    for module in model:
        x = module(x)
        if isinstance(module, nn.Linear):
            found.append(x)
    return found


def plot(widths: list[int], steps: list[int], changes: dict[str, Tensor], path: Path) -> Path:
    """Draw a panel per number of steps: changes over widths, a colour per layer, a dash pattern per optimizer."""
    with style():
        figure, panels = new_figure(3.4 * len(steps), 3.4, n_columns=len(steps))
        for k, (axes, n_steps) in enumerate(zip(panels, steps, strict=True)):
            for dash, (name, values) in zip(("solid", "dashed", "dotted"), changes.items(), strict=True):
                for i, layer in enumerate(LAYERS):
                    axes.plot(widths, values[:, k, i], color=PALETTE[i], linestyle=dash, label=f"{name}, {layer}")
            axes.set(xscale="log", yscale="log", xlabel="width", title=f"after {n_steps} step{'s' * (n_steps > 1)}")
            axes.set_xticks(widths, map(str, widths))
            axes.minorticks_off()
        panels[0].set_ylabel("rms change of the output")
        panels[-1].legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return save_figure(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.parser(
        __doc__,
        "markdown",
        runs={"default": 2, "help": "seeds"},
        device={"default": "cpu"},
        out={"default": "runs/coordinate-check"},
    )
    add = parser.add_argument
    add("--widths", nargs="+", type=arguments.positive, default=[2**k for k in range(5, 12)], help="of hidden layers")
    add("--steps", nargs="+", type=arguments.positive, default=[1, 10, 100], help="when to measure, rising")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
