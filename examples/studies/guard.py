"""Can a learned optimizer ruin a run under a guard?

Tasks on which rules fail, and tasks on which they do not, are run by the rule alone, by the fallback alone and under
``odeopt.Guard``, from the same start on the same batches. The fallback is Adam at one learning rate for all.
"""

from __future__ import annotations

import argparse
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
_LAST = 0.05  # of the losses, whose mean judges a run


@dataclass(frozen=True)
class Case:
    """A surface, a rule and what makes it hard; ``is_flipped`` and ``angle`` are functions of the share done."""

    surface: str
    rule: Callable[[int], odeopt.UpdateRule | str]
    lr: float = 1.0
    is_flipped: Callable[[float], bool] = lambda done: False
    angle: Callable[[float], float] = lambda done: 0.0


def random_rule(seed: int, kind: type[odeopt.UpdateRule], **options: Any) -> odeopt.UpdateRule:
    """Rule whose weights are drawn at random, the last layer too."""
    torch.manual_seed(seed)
    rule = kind(**options)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.copy_(0.5 * torch.randn_like(weight))
    return rule


def shipped(name: str) -> Callable[[int], str]:
    """Name of a rule whatever the seed."""
    return lambda seed: name


def random_ph(seed: int) -> odeopt.UpdateRule:
    """Port-Hamiltonian rule of random weights."""
    return random_rule(seed, odeopt.PortHamiltonianUpdate)


def random_lstm(seed: int) -> odeopt.UpdateRule:
    """LSTM of random weights."""
    return random_rule(seed, odeopt.LSTMUpdate, preprocess=True)


ADVERSARIAL = {
    f"{title}, {surface}": Case(surface, **options)
    for surface in ("quadratic", "network")
    for title, options in {
        "wrong sign for a tenth of the run": {"rule": shipped(SPECTRAL), "is_flipped": lambda t: 0.2 <= t < 0.3},
        "wrong sign throughout": {"rule": shipped(SPECTRAL), "is_flipped": lambda t: True},
        "learning rate times 100": {"rule": shipped(SPECTRAL), "lr": 100.0},
        "random weights": {"rule": random_ph},
        "random LSTM": {"rule": random_lstm},
        "random weights, tiny steps": {"rule": random_ph, "lr": 1e-5},
        "rule of quadratics, times 100": {"rule": shipped(QUADRATIC), "lr": 100.0},
    }.items()
} | {
    "rotated by half a turn": Case("quadratic", shipped(SPECTRAL), angle=lambda t: 3.14 * t),
    "rotated back and forth": Case("quadratic", shipped(QUADRATIC), angle=lambda t: float(torch.tensor(12 * t).sin())),
}
BENIGN = {
    f"{name}, {surface}": Case(surface, shipped(name))
    for name in (SPECTRAL, "port-hamiltonian", "port-hamiltonian-mnist", QUADRATIC)
    for surface in ("quadratic", "network")
    if (name, surface) != (QUADRATIC, "network")
}


def main(argv: list[str] | None = None) -> None:
    """Run all cases three ways, print a table and draw the figure."""
    args = parse(argv)
    surfaces = {
        "quadratic": NoisyQuadratic(10),
        "network": MLPClassification(arguments.dataset(args), [20], batch_size=64, activation="relu"),
    }
    content: dict[str, Any] = {"steps": args.steps, "runs": args.runs, "lr": args.lr, "cases": {}}
    curves = {}
    cases = [("adversarial", *item) for item in ADVERSARIAL.items()] + [("benign", *item) for item in BENIGN.items()]
    cases = [case for case in cases if not args.only or args.only in case[1]]
    for kind, name, case in tqdm(cases, unit="case"):
        runs = [three_ways(case, surfaces[case.surface], seed, args) for seed in range(args.runs)]
        curves[name] = runs[0][0]
        content["cases"][name] = {"kind": kind} | summary(runs)
    print(table(content, markdown=args.markdown))
    write_json(args.out / "guard.json", content)
    print(f"Figure: {plot(curves, args.out / 'guard.png')}")


def three_ways(case: Case, task: Task, seed: int, args: argparse.Namespace) -> tuple[dict[str, Tensor], Any]:
    """Losses of the rule alone, of the fallback alone and under the guard; and the account of the guard."""
    fallback = odeopt.AdamUpdate(args.lr)
    losses, status = {}, None
    for name, rule, lr, guard in (
        ("rule", case.rule(seed), case.lr, None),
        ("fallback", fallback, 1.0, None),
        ("guarded", case.rule(seed), case.lr, odeopt.Guard(fallback)),
    ):
        index = torch.tensor([seed])
        params = start(task, index)
        options = {"lr": lr, "total_steps": args.steps, "guard": guard}
        optimizer = odeopt.LearnedOptimizer(list(params.values()), rule, **options)
        losses[name] = train(case, task, params, optimizer, index, args.steps)
        status = optimizer.guard_status
    losses["start"] = train(case, task, start(task, index), torch.optim.SGD([torch.zeros(1)]), index, args.steps)
    return losses, status


