"""Rules, a small model and a training loop that the tests of LearnedOptimizer share."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from odeopt.rules import (
    AdamUpdate,
    HamiltonianUpdate,
    LSTMUpdate,
    PortHamiltonianUpdate,
    RMSpropUpdate,
    SGDUpdate,
    UpdateRule,
)
from odeopt.rules.base import state_dtype


class Watching(TorchDispatchMode):
    """A mode that lets each operation pass."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """A tensor that is none of torch's own."""


class LeakySumState(NamedTuple):
    total: Tensor
    step: Tensor  # the one name that torch.optim.Optimizer.load_state_dict does not cast


class LeakySum(UpdateRule):
    """A toy with one weight: update = -weight * (decayed sum of gradients), halved by the end of a run."""

    def __init__(self, *, weight: float = 0.1) -> None:
        super().__init__(weight=weight)
        self.weight = nn.Parameter(torch.tensor(weight))

    def init_state(self, param):
        total = torch.zeros_like(param, dtype=state_dtype(param.dtype))
        return LeakySumState(total, torch.zeros(1, device=param.device))

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        total = 0.9 * state.total + grad
        slowdown = 1.0 if progress is None else 1 - 0.5 * progress
        return -self.weight * slowdown * total, LeakySumState(total, state.step + 1)


def port_hamiltonian(**options):
    torch.manual_seed(1)
    rule = PortHamiltonianUpdate(**options)
    with torch.no_grad():  # away from the start, at which the network's last layer is zero
        for weight in rule.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return rule


RULES = {
    "toy": LeakySum,
    "sgd": lambda: SGDUpdate(0.05, momentum=0.9, nesterov=True),
    "rmsprop": lambda: RMSpropUpdate(0.01),
    "adam": lambda: AdamUpdate(0.01),
    "lstm": lambda: LSTMUpdate(preprocess=True),
    "lstm, normalized": lambda: LSTMUpdate(normalize=True),
    "hamiltonian": lambda: HamiltonianUpdate(normalize=True),
    "port-hamiltonian": lambda: port_hamiltonian(uses_progress=True),
    "coordinatewise": lambda: port_hamiltonian(coordinatewise=True, potential="network"),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = [(), (0,), (5,), (3, 4), (2, 3, 1, 2)]

over_rules = pytest.mark.parametrize("rule", [make() for make in RULES.values()], ids=RULES)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def loss_of(model, step=0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=generator).to(next(model.parameters()).dtype)
    return (model(x) - x[:, :2]).square().mean()


def train(model, optimizer, steps, scheduler=None):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def parameter(value, grad, dtype=torch.float32):
    param = nn.Parameter(torch.as_tensor(value, dtype=dtype))
    param.grad = torch.as_tensor(grad, dtype=dtype)
    return param


def assert_same(left, right):
    """Bit for bit: the same parameters of two models."""
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b)
