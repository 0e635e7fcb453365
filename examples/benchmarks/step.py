"""Time one optimizer step: learned rules and torch.optim on the same parameters and gradients, in turns.

Runs on single tensors of 1e4 to 1e7 parameters and on a 784-20-10 network, ResNet-18, ViT-S and GPT-2 small, beside the
forward and backward pass of a small batch. Compare the ratios of one run; the times depend on the machine. At the end,
what a state in bfloat16 does to the loss.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from measuring import captured, extra_bytes, machine, scores_with_state, state_bytes
from reporting import CAPTION, draw, summary, timing_table
from workloads import (
    EVERY,
    LOOP,
    LSTM,
    MODELS,
    MUON,
    NETWORK,
    Make,
    contenders,
    forward_and_backward,
    module,
    n_parameters,
    workload,
)

from odeopt.cli import arguments
from odeopt.evaluation import student_interval
from odeopt.files import read_json, write_json
from odeopt.report import draw_table
from odeopt.tasks import MLPClassification
from odeopt.timing import clock, interleaved

LARGE = 10**6  # parameters from which on memory is measured: less would not be seen


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse(argv)
    if args.memory:
        return print(json.dumps(peak_memory(args)))
    path, content = args.out / "step.json", {"machine": machine(args.device)}
    print(content["machine"], "", sep="\n", flush=True)
    others = earlier(path, content["machine"], args.sizes)  # a damaged file shows now, not at the end
    memory, rows = measured_apart(sys.argv[1:] if argv is None else argv, args), []
    for name in args.sizes:
        found = timed(name, args)
        for row in found:
            row["extra_bytes"] = memory.get(name, {}).get(row["optimizer"])
        print(f"{name}: {n_parameters(name):,} parameters\n\n{timing_table(found)}\n", flush=True)
        rows += found
    print(f"{CAPTION}\n\n{summary(rows)}\n")
    rows = sorted([*rows, *others], key=lambda row: row["n"])
    write_json(path, content | {"bfloat16": narrowed(args), "rows": rows}, is_by_row=True)
    print(f"Numbers and figure: {draw(rows, path.with_suffix('.png'), title=content['machine']).with_suffix('')}.*")


def earlier(path: Path, machine: str, sizes: list[str]) -> list[dict]:
    """Rows of other sizes that were timed before on this machine."""
    if not path.exists():
        return []
    kept = read_json(path, lambda content: (content["machine"], content["rows"]), wanted="numbers of this benchmark")
    return [row for row in kept[1] if row["workload"] not in sizes and kept[0] == machine]


def timed(workload: str, args: argparse.Namespace) -> list[dict]:
    """Milliseconds per step of each contender, one repeat of all after the other."""
    gc.collect()
    model, n, is_cuda = module(workload, args.device), n_parameters(workload), args.device.type == "cuda"
    n_steps = max(10 if is_cuda else 1, min(100, 10**6 // n))  # as one, so that the clock does not count
    n_steps = EVERY * -(-n_steps // EVERY)  # of which as many move matrices in each turn
    steps, rows = {}, {}
    for name, make in all_contenders(workload, args).items():
        began = clock(args.device)
        optimizer = make(model)
        optimizer.step()
        row = {"workload": workload, "n": n, "optimizer": name}
        row |= {"first_s": clock(args.device) - began, "state_bytes": state_bytes(optimizer)}
        steps[name], rows[name] = optimizer.step, row
        if is_cuda and name not in (LSTM, LOOP, MUON):
            graph = f"{name}, graph"
            steps[graph], rows[graph] = captured(optimizer.step), row | {"optimizer": graph}
    if workload in MODELS:
        steps[NETWORK] = forward_and_backward(workload, model)
        steps[NETWORK]()
        rows[NETWORK] = {"workload": workload, "n": n, "optimizer": NETWORK, "batch": MODELS[workload].batch}
    turns = {"n_repeats": args.repeats, "n_calls": n_steps, "description": workload}
    for name, seconds in interleaved(steps, args.device, **turns).items():
        rows[name]["ms"] = [1e3 * each for each in seconds]
    return list(rows.values())


def all_contenders(workload: str, args: argparse.Namespace) -> dict[str, Make]:
    """Who takes part; the LSTM rule and its loop take 640 bytes per parameter, and seconds per million of them."""
    limit = 12 * 10**6 if args.full or (workload == "resnet18" and not args.quick) else 10**6
    return contenders(args.device, has_lstm=n_parameters(workload) <= limit)


def peak_memory(args: argparse.Namespace) -> dict[str, dict[str, int | None]]:
    """Memory beyond parameters, gradients and state, by workload and contender."""
    peaks = {}
    for name in args.sizes:
        if n_parameters(name) >= LARGE:
            model = module(name, args.device)
            makes = {label: make for label, make in all_contenders(name, args).items() if label != LOOP}
            peaks[name] = {label: extra_bytes(partial(make, model), args.device) for label, make in makes.items()}
    return peaks


def measured_apart(argv: list[str], args: argparse.Namespace) -> dict[str, dict[str, int | None]]:
    """:func:`peak_memory` in a process of its own, which holds what it uses and no more."""
    if all(n_parameters(name) < LARGE for name in args.sizes):
        return {}
    # blocks of this size and more then go back to the system when they are freed
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *argv, "--memory"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def narrowed(args: argparse.Namespace) -> dict[str, list[float]]:
    """Print and return what a state in bfloat16 does to the loss, on common networks and batches."""
    dataset = arguments.dataset(args)
    task = MLPClassification(dataset, (20,), activation="sigmoid", split="evaluation", device=args.device)
    n_runs, n_steps = (3, 10) if args.quick else (20, 100)
    wide, narrow = (scores_with_state(task, dtype, n_runs=n_runs, n_steps=n_steps)
                    for dtype in (torch.float32, torch.bfloat16))  # fmt: skip
    mean, low, high = student_interval(narrow - wide)
    sizes = "-".join(map(str, task.sizes))
    lines = [f"{dataset.name}, {sizes}, sigmoid, {n_runs} runs of {n_steps} steps on common networks and batches:",
             "mean of the last ten losses, and its paired difference [95 % Student interval].", ""]  # fmt: skip
    print(*lines, sep="\n")
    rows = [["float32", f"{wide.mean():.5f}", ""],
            ["bfloat16", f"{narrow.mean():.5f}", f"{mean:+.5f} [{low:+.5f}, {high:+.5f}]"]]  # fmt: skip
    print(draw_table([("state in", ""), ("loss", "nats"), ("difference", "nats")], rows), end="\n\n")
    return {"float32": wide.tolist(), "bfloat16": narrow.tolist()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and check them before any work is done."""
    parser = arguments.parser(__doc__, "dataset data_dir", device={"default": "cpu"})
    parser.set_defaults(threads=torch.get_num_threads())
    add = parser.add_argument
    add("--sizes", type=workload, nargs="+", help="numbers of parameters in one tensor, and names of models: "
        f"{', '.join(MODELS)} (None: 1e4 to 1e7 and the models; 1e8 too on CUDA or with --full)")  # fmt: skip
    add("--repeats", type=arguments.positive, help="timed repeats, three of a slow step (None: 21; with --quick, 5)")
    add("--quick", action="store_true", help="up to a million parameters and ResNet-18, few repeats")
    add("--full", action="store_true", help="1e8 parameters too, and the LSTM rule up to 1e7 (takes long)")
    add("--memory", action="store_true", help="print the memory of the steps in bytes and nothing else")
    add("--out", "--out-dir", type=arguments.folder, default="figs", help="folder of step.png and step.json, where "
        "numbers of sizes not timed now stay if they are of this machine")  # fmt: skip
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (5 if args.quick else 21)
    is_large = args.full or args.device.type == "cuda"
    if args.sizes is None:
        args.sizes = ["mlp", "1e4", "1e5", "1e6", *([] if args.quick else ["1e7"]), *(["1e8"] if is_large else [])]
        args.sizes += ["resnet18", *([] if args.quick else ["vit-s", "gpt2"])]
    return args


if __name__ == "__main__":
    main()
