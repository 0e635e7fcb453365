"""English text that ships with Python, and transformers and recurrent networks that read it."""

from __future__ import annotations

import ast
import math
import sysconfig
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from odeopt.checks import require, require_counts, require_one_of

from .base import Batch
from .classification import SPLITS
from .examples import Examples, count_of
from .layers import CELLS, TransformerFields, WithPositions, check_network
from .module import NetworkTask
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


@dataclass(eq=False, repr=False, kw_only=True)
class TextNetwork(NetworkTask):
    r"""A network that predicts characters of English text, the docstrings of Python's standard library.

    Each problem trains on a stretch of the text of its own and holds out the others. The loss is the mean cross-entropy
    in nats over the predicted positions: of the next character each (``"next"``), or of 15 % of the characters, which
    are replaced by a symbol of their own (``"masked"``).

    Networks map symbols ``(batch_size, context)``, integers below :data:`N_SYMBOLS` or that number for the mask, to
    scores ``(batch_size, context, N_SYMBOLS)``. To write one, see :class:`NetworkTask`.

    Args:
        context: Characters that are predicted from.
        objective: ``"next"`` or ``"masked"``.
        batch_size: Windows of the text per step.
        n_characters: Characters of the split that a problem trains on, or a fraction of them.
        split: ``"meta-train"`` or ``"evaluation"``, the halves of the text.
        device: See :class:`Task`.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If the sources of the standard library are not installed.
    """

    context: int = 32
    objective: str = "next"
    n_characters: float = 0.9
    split: str = "meta-train"

    def __post_init__(self) -> None:
        require_counts(context=self.context)
        require_one_of(OBJECTIVES, objective=self.objective)
        require_one_of(SPLITS, split=self.split)
        self.symbols = _symbols().tensor_split(2)[SPLITS.index(self.split)]
        n_all, span = len(self.symbols), self.context + 1
        n = count_of(self.n_characters, n_all, name="n_characters")
        wanted = f"between {span} and {n_all - span}, characters of a window and those of all others"
        require(span <= n <= n_all - span, "n_characters", self.n_characters, wanted)
        self.examples = Examples(n_all, n, f"text/{self.split}", span=span)
        super().__post_init__()

    def draw(self, indices: Tensor, step: int, seed: int, *, held_out: bool = False) -> Batch:
        """Symbols ``(n_tasks, batch_size, context)``, and what is predicted of them, -100 where nothing is."""
        first = self.examples.draw(indices, self.batch_size, step=step, seed=seed, held_out=held_out)
        places = first.unsqueeze(-1) + torch.arange(self.context + 1, device=first.device)
        windows = self.symbols[places % len(self.symbols)]
        if self.objective == "next":
            return windows[..., :-1], windows[..., 1:]
        windows, stream = windows[..., :-1], f"{self.examples.stream}/{'held-out' if held_out else 'minibatch'}/mask"
        ranks = uniform(indices, windows.shape[1:], seed=seed, stream=stream, step=step).argsort(-1).argsort(-1)
        is_masked = ranks < math.ceil(_MASKED * self.context)
        return windows.masked_fill(is_masked, N_SYMBOLS), windows.masked_fill(~is_masked, -100)


@dataclass(eq=False, repr=False, kw_only=True)
class TextTransformer(TransformerFields, TextNetwork):
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

    expansion: int = 4

    def build(self) -> nn.Module:
        is_causal = self.objective == "next"
        layers = self.layers(is_causal=is_causal)
        embedding, last = nn.Embedding(N_SYMBOLS + (not is_causal), self.width), nn.Linear(self.width, N_SYMBOLS)
        return self.drawn(nn.Sequential(embedding, WithPositions(self.context, self.width), *layers, last))


@dataclass(eq=False, repr=False, kw_only=True)
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

    cell: str = "gru"
    width: int = 32
    depth: int = 1
    activation: str = "tanh"
    context: int = 24
    objective: str = field(default="next", init=False)

    def __post_init__(self) -> None:
        check_network(self.width, self.depth, self.activation)
        require_one_of(CELLS, cell=self.cell)
        super().__post_init__()

    def build(self) -> nn.Module:
        layers = (CELLS[self.cell](self.width, self.activation) for _ in range(self.depth))
        return nn.Sequential(nn.Embedding(N_SYMBOLS, self.width), *layers, nn.Linear(self.width, N_SYMBOLS))
