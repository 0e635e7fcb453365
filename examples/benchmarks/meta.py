"""Time meta-training and evaluation of the learned rules, and measure the memory of exact meta-gradients.

Each rule runs on 128 random quadratics and on 4 networks 784-20-10 on MNIST, meta-trained as its shipped
configuration says (forward and backward) or evaluated, all tasks as one batch and, for comparison, one task
after the other. The figure shows the memory of a gradient over the whole horizon, 8 networks at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from figures import plot_memory
from measuring import machine, memory
from torch import Tensor

import odeopt
from odeopt.cli import arguments
from odeopt.meta import Backpropagation, MetaConfig, MetaObjective, unroll
from odeopt.meta.files import load_config
from odeopt.meta.layouts import CompiledSteps
from odeopt.progress import tqdm
from odeopt.report import draw_table
from odeopt.rules import UpdateRule
from odeopt.tasks import DatasetCorrupt, MLPClassification, RandomQuadratic, Task, load_dataset_or_digits
from odeopt.timing import clock

RULES = ("port-hamiltonian", "lstm", "hamiltonian")
N_TASKS = {"quadratic": 128, "mnist": 4}
N_LOOP = 4  # tasks that the loop visits; each costs it the same
N_MEMORY_TASKS = 8


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse(argv)
    try:
        dataset, notice = load_dataset_or_digits(args.dataset, args.data_dir)
    except DatasetCorrupt as error:
        sys.exit(str(error))
    networks = MLPClassification(dataset, device=args.device)
    if args.measure:
        return print(peak_bytes(networks, *args.measure))
    print(*filter(None, [notice]), machine(args.device), sep="\n")
    timings = []
    for family, task in (("quadratic", RandomQuadratic(device=args.device)), ("mnist", networks)):
        for name in RULES:
            rule, config = odeopt.load_pretrained(f"{name}-{family}"), load_config(f"{name}-{family}").training
            n_steps = 5 if args.quick else estimator_of(config).truncation or config.horizon
            for is_training in (True, False):
                case = Case(family, name, rule.to(args.device), task, config, n_steps, is_training, rule)
                timings.append(timed(case, args))
                if rule.is_staged and not args.quick:  # compiling takes a minute
                    timings.append(timed(case._replace(name=f"{name}, compiled", stepped=CompiledSteps(rule)), args))
    title = f"{N_TASKS['quadratic']} quadratics in 10 dimensions, {N_TASKS['mnist']} networks on {dataset.name}"
    print(f"\n{title}: medians [quartiles] of {args.repeats} interleaved repeats\n\n{timing_table(timings)}\n")
    horizons = (2, 4) if args.quick else (25, 50, 100, 200)
    memory = [(n, 0) for n in horizons]  # 0: every step kept
    # a step in memory takes about twelve times what the boundary of a segment takes
    memory += [(n, max(1, round((n / 12) ** 0.5))) for n in (*horizons, *((500, 1000, 2000) if args.full else ()))]
    memory = [(n, length, measured_apart(n, length, args)) for n, length in tqdm(memory, desc="memory", leave=False)]
    print(draw_table([("horizon", "steps"), ("segments of", "steps"), ("peak memory", "MB")],
                     [(str(n), str(length or "-"), f"{size / 1e6:.0f}") for n, length, size in memory]))  # fmt: skip
    curves = {"every step kept": [(n, size) for n, length, size in memory if not length]}
    curves["segments checkpointed"] = [(n, size) for n, length, size in memory if length]
    title = f"Exact meta-gradient of the port-Hamiltonian rule, {N_MEMORY_TASKS} networks on {dataset.name}"
    print(f"Figure: {plot_memory(curves, args.out / 'memory.png', limit=4e9, title=title)}")
    if args.json:
        results = {"machine": machine(args.device), "dataset": dataset.name, "timings": timings, "memory": memory}
        args.json.write_text(json.dumps(results, indent=2))


class Case(NamedTuple):
    """One rule on one family of tasks, in meta-training or in evaluation."""

    family: str
    name: str
    rule: UpdateRule
    task: Task
    config: MetaConfig
    n_steps: int
    is_training: bool
    stepped: UpdateRule | CompiledSteps


def batched(case: Case) -> None:
    """Run all tasks at once, as the library does it."""
    config, indices = case.config, torch.arange(N_TASKS[case.family])
    if not case.is_training:
        with torch.no_grad():
            unroll(case.stepped, case.task, indices=indices, n_steps=case.n_steps, total_steps=case.n_steps)
        return
    options = {"horizon": case.n_steps, "seed": 0, "update_scale": config.gain_margin}
    for _ in estimator_of(config).gradients(case.stepped, case.task, config.objective, indices=indices, **options):
        case.rule.zero_grad()


def estimator_of(config: MetaConfig) -> Backpropagation:
    """The exact gradient, or the truncated one; other estimators may evaluate a run several times."""
    return config.estimator if isinstance(config.estimator, Backpropagation) else Backpropagation()


def one_by_one(case: Case) -> Tensor:
    """Run some tasks one after the other, as one would write it for a single one; return their losses."""
    all_losses, config = [], case.config
    for k in range(N_LOOP):
        index, losses = torch.tensor([k]), []
        params = {name: p[0].requires_grad_() for name, p in case.task.init_params(index, 0).items()}
        states = {name: case.rule.init_state(p.detach().flatten()) for name, p in params.items()}
        for step in range(case.n_steps + 1):
            losses.append(LOSSES[case.family](params, *(x[0] for x in case.task.sample_batch(index, step, 0))))
            if step == case.n_steps:
                break
            is_exact = case.is_training and not estimator_of(config).detach
            grads = torch.autograd.grad(losses[-1], params.values(), create_graph=is_exact, retain_graph=True)
            progress, params_before = losses[-1].new_tensor(step / case.n_steps), params
            with torch.set_grad_enabled(case.is_training):
                for (name, p), grad in zip(params_before.items(), grads, strict=True):
                    options = {"param": p.flatten(), "shape": p.shape, "progress": progress}
                    update, states[name] = case.rule(grad.flatten(), states[name], **options)
                    update = update * config.gain_margin if case.is_training else update
                    params = params | {name: p + update.view_as(p)}
            params = params if case.is_training else {name: p.requires_grad_() for name, p in params.items()}
        if case.is_training:
            first, *others = (loss[None] for loss in losses)
            config.objective(torch.stack(others), start=0, horizon=case.n_steps, first=first).sum().backward()
            case.rule.zero_grad()
        all_losses.append(torch.stack(losses).detach())
    return torch.stack(all_losses, 1)


def perceptron(params: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of one network."""
    hidden = F.linear(images, params["0.weight"], params["0.bias"]).sigmoid()
    return F.cross_entropy(F.linear(hidden, params["2.weight"], params["2.bias"]), labels)


