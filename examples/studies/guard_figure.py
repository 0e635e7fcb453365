"""Figure and table of the study of the guard: losses of the rule alone, of the fallback alone and under the guard."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from torch import Tensor

from odeopt.report import draw_table, new_figure, save_figure, style

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


def table(content: Mapping[str, Any], *, markdown: bool) -> str:
    """Draw the mean final losses, their ratios to the fallback's and to the start, and what was done."""
    rows = []
    for name, case in content["cases"].items():
        final = {key: [math.inf if x is None else x for x in values] for key, values in case["final"].items()}
        means = [f"{sum(values) / len(values):.3g}" for values in map(final.get, ("rule", "fallback", "guarded"))]
        ratios = [[*map(operator.truediv, final["guarded"], final[key])] for key in ("fallback", "start")]
        shown = [f"{geometric_mean(values):.2f} ({max(values):.2f})" for values in ratios]
        handovers = "{}-{}".format(*(choose(status[1] for status in case["status"]) for choose in (min, max)))
        rows.append([name, *means, *shown, handovers, "yes" if case["equal"] else "no"])
    titles = "task", "rule", "fallback", "guarded", "to fallback", "to start", "hand-overs", "as without"
    return draw_table([(title, "") for title in titles], rows, markdown=markdown)
