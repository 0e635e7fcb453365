"""Sequences of random Markov chains."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from odeopt.checks import is_integer, require, require_one_of

from .base import Batch, Task
from .layers import CELLS, WithPositions, attention_layers, check_network
from .module import NetworkTask
from .random import normal, uniform

# "recurrent" is the plain cell's name from before there were others
_CELLS = {"recurrent" if name == "plain" else name: cell for name, cell in CELLS.items()}
SEQUENCE_ARCHITECTURES = ("attention", *_CELLS)


@dataclass(eq=False, repr=False)
class SequencePrediction(NetworkTask):
    r"""Predict the next symbol of a random Markov chain of second order, a new chain for each problem.

    .. math:: P(s_{t+1} = k \mid s_t = i, s_{t-1} = j) \propto \exp(A_{ik} + B_{jk}), \qquad A, B \sim 2\,N(0, 1)

    Sequences never come twice. The loss is the mean cross-entropy in nats over all positions but the first.

    Args:
        architecture: ``"attention"`` (causal, two heads, learned positions), ``"recurrent"``, ``"gru"`` or ``"lstm"``.
        width: Width of the embedding and of the network; an even number for attention.
        depth: Number of layers.
        n_symbols: Size of the alphabet.
        length: Symbols of a sequence that are predicted from.
        activation: One of ``"sigmoid"``, ``"tanh"``, ``"relu"``, ``"gelu"``.
        batch_size: Sequences per step.
        device: See :class:`~odeopt.tasks.base.Task`.

    Raises:
        ValueError: If an argument is not one of these.
    """

    architecture: str = "attention"
    _: KW_ONLY
    width: int = 16
    depth: int = 1
    n_symbols: int = 8
    length: int = 12
    activation: str = "tanh"

    def __post_init__(self) -> None:
        require_one_of(SEQUENCE_ARCHITECTURES, architecture=self.architecture)
        check_network(self.width, self.depth, self.activation, has_two_heads=self.architecture == "attention")
        for name in ("n_symbols", "length"):
            value = getattr(self, name)
            require(is_integer(value) and value >= 2, name, value, "at least 2")
        super().__post_init__()

    def build(self) -> nn.Module:
        layers: list[nn.Module] = [nn.Embedding(self.n_symbols, self.width)]
        if self.architecture == "attention":
            layers.append(WithPositions(self.length, self.width))
            layers += attention_layers(self.width, self.depth, self.activation, is_causal=True)
        else:
            layers += [_CELLS[self.architecture](self.width, self.activation) for _ in range(self.depth)]
        return nn.Sequential(*layers, nn.Linear(self.width, self.n_symbols))

    sample_held_out = Task.sample_held_out  # sequences never come twice

    def draw(self, indices: Tensor, step: int, seed: int, *, held_out: bool = False) -> Batch:
        """Symbols, ``(n_tasks, batch_size, length)``, and their successors."""
        k, options = self.n_symbols, {"seed": seed, "stream": "sequence/chain", "dtype": self.dtype}
        last, before = (2 * normal(indices, (2, k, k), **options)).unbind(1)
        # the maximum of logits and Gumbel noise is a draw from their softmax
        options["stream"] = "sequence/noise"
        u = uniform(indices, (self.batch_size, self.length + 1, k), step=step, **options)
        noise = -(-(u.clamp(min=1e-9).log())).clamp(min=1e-9).log()
        symbols = [noise[:, :, 0].argmax(-1)]
        symbols.append((_rows(last, symbols[0]) + noise[:, :, 1]).argmax(-1))
        for t in range(2, self.length + 1):
            logits = _rows(last, symbols[-1]) + _rows(before, symbols[-2])
            symbols.append((logits + noise[:, :, t]).argmax(-1))
        sequence = torch.stack(symbols, dim=-1)
        return sequence[..., :-1], sequence[..., 1:]


def _rows(table: Tensor, symbols: Tensor) -> Tensor:
    """Rows of each problem's table, ``(n_tasks, k, k)``, that symbols ``(n_tasks, B)`` name."""
    return table.take_along_dim(symbols.unsqueeze(-1), dim=1)
