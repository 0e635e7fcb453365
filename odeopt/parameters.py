"""Parameter groups that fit a module, so that nobody has to filter parameters by their names."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from odeopt.checks import is_number, require
from odeopt.rules.port_hamiltonian.kinetic import is_matrix


def param_groups(module: nn.Module, *, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Sort the parameters of a module into the groups that :class:`odeopt.LearnedOptimizer` steps best.

    Lookup tables (``nn.Embedding``, ``nn.EmbeddingBag``), also where a head shares their weight, are stepped coordinate
    by coordinate: their rows are vectors of their own. So are gains of several axes (of a ``nn.LayerNorm`` over images,
    or of shape ``(n, 1, 1)``). Stacks, tensors of three or more axes that belong neither to a convolution nor to a
    ``nn.Bilinear``, such as the weights of experts, ``(experts, out, in)``, are stepped matrix by matrix
    (``is_stack``). Matrices, convolutions and stacks are decayed, where that is asked for; tables, gains and vectors
    (biases, one row that is added, of shape ``(1, ..., n)``) are not.

    Three things cannot be told. A bare ``nn.Parameter`` used by ``F.conv2d`` counts as a stack: keep it in a
    ``nn.Conv2d``, or give it a group of its own, without ``is_stack``, to have it stepped as a matrix. So does a grid
    of vectors, ``(height, width, n)``, which wants a group with ``is_table``. A stack of vectors, ``(networks, n)``,
    counts as a matrix.

    Args:
        module: The module. A parameter that it holds twice is given once.
        weight_decay: Decoupled decay of the matrices; None leaves it to the ``weight_decay`` of
            :class:`odeopt.LearnedOptimizer`.

    Returns:
        Groups of named parameters: matrices, vectors, tables (with gains of several axes) and stacks; those that there
        are.

    Raises:
        TypeError: If ``module`` is not a module.
        ValueError: If ``weight_decay`` is neither a non-negative number nor None.

    Example:
        >>> groups = param_groups(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)))
        >>> [[name for name, _ in group["params"]] for group in groups]
        [['1.weight'], ['1.bias'], ['0.weight']]
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"Parameter `module` should be an nn.Module. Found `module = {module!r}`.")
    is_right = weight_decay is None or (is_number(weight_decay) and weight_decay >= 0)
    require(is_right, "weight_decay", weight_decay, "a non-negative number or None")
    tables = _held_by(module, nn.Embedding, nn.EmbeddingBag)
    tables |= {key: param for key, param in _held_by(module, nn.LayerNorm, nn.RMSNorm).items() if param.ndim > 1}
    kernels = _held_by(module, _ConvNd, nn.Bilinear)
    matrices, vectors, by_coordinates, stacks = [], [], [], []
    for name, param in module.named_parameters():
        if id(param) in tables:
            kind = by_coordinates
        elif not is_matrix(tuple(param.shape)):
            kind = vectors
        elif param.ndim == 2 or id(param) in kernels:
            kind = matrices
        else:
            kind = by_coordinates if max(param.shape) == param.numel() else stacks
        kind.append((name, param))
    decayed = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups = (
        {"params": matrices, **decayed},
        {"params": vectors, "weight_decay": 0.0},
        {"params": by_coordinates, "weight_decay": 0.0, "is_table": True},
        {"params": stacks, **decayed, "is_stack": True},
    )
    return [group for group in groups if group["params"]]


def _held_by(module: nn.Module, *kinds: type[nn.Module]) -> dict[int, nn.Parameter]:
    """Parameters of the submodules of some kinds, by whatever parametrization, by their identity."""
    parts = (part for part in module.modules() if isinstance(part, kinds))
    return {id(param): param for part in parts for param in part.parameters()}
