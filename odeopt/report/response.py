"""The figure of what a rule answers to gradients."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from odeopt.report.figure import PALETTE, new_figure, save_figure, style


def plot_response(
    gradient: Tensor,
    update: Mapping[str, Tensor],
    step: Tensor,
    step_size: Mapping[str, Tensor],
    singular_value: Tensor,
    matrix_update: Tensor,
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> Path:
    """Draw the fields of :class:`odeopt.evaluation.Response` side by side, and save the figure.

    Args:
        gradient: Gradients, shape ``(n,)``.
        update: Updates by what the gradients were before, each ``(n,)``.
        step: Numbers of steps, ``(n_steps,)``.
        step_size: Sizes of the updates by what the rule is told, each ``(n_steps,)``.
        singular_value: Singular values of a gradient, ``(k,)``.
        matrix_update: The update along the singular directions, ``(k,)``.
        path: The image file.
        title: Stands above.

    Returns:
        The path.
    """
    with style():
        figure, (left, middle, right) = new_figure(11.0, 3.4, n_columns=3, title=title)
        for (name, values), colour in zip(update.items(), PALETTE, strict=False):
            left.plot(gradient, values, color=colour, label=f"after {name}")
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 3}
        left.legend(frameon=False, fontsize=7, handlelength=1.0, columnspacing=0.8, **below)
        left.set(title="vectors", xlabel="gradient over its mean magnitude", ylabel="update")
        for (name, values), colour in zip(step_size.items(), PALETTE, strict=False):
            middle.plot(step, values, color=colour, label=name)
        middle.legend(title="length of the run", frameon=False)
        middle.set(title="vectors, gradients of noise", xlabel="step", ylabel="update, root mean square")
        middle.set(xscale="log", yscale="log")
        right.plot(singular_value, matrix_update / matrix_update.abs().max(), color=PALETTE[0], marker=".")
        right.set(title="matrices, the same gradient again", xscale="log")
        right.set(xlabel="singular value of the gradient, over the largest", ylabel="update along it, over the largest")
        return save_figure(figure, path)
