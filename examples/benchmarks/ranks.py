"""Measure what ranks exchange, and say from that how cost and traffic grow to a thousand of them.

Run as ``torchrun --nproc-per-node 2 examples/benchmarks/ranks.py``. Measured: one exchange of the sums of a sharded
step, one of a meta-gradient, the step of a million parameters and a meta-step. Modelled: the number of coordinates
falls with the ranks, and the latency of an exchange grows with the logarithm of their number (a tree).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from measuring import machine
from torch import nn
from workloads import module, n_parameters

import odeopt
from odeopt.cli import arguments
from odeopt.meta import Backpropagation, MetaObjective
from odeopt.meta.distributed import current_world
from odeopt.report import draw_table
from odeopt.tasks import RandomQuadratic

MODEL = "gpt2"
RANKS = (2, 8, 64, 256, 1024)


def main(argv: list[str] | None = None) -> None:
    """Measure on all ranks, print on the first."""
    parser = arguments.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=arguments.positive, default=50, help="repeats of each measurement")
    parser.add_argument("--size", type=arguments.positive, default=10**6, help="parameters of the timed step")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        lines = measured(args)
        if dist.get_rank() == 0:
            print(*lines, sep="\n")
    finally:
        dist.destroy_process_group()


def measured(args: argparse.Namespace) -> list[str]:
    """Lines of the report; every rank has to come here."""
    rule, world = odeopt.load_pretrained("port-hamiltonian"), current_world()
    n_tensors, n, n_weights = len(list(module(MODEL, "meta").parameters())), n_parameters(MODEL), rule.n_parameters()
    sums = [torch.zeros(n_tensors, k) for k in (2, 3 + 2 * rule.modes)]  # of the two stages of a step
    weights = [torch.zeros_like(weight) for weight in rule.parameters()]
    exchange = seconds(lambda: [dist.all_reduce(x) for x in sums], args.repeats)
    average = seconds(lambda: world.average(weights, 1.0), args.repeats)

    param = nn.Parameter(torch.randn(args.size))
    param.grad = torch.randn(args.size)
    optimizer = odeopt.LearnedOptimizer([param], rule, implementation="eager")  # as pieces are stepped on a CPU
    per_parameter = seconds(optimizer.step, args.repeats) / args.size
    quadratic, estimator = odeopt.load_pretrained("port-hamiltonian-quadratic"), Backpropagation(truncation=20)
    task, indices = RandomQuadratic(), torch.arange(128)
    meta_step = seconds(
        lambda: list(estimator.gradients(quadratic, task, MetaObjective(), indices=indices, horizon=20, seed=0)),
        min(args.repeats, 10),
    )

    traffic = sum(x.nbytes for x in sums)
    lines = [
        machine(torch.device("cpu")),
        f"{world.size} ranks on it, one thread each, gloo; medians",
        "",
        f"step: {1e9 * per_parameter:.1f} ns per parameter and rank; sums of {n_tensors} tensors: {traffic:,} bytes in "
        f"{1e3 * exchange:.2f} ms, two exchanges",
        f"meta-step: {1e3 * meta_step:.0f} ms for 128 quadratics over 20 steps; meta-gradient of {n_weights} weights: "
        f"{8 * n_weights:,} bytes in {1e3 * average:.2f} ms",
        "",
        f"Modelled, {MODEL} ({n:,} parameters) sharded over ranks of this speed, and a meta-step of 128 tasks a rank:",
        "",
    ]
    rows = []
    for ranks in RANKS:
        depth = math.log2(ranks) / math.log2(world.size)
        step, sent, meta_sent = per_parameter * n / ranks, exchange * depth, average * depth
        rows.append(
            [
                f"{ranks}",
                f"{1e3 * step:.2f}",
                f"{1e3 * sent:.2f}",
                f"{12 * n / ranks / 2**20:.2f}",
                f"{1e3 * (meta_step + meta_sent):.0f}",
                f"{100 * meta_step / (meta_step + meta_sent):.0f}",
            ]
        )
    headers = [("ranks", ""), ("step", "ms"), ("its sums", "ms"), ("state a rank", "MiB"), ("meta-step", "ms"),
               ("efficiency", "%")]  # fmt: skip
    return [*lines, draw_table(headers, rows)]


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median over repeats, begun together."""
    times = []
    for _ in range(repeats + 3):
        dist.barrier()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


if __name__ == "__main__":
    main()
