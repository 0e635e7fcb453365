"""Detection of meta-gradients of unusual length."""

from __future__ import annotations

import statistics
from typing import Any

_N_NORMS = 50  # accepted norms that the next one is compared with
_N_LEAST = 10  # under which none is an outlier
_N_SURPLUS = 25  # outliers more than accepted norms since the first of them, at which they are the rule


class Outliers:
    """Tells a norm far beyond the median of the norms accepted before it.

    Outliers do not move that median while they are exceptions. Where there are 25 more of them than accepted norms the
    run has come to a place with longer gradients: they take the place of the norms accepted before, and so of no run
    are all further gradients outliers.

    Args:
        factor: Norm from which on one is an outlier, in multiples of the median.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.accepted: list[float] = []
        self.surplus: list[float] = []

    def has(self, norm: float) -> bool:
        """Decide whether the next norm, a finite number, is an outlier; called once for each norm."""
        if len(self.accepted) < _N_LEAST or norm <= self.factor * statistics.median(self.accepted):
            self.accepted = [*self.accepted, norm][-_N_NORMS:]
            self.surplus = self.surplus[1:]
            return False
        if len(self.surplus) < _N_SURPLUS:
            self.surplus.append(norm)
            return True
        self.accepted, self.surplus = self.surplus, []
        return self.has(norm)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next judgements depend on, for a checkpoint."""
        return {"accepted": self.accepted, "surplus": self.surplus}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.accepted, self.surplus = state["accepted"], state["surplus"]
