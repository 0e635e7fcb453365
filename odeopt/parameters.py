"""Parameter groups that fit a module, so that nobody has to filter parameters by their names."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from odeopt.checks import is_number, require, shown
from odeopt.rules.port_hamiltonian.kinetic import is_matrix

# names of layers of query, key and value in one, blocks of rows of equal size
_PROJECTIONS = {"qkv", "qkv_proj", "to_qkv", "wqkv", "c_attn"}
_CONV1D = "transformers.pytorch_utils", "Conv1D"
# forms of matrices beside numbers of blocks, and their options
_TRANSPOSED = "transposed"
_FORMS = {1: {}, _TRANSPOSED: {"is_transposed": True}}
# how names of tables end
_TABLES = {"pos", "position", "positions", "emb", "embed", "embedding", "embeddings", "table", "wpe", "wte"}


def param_groups(module: nn.Module, *, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Sort the parameters of a module into the groups that :class:`odeopt.LearnedOptimizer` steps best.

    Lookup tables are stepped coordinate by coordinate: their rows are vectors of their own. They are the weights of
    ``nn.Embedding`` and ``nn.EmbeddingBag``, also where a head shares them, and learned positions: parameters of shape
    ``(1, ..., length, n)``, and those of two axes whose name ends like ``pos_embed``, ``positions`` or
    ``position_bias_table``. So are gains of several axes (of a ``nn.LayerNorm`` over images, of weight normalisation,
    or of shape ``(n, 1, 1)``). Stacks, tensors of three or more axes that belong neither to a convolution nor to a
    ``nn.Bilinear``, such as the weights of experts, ``(experts, out, in)``, are stepped matrix by matrix
    (``is_stack``), and so are parameters of two axes, ``(experts, out)``, that the same module holds beside them.
    Matrices, convolutions and stacks are decayed, where that is asked for; tables, gains and vectors are not.

    Matrices of several blocks of rows are stepped block by block (``n_blocks``): query, key and value in one, of a
    ``nn.MultiheadAttention`` or of a ``nn.Linear`` with three times as many outputs as inputs, called ``qkv``,
    ``qkv_proj``, ``to_qkv``, ``Wqkv`` or ``c_attn``; and the gates of ``nn.LSTM``, ``nn.GRU`` and their cells.

    The weights of ``Conv1D`` of Transformers, as GPT-2 has them, are stored (in, out), and stepped so
    (``is_transposed``), query, key and value as one matrix.

    The last layer is stepped as the matrix that it is: by coordinates no network that was tried holds out better
    beyond the noise, and perceptrons have 1.3 to 1.5 times the held-out loss (``python examples/studies/heads.py
    --runs 3``).

    Four things cannot be told. A bare ``nn.Parameter`` used as ``x @ weight``, (in, out), is taken for one of shape
    (out, in), also in a stack: give it a group of its own with ``is_transposed``. A bare ``nn.Parameter`` used by
    ``F.conv2d`` counts as a stack: keep it in a ``nn.Conv2d``, or give it a group of its own, without ``is_stack``, to
    have it stepped as a matrix. So does a grid of vectors, ``(height, width, n)``, which wants a group with
    ``is_table``. And the matrix of a router, ``(experts, n)``, that the same module holds beside the experts counts as
    a stack of vectors: keep it in a ``nn.Linear``.

    Args:
        module: The module. A parameter that it holds twice is given once.
        weight_decay: Decoupled decay of the matrices; None leaves it to the ``weight_decay`` of
            :class:`odeopt.LearnedOptimizer`.

    Returns:
        Groups of named parameters: matrices, those of three and of four blocks, transposed ones, vectors, tables (with
        gains of several axes), stacks of matrices and of vectors; those that there are.

    Raises:
        TypeError: If ``module`` is not a module.
        ValueError: If ``weight_decay`` is neither a non-negative number nor None.

    Example:
        >>> groups = param_groups(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)))
        >>> [[name for name, _ in group["params"]] for group in groups]
        [['1.weight'], ['1.bias'], ['0.weight']]
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            "Parameter `module` should be an nn.Module: the model itself, because groups go by its layers and not "
            f"by its parameters alone. Found `module = {shown(module)}`."
        )
    is_right = weight_decay is None or (is_number(weight_decay) and weight_decay >= 0)
    require(is_right, "weight_decay", weight_decay, "a non-negative number or None")
    gains = [*_held_by(module, nn.LayerNorm, nn.RMSNorm), *_gains(module)]
    tables = {*map(id, _held_by(module, nn.Embedding, nn.EmbeddingBag)), *(id(x) for x in gains if x.ndim > 1)}
    kernels = {*map(id, _held_by(module, _ConvNd, nn.Bilinear))}
    stacks, blocks, transposed = _stacks(module, kernels), _blocks(module), _transposed(module)
    matrices, vectors, by_coordinates, stacked, stacked_vectors = {1: [], 3: [], 4: [], _TRANSPOSED: []}, [], [], [], []
    for name, param in module.named_parameters():
        is_kernel, is_row = id(param) in kernels, _is_row(param)
        if id(param) in tables or (not is_kernel and not is_row and _is_table(name, param)):
            kind = by_coordinates
        elif id(param) in stacks:
            kind = stacked if param.ndim > 2 else stacked_vectors
        elif not is_matrix(tuple(param.shape)) and not (is_kernel and param.ndim > 2):
            kind = vectors
        else:
            is_gain = is_row and param.ndim > 2 and not is_kernel
            form = _TRANSPOSED if id(param) in transposed else blocks.get(id(param), 1)
            kind = by_coordinates if is_gain else matrices[form]
        kind.append((name, param))
    decayed = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups = (
        *({"params": some, **decayed} | _FORMS.get(form, {"n_blocks": form}) for form, some in matrices.items()),
        {"params": vectors, "weight_decay": 0.0},
        {"params": by_coordinates, "weight_decay": 0.0, "is_table": True},
        {"params": stacked, **decayed, "is_stack": True},
        {"params": stacked_vectors, "weight_decay": 0.0, "is_stack": True},
    )
    return [group for group in groups if group["params"]]


def _is_row(param: nn.Parameter) -> bool:
    """Whether a parameter extends along one axis at most."""
    return param.numel() == 0 or max(param.shape, default=1) == param.numel()


def _is_table(name: str, param: nn.Parameter) -> bool:
    """Whether a parameter that no layer of torch holds is a table of vectors, such as learned positions."""
    if param.ndim > 2:
        return param.shape[0] == 1
    return param.ndim == 2 and name.rpartition(".")[2].lower().rpartition("_")[2] in _TABLES


def _stacks(module: nn.Module, kernels: Collection[int]) -> set[int]:
    """Stacks, and what is of two axes beside them, as many vectors as the stack has matrices; by their identity."""
    found = set()
    for part in module.modules():
        held = [*part.parameters(recurse=False)]
        if is_parametrized(part):
            held += (param for each in part.parametrizations.values() for param in each.parameters(recurse=False))
        own = [param for param in held if id(param) not in kernels]
        stacks = [x for x in own if x.ndim > 2 and x.shape[0] > 1 and not _is_row(x)]
        lengths = {x.shape[0] for x in stacks}
        found.update(map(id, stacks), (id(x) for x in own if x.ndim == 2 and x.shape[0] in lengths))
    return found


def _blocks(module: nn.Module) -> dict[int, int]:
    """Number of blocks of rows of the matrices that consist of several, by their identity."""
    found = {}
    for name, part in module.named_modules():
        called = [word for word in name.split(".") if word != "_orig_mod"]  # a layer that torch.compile has wrapped
        if isinstance(part, nn.MultiheadAttention):
            n, weights = 3, r"in_proj_weight"
        elif isinstance(part, nn.LSTM | nn.LSTMCell | nn.GRU | nn.GRUCell):
            n, weights = 4 if isinstance(part, nn.LSTM | nn.LSTMCell) else 3, r"weight_[ih]h\w*"
        elif isinstance(part, nn.Linear) and called[-1:] and called[-1].lower() in _PROJECTIONS:
            n, weights = 3 if part.out_features == 3 * part.in_features else 1, r"weight(_v)?"
        else:
            continue
        # by whatever parametrization, but not what it adds to the matrix
        pattern = re.compile(rf"(parametrizations\.)?{weights}(\.original\d?)?")
        found |= {id(param): n for key, param in part.named_parameters() if pattern.fullmatch(key)}
    return found


def _transposed(module: nn.Module) -> set[int]:
    """Weights of ``transformers.pytorch_utils.Conv1D``, by their identity; the package need not be there."""
    found = set()
    for part in module.modules():
        if any((base.__module__, base.__name__) == _CONV1D for base in type(part).__mro__):
            found.update(id(param) for param in part.parameters())
    return found


def _gains(module: nn.Module) -> list[nn.Parameter]:
    """Gains that weight normalisation gives to layers."""
    found = []
    for part in module.modules():
        if isinstance(part, ParametrizationList) and isinstance(part[0], _WeightNorm):
            found.append(part.original0)
        hooks = (hook for hook in part._forward_pre_hooks.values() if isinstance(hook, WeightNorm))
        found += [getattr(part, f"{hook.name}_g") for hook in hooks]
    return found


def _held_by(module: nn.Module, *kinds: type[nn.Module]) -> list[nn.Parameter]:
    """Parameters of the submodules of some kinds, by whatever parametrization."""
    return [param for part in module.modules() if isinstance(part, kinds) for param in part.parameters()]
