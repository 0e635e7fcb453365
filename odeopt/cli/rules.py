"""``odeopt rules`` and ``odeopt show``: the rules that ship, what they were trained for, cost and answer."""

from __future__ import annotations

import argparse
import statistics
from operator import truediv

import torch
from torch import nn

from odeopt import artifacts
from odeopt.checks import n_of
from odeopt.cli import arguments
from odeopt.cli.files import named_rule
from odeopt.evaluation.response import response
from odeopt.optimizer import LearnedOptimizer
from odeopt.parameters import param_groups
from odeopt.report import draw_table, plot_response
from odeopt.rules.base import UpdateRule
from odeopt.timing import interleaved


def add(commands: argparse._SubParsersAction) -> None:
    """Add both commands."""
    text = "list the rules that ship: what they were trained for, parameters, and what a step costs here"
    rules = commands.add_parser("rules", help=text, description=text + ", on the parameters of a 784-20-10 network.")
    arguments.add(rules, "markdown")
    rules.set_defaults(run=run_rules)
    text = "draw how a rule answers gradients: update, step size over a run, singular values"
    show = commands.add_parser("show", help=text, description=text + ".")
    show.add_argument("rule", help="a .safetensors file, or a name that `odeopt rules` lists")
    show.add_argument("--out", type=arguments.folder, default="runs", help="folder of the figure (default: runs)")
    show.set_defaults(run=run_show)


def run_rules(args: argparse.Namespace) -> int:
    """Print the table; return the exit status."""
    names = artifacts.available_pretrained()
    rules = {name: artifacts.load_pretrained(name) for name in names}
    prices = _prices(rules)
    rows = [[name, *_account(rule), f"{prices[name]:.1f}"] for name, rule in rules.items()]
    headers = [("rule", ""), ("trained on", ""), ("horizon", "steps"), ("weights", ""), ("state", "B/parameter"),
               ("step", "x Adam's")]  # fmt: skip
    print(draw_table(headers, rows, markdown=args.markdown))
    print(
        f"\nTimes of a step of a 784-20-10 network on {n_of(torch.get_num_threads(), 'thread')}, over those of "
        "torch.optim.Adam. On larger matrices rules\nwith spectral energies take longer (docs/cost.md). "
        "`odeopt show RULE` draws one."
    )
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Draw a rule; return the exit status."""
    name, rule = named_rule(args.rule)
    task, horizon, *_ = _account(rule)
    path = plot_response(*response(rule), args.out / f"rule-{name}.png", title=f"{name} ({type(rule).__name__})")
    weights = n_of(rule.n_parameters(), "weight")
    print(f"{type(rule).__name__}, {weights}, meta-trained on runs of up to {horizon} steps of {task}.")
    print(f"Figure: {path}")
    return 0


def _account(rule: UpdateRule) -> list[str]:
    """Task, horizon, number of weights and size of the state."""
    account = rule.trained_for or {}
    task, horizon = account.get("task", "?"), account.get("horizon", "?")
    name = _kind(task) if isinstance(task, dict) else task
    n = 1000
    state = rule.init_state(torch.zeros(n))
    per_parameter = sum(x.numel() * x.element_size() for x in state if x.numel() >= n) / n
    return [str(name), str(horizon), f"{rule.n_parameters():,}", f"{per_parameter:g}"]


def _kind(task: dict) -> str:
    """Name of a kind of problems; of a mixture, those of its members."""
    kinds = list(dict.fromkeys(map(_kind, task.get("families", ()))))
    if kinds:
        return ", ".join(kinds[:2]) + (f" and {len(kinds) - 2} other kinds" if len(kinds) > 2 else "")
    return str(task.get("class", task.get("task", "?")))


def _prices(rules: dict[str, UpdateRule]) -> dict[str, float]:
    """Time of a step over that of Adam, in turns, each the median."""
    model = nn.Sequential(nn.Linear(784, 20), nn.Linear(20, 10))
    for param in model.parameters():
        param.grad = 1e-3 * torch.randn_like(param)
    steps = {"Adam": torch.optim.Adam(model.parameters()).step}
    steps |= {name: LearnedOptimizer(param_groups(model), rule).step for name, rule in rules.items()}
    for step in steps.values():  # lays out the state
        step()
    seconds = interleaved(steps, n_repeats=5, n_calls=5, description="timing")
    return {name: statistics.median(map(truediv, seconds[name], seconds["Adam"])) for name in rules}
