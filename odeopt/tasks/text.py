"""English text that ships with Python, and transformers and recurrent networks that read it."""

from __future__ import annotations

import ast
import math
import sysconfig
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeopt.checks import is_integer, require

from .base import Batch
from .classification import SPLITS
from .examples import Examples, count_of
from .layers import (
    CELLS,
    WithPositions,
    attention_layers,
    check_attention,
    check_network,
    check_std,
    draw_small,
    recurrent_layer,
)
from .module import ModuleTask
from .random import uniform

N_SYMBOLS = 96  # the printable characters of ASCII and the end of a line
OBJECTIVES = ("next", "masked")
_MASKED = 0.15
_N_CHARACTERS = 500_000
_ELSEWHERE = {"site-packages", "dist-packages", "test", "pydoc_data", "__pycache__"}


@lru_cache(maxsize=1)
def standard_library_text() -> str:
    """Collect the docstrings of the standard library's modules, the first half a million characters.

    Modules are read in sorted order, those of packages after the others, so that the text is a function of the version
    of Python. Characters outside ASCII are left out.

    Raises:
        RuntimeError: If the sources of the standard library are not installed.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    text = _docstrings(folder)
    if len(text) < 10_000:
        raise RuntimeError(f"The sources of the standard library should lie in {folder}. Found {len(text)} characters.")
    return text


def _docstrings(folder: Path) -> str:
    documents, n = [], 0
    inner = (path for path in folder.glob("*/*.py") if path.parent.name not in _ELSEWHERE)
    for path in (*sorted(folder.glob("*.py")), *sorted(inner)):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some packages hold examples of what does not compile
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        found = [text.encode("ascii", "ignore").decode() for text in found if text]
        documents, n = documents + found, n + sum(map(len, found))
        if n >= _N_CHARACTERS:
            break
    return "\n\n".join(documents)[:_N_CHARACTERS]


@lru_cache(maxsize=1)
def _symbols() -> Tensor:
    """The text as int64 numbers below :data:`N_SYMBOLS`."""
    codes = torch.frombuffer(bytearray(standard_library_text().encode()), dtype=torch.uint8).long()
    return torch.where(codes == ord("\n"), N_SYMBOLS - 1, codes - 32)[(codes >= 32) & (codes < 127) | (codes == 10)]


class TextNetwork(ModuleTask):
    r"""A network that predicts characters of English text, the docstrings of Python's standard library.

    Each problem trains on a stretch of the text of its own and holds out the others. The loss is the mean cross-entropy
    in nats over the predicted positions: of the next character each (``"next"``), or of 15 % of the characters, which
    are replaced by a symbol of their own (``"masked"``).

    Args:
        make_module: Builds a network that maps symbols ``(batch_size, context)``, integers below :data:`N_SYMBOLS` or
            that number for the mask, to scores ``(batch_size, context, N_SYMBOLS)``; see :class:`ModuleTask`.
        context: Characters that are predicted from.
        objective: ``"next"`` or ``"masked"``.
        batch_size: Windows of the text per step.
        n_characters: Characters of the split that a problem trains on, or a fraction of them.
        split: ``"meta-train"`` or ``"evaluation"``, the halves of the text.
        device: See :class:`Task`.
        **config: See :class:`Task`.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If the sources of the standard library are not installed.
    """

    def __init__(
        self,
        make_module: Callable[[], nn.Module],
        *,
        context: int = 32,
        objective: str = "next",
        batch_size: int = 16,
        n_characters: float = 0.9,
        split: str = "meta-train",
        device: torch.device | str = "cpu",
        **config: Any,
    ) -> None:
        for name, value in (("context", context), ("batch_size", batch_size)):
            require(is_integer(value) and value >= 1, name, value, "a positive integer")
        require(objective in OBJECTIVES, "objective", objective, f"one of {', '.join(OBJECTIVES)}")
        require(split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}")
        symbols = _symbols().tensor_split(2)[SPLITS.index(split)]
        n, span = count_of(n_characters, len(symbols), name="n_characters"), context + 1
        is_right = span <= n <= len(symbols) - span
        wanted = f"between {span} and {len(symbols) - span}, characters of a window and those of all others"
        require(is_right, "n_characters", n_characters, wanted)
        self.examples = Examples(len(symbols), n, f"text/{split}", span=span)
        self.symbols, self.n_windows, self.context, self.is_masked = symbols, batch_size, context, objective == "masked"
        super().__init__(make_module, self._windows, loss_fn=_loss, device=device)
        self.config = config | {
            "context": context,
            "objective": objective,
            "batch_size": batch_size,
            "n_characters": n_characters,
            "split": split,
        }

    def sample_held_out(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Draw windows of the text that a problem does not train on; see :meth:`Task.sample_held_out`."""
        return self._windows(self._indices(indices), step, seed, held_out=True)

    def _windows(self, indices: Tensor, step: int, seed: int, *, held_out: bool = False) -> Batch:
        """Symbols ``(n_tasks, batch_size, context)``, and what is predicted of them, -100 where nothing is."""
        first = self.examples.draw(indices, self.n_windows, step=step, seed=seed, held_out=held_out)
        places = first.unsqueeze(-1) + torch.arange(self.context + 1, device=first.device)
        windows = self.symbols[places % len(self.symbols)]
        if not self.is_masked:
            return windows[..., :-1], windows[..., 1:]
        windows, stream = windows[..., :-1], f"{self.examples.stream}/{'held-out' if held_out else 'minibatch'}/mask"
        ranks = uniform(indices, windows.shape[1:], seed=seed, stream=stream, step=step).argsort(-1).argsort(-1)
        is_masked = ranks < math.ceil(_MASKED * self.context)
        return windows.masked_fill(is_masked, N_SYMBOLS), windows.masked_fill(~is_masked, -100)


