"""Figure of the study of the guard: losses of the rule alone, of the fallback alone and under the guard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from odeopt.report import new_figure, save_figure, style

SHOWN = "wrong sign for a tenth of the run, network", "random weights, network", "rotated by half a turn"


def plot(curves: Mapping[str, Mapping[str, Tensor]], path: Path) -> Path:
    """Draw the losses of the first run of some cases."""
    with style():
        figure, panels = new_figure(9.6, 2.8, n_columns=len(SHOWN))
        for axes, name in zip(panels, SHOWN, strict=True):
            for label in ("rule", "fallback", "guarded"):
                axes.plot(curves[name][label].clamp(max=1e3), label=label, linewidth=1)
            axes.set(yscale="log", xlabel="step", title=name)
        panels[0].set_ylabel("training loss")
        panels[-1].legend(fontsize=7)
        return save_figure(figure, path)
