"""Tables and the figure of the benchmark of the step."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from figures import plot_step_cost
from workloads import FOREACH, LEARNED, LOOP, LSTM, MODELS, REFERENCES, SHOWN

from odeopt.report import draw_table

CAPTION = """Medians [quartiles] of interleaved repeats; x Adam and x SGD: ratio of times within a repeat.
State: what lies in optimizer.state. Extra: peak of memory during a step beyond parameters, gradients and state.
First step: laying out the state, and on CUDA compiling what Triton's cache on disk does not hold."""


def timing_table(rows: list[dict]) -> str:
    """One line per contender on one workload."""
    n, ms = rows[0]["n"], {row["optimizer"]: row["ms"] for row in rows}
    headers = [("", ""), ("step", "ms"), ("step", "ns/param"), ("x Adam", "foreach"), ("x Adam", "fused"),
               ("x SGD", "momentum"), ("state", "B/param"), ("extra", "B/param"), ("first step", "s")]  # fmt: skip
    table = []
    for row in rows:
        foreach, fused, momentum = (ratio(row["ms"], ms[name]) for name in REFERENCES)
        extra = "-" if row["extra_bytes"] is None else f"{max(0, row['extra_bytes']) / n:.1f}"
        cells = [spread(row["ms"]), number(1e6 * statistics.median(row["ms"]) / n), spread(foreach)]
        cells += [number(statistics.median(fused)), number(statistics.median(momentum))]
        if "batch" in row:  # a network, beside its optimizers
            table.append([f"{row['optimizer']}, {row['batch']}", *cells, "", "", ""])
        else:
            cells += [f"{row['state_bytes'] / n:.2f}", extra, f"{row['first_s']:.2f}"]
            table.append([row["optimizer"], *cells])
    return draw_table(headers, table)


def ratio_table(rows: list[dict]) -> str:
    """Times over that of Adam on all workloads, as markdown."""
    ms = {(row["workload"], row["optimizer"]): row["ms"] for row in rows}
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    table = [
        [name, *(spread(ratio(ms[at, name], ms[at, FOREACH])) if (at, name) in ms else "" for at in workloads)]
        for name in SHOWN
        if any((at, name) in ms for at in workloads)
    ]
    return draw_table([("", ""), *((at, "") for at in workloads)], table, markdown=True)


def summary(rows: list[dict]) -> str:
    """Growth of the cost, and the LSTM rule against its loop."""
    ms = {(row["workload"], row["optimizer"]): row["ms"] for row in rows}
    lines = []
    for workload, name in ms:
        if workload == "1e6" and ("1e7", name) in ms:
            growth = statistics.median(ms["1e7", name]) / 10 / statistics.median(ms["1e6", name])
            lines.append(f"Time per parameter at 1e7 over that at 1e6, {name}: {growth:.2f}")
        if name == LSTM:
            lines.append(f"{LOOP} / {LSTM}, {workload}: {spread(ratio(ms[workload, LOOP], ms[workload, LSTM]))}")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path, *, title: str) -> Path:
    """Save the figure: cost against size for single tensors, ratios for the largest of them and for the models."""
    costs, ratios = {}, {}
    reference = {row["workload"]: row["ms"] for row in rows if row["optimizer"] == FOREACH}
    single = [name for name in reference if name not in MODELS]
    for row in rows:
        name, optimizer, ms = row["workload"], row["optimizer"], row["ms"]
        if name in single:
            costs.setdefault(optimizer, {})[row["n"]] = 1e6 / row["n"] * torch.tensor(ms)
        if name not in single[:-1]:
            ratios.setdefault(name, {})[optimizer] = torch.tensor(ratio(ms, reference[name]))
    is_learned = {row["optimizer"]: row["optimizer"].removesuffix(", graph") in LEARNED for row in rows}
    return plot_step_cost(costs, ratios, is_learned, path, reference=FOREACH, title=title)


def ratio(ms: list[float], others: list[float]) -> list[float]:
    """Ratios repeat by repeat."""
    return [a / b for a, b in zip(ms, others, strict=False)]  # a slow one has fewer


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = torch.tensor(values).quantile(torch.tensor((0.25, 0.5, 0.75))).tolist()
    return f"{number(middle)} [{number(low)}, {number(high)}]"


def number(value: float) -> str:
    """As many digits as a time deserves."""
    return f"{value:,.{2 if value < 10 else 1 if value < 1000 else 0}f}"
