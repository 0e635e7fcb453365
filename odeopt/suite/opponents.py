"""Contenders on the problems: hand-designed optimizers, each with a grid of learning rates, and learned rules."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from odeopt._version import __version__
from odeopt.artifacts import fingerprint
from odeopt.checks import install_command
from odeopt.optimizer import LearnedOptimizer
from odeopt.parameters import param_groups
from odeopt.rules.base import UpdateRule
from odeopt.suite.run import Steps

REFERENCE = "adamw"
_WARM_UP = 0.05  # part of the run
_DECAY = 0.01
_LR_BESIDE_MUON = 3e-3
_GROUPS = "blocks of rows apart"  # as param_groups finds them: tells runs apart that were made by others
_PACKAGES = {"schedule-free": "schedulefree", "prodigy": "prodigyopt"}
_AVERAGING = 8  # power of the averages of rules that are not told the number of steps


@dataclass(frozen=True)
class Contender:
    """An optimizer with the learning rates that are tried.

    Attributes:
        name: Name on the command line and in files.
        title: Name in tables and figures.
        make: Builds the optimizer from the model, the number of steps and the learning rate.
        rates: Learning rates to choose from; one needs no choice.
        settings: What else its runs depend on, in values that JSON can hold.
        is_learned: Whether it is a learned rule.
    """

    name: str
    title: str
    make: Callable[[nn.Module, int, float], Steps]
    rates: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    is_learned: bool = False


def opponents() -> tuple[dict[str, Contender], tuple[str, ...]]:
    """Return the hand-designed contenders that are installed, by name, and a note on each of the others."""
    remedies = {} if hasattr(torch.optim, "Muon") else {"muon": "torch 2.9 or later"}
    for name, package in _PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            remedies[name] = install_command("opponents")
    found = {name: contender for name, contender in OPPONENTS.items() if name not in remedies}
    return found, tuple(f"{OPPONENTS[name].title} is left out: it needs {what}." for name, what in remedies.items())


def learned(rule: UpdateRule, name: str, *, is_told: bool = True) -> Contender:
    """Make a contender of a rule, at the learning rate 1.

    Args:
        rule: The rule.
        name: Its name.
        is_told: Whether it is told the number of steps. Where not, its weights are averaged, as those of Schedule-Free.

    Returns:
        The contender; a rule that is not told has "not told" behind its name.
    """
    averaging = None if is_told else _AVERAGING

    def make(model: nn.Module, n_steps: int, lr: float) -> LearnedOptimizer:
        total_steps = n_steps if is_told else None
        return LearnedOptimizer(param_groups(model), rule, lr=lr, total_steps=total_steps, averaging=averaging)

    name = name if is_told else f"{name}, not told"
    settings = {"rule": fingerprint(rule), "is_told": is_told, "averaging": averaging, "library_version": __version__}
    settings["groups"] = _GROUPS
    return Contender(name, name, make, (1.0,), settings, is_learned=True)


def untrained(rule: UpdateRule) -> UpdateRule:
    """Build the same rule with its initial weights, drawn from seed 0: what training adds shows beside it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(rule)(**rule.config)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the matrices of a network of the suite, convolutions among them, but embeddings and the last layer.

    The first layer of a network on images or points is one of them: so Muon is the stronger opponent (.019 in place of
    .041 on the perceptron, at its best rate).
    """
    outer = (module for module in model.modules() if isinstance(module, nn.Embedding))
    excluded = {param for module in (model.head, *outer) for param in module.parameters()}
    trained = (param for param in model.parameters() if param.requires_grad)
    return [param for param in trained if param.ndim >= 2 and param not in excluded]


class MuonAndAdamW:
    """``torch.optim.Muon`` on the hidden matrices, ``torch.optim.AdamW`` on all else, both with cosine decay.

    ``torch.optim.Muon`` takes matrices only: it is handed views of convolutions as (out, rest), of each matrix of a
    stack, and of each block of rows of a matrix that consists of several, as :func:`odeopt.param_groups` finds them.

    Args:
        model: A network of the suite.
        n_steps: Length of the run.
        lr: Learning rate of Muon.
    """

    def __init__(self, model: nn.Module, n_steps: int, lr: float) -> None:
        hidden = hidden_matrices(model)
        others = [param for param in model.parameters() if all(param is not other for other in hidden)]
        self._groups = {param: group for group in param_groups(model) for _, param in group["params"]}
        self._views = [(p, [nn.Parameter(x) for x in self._matrices(p, p.detach())]) for p in hidden]
        views = [view for _, some in self._views for view in some]
        parts = [torch.optim.Muon(views, lr=lr, weight_decay=_DECAY)] if hidden else []
        parts += [torch.optim.AdamW(others, lr=_LR_BESIDE_MUON, weight_decay=_DECAY)] if others else []
        self._parts = [_scheduled(part, n_steps) for part in parts]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad()
        for param, _ in self._views:
            param.grad = None

    def step(self) -> None:
        """Move the parameters."""
        for param, views in self._views:
            for view, grad in zip(views, self._matrices(param, param.grad), strict=True):
                view.grad = grad
        for part in self._parts:
            part.step()

    def _matrices(self, param: nn.Parameter, values: Tensor) -> tuple[Tensor, ...]:
        group = self._groups[param]
        if group.get("is_stack") and param.ndim > 2:
            return tuple(x.flatten(1) for x in values.unbind())
        return values.flatten(1).chunk(group.get("n_blocks", 1))


def _scheduled(optimizer: torch.optim.Optimizer, n_steps: int, warm_up: float = 0.0) -> torch.optim.Optimizer:
    """Let the learning rate rise linearly over a part of the run, and fall to zero as half a cosine."""
    n_rising = int(warm_up * n_steps)

    def factor(step: int) -> float:
        if step < n_rising:
            return (step + 1) / n_rising
        return 0.5 + 0.5 * math.cos(math.pi * (step - n_rising) / (n_steps - n_rising))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


def _adam(model: nn.Module, n_steps: int, lr: float) -> Steps:
    return torch.optim.Adam(model.parameters(), lr)


def _adamw(model: nn.Module, n_steps: int, lr: float) -> Steps:
    return _scheduled(torch.optim.AdamW(model.parameters(), lr, weight_decay=_DECAY), n_steps, _WARM_UP)


def _nesterov(model: nn.Module, n_steps: int, lr: float) -> Steps:
    return _scheduled(torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True), n_steps)


def _schedule_free(model: nn.Module, n_steps: int, lr: float) -> Steps:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(model.parameters(), lr, weight_decay=_DECAY, warmup_steps=int(_WARM_UP * n_steps))


def _prodigy(model: nn.Module, n_steps: int, lr: float) -> Steps:
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # it says how it decays weights
        return _scheduled(Prodigy(model.parameters(), lr, weight_decay=_DECAY), n_steps)


# the recipe tells runs apart that were made by another one
_RECIPES = {
    "adam": "constant",
    REFERENCE: f"warm-up {_WARM_UP}, cosine, decay {_DECAY}",
    "nesterov": "momentum 0.9, cosine",
    "muon": f"cosine, decay {_DECAY}, {_GROUPS}, AdamW at {_LR_BESIDE_MUON} on embeddings, last layer, vectors",
    "schedule-free": f"warm-up {_WARM_UP}, decay {_DECAY}",
    "prodigy": f"cosine, decay {_DECAY}",
}


def _settings(name: str) -> dict[str, str]:
    settings, package = {"recipe": _RECIPES[name]}, _PACKAGES.get(name)
    if package is not None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            settings[package] = importlib.metadata.version(package)
    return settings


OPPONENTS = {
    name: Contender(name, title, make, rates, _settings(name))
    for name, title, make, rates in (
        ("adam", "Adam, 1e-3", _adam, (1e-3,)),
        (REFERENCE, "AdamW, warm-up and cosine", _adamw, (3e-4, 1e-3, 3e-3, 1e-2)),
        ("nesterov", "Nesterov, cosine", _nesterov, (0.01, 0.03, 0.1, 0.3)),
        ("muon", "Muon + AdamW, cosine", MuonAndAdamW, (3e-3, 1e-2, 3e-2, 1e-1)),
        ("schedule-free", "Schedule-Free AdamW", _schedule_free, (1e-3, 3e-3, 1e-2)),
        ("prodigy", "Prodigy, cosine", _prodigy, (1.0,)),
    )
}