LOSSES = {"quadratic": lambda params, W, y: (W @ params["theta"] - y).square().sum(), "mnist": perceptron}


def timed(case: Case, args: argparse.Namespace) -> dict:
    """Microseconds per task and step of the two ways, in turns; the first turn is warm-up."""
    n_tasks = {batched: N_TASKS[case.family], one_by_one: N_LOOP}
    values = {way: [] for way in n_tasks}
    for _ in tqdm(range(1 + args.repeats), desc=f"{case.name}, {case.family}", unit=" turns", leave=False):
        for way in values:
            began = clock(args.device)
            way(case)
            values[way].append(1e6 * (clock(args.device) - began) / (n_tasks[way] * case.n_steps))
    ours, loop = (measured[1:] for measured in values.values())
    labels = {"family": case.family, "rule": case.name, "pass": "training" if case.is_training else "evaluation"}
    ratio = [b / a for a, b in zip(ours, loop, strict=True)]
    return labels | {"steps": case.n_steps, "batched_us": ours, "loop_us": loop, "ratio": ratio}


def timing_table(timings: list[dict]) -> str:
    """One line per rule, family and pass."""
    headers = [("family", ""), ("rule", ""), ("pass", ""), ("steps", "1/(s task)"), ("batched", "us/(task step)"),
               ("one by one", "us/(task step)"), ("ratio", "")]  # fmt: skip
    rows = []
    for row in timings:
        cells = [row["family"], row["rule"], row["pass"], f"{1e6 / statistics.median(row['batched_us']):,.0f}"]
        for name in ("batched_us", "loop_us", "ratio"):
            low, middle, high = torch.tensor(row[name]).quantile(torch.tensor((0.25, 0.5, 0.75))).tolist()
            cells.append(f"{middle:.4g} [{low:.4g}, {high:.4g}]")
        rows.append(cells)
    return draw_table(headers, rows)


def peak_bytes(task: Task, horizon: int, checkpoint: int) -> int:
    """Peak memory of one exact gradient, over what the process holds before it."""
    rule = odeopt.load_pretrained("port-hamiltonian-mnist").to(task.device)
    for n_steps in (1, horizon):  # the first loads libraries
        before, indices = bytes_held(task.device, "VmRSS"), torch.arange(N_MEMORY_TASKS)
        estimator = Backpropagation(checkpoint_every=checkpoint or None)
        list(estimator.gradients(rule, task, MetaObjective(), indices=indices, horizon=n_steps, seed=0))
    return bytes_held(task.device, "VmHWM") - before


def bytes_held(device: torch.device, field: str) -> int:
    """Bytes held now (field VmRSS) or at the peak (VmHWM); where there is no Linux, at the peak in both cases."""
    found = memory(device, field)
    if found is None:  # not always getrusage, whose peak begins with the parent's
        import resource

        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes
    return found


def measured_apart(horizon: int, checkpoint: int, args: argparse.Namespace) -> int:
    """:func:`peak_bytes` in a process of its own."""
    options = {
        "--dataset": args.dataset,
        "--data-dir": args.data_dir,
        "--threads": args.threads,
        "--device": args.device,
    }
    command = [sys.executable, __file__, "--measure", horizon, checkpoint]
    command += [text for option, value in options.items() if value is not None for text in (option, value)]
    return int(subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and check them before any work is done."""
    parser = arguments.parser(__doc__, "dataset data_dir out", device={"default": "cpu"})
    parser.set_defaults(threads=torch.get_num_threads())
    add = parser.add_argument
    add("--repeats", type=arguments.positive, default=7, help="timed repeats, after one that is not")
    add("--quick", action="store_true", help="a few steps and short horizons, to see that it runs")
    add("--full", action="store_true", help="memory up to 2,000 steps (takes long)")
    add("--measure", type=int, nargs=2, metavar=("HORIZON", "SEGMENT"), help="print the peak memory in bytes of one "
        "gradient, in segments of so many steps (0: every step kept), and nothing else")  # fmt: skip
    add("--json", type=Path, help="file for all numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
