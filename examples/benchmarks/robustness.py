"""Try to break it: processes killed at any moment, files with a flipped bit, calls with arguments of any kind.

Nothing may be lost, and no wrong answer be given without a word: a run that was killed ends with the numbers of one
that was not, a damaged file is refused, and a call gives a result or an error that says what is wrong.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

import odeopt
from odeopt import artifacts
from odeopt.cli import arguments
from odeopt.progress import tqdm
from odeopt.report import draw_table
from odeopt.tasks import RandomQuadratic

Work = Callable[[str, Callable[[], None]], None]  # a folder, and what to call when the imports are done

TENSORS = (torch.tensor(1.0), torch.ones(2), torch.ones(3, 2), torch.tensor(float("nan")), torch.zeros(0),
           torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.complex64))  # fmt: skip
ODD = (None, True, 0, 1, -1, 2, 1.5, -0.5, float("nan"), float("inf"), 10**30, "", "rk4", "no such thing", (), (1, 2),
       [3], {}, {"a": 1}, *TENSORS, torch.float16, nn.Linear(1, 1), print)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run all parts and print the table."""
    args = parse(argv)
    generator, rows = random.Random(args.seed), []
    for name, work in {"meta-training": meta_training, "training with torch.save": training}.items():
        rows.append([f"{name}, kill -9", *crashes(work, args.kills, generator)])
    rows.append(["artefact, one bit flipped", *flips(args.flips, generator)])
    for name, call in {
        "PortHamiltonianUpdate": rule_of,
        "LearnedOptimizer": optimizer_of,
        "integrate": integrated,
    }.items():
        rows.append([f"{name}, arguments of any kind", *calls(name, call, args.calls // 3, generator)])
    headers = [("", ""), ("tried", ""), ("as it should", ""), ("refused in words", ""), ("otherwise", "")]
    print(draw_table(headers, rows, markdown=args.markdown))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
    sys.exit(int(any(row[-1] != "0" for row in rows)))


def meta_training(folder: str, begins: Callable[[], None]) -> None:
    """Meta-train a rule in a folder, from where the last process that did came to."""
    torch.manual_seed(0)
    begins()
    rule = odeopt.PortHamiltonianUpdate(hidden=(8,))
    config = odeopt.MetaConfig(n_meta_steps=60, n_tasks=8, horizon=20, validate_every=5)
    odeopt.meta_train(rule, RandomQuadratic(), config, folder=folder, progress_bar=False)
    torch.save(rule.state_dict(), f"{folder}/done.pt")


def training(folder: str, begins: Callable[[], None]) -> None:
    """Train a network, and save both it and its optimizer at every step; from where the last process came to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = odeopt.LearnedOptimizer(odeopt.param_groups(model), total_steps=400)
    first, file = 0, Path(folder, "run.pt")
    if file.exists():
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    begins()
    for step in range(first, 400):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.sin().sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, f"{file}.new")
        os.replace(f"{file}.new", file)
    torch.save(model.state_dict(), f"{folder}/done.pt")


def crashes(work: Work, n_kills: int, generator: random.Random) -> list[str]:
    """Kill a process at moments drawn at random, start it again, and compare its end with that of one left alone."""
    with tempfile.TemporaryDirectory() as alone, tempfile.TemporaryDirectory() as killed:
        seconds = _run(work, alone)
        for _ in tqdm(range(n_kills), unit="kill"):
            _run(work, killed, after=generator.uniform(0.0, max(0.1, seconds / 4)))
        _run(work, killed)
        a, b = (torch.load(Path(folder, "done.pt")) for folder in (alone, killed))
        same = n_kills if all(torch.equal(a[name], b[name]) for name in a) else 0
    return [str(n_kills), str(same), "0", str(n_kills - same)]


def _run(work: Work, folder: str, after: float | None = None) -> float:
    """Run work to its end, or kill it some seconds after it has begun; returns how many it took from there on."""
    # forked, where that is possible, from a process that has imported what it needs, and has done nothing else
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    context.set_forkserver_preload(["odeopt", "torch._dynamo"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_begin, args=(work, folder, sender))
    process.start()
    sender.close()
    receiver.recv()
    began = time.perf_counter()
    process.join(after)
    process.kill()
    process.join()
    if after is None and process.exitcode != 0:
        raise RuntimeError(f"the run ended with status {process.exitcode}")
    return time.perf_counter() - began


def _begin(work: Work, folder: str, sender: Connection) -> None:
    tqdm.set_lock(threading.RLock())  # the default one is a semaphore, which a process that is killed leaves behind
    work(folder, lambda: sender.send("begins"))


def flips(n: int, generator: random.Random) -> list[str]:
    """Flip one bit of a rule's file, and load it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rule.safetensors")
        artifacts.save(
            odeopt.load_pretrained("port-hamiltonian-quadratic"), path, trained_for={"horizon": 1, "task": "x"}
        )
        whole, counts = path.read_bytes(), collections.Counter()
        for _ in tqdm(range(n), unit="flip"):
            content = bytearray(whole)
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            path.write_bytes(content)
            counts[outcome(lambda: odeopt.load(path))] += 1
    return [str(n), "0", str(counts["refused"]), str(n - counts["refused"])]


def outcome(call: Callable[[], object]) -> str:
    """``"done"``, ``"refused"`` for an error of the kind that says what is wrong, or the name of another one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except (ValueError, TypeError) as error:
        return "refused" if str(error) else type(error).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def rule_of(**options: object) -> None:
    """Build a rule and take a step with it."""
    rule = odeopt.PortHamiltonianUpdate(**options)
    param = torch.ones(6)
    update, _ = rule(torch.linspace(-1, 1, 6), rule.init_state(param), param=param, shape=(2, 3))
    if not bool(update.isfinite().all()):
        raise ArithmeticError("the update is not finite")


def optimizer_of(**options: object) -> None:
    """Build an optimizer and take a step with it."""
    weight = nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.linspace(-1, 1, 6).view(2, 3)
    optimizer = odeopt.LearnedOptimizer([weight], **options)
    optimizer.step()
    if not bool(weight.isfinite().all()):
        raise ArithmeticError("the parameter is not finite")


def integrated(**options: object) -> None:
    """Solve an equation, unless the arguments say otherwise."""
    solution = odeopt.integrate(**{"field": lambda t, x: -x, "x0": torch.ones(2), "t": (0.0, 0.5, 1.0)} | options)
    if solution.is_success and not bool(torch.as_tensor(solution.states).isfinite().all()):
        raise ArithmeticError("a solution that is not finite is called a success")


def calls(name: str, call: Callable[..., None], n: int, generator: random.Random) -> list[str]:
    """Call with at most two arguments drawn from :data:`ODD`."""
    names = [x.name for x in inspect.signature(getattr(odeopt, name)).parameters.values() if x.kind != x.VAR_KEYWORD]
    names, counts, others = [x for x in names if x != "params"], collections.Counter(), {}
    for _ in tqdm(range(n), unit="call"):
        options = {generator.choice(names): generator.choice(ODD) for _ in range(generator.choice((0, 1, 1, 2)))}
        found = outcome(lambda options=options: call(**options))
        counts[found if found in ("done", "refused") else "otherwise"] += 1
        if found not in ("done", "refused"):
            others.setdefault(f"{sorted(options)} {found}"[:200], options)
    for text, options in others.items():
        print(f"{name}: {text}   {options!r}"[:300], file=sys.stderr)
    return [str(n), str(counts["done"]), str(counts["refused"]), str(counts["otherwise"])]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.parser(__doc__, "seed markdown")
    add = parser.add_argument
    add("--kills", type=arguments.positive, default=20, help="times that each of two runs is killed")
    add("--flips", type=arguments.positive, default=1000, help="files with a flipped bit")
    add("--calls", type=arguments.positive, default=10_000, help="calls in all")
    add("--json", type=Path, help="file for the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
