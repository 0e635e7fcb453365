"""Figures; the one door to matplotlib, which is imported inside the functions only.

No display, no pyplot and no global state: figures are drawn by matplotlib's Agg canvas, and the style holds
inside the functions here alone.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from odeopt.evaluation import Comparison, student_interval, trailing_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito (2008), Color universal design; yellow is left out, which white paper swallows
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LEARNED_DASHES = ("solid", (0, (6, 2)), (0, (2, 1.2)), (0, (7, 2, 2, 2)))
_HAND_DESIGNED_DASHES = (
    "solid",
    (0, (5, 2)),
    (0, (1.2, 1.2)),
    (0, (6, 2, 1.2, 2)),
    (0, (6, 2, 1.2, 2, 1.2, 2)),
)
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "savefig.dpi": 160,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the library's style inside the block; the caller's settings come back after it."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float, n_columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure without a window; call it inside :func:`style`.

    Args:
        width: In inches.
        height: In inches.
        n_columns: Number of axes side by side.

    Returns:
        The figure and its axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, n_columns, squeeze=False)[0])


def use_logarithms(axes: Axes) -> None:
    """Make both axes logarithmic, with a tick at every second power of ten of the vertical one."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(base=100, numticks=20))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())


def use_plain_numbers(axis: Axis, subs: Sequence[float] = (1, 2, 3, 5)) -> None:
    """Write plain numbers at a logarithmic axis, also between powers of ten, of which there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save_figure(figure: Figure, path: str | os.PathLike) -> Path:
    """Write a figure, making its folder where there is none; the suffix chooses the format.

    Args:
        figure: The figure.
        path: The file.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def line_styles(is_learned: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    """Colour, dashes and width per rule: learned rules thick and dark, no two alike in grey print.

    Args:
        is_learned: Whether each rule is learned, by name.

    Returns:
        Keyword arguments of ``Axes.plot``, by name.
    """
    styles, n_learned, n_hand_designed = {}, 0, 0
    for i, (name, learned) in enumerate(is_learned.items()):
        dashes = _LEARNED_DASHES if learned else _HAND_DESIGNED_DASHES
        n = n_learned if learned else n_hand_designed
        styles[name] = {
            "color": PALETTE[i % len(PALETTE)],
            "linestyle": dashes[n % len(dashes)],
            "linewidth": 2.4 if learned else 1.1,
            "zorder": 3 if learned else 2,
        }
        n_learned, n_hand_designed = n_learned + learned, n_hand_designed + (not learned)
    return styles


def plot_comparison(comparison: Comparison, path: str | os.PathLike, *, title: str | None = None) -> Path:
    """Draw the mean loss against the step with its 95 % interval, on a logarithmic axis, and save it.

    Where minibatches make single losses jump, each run's is averaged over the last twentieth of the steps so far.

    Args:
        comparison: What to draw.
        path: The image file.
        title: Title; the task's name and the number of runs by default.

    Returns:
        The path.
    """
    with style():
        figure, (axes,) = new_figure(7.2, 4.2)
        # a loss after the last update that counts by itself is one without minibatches
        is_noisy = comparison.score != "final"
        losses = {name: result.losses for name, result in comparison.results.items()}
        losses = {name: trailing_mean(runs) if is_noisy else runs for name, runs in losses.items()}
        styles = line_styles({name: result.is_learned for name, result in comparison.results.items()})
        bands = {name: torch.tensor([student_interval(at_step) for at_step in runs]).T for name, runs in losses.items()}
        finite = torch.cat([mean[mean.isfinite()] for mean, _, _ in bands.values()])
        first = torch.stack([mean[0] for mean, _, _ in bands.values()])
        # a rule that diverges leaves the axis and may not squeeze the others
        bottom, top = 0.9 * finite.min().item(), 1.5 * first.max().item()
        for name, (mean, low, high) in bands.items():
            steps = torch.arange(len(mean))
            axes.plot(steps, mean, **styles[name])
            axes.fill_between(steps, low, high, where=mean < top, color=styles[name]["color"], alpha=0.16, linewidth=0)
        axes.set_yscale("log")
        axes.set_xlim(0, comparison.n_steps)
        axes.set_ylim(bottom, top)
        axes.xaxis.get_major_locator().set_params(integer=True)
        use_plain_numbers(axes.yaxis)
        unit = f" [{comparison.loss_unit}]" if comparison.loss_unit else ""
        axes.set_xlabel(f"optimizer step{'; losses over the last 5 % of steps so far' if is_noisy else ''}")
        axes.set_ylabel(f"loss{unit}, mean and its 95 % interval")
        axes.set_title(title or f"{comparison.task['task']}, {comparison.n_runs} runs")
        ends = {name: mean[-1].item() for name, (mean, _, _) in bands.items()}
        _label_ends(figure, axes, ends, styles)
        return save_figure(figure, path)


def plot_escape(
    losses: Mapping[str, Mapping[str, Tensor]],
    thresholds: Mapping[str, float],
    is_learned: Mapping[str, bool],
    path: str | os.PathLike,
    *,
    title: str,
) -> Path:
    """Draw, per landscape, how many runs have left its saddle by each step, and save it.

    Args:
        losses: Losses by landscape and rule, each of shape ``(n_steps + 1, n_runs)``.
        thresholds: Loss below which a run has left, by landscape.
        is_learned: Whether each rule is learned, by name.
        path: The image file.
        title: Title of the figure.

    Returns:
        The path.
    """
    from matplotlib.ticker import FuncFormatter

    with style():
        figure, panels = new_figure(4.6 * len(losses) + 1.2, 3.8, len(losses))
        styles = line_styles(is_learned)
        for axes, (landscape, runs) in zip(panels, losses.items(), strict=True):
            for name, values in runs.items():
                has_left = (values < thresholds[landscape]).cummax(0).values.double().mean(1)
                # from step 1 on: a logarithmic axis has no 0, where no run has left
                steps = range(1, len(has_left))
                axes.step(steps, 100 * has_left[1:], where="post", label=name, **styles[name])
            axes.set_xscale("log")
            axes.set_xlim(1, max(2, len(has_left) - 1))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_ylim(-2, 102)
            axes.set_xlabel("optimizer step")
            axes.set_title(landscape)
        panels[0].set_ylabel("runs that have left the saddle [%]")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
        return save_figure(figure, path)


def _label_ends(figure: Figure, axes: Axes, ends: Mapping[str, float], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Write each curve's name at its right end, none over another, joined by a line in the curve's style."""
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height  # before the layout: it only changes by the axes' labels
    wanted = {}
    for name, value in ends.items():
        is_inside = value < float("inf")
        point = axes.transData.transform((0, min(max(value, low), high) if is_inside else high))
        wanted[name] = axes.transAxes.inverted().transform(point)[1]
    gap = 13 * figure.dpi / 72 / height
    placed = _spread(wanted, gap)
    for name, y in placed.items():
        remark = "" if ends[name] < high else ", off the axis" if ends[name] < float("inf") else ", diverged"
        axes.annotate(
            name + remark,
            (1, wanted[name]),
            (1.09, y),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            ha="left",
            fontsize=8.5,
            fontweight="bold" if styles[name]["linewidth"] > 2 else "normal",
            annotation_clip=False,
        )
        axes.plot(
            [1.0, 1.03, 1.08],
            [wanted[name], y, y],
            transform=axes.transAxes,
            clip_on=False,
            **{**styles[name], "linewidth": min(styles[name]["linewidth"], 1.8)},
        )


def _spread(wanted: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights in [0, 1] at least a gap apart, in the order of the wanted ones and close to them."""
    names = sorted(wanted, key=wanted.get)
    heights: list[float] = []
    for name in names:
        heights.append(max(wanted[name], heights[-1] + gap) if heights else max(wanted[name], 0.0))
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return _centred(names, heights, wanted, gap)


def _centred(names: Sequence[str], heights: list[float], wanted: Mapping[str, float], gap: float) -> dict[str, float]:
    """Move each block of touching labels so that it sits around its curves rather than above them."""
    start = 0
    while start < len(names):
        end = start + 1
        while end < len(names) and heights[end] - heights[end - 1] <= gap * 1.001:
            end += 1
        offset = sum(heights[i] - wanted[names[i]] for i in range(start, end)) / (end - start)
        floor = heights[start - 1] + gap if start else 0.0
        ceiling = heights[end] - gap if end < len(names) else 1.0
        offset = max(min(offset, heights[start] - floor), heights[end - 1] - ceiling)
        heights[start:end] = [h - offset for h in heights[start:end]]
        start = end
    return dict(zip(names, heights, strict=True))


def plot_memory(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    path: str | os.PathLike,
    *,
    limit: float,
    title: str,
) -> Path:
    """Draw the memory of a meta-gradient against its horizon, on logarithmic axes, and save it.

    Args:
        curves: Pairs of horizon in steps and memory in bytes, by the name of the method.
        path: The image file.
        limit: Memory in bytes at which a line is drawn.
        title: Title of the figure.

    Returns:
        The path.
    """
    with style():
        figure, (axes,) = new_figure(5.6, 3.8)
        styles = line_styles(dict.fromkeys(curves, True))
        for (name, points), marker in zip(curves.items(), "osD^", strict=False):
            horizons, sizes = zip(*sorted(points), strict=True)
            axes.plot(horizons, [size / 1e6 for size in sizes], marker=marker, label=name, **styles[name])
        axes.axhline(limit / 1e6, color="#666666", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(f"{limit / 1e9:g} GB", (0.01, limit / 1e6), xycoords=("axes fraction", "data"), va="bottom")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("horizon [optimizer steps]")
        ticks = sorted({horizon for points in curves.values() for horizon, _ in points})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_ylabel("peak memory [MB]")
        axes.set_title(title)
        axes.legend(frameon=False)
        return save_figure(figure, path)


def plot_step_cost(
    costs: Mapping[str, Mapping[int, Tensor]],
    ratios: Mapping[str, Mapping[str, Tensor]],
    is_learned: Mapping[str, bool],
    path: str | os.PathLike,
    *,
    reference: str,
    title: str,
) -> Path:
    """Draw what a step costs: per parameter against their number, and as a ratio to one optimizer; and save it.

    Medians, with their quartiles as a band or a line.

    Args:
        costs: Samples in nanoseconds per parameter, by optimizer and number of parameters.
        ratios: Samples of the ratio to the time of ``reference``, by workload and optimizer.
        is_learned: Whether each optimizer is a learned one, by name.
        path: The image file.
        reference: Name of the optimizer of ratio one.
        title: Title of the figure.

    Returns:
        The path.
    """

    def quartiles(samples: Mapping[Any, Tensor]) -> Tensor:
        return torch.stack([x.double().quantile(x.new_tensor((0.25, 0.5, 0.75)).double()) for x in samples.values()])

    with style():
        figure, (left, right) = new_figure(11.0, 4.6, 2)
        styles = line_styles(is_learned)
        for name, samples in costs.items():
            low, middle, high = quartiles(samples).T
            left.plot(list(samples), middle, marker=".", label=name, **styles[name])
            left.fill_between(list(samples), low, high, color=styles[name]["color"], alpha=0.16, linewidth=0)
        left.set_xscale("log")
        left.set_yscale("log")
        left.set_xlabel("parameters, in one tensor")
        left.set_ylabel("time of a step [ns per parameter]")
        shown = [name for name in is_learned if any(name in samples for samples in ratios.values())]
        rows = {name: -i for i, name in enumerate(shown)}
        for i, (workload, samples) in enumerate(ratios.items()):
            low, middle, high = quartiles(samples).T
            heights = [rows[name] + 0.5 * ((len(ratios) - 1) / 2 - i) / len(ratios) for name in samples]
            right.hlines(heights, low, high, color=PALETTE[i], linewidth=1.2)
            right.plot(middle, heights, "osD^v"[i % 5], color=PALETTE[i], markersize=4.5, label=workload)
        right.axvline(1, color="#666666", linewidth=1, linestyle=(0, (4, 3)))
        right.set_yticks(list(rows.values()), list(rows))
        right.set_xscale("log")
        right.set_xlabel(f"time of a step over that of {reference}")
        right.legend(frameon=False, loc="upper right")
        for axis in (left.yaxis, right.xaxis):
            use_plain_numbers(axis, (1, 2, 5))
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
        return save_figure(figure, path)


def plot_ratios(
    panels: Mapping[str, Mapping[str, Mapping[str, float]]], path: str | os.PathLike, *, label: str, n_columns: int = 5
) -> Path:
    """Draw ratios as heat maps, one row per factor, with the numbers in the fields; and save them.

    Args:
        panels: Ratios by the title of the panel, by factor and by the factor's value; all with the same factors.
        path: The image file.
        label: What the ratio is, for the colour bar, which ends at one half and two.
        n_columns: Fields in a row; a factor of more values takes several rows.

    Returns:
        The path.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    with style():
        starts = {factor: range(0, len(values), n_columns) for factor, values in next(iter(panels.values())).items()}
        names = [factor if i == 0 else "" for factor, rows in starts.items() for i in rows]
        figure, axes_of = new_figure(1.1 * n_columns * len(panels) + 1.6, 0.52 * len(names) + 0.5, len(panels))
        colours = ScalarMappable(LogNorm(0.5, 2), "PuOr_r")  # orange is worse
        for axes, (title, factors) in zip(axes_of, panels.items(), strict=True):
            rows = [
                list(values.items())[i : i + n_columns] for factor, values in factors.items() for i in starts[factor]
            ]
            for row, fields in enumerate(rows):
                for column, (value, ratio) in enumerate(fields):
                    axes.add_patch(Rectangle((column, row), 0.97, 0.94, color=colours.to_rgba(ratio), linewidth=0))
                    number = f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0e}" if ratio < float("inf") else "diverged"
                    ink = "black" if sum(colours.to_rgba(ratio)[:3]) > 1.5 else "white"
                    at = {"ha": "center", "va": "center", "color": ink}
                    axes.text(column + 0.485, row + 0.3, "\n".join(textwrap.wrap(value, 21)), fontsize=6, **at)
                    axes.text(column + 0.485, row + 0.74, number, fontsize=9, **at)
            axes.set(xlim=(0, n_columns), ylim=(len(names), 0), xticks=[], title=title)
            axes.set_yticks(
                [row + 0.47 for row in range(len(names))], names if axes is axes_of[0] else [""] * len(names)
            )
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        ticks = (0.5, 0.7, 1, 1.4, 2)
        bar = figure.colorbar(colours, ax=axes_of, label=label, fraction=0.03)
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks], minor=False)
        bar.set_ticks([], minor=True)
        return save_figure(figure, path)
