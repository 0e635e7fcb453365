"""Parameter groups that fit a module, so that nobody has to filter parameters by their names."""

from __future__ import annotations

from typing import Any

from torch import nn

from odeopt.checks import is_number, require
from odeopt.rules.port_hamiltonian.kinetic import is_matrix


def param_groups(module: nn.Module, *, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Sort the parameters of a module into the groups that :class:`odeopt.LearnedOptimizer` steps best.

    Lookup tables (``nn.Embedding``, ``nn.EmbeddingBag``), also where a head shares their weight, are stepped coordinate
    by coordinate: their rows are vectors of their own. Matrices and convolutions are decayed, where that is asked for;
    vectors (biases, gains of norms, one row that is added, of shape ``(1, ..., n)``) and tables are not.

    Args:
        module: The module. A parameter that it holds twice is given once.
        weight_decay: Decoupled decay of the matrices; None leaves it to the ``weight_decay`` of
            :class:`odeopt.LearnedOptimizer`.

    Returns:
        Groups of named parameters: matrices, vectors and tables; those that there are.

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
    embeddings = (part for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag))
    tables = {id(param) for part in embeddings for param in part.parameters()}  # by whatever parametrization
    matrices, vectors, looked_up = [], [], []
    for name, param in module.named_parameters():
        kind = looked_up if id(param) in tables else matrices if is_matrix(tuple(param.shape)) else vectors
        kind.append((name, param))
    decayed = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups = (
        {"params": matrices, **decayed},
        {"params": vectors, "weight_decay": 0.0},
        {"params": looked_up, "weight_decay": 0.0, "is_table": True},
    )
    return [group for group in groups if group["params"]]
