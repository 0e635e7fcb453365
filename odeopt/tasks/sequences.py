"""Sequences of random Markov chains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeopt.checks import is_integer, require

from .base import Batch
from .layers import CELLS, WithPositions, attention_layers, check_network, recurrent_layer
from .module import ModuleTask
from .random import normal, uniform

# "recurrent" is the plain cell's name from before there were others
SEQUENCE_ARCHITECTURES = ("attention", "recurrent", *CELLS[1:])


class SequencePrediction(ModuleTask):
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

    def __init__(
        self,
        architecture: str = "attention",
        *,
        width: int = 16,
        depth: int = 1,
        n_symbols: int = 8,
        length: int = 12,
        activation: str = "tanh",
        batch_size: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        wanted = f"one of {', '.join(SEQUENCE_ARCHITECTURES)}"
        require(architecture in SEQUENCE_ARCHITECTURES, "architecture", architecture, wanted)
        check_network(width, depth, activation)
        require(is_integer(batch_size) and batch_size >= 1, "batch_size", batch_size, "positive")
        is_right = architecture != "attention" or width % 2 == 0
        require(is_right, "width", width, "even for two heads")
        for name, value in (("n_symbols", n_symbols), ("length", length)):
            require(is_integer(value) and value >= 2, name, value, "at least 2")

        def make() -> nn.Module:
            layers: list[nn.Module] = [nn.Embedding(n_symbols, width)]
            if architecture == "attention":
                layers.append(WithPositions(length, width))
                layers += attention_layers(width, depth, activation, is_causal=True)
            else:
                cell = "plain" if architecture == "recurrent" else architecture
                layers += [recurrent_layer(cell, width, activation) for _ in range(depth)]
            return nn.Sequential(*layers, nn.Linear(width, n_symbols))

        self.n_symbols, self.length, self.n_sequences = n_symbols, length, batch_size
        super().__init__(make, self._sequences, loss_fn=_sequence_loss, device=device)
        self.config = {
            "architecture": architecture,
            "width": width,
            "depth": depth,
            "n_symbols": n_symbols,
            "length": length,
            "activation": activation,
            "batch_size": batch_size,
        }

    def _sequences(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Symbols, ``(n_tasks, batch_size, length)``, and their successors."""
        k, options = self.n_symbols, {"seed": seed, "stream": "sequence/chain", "dtype": self.dtype}
        last, before = (2 * normal(indices, (2, k, k), **options)).unbind(1)
        # the maximum of logits and Gumbel noise is a draw from their softmax
        options["stream"] = "sequence/noise"
        u = uniform(indices, (self.n_sequences, self.length + 1, k), step=step, **options)
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


def _sequence_loss(logits: Tensor, symbols: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), symbols.flatten())
