"""Multilayer perceptrons, many at a time: what tasks that train them have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from odeopt.checks import is_integer, is_list, require, require_counts, require_one_of

from .base import DeclaredTask, Params
from .random import uniform

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
}


@dataclass(eq=False, repr=False, kw_only=True)
class PerceptronTask(DeclaredTask):
    """A task whose problems are to train a multilayer perceptron, a new initialisation for each.

    Parameters are named and shaped as in ``nn.Sequential(Linear, activation, Linear, ...)``: ``"0.weight"``
    of shape ``(out, in)``, ``"0.bias"``, ``"2.weight"``, ...; they start as ``nn.Linear`` does, uniform
    within ``1 / sqrt(fan_in)`` of zero. A subclass has the field ``widths``, those of the hidden layers if any.

    Args:
        activation: One of ``"sigmoid"``, ``"tanh"``, ``"relu"``, ``"gelu"``.
        batch_size: Examples per step.
        device: See :class:`Task`.
        dtype: See :class:`Task`.

    Raises:
        ValueError: If a size is not positive or the activation is not one of these.
    """

    activation: str = "sigmoid"
    batch_size: int = 128

    def __post_init__(self, n_inputs: int, n_outputs: int, stream: str) -> None:
        """Take the numbers of inputs and outputs, and the name of the random numbers of the initialisations."""
        require_counts(batch_size=self.batch_size, n_inputs=n_inputs, n_outputs=n_outputs)
        are_counts = is_list(self.widths) and all(is_integer(width) and width >= 1 for width in self.widths)
        require(are_counts, "widths", self.widths, "a list of positive integers")
        require_one_of(ACTIVATIONS, activation=self.activation)
        self.widths, self.sizes, self.stream = list(self.widths), (n_inputs, *self.widths, n_outputs), stream
        super().__post_init__()

    @property
    def param_shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter of one network, by name."""
        return perceptron_shapes(self.sizes)

    def init_params(self, indices: Tensor, seed: int) -> Params:
        """Draw networks as ``nn.Linear`` does; see :meth:`Task.init_params`."""
        indices = self._indices(indices)
        params = {}
        for name, shape in self.param_shapes.items():
            layer = int(name.split(".")[0]) // 2
            bound = 1 / math.sqrt(self.sizes[layer])
            u = uniform(indices, shape, seed=seed, stream=f"{self.stream}/{name}", dtype=self.dtype)
            params[name] = u.mul_(2 * bound).sub_(bound)
        return params

    def outputs(self, params: Params, x: Tensor) -> Tensor:
        """Apply each problem's network to its inputs: (n_tasks, B, n_inputs) to (n_tasks, B, n_outputs)."""
        return perceptron(params, x, ACTIVATIONS[self.activation])


def perceptron_shapes(sizes: Sequence[int]) -> dict[str, torch.Size]:
    """Shape of each parameter of a network with layers of these sizes, by name."""
    shapes = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        shapes[f"{2 * layer}.weight"] = torch.Size((fan_out, fan_in))
        shapes[f"{2 * layer}.bias"] = torch.Size((fan_out,))
    return shapes


def perceptron(params: Params, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Evaluate networks, each on inputs of its own: (n_networks, B, n_inputs) to (n_networks, B, n_outputs)."""
    # examples run along the last axis: measured on a CPU, the first layer's products, forward and backward,
    # are a third faster than with examples along rows
    x = x.transpose(1, 2)
    n_layers = len(params) // 2
    for layer in range(n_layers):
        weight, bias = params[f"{2 * layer}.weight"], params[f"{2 * layer}.bias"]
        x = torch.baddbmm(bias.unsqueeze(2), weight, x)
        if layer < n_layers - 1:
            x = activation(x)
    return x.transpose(1, 2)