class TextTransformer(TextNetwork):
    """A transformer on characters; causal where the next one is predicted, and not where masked ones are.

    Args:
        width: Width of the embedding and of the layers, a multiple of ``n_heads``.
        depth: Number of layers, each of attention and of a perceptron.
        n_heads: Number of heads.
        expansion: Width of the perceptrons in units of ``width``.
        norm: ``"pre"`` (norms before attention and perceptrons), ``"post"`` (after the sums), or ``"none"``.
        activation: One of ``"sigmoid"``, ``"tanh"``, ``"relu"``, ``"gelu"``.
        init_std: Deviation of all initial weights, biases being zero; as torch initialises layers by default.
        **options: See :class:`TextNetwork`.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If the sources of the standard library are not installed.

    Example:
        >>> task = TextTransformer(width=16, depth=1)
        >>> indices = torch.arange(2)
        >>> task.loss(task.init_params(indices, seed=0), task.sample_held_out(indices, step=0, seed=0)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        *,
        width: int = 32,
        depth: int = 2,
        n_heads: int = 2,
        expansion: int = 4,
        norm: str = "pre",
        activation: str = "gelu",
        init_std: float | None = None,
        context: int = 32,
        objective: str = "next",
        batch_size: int = 16,
        n_characters: float = 0.9,
        split: str = "meta-train",
        device: torch.device | str = "cpu",
    ) -> None:
        check_network(width, depth, activation)
        check_attention(width, n_heads, expansion, norm)
        check_std(init_std)

        def make() -> nn.Module:
            options = {"n_heads": n_heads, "expansion": expansion, "norm": norm, "is_causal": objective == "next"}
            layers = attention_layers(width, depth, activation, **options)
            ends = nn.Embedding(N_SYMBOLS + (objective == "masked"), width), nn.Linear(width, N_SYMBOLS)
            module = nn.Sequential(ends[0], WithPositions(context, width), *layers, ends[1])
            return module if init_std is None else draw_small(module, init_std)

        super().__init__(
            make,
            context=context,
            objective=objective,
            batch_size=batch_size,
            n_characters=n_characters,
            split=split,
            device=device,
            width=width,
            depth=depth,
            n_heads=n_heads,
            expansion=expansion,
            norm=norm,
            activation=activation,
            init_std=init_std,
        )


class TextRecurrence(TextNetwork):
    """A recurrent network that predicts the next character.

    Args:
        cell: ``"plain"``, ``"gru"`` or ``"lstm"``.
        width: Width of the embedding and of the layers.
        depth: Number of recurrent layers.
        activation: Of the states: one of ``"sigmoid"``, ``"tanh"``, ``"relu"``, ``"gelu"``; gates are sigmoid.
        **options: See :class:`TextNetwork`.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If the sources of the standard library are not installed.
    """

    def __init__(
        self,
        *,
        cell: str = "gru",
        width: int = 32,
        depth: int = 1,
        activation: str = "tanh",
        context: int = 24,
        batch_size: int = 16,
        n_characters: float = 0.9,
        split: str = "meta-train",
        device: torch.device | str = "cpu",
    ) -> None:
        check_network(width, depth, activation)
        require(cell in CELLS, "cell", cell, f"one of {', '.join(CELLS)}")

        def make() -> nn.Module:
            layers = (recurrent_layer(cell, width, activation) for _ in range(depth))
            return nn.Sequential(nn.Embedding(N_SYMBOLS, width), *layers, nn.Linear(width, N_SYMBOLS))

        super().__init__(
            make,
            context=context,
            batch_size=batch_size,
            n_characters=n_characters,
            split=split,
            device=device,
            cell=cell,
            width=width,
            depth=depth,
            activation=activation,
        )


def _loss(scores: Tensor, symbols: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, -2), symbols.flatten())
