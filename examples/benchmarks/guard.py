"""Time and memory of a guard and of diagnostics: steps with and without them, one snapshot, one look.

The reported loss is a tensor, so that a step under a guard waits for the device, as it does in use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import odeopt
from odeopt.cli import arguments
from odeopt.report import draw_table
from odeopt.stepping.guard import take_snapshot


def main(argv: list[str] | None = None) -> None:
    """Print a table of times and sizes."""
    args = parse(argv)
    torch.set_num_threads(1)
    rows = []
    for size in map(int, args.sizes):
        plain, looked_at, guarded = (make(size, guard, args.device) for guard in (None, None, True))
        loss = torch.ones((), device=args.device)
        times = [[], [], [], [], []]
        for _ in range(args.repeats):  # in turns, so that what else the machine does meets all alike
            times[0].append(seconds(plain.step, args))
            guarded.report(loss)
            times[1].append(seconds(guarded.step, args))
            params = guarded.param_groups[0]["params"]
            with torch.no_grad():
                times[2].append(seconds(lambda p=params, s=guarded.state: take_snapshot(p, s), args))
            times[3].append(seconds(looked_at.diagnostics, args))
            times[4].append(seconds(looked_at.step, args))
        held = sum(x.nbytes for state in guarded.state.values() for key, x in state.items() if key == "guard_snapshot")
        milliseconds = (f"{1e3 * sorted(some)[len(some) // 2]:.3f}" for some in times)
        rows.append([f"{size:,}", *milliseconds, f"{held / size:g}"])
    titles = ["parameters", "step, ms", "guarded step", "snapshot", "diagnostics", "step after", "snapshot, bytes each"]
    print(draw_table([(title, "") for title in titles], rows, markdown=args.markdown))


def make(size: int, guard: bool | None, device: str) -> odeopt.LearnedOptimizer:
    """Optimizer of one tensor that has a gradient."""
    param = torch.nn.Parameter(torch.ones(size, device=device))
    param.grad = torch.full_like(param, 1e-3)
    return odeopt.LearnedOptimizer([param], "port-hamiltonian", guard=guard)


def seconds(work: Callable[[], object], args: argparse.Namespace) -> float:
    """Time of one call."""
    if args.device != "cpu":
        torch.accelerator.synchronize()
    began = time.perf_counter()
    work()
    if args.device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.Parser(description=__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", type=float, default=[1e4, 1e6, 1e7], help="parameters")
    add("--repeats", type=int, default=9, help="steps, of which the median is told")
    add("--device", default="cpu")
    add("--markdown", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
