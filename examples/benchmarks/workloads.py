"""Workloads of the benchmark of the step: shapes of real models, and the optimizers that step them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

import odeopt
from odeopt import LearnedOptimizer, LSTMUpdate
from odeopt.rules.preprocessing import log_sign

LEARNED = FAST, NARROW, EAGER, DEFAULT, LSTM = (
    "port-hamiltonian",  # in C on a CPU, in Triton on CUDA
    "port-hamiltonian, bfloat16",
    "port-hamiltonian, eager",
    "port-hamiltonian-spectral",
    "lstm",
)
LOOP = "lstm, loop of cells"
FOREACH, FUSED, MOMENTUM = REFERENCES = ("Adam, foreach", "Adam, fused", "SGD, momentum")
Make = Callable[[list[Tensor]], Optimizer]


def resnet18() -> list[tuple[int, ...]]:
    """Shapes of the parameters of ResNet-18 (He et al., 2016) with a thousand classes: 11,689,512 of them."""
    shapes, fan_in = [(64, 3, 7, 7), (64,), (64,)], 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, fan_in, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and fan_in != width:  # the shortcut has to grow too
                shapes += [(width, fan_in, 1, 1), (width,), (width,)]
            fan_in = width
    return [*shapes, (1000, 512), (1000,)]


def gpt2() -> list[tuple[int, ...]]:
    """Shapes of the parameters of GPT-2 small (Radford et al., 2019): 124,439,808 of them."""
    d, norm = 768, [(768,), (768,)]
    attention = [*norm, (d, 3 * d), (3 * d,), (d, d), (d,)]
    perceptron = [*norm, (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *12 * (attention + perceptron), *norm]


def mlp() -> list[tuple[int, ...]]:
    """Shapes of the parameters of a 784-20-10 network: 15,910 of them."""
    return [(20, 784), (20,), (10, 20), (10,)]


MODELS = {"mlp": mlp, "resnet18": resnet18, "gpt2": gpt2}


def workload(text: str) -> str:
    """Read a number of parameters, or the name of a model."""
    if text in MODELS:
        return text
    try:
        if float(text) >= 1 and float(text).is_integer():
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"should be a number of parameters or one of {', '.join(MODELS)}; found {text}")


def shapes_of(workload: str) -> list[tuple[int, ...]]:
    """Shapes of a model in :data:`MODELS`, or of one tensor of that size."""
    return MODELS[workload]() if workload in MODELS else [(int(float(workload)),)]


def n_parameters(workload: str) -> int:
    """Number of parameters."""
    return sum(map(math.prod, shapes_of(workload)))


def parameters(workload: str, device: torch.device) -> list[Tensor]:
    """Parameters with gradients that stay as they are."""
    generator = torch.Generator(device).manual_seed(0)
    params = [0.02 * torch.randn(shape, generator=generator, device=device) for shape in shapes_of(workload)]
    for param in params:
        param.grad = 1e-3 * torch.randn(param.shape, generator=generator, device=device)
    return params


class CellLoop(Optimizer):
    """The LSTM rule as one would write it: two ``nn.LSTMCell`` called for one tensor after the other.

    Args:
        params: The parameters.
        rule: Whose weights it uses.
    """

    def __init__(self, params: list[Tensor], rule: LSTMUpdate) -> None:
        super().__init__(params, {})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter."""
        for param in self.param_groups[0]["params"]:
            x = log_sign(param.grad.view(-1)) if self.rule.preprocess else param.grad.view(-1, 1)
            state = self.state[param]
            if not state:
                zeros = param.new_zeros(param.numel(), self.rule.hidden_size)
                state.update(h1=zeros, c1=zeros, h2=zeros, c2=zeros)
            state["h1"], state["c1"] = self.rule.cell1(x, (state["h1"], state["c1"]))
            state["h2"], state["c2"] = self.rule.cell2(state["h1"], (state["h2"], state["c2"]))
            param.add_(self.rule.output(state["h2"]).view_as(param), alpha=self.rule.output_scale)


def contenders(device: torch.device, *, has_lstm: bool) -> dict[str, Make]:
    """Ways to build an optimizer, by name.

    Args:
        device: Where the parameters are; on CUDA the steps may be captured in a graph.
        has_lstm: Whether the LSTM rule takes part, whose state has 320 bytes per parameter.
    """
    capturable = {"capturable": True} if device.type == "cuda" else {}
    rule, lstm = odeopt.load_pretrained("port-hamiltonian"), odeopt.load_pretrained("lstm")
    learned, fast = partial(LearnedOptimizer, **capturable), {"implementation": "native"}
    makes = {
        FAST: partial(learned, rule=rule, **fast),
        NARROW: partial(learned, rule=rule, **fast, state_dtype=torch.bfloat16),
        EAGER: partial(learned, rule=rule, implementation="eager"),
        DEFAULT: learned,
        "AdamUpdate": partial(learned, rule=odeopt.AdamUpdate()),
        FOREACH: partial(Adam, foreach=True, **capturable),
        FUSED: partial(Adam, fused=True, **capturable),
        MOMENTUM: partial(SGD, lr=1e-3, momentum=0.9, foreach=True),
    }
    if has_lstm:
        makes |= {LSTM: partial(learned, rule=lstm), LOOP: partial(CellLoop, rule=lstm)}
    return makes