def start(task: Task, index: Tensor) -> dict[str, torch.nn.Parameter]:
    """Initial parameters of a run."""
    return {key: torch.nn.Parameter(value[0]) for key, value in task.init_params(index, 0).items()}


def train(
    case: Case,
    task: Task,
    params: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    index: Tensor,
    n_steps: int,
) -> Tensor:
    """Losses of one run, float64, infinite or NaN where it diverged."""
    losses = torch.full((n_steps,), torch.inf, dtype=torch.float64)
    for step in range(n_steps):
        turned = {key: rotated(value, case.angle(step / n_steps)) for key, value in params.items()}
        loss = task.loss({key: value[None] for key, value in turned.items()}, task.sample_batch(index, step, 0)).sum()
        losses[step] = loss.item()
        optimizer.zero_grad()
        loss.backward()
        if case.is_flipped(step / n_steps):
            for param in params.values():
                param.grad.neg_()
        if isinstance(optimizer, odeopt.LearnedOptimizer):
            optimizer.report(loss)
        optimizer.step()
    return losses


def rotated(x: Tensor, angle: float) -> Tensor:
    """Turn pairs of coordinates by an angle."""
    if angle == 0:
        return x
    c, s = torch.tensor(angle).cos(), torch.tensor(angle).sin()
    left, right = x[0::2], x[1::2]
    return torch.stack((c * left - s * right, s * left + c * right), 1).flatten()


def summary(runs: list[tuple[dict[str, Tensor], Any]]) -> dict[str, Any]:
    """Final losses by contender and run, that of the start, and whether the guard changed anything."""
    n = max(1, round(_LAST * len(runs[0][0]["rule"])))
    last = {name: [losses[name][-n:].mean().nan_to_num(torch.inf).item() for losses, _ in runs] for name in runs[0][0]}
    return {
        "final": last,
        "equal": all(torch.equal(losses["rule"], losses["guarded"]) for losses, _ in runs),
        "handovers": [status.n_handovers for _, status in runs],
        "fallback_steps": [status.n_fallback_steps for _, status in runs],
    }


def table(content: Mapping[str, Any], *, markdown: bool) -> str:
    """Draw the mean final losses, the worst ratio of a run to the fallback's, and the account of the guard."""
    rows = []
    for name, case in content["cases"].items():
        final = case["final"]
        ratio = max(g / f for g, f in zip(final["guarded"], final["fallback"], strict=True))
        means = [f"{sum(final[key]) / len(final[key]):.3g}" for key in ("rule", "fallback", "guarded")]
        to_start = max(g / s for g, s in zip(final["guarded"], final["start"], strict=True))
        share = sum(case["fallback_steps"]) / content["steps"] / content["runs"]
        same = "yes" if case["equal"] else "no"
        rows.append([name, *means, f"{ratio:.2f}", f"{to_start:.3f}", same, f"{100 * share:.0f} %"])
    titles = ["rule", "fallback", "guarded", "to fallback", "to start", "equals the rule", "steps of the fallback"]
    return draw_table([(title, "") for title in ("task", *titles)], rows, markdown=markdown)


def plot(curves: Mapping[str, Mapping[str, Tensor]], path: Path) -> Path:
    """Draw the losses of the first run of some cases."""
    shown = [*curves.items()][:4]
    with style():
        figure, panels = new_figure(9.0, 2.8, n_columns=len(shown))
        for axes, (name, losses) in zip(panels if len(shown) > 1 else [panels], shown, strict=True):
            for label in ("rule", "fallback", "guarded"):
                values = losses[label]
                axes.plot(values.clamp(max=1e3 * values[0]), label=label, linewidth=1)
            axes.set(yscale="log", title=name, xlabel="step")
        axes.legend(fontsize=7)
        return save_figure(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.parser(
        __doc__,
        "dataset data_dir markdown",
        runs={"default": 2, "help": "runs of each case"},
        out={"default": "runs/guard"},
    )
    parser.add_argument("--steps", type=arguments.positive, default=800, help="of a run")
    parser.add_argument("--lr", type=float, default=0.01, help="of the fallback, Adam")
    parser.add_argument("--only", help="cases whose name holds this")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
