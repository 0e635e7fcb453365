"""Layers of small networks, written so that ``torch.func.vmap`` and second derivatives can take them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odeopt.checks import require, require_counts, require_one_of, require_positive

from .perceptron import ACTIVATIONS

NORMS = ("pre", "post", "none")


class Activation(nn.Module):
    """A named activation as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def hidden_layers(sizes: Iterable[int], activation: str, *, has_norms: bool = False) -> list[nn.Module]:
    """Build linear layers between the sizes given, each with an activation behind it, and a norm in between if any."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), *[nn.LayerNorm(b)] * has_norms, Activation(activation)]
    return layers


class Residual(nn.Module):
    """``x + f(norm(x))``, or with the norm after the sum (``"post"``), or without one (``"none"``)."""

    def __init__(self, width: int, block: nn.Module, norm: str = "pre") -> None:
        super().__init__()
        self.norm = nn.Identity() if norm == "none" else nn.LayerNorm(width)
        self.block, self.is_post = block, norm == "post"

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.block(x)) if self.is_post else x + self.block(self.norm(x))


class SelfAttention(nn.Module):
    """Attention over the second last axis, in plain matrix products, which vmap and second derivatives take."""

    def __init__(self, width: int, n_heads: int, *, is_causal: bool) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_heads, self.is_causal = n_heads, is_causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(-1, (3, self.n_heads, -1)).transpose(-4, -2).unbind(-3)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if self.is_causal:
            n = scores.shape[-1]
            future = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return self.outputs((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))


def attention_layers(
    width: int,
    depth: int,
    activation: str,
    *,
    is_causal: bool,
    n_heads: int = 2,
    expansion: int = 2,
    norm: str = "pre",
) -> list[nn.Module]:
    """Build ``depth`` layers of attention and of a perceptron ``expansion`` times as wide."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers.append(Residual(width, SelfAttention(width, n_heads, is_causal=is_causal), norm))
        block = (nn.Linear(width, expansion * width), Activation(activation), nn.Linear(expansion * width, width))
        layers.append(Residual(width, nn.Sequential(*block), norm))
    return [*layers, nn.LayerNorm(width)] if norm == "pre" else layers


def check_network(width: int, depth: int, activation: str, *, has_two_heads: bool = False) -> None:
    """Raise a ValueError that names what is out of range."""
    require_counts(width=width, depth=depth)
    require_one_of(ACTIVATIONS, activation=activation)
    require(width % 2 == 0 or not has_two_heads, "width", width, "even for two heads")


@dataclass(eq=False, repr=False, kw_only=True)
class TransformerFields:
    """Fields of the tasks that train a transformer, beside a subclass of :class:`~odeopt.tasks.module.NetworkTask`."""

    width: int = 32
    depth: int = 2
    n_heads: int = 2
    expansion: int = 2
    norm: str = "pre"
    activation: str = "gelu"
    init_std: float | None = None

    def __post_init__(self, *args: Any) -> None:
        check_network(self.width, self.depth, self.activation)
        require_counts(n_heads=self.n_heads, expansion=self.expansion)
        require_positive(init_std=self.init_std, or_none=True)
        require(self.width % self.n_heads == 0, "width", self.width, f"a multiple of `n_heads = {self.n_heads}`")
        require_one_of(NORMS, norm=self.norm)
        super().__post_init__(*args)

    def layers(self, *, is_causal: bool) -> list[nn.Module]:
        """Build the layers of attention and of perceptrons."""
        options = {"n_heads": self.n_heads, "expansion": self.expansion, "norm": self.norm, "is_causal": is_causal}
        return attention_layers(self.width, self.depth, self.activation, **options)

    def drawn(self, module: nn.Module) -> nn.Module:
        """Draw the weights of linear layers and embeddings anew if ``init_std`` says so, biases at zero, as GPT-2."""
        for layer in module.modules() if self.init_std is not None else ():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=self.init_std)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)
        return module


class Recurrence(nn.Module):
    """A recurrent network written with linear layers: torch's kernels have no batching rule under vmap."""

    n_parts = 1  # of the inputs of a step: those of the new state, and of the gates
    has_second_bias = False

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        n = self.n_parts * width
        self.inputs, self.hidden = nn.Linear(width, n), nn.Linear(width, n, bias=self.has_second_bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros_like(x[..., 0, :]), []
        c = h
        for driven in self.inputs(x).unbind(-2):
            h, c = self.step(driven, h, c)
            outputs.append(h)
        return torch.stack(outputs, dim=-2)

    def step(self, driven: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Next state, and next memory, which an LSTM alone has."""
        return self.activation(driven + self.hidden(h)), c


class GatedRecurrence(Recurrence):
    r"""A gated recurrent unit with an activation of one's choice, ``tanh`` for the usual one.

    .. math:: h_t = z_t h_{t-1} + (1 - z_t)\,\phi(W x_t + r_t (U h_{t-1} + b))

    References:
        Cho et al. (2014), Learning phrase representations using RNN encoder-decoder, Eq. (5)-(8).
    """

    n_parts, has_second_bias = 3, True

    def step(self, driven: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        (r, z, n), (hr, hz, hn) = driven.chunk(3, -1), self.hidden(h).chunk(3, -1)
        new = self.activation(n + torch.sigmoid(r + hr) * hn)
        return new + torch.sigmoid(z + hz) * (h - new), c


class LongShortTermMemory(Recurrence):
    r"""An LSTM with an activation of one's choice, ``tanh`` for the usual one, and forget gates that start open by one.

    .. math:: c_t = f_t c_{t-1} + i_t\,\phi(g_t), \qquad h_t = o_t\,\phi(c_t)

    References:
        Jozefowicz et al. (2015), An empirical exploration of recurrent network architectures, Section 2.2.
    """

    n_parts = 4

    def __init__(self, width: int, activation: str) -> None:
        super().__init__(width, activation)
        with torch.no_grad():
            self.inputs.bias[width : 2 * width] += 1

    def step(self, driven: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (driven + self.hidden(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * self.activation(g)
        return torch.sigmoid(o) * self.activation(c), c


CELLS = {"plain": Recurrence, "gru": GatedRecurrence, "lstm": LongShortTermMemory}


class WithPositions(nn.Module):
    """Add a learned vector to each position of a sequence."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


class Mean(nn.Module):
    """Mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-2)


class AsPatches(nn.Module):
    """Rows of pixels to sequences of square patches."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        k, n = self.patch, math.isqrt(x.shape[-1]) // self.patch
        return x.unflatten(-1, (n, k, n, k)).transpose(-3, -2).flatten(-4, -3).flatten(-2)
