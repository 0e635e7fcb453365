"""Can a learned optimizer ruin a run under a guard?

Tasks on which rules fail, and tasks on which they do not, are run by the rule alone, by the fallback alone and under
``odeopt.Guard``, from the same start on the same batches. The fallback is Adam at one learning rate for all.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import odeopt
from odeopt.cli import arguments
from odeopt.files import write_json
from odeopt.report import draw_table, new_figure, save_figure, style
from odeopt.tasks import MLPClassification, NoisyQuadratic, Task

SPECTRAL, QUADRATIC = "port-hamiltonian-spectral", "port-hamiltonian-quadratic"
SHOWN = "wrong sign for a tenth of the run, network", "random weights, network", "rotated by half a turn"
PH, LSTM = {"kind": odeopt.PortHamiltonianUpdate}, {"kind": odeopt.LSTMUpdate, "preprocess": True}


@dataclass(frozen=True)
class Case:
    """A surface, a rule by name or of random weights, and functions of the share of the run that is done."""

    surface: str
    rule: str | dict[str, Any] = SPECTRAL
    lr: float = 1.0
    is_flipped: Callable[[float], bool] = lambda done: False
    angle: Callable[[float], float] = lambda done: 0.0
    is_benign: bool = False


CASES = {
    f"{title}, {surface}": Case(surface, **options)
    for surface in ("quadratic", "network")
    for title, options in {
        "wrong sign for a tenth of the run": {"is_flipped": lambda done: 0.2 <= done < 0.3},
        "wrong sign throughout": {"is_flipped": lambda done: True},
        "learning rate times 100": {"lr": 100.0},
        "random weights": {"rule": PH},
        "random LSTM": {"rule": LSTM},
        "random weights, tiny steps": {"rule": PH, "lr": 1e-5},
        "rule of quadratics, times 100": {"rule": QUADRATIC, "lr": 100.0},
    }.items()
}
CASES["rotated by half a turn"] = Case("quadratic", angle=lambda done: math.pi * done)
CASES["rotated back and forth"] = Case("quadratic", QUADRATIC, angle=lambda done: math.sin(12 * done))
for name in (SPECTRAL, "port-hamiltonian", "port-hamiltonian-mnist", QUADRATIC):
    for surface in ("quadratic", "network")[: 1 if name == QUADRATIC else 2]:
        CASES[f"{name}, {surface}"] = Case(surface, name, is_benign=True)


def main(argv: list[str] | None = None) -> None:
    """Run all cases three ways, print a table and draw the figure."""
    args = parse(argv)
    network = MLPClassification(arguments.dataset(args), [20], batch_size=64, activation="relu")
    surfaces, content, curves = {"quadratic": NoisyQuadratic(10), "network": network}, {"cases": {}}, {}
    for name, case in tqdm(CASES.items(), unit="case"):
        runs = [run(case, surfaces[case.surface], seed, args) for seed in range(args.runs)]
        curves[name] = runs[0][0]
        content["cases"][name] = summary(case, runs)
    print(table(content, markdown=args.markdown))
    write_json(args.out / "guard.json", content | {"steps": args.steps, "runs": args.runs, "lr": args.lr})
    print(f"Figure: {plot(curves, args.out / 'guard.png')}")


def rule_of(case: Case, seed: int) -> odeopt.UpdateRule | str:
    """Rule of a case: the shipped one, or one whose weights are drawn at random, the last layer's too."""
    if isinstance(case.rule, str):
        return case.rule
    torch.manual_seed(seed)
    options = dict(case.rule)
    rule = options.pop("kind")(**options)
    for weight in rule.parameters():
        weight.data = 0.5 * torch.randn_like(weight)
    return rule


