"""Workloads of the benchmark of the step: real networks, and the optimizers that step them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import odeopt
from odeopt import LearnedOptimizer, LSTMUpdate
from odeopt.rules.preprocessing import log_sign
from odeopt.tasks.datasets import import_torchvision

EVERY = 4  # steps, of the contender that moves matrices only then
LEARNED = FAST, NARROW, EAGER, DEFAULT, SELDOM, HALF, SHORT, LSTM = (
    "port-hamiltonian",  # in C on a CPU, in Triton on CUDA
    "port-hamiltonian, bfloat16",
    "port-hamiltonian, eager",
    "port-hamiltonian-spectral",
    f"port-hamiltonian-spectral, every {EVERY}th step",
    "port-hamiltonian-spectral, products in bfloat16",
    "port-hamiltonian-spectral, short polynomial",
    "lstm",
)
LOOP, MUON, NETWORK = "lstm, loop of cells", "Muon and fused Adam", "forward and backward"
FOREACH, FUSED, MOMENTUM = REFERENCES = ("Adam, foreach", "Adam, fused", "SGD, momentum")
SHOWN = (FAST, EAGER, DEFAULT, HALF, SHORT, SELDOM, MUON, FUSED, NETWORK)  # in the table that compares all workloads
Make = Callable[[nn.Module], Optimizer]

models = import_torchvision().models


class GPT2(nn.Module):
    """GPT-2 small (Radford et al., 2019), its head tied to the embedding: 124,439,808 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
        block = partial(nn.TransformerEncoderLayer, 768, 12, 3072, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks, self.norm = nn.ModuleList(block() for _ in range(12)), nn.LayerNorm(768)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the next token, shape ``(n_texts, n_tokens, 50257)``."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], x.device)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.norm(x) @ self.tokens.weight.mT


class Model(NamedTuple):
    """A real network, and a batch for it.

    Attributes:
        make: Builds the network.
        batch: The batch in words.
        shape: Shape of its inputs.
        n_tokens: Number of tokens to choose inputs from; 0 for normal numbers.
    """

    make: Callable[[], nn.Module]
    batch: str
    shape: tuple[int, ...]
    n_tokens: int = 0


def images(n: int) -> tuple[str, tuple[int, ...]]:
    """Return a batch of images as ImageNet has them."""
    return f"{n} images of 224 x 224", (n, 3, 224, 224)


MODELS = {
    "mlp": Model(lambda: nn.Sequential(nn.Linear(784, 20), nn.Sigmoid(), nn.Linear(20, 10)), "128 digits", (128, 784)),
    "resnet18": Model(models.resnet18, *images(8)),
    "vit-s": Model(partial(models.VisionTransformer, 224, 16, 12, 6, 384, 1536), *images(8)),
    "gpt2": Model(GPT2, "a text of 128 tokens", (1, 128), 50257),
}


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


def module(workload: str, device: torch.device | str) -> nn.Module:
    """Build a model in :data:`MODELS`, or one tensor of that size; with gradients that stay as they are."""
    torch.manual_seed(0)
    with torch.device(device):
        if workload in MODELS:
            built = MODELS[workload].make()
        else:
            built = nn.ParameterList([nn.Parameter(0.02 * torch.randn(int(float(workload))))])
    for param in built.parameters():
        param.grad = 1e-3 * torch.randn_like(param)
    return built


def n_parameters(workload: str) -> int:
    """Number of parameters."""
    return sum(param.numel() for param in module(workload, "meta").parameters())


def forward_and_backward(workload: str, model: nn.Module) -> Callable[[], None]:
    """Return what a step of training computes before the optimizer's step: the share that the latter has."""
    _, _, shape, n_tokens = MODELS[workload]
    device = next(model.parameters()).device
    inputs = torch.randint(n_tokens, shape, device=device) if n_tokens else torch.randn(shape, device=device)
    params = list(model.parameters())
    # the gradients of the optimizers stay as they are
    return lambda: torch.autograd.grad(model(inputs).square().mean(), params) and None


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


class MuonAndAdam(Optimizer):
    """``torch.optim.Muon`` on matrices and, as views, convolutions; fused Adam on embeddings and vectors.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})
        groups = odeopt.param_groups(model)
        groups = [group for group in groups if not group.keys() & {"is_table", "is_stack"}]
        hidden = [param for group in groups for _, param in group["params"] if param.ndim > 1]
        self._views = [(param, nn.Parameter(param.detach().flatten(1))) for param in hidden]
        others = list({*self.param_groups[0]["params"]} - {*hidden})
        muon = [torch.optim.Muon([view for _, view in self._views])] if self._views else []
        self._parts = [*muon, *([Adam(others, fused=True)] if others else [])]

    def step(self, closure: None = None) -> None:
        """Move every parameter."""
        for param, view in self._views:
            view.grad = param.grad.flatten(1)
        for part in self._parts:
            part.step()
            self.state.update(part.state)


def contenders(device: torch.device, *, has_lstm: bool) -> dict[str, Make]:
    """Ways to build an optimizer, by name.

    Args:
        device: Where the parameters are; on CUDA the steps may be captured in a graph.
        has_lstm: Whether the LSTM rule takes part, whose state has 320 bytes per parameter.
    """
    capturable = {"capturable": True} if device.type == "cuda" else {}
    rule, lstm = odeopt.load_pretrained("port-hamiltonian"), LSTMUpdate(preprocess=True)  # as the paper has it
    fast = {"implementation": "native"}

    def learned(**options) -> Make:
        return lambda model: LearnedOptimizer(odeopt.param_groups(model), **options, **capturable)

    def given(optimizer: Callable[..., Optimizer], **options) -> Make:
        return lambda model: optimizer(model.parameters(), **options)

    makes = {
        FAST: learned(rule=rule, **fast),
        NARROW: learned(rule=rule, **fast, state_dtype=torch.bfloat16),
        EAGER: learned(rule=rule, implementation="eager"),
        DEFAULT: learned(),
        SELDOM: learned(rule=odeopt.load_pretrained(DEFAULT).with_options(matrix_interval=EVERY)),
        HALF: learned(rule=odeopt.load_pretrained(DEFAULT).with_options(matrix_products="bfloat16")),
        SHORT: learned(rule=odeopt.load_pretrained(DEFAULT).with_options(matrix_polynomial="short")),
        "AdamUpdate": learned(rule=odeopt.AdamUpdate()),
        FOREACH: given(Adam, foreach=True, **capturable),
        FUSED: given(Adam, fused=True, **capturable),
        MOMENTUM: given(SGD, lr=1e-3, momentum=0.9, foreach=True),
        MUON: MuonAndAdam,  # on CUDA without a graph: torch.optim.Muon cannot be captured
    }
    if has_lstm:
        makes |= {LSTM: learned(rule=lstm), LOOP: given(CellLoop, rule=lstm)}
    return makes
