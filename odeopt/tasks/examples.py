"""Splits of finitely many examples: those that a problem trains on, and those that it holds out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from odeopt.checks import is_integer, require

from .random import integers


@dataclass(frozen=True)
class Examples:
    """Numbers ``0 ... n_all - 1`` of examples, of which each problem trains on some and holds out the others.

    The examples lie on a circle, in an order that has been shuffled before where that matters; a problem trains on an
    arc of it that begins at a place of its own, a function of its index and the seed.

    Attributes:
        n_all: Number of examples.
        n_trained: Number of those that a problem trains on; where these are all, held-out draws are others of them.
        stream: Name of the random numbers.
        is_shared: Whether all problems train on the first examples instead.
        span: Number of neighbours that are used together, such as the characters of a text: a draw is the first of so
            many on one side.
    """

    n_all: int
    n_trained: int
    stream: str
    is_shared: bool = False
    span: int = 1

    def draw(self, indices: Tensor, n: int, *, step: int, seed: int, held_out: bool = False) -> Tensor:
        """Draw ``n`` examples per problem with replacement, int64, shape ``(n_tasks, n)``."""
        is_part = self.n_trained < self.n_all
        first, size = (self.n_trained, self.n_all - self.n_trained) if held_out and is_part else (0, self.n_trained)
        stream = f"{self.stream}/{'held-out' if held_out else 'minibatch'}"
        places = first + integers(indices, (n,), size - self.span + 1, seed=seed, stream=stream, step=step)
        if self.is_shared or not is_part:
            return places
        return (places + integers(indices, (1,), self.n_all, seed=seed, stream=f"{self.stream}/arc")) % self.n_all


def count_of(n_examples: float | None, n_all: int, *, name: str = "n_examples") -> int:
    """Number of examples to train on, out of a number or a fraction of all; all for None.

    Raises:
        ValueError: If it is neither an integer between 1 and ``n_all`` nor a fraction between 0 and 1.
    """
    if n_examples is None:
        return n_all
    if isinstance(n_examples, float):
        require(0 < n_examples < 1, name, n_examples, "an integer, or a fraction that lies between 0 and 1")
        return max(1, int(n_examples * n_all))
    require(is_integer(n_examples) and 1 <= n_examples <= n_all, name, n_examples, f"between 1 and {n_all}")
    return n_examples
