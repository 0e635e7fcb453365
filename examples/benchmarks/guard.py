"""Time and memory of a guard and of diagnostics: steps with and without them, one snapshot, one look.

The reported loss is a tensor, so that a step under a guard waits for the device, as it does in use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import machine
from reporting import spread

import odeopt
from odeopt.cli import arguments
from odeopt.report import draw_table
from odeopt.stepping.guard import take_snapshot
from odeopt.timing import clock


def main(argv: list[str] | None = None) -> None:
    """Print a table of times and sizes."""
    args = parse(argv)
    print(machine(args.device), flush=True)
    rows = []
    for size in map(int, args.sizes):
        times, guarded = measured(size, args)
        held = sum(state["guard_snapshot"].nbytes for state in guarded.state.values())
        rows.append({"parameters": size, "ms": times, "snapshot_bytes": held})
    print(f"\n{table(rows, markdown=args.markdown)}\n\nMilliseconds, medians [quartiles].")
    if args.json:
        content = {"machine": machine(args.device), "rows": rows}
        args.json.write_text(json.dumps(content, indent=2), encoding="utf-8")


def measured(size: int, args: argparse.Namespace) -> tuple[dict[str, list[float]], odeopt.LearnedOptimizer]:
    """Milliseconds of everything that is timed, by its name in the table, and the optimizer with a guard."""
    plain, looked_at, guarded = (make(size, guard, args.device) for guard in (None, None, True))
    loss = torch.ones((), device=args.device)
    times: dict[str, list[float]] = {}

    def add(name: str, work: Callable[[], object]) -> None:
        began = clock(args.device)
        work()
        times.setdefault(name, []).append(1e3 * (clock(args.device) - began))

    params = guarded.param_groups[0]["params"]
    for _ in range(args.repeats):  # in turns, so that what else the machine does meets all alike
        add("step", plain.step)
        guarded.report(loss)
        add("guarded step", guarded.step)
        with torch.no_grad():
            add("snapshot", lambda: take_snapshot(params, guarded.state))
        add("`diagnostics()`", looked_at.diagnostics)
        add("step after it", looked_at.step)
    return times, guarded


def table(rows: list[dict], *, markdown: bool) -> str:
    """One line per size."""
    titles, cells = ["parameters", *rows[0]["ms"], "snapshot, bytes each"], []
    for row in rows:
        n, held = row["parameters"], row["snapshot_bytes"]
        cells.append([f"{n:,}", *map(spread, row["ms"].values()), f"{held / n:g}"])
    return draw_table([(title, "") for title in titles], cells, markdown=markdown)


def make(size: int, guard: bool | None, device: torch.device) -> odeopt.LearnedOptimizer:
    """Optimizer of one tensor that has a gradient."""
    param = torch.nn.Parameter(torch.ones(size, device=device))
    param.grad = torch.full_like(param, 1e-3)
    return odeopt.LearnedOptimizer([param], "port-hamiltonian", guard=guard)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.parser(__doc__, "markdown", device={"default": "cpu"})
    add = parser.add_argument
    add("--sizes", nargs="+", type=float, default=[1e4, 1e6, 1e7], help="parameters")
    add("--repeats", type=arguments.positive, default=9, help="steps, of which the median is told")
    add("--json", type=Path, help="file for all numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