def run(case: Case, task: Task, seed: int, args: argparse.Namespace) -> tuple[dict[str, Tensor], Any]:
    """Losses of the rule alone, of the fallback alone, under the guard and at the start; the account of the guard."""
    fallback, rule = odeopt.AdamUpdate(args.lr), rule_of(case, seed)
    ways = {"rule": (rule, case.lr, None), "fallback": (fallback, 1.0, None), "start": (fallback, 0.0, None)}
    ways["guarded"] = rule, case.lr, odeopt.Guard(fallback)
    losses, index = {}, torch.tensor([seed])
    for name, (rule, lr, guard) in ways.items():
        params = {key: torch.nn.Parameter(value[0]) for key, value in task.init_params(index, 0).items()}
        optimizer = odeopt.LearnedOptimizer(params.values(), rule, lr=lr, total_steps=args.steps, guard=guard)
        losses[name] = torch.zeros(args.steps, dtype=torch.float64)
        for step in range(0 if name != "start" else args.steps - n_last(args.steps), args.steps):
            done = step / args.steps
            turned = {key: rotated(value, case.angle(done))[None] for key, value in params.items()}
            loss = task.loss(turned, task.sample_batch(index, step, 0)).sum()
            losses[name][step] = loss.item()
            optimizer.zero_grad()
            (-loss if case.is_flipped(done) else loss).backward()
            optimizer.report(loss)
            optimizer.step()
    return losses, optimizer.guard_status


def n_last(n_steps: int) -> int:
    """Number of losses that judge a run."""
    return max(1, n_steps // 20)


def rotated(x: Tensor, angle: float) -> Tensor:
    """Turn pairs of coordinates of a vector by an angle."""
    if angle == 0:
        return x
    turned = torch.view_as_complex(x.view(-1, 2)) * complex(math.cos(angle), math.sin(angle))
    return torch.view_as_real(turned).flatten()


def summary(case: Case, runs: list[tuple[dict[str, Tensor], Any]]) -> dict[str, Any]:
    """Final losses by contender and run, and what the guard did."""
    n = n_last(len(runs[0][0]["rule"]))
    last = {key: [losses[key][-n:].mean().nan_to_num(math.inf).item() for losses, _ in runs] for key in runs[0][0]}
    equal = all(torch.equal(losses["rule"], losses["guarded"]) for losses, _ in runs)
    return {"final": last, "benign": case.is_benign, "equal": equal, "status": [status for _, status in runs]}


def table(content: Mapping[str, Any], *, markdown: bool) -> str:
    """Draw the mean final losses, the worst ratios of a run to the fallback's and to the start, and what was done."""
    rows = []
    for name, case in content["cases"].items():
        final = {key: [math.inf if x is None else x for x in values] for key, values in case["final"].items()}
        means = [f"{sum(values) / len(values):.3g}" for values in map(final.get, ("rule", "fallback", "guarded"))]
        worst = [max(map(lambda g, o: g / o, final["guarded"], final[key])) for key in ("fallback", "start")]
        handovers = ", ".join(str(status[1]) for status in case["status"])
        rows.append([name, *means, *(f"{x:.2f}" for x in worst), handovers, "yes" if case["equal"] else "no"])
    titles = ["rule", "fallback", "guarded", "to fallback", "to start", "hand-overs", "as without"]
    return draw_table([(title, "") for title in ("task", *titles)], rows, markdown=markdown)


def plot(curves: Mapping[str, Mapping[str, Tensor]], path: Path) -> Path:
    """Draw the losses of the first run of some cases."""
    with style():
        figure, panels = new_figure(9.0, 2.8, n_columns=len(SHOWN))
        for axes, name in zip(panels, SHOWN, strict=True):
            for label in ("rule", "fallback", "guarded"):
                values = curves[name][label]
                axes.plot(values.clamp(max=1e3 * values[0]), label=label, linewidth=1)
            axes.set(yscale="log", xlabel="step", title=name)
        panels[0].set_ylabel("training loss")
        panels[-1].legend(fontsize=7)
        return save_figure(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    runs = {"default": 2, "help": "runs of each case"}
    parser = arguments.parser(__doc__, "dataset data_dir markdown", runs=runs, out={"default": "runs/guard"})
    parser.add_argument("--steps", type=arguments.positive, default=600, help="of a run")
    parser.add_argument("--lr", type=float, default=0.01, help="of the fallback, Adam")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
