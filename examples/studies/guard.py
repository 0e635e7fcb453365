"""Can a learned optimizer ruin a run under a guard?

Tasks on which rules fail, and tasks on which they do not, are run by the rule alone, by the fallback alone and under
``odeopt.Guard``, from the same start on the same batches. The fallback is Adam at one learning rate for all.
"""

from __future__ import annotations

import argparse
import cmath
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from guard_figure import plot, table
from torch import Tensor

import odeopt
from odeopt.cli import arguments
from odeopt.files import write_json
from odeopt.progress import tqdm
from odeopt.tasks import MLPClassification, NoisyQuadratic, Task

SPECTRAL, QUADRATIC = "port-hamiltonian-spectral", "port-hamiltonian-quadratic"
LR = 0.01  # of the fallback
N_BATCHES = 32  # that a final loss is evaluated on, at each of the last steps
PH, LSTM = odeopt.PortHamiltonianUpdate, partial(odeopt.LSTMUpdate, preprocess=True)


class Case(NamedTuple):
    """A surface, a rule (by name, or what makes one), and functions of the share of the run that is done."""

    surface: str
    rule: str | Callable[[], odeopt.UpdateRule] = SPECTRAL
    lr: float = 1.0
    is_flipped: Callable[[float], bool] = lambda done: False
    angle: Callable[[float], float] = lambda done: 0.0


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
} | {
    "rotated by half a turn": Case("quadratic", angle=lambda done: math.pi * done),
    "rotated back and forth": Case("quadratic", QUADRATIC, angle=lambda done: math.sin(12 * done)),
}
for name in (SPECTRAL, "port-hamiltonian", "port-hamiltonian-mnist", QUADRATIC):
    for surface in ("quadratic", "network")[: 1 if name == QUADRATIC else 2]:
        CASES[f"{name}, {surface}"] = Case(surface, name)


def main(argv: list[str] | None = None) -> None:
    """Run all cases three ways, print a table and draw the figure."""
    args = parse(argv)
    network = MLPClassification(arguments.dataset(args), [20], batch_size=64, activation="relu", device=args.device)
    surfaces = {"quadratic": NoisyQuadratic(10, device=args.device), "network": network}
    content, curves = {"steps": args.steps, "runs": args.runs, "lr": LR, "cases": {}}, {}
    for name, case in tqdm(CASES.items(), unit="case"):
        runs = [run(case, surfaces[case.surface], seed, args) for seed in range(args.runs)]
        curves[name] = runs[0][0]
        content["cases"][name] = summary(runs)
    write_json(args.out / "guard.json", content)
    print(table(content, markdown=args.markdown), f"Figure: {plot(curves, args.out / 'guard.png')}", sep="\n")


def rule_of(case: Case, seed: int) -> odeopt.UpdateRule | str:
    """Rule of a case: the shipped one, or one whose weights are drawn at random, the last layer's too."""
    if isinstance(case.rule, str):
        return case.rule
    torch.manual_seed(seed)
    rule = case.rule()
    for weight in rule.parameters():
        weight.data = 0.5 * torch.randn_like(weight)
    return rule


def run(case: Case, task: Task, seed: int, args: argparse.Namespace) -> tuple[dict[str, Tensor], Any]:
    """Losses of all steps and at the end: of the rule, of the fallback, under the guard, at the start. Its account."""
    fallback, rule = odeopt.AdamUpdate(LR), rule_of(case, seed)
    ways = {"rule": (rule, case.lr, None), "fallback": (fallback, 1.0, None), "start": (fallback, 0.0, None)}
    ways["guarded"] = rule, case.lr, odeopt.Guard(fallback)
    losses, final = {}, {}
    index, n_last = torch.tensor([seed], device=args.device), max(1, args.steps // 20)
    for name, (rule, lr, guard) in ways.items():
        params = {key: torch.nn.Parameter(value[0]) for key, value in task.init_params(index, 0).items()}
        optimizer = odeopt.LearnedOptimizer(params.values(), rule, total_steps=args.steps, guard=guard)
        optimizer.param_groups[0]["lr"] = lr  # here nobody is warned of one that is wrong on purpose
        losses[name] = torch.zeros(args.steps, dtype=torch.float64)
        for step in range(0 if name != "start" else args.steps - n_last, args.steps):
            done = step / args.steps
            turned = {key: rotated(value, case.angle(done))[None] for key, value in params.items()}
            loss = task.loss(turned, task.sample_batch(index, step, 0)).sum()
            losses[name][step] = loss.item()
            if step >= args.steps - n_last:
                final[name] = final.get(name, 0.0) + evaluated(task, turned, index, args.steps) / n_last
            optimizer.zero_grad()
            (-loss if case.is_flipped(done) else loss).backward()
            optimizer.report(loss)
            optimizer.step()
    return losses, final, optimizer.guard_status


@torch.no_grad()
def evaluated(task: Task, params: dict[str, Tensor], index: Tensor, n_steps: int) -> float:
    """Loss over batches from beyond the run, the same ones for all."""
    batches = (task.sample_batch(index, n_steps + k, 0) for k in range(N_BATCHES))
    return sum(task.loss(params, batch).sum().item() for batch in batches) / N_BATCHES


def rotated(x: Tensor, angle: float) -> Tensor:
    """Turn pairs of coordinates of a vector by an angle."""
    return torch.view_as_real(torch.view_as_complex(x.view(-1, 2)) * cmath.rect(1, angle)).flatten() if angle else x


def summary(runs: list[tuple[dict[str, Tensor], Any]]) -> dict[str, Any]:
    """Final losses by contender and run, and what the guard did."""
    last = {key: [final[key] if math.isfinite(final[key]) else math.inf for _, final, _ in runs] for key in runs[0][1]}
    is_equal = [torch.equal(losses["rule"], losses["guarded"]) for losses, _, _ in runs]
    return {"final": last, "equal": all(is_equal), "status": [status for *_, status in runs]}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    runs, device, out = {"default": 6, "help": "runs of each case"}, {"default": "cpu"}, {"default": "runs/guard"}
    parser = arguments.parser(__doc__, "dataset data_dir markdown", runs=runs, device=device, out=out)
    parser.add_argument("--steps", type=arguments.positive, default=600, help="of a run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
