"""Command line: ``python -m odeopt train``, ``search``, ``tune``, ``matrix``, ``suite`` and ``solvers``.

Under ``torchrun`` (``torchrun --nproc-per-node 2 -m odeopt train ...``) all its processes train one rule together.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from odeopt import arguments, artifacts
from odeopt.baselines import make_baselines_table
from odeopt.matrix import evaluate_matrix, grid
from odeopt.meta.distributed import LostRankError, World, joined_world, local_rank
from odeopt.meta.files import START, Config, available_configs, load_config
from odeopt.meta.search import search
from odeopt.meta.search_files import load_search
from odeopt.meta.study import MissingOptunaError
from odeopt.meta.trainer import meta_train
from odeopt.ode import available_problems, comparable_methods, compare_solvers
from odeopt.rules import UpdateRule
from odeopt.suite import available_problems as available_suite_problems
from odeopt.suite import evaluate_suite, learned, make_problem, opponents, untrained
from odeopt.suite.opponents import OPPONENTS, REFERENCE
from odeopt.tables import draw_table
from odeopt.tasks import DatasetCorrupt, DatasetUnavailable, load_dataset


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m odeopt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="meta-train a rule from a configuration",
        description="Meta-train a rule from a configuration. Under torchrun each rank works on tasks of its own: "
        "two ranks equal one process with twice the tasks. An interrupted run continues, on any number of "
        "ranks, with the same command.",
    )
    train.add_argument("--config", required=True, help=f"a TOML file, or one of {', '.join(available_configs())}")
    train.add_argument("--seed", type=arguments.natural, help="meta-seed, in place of the configuration's; NAME below "
                       "is then followed by -seedSEED")  # fmt: skip
    train.add_argument("--out", type=Path, help="where the rule goes (default: runs/NAME.safetensors)")
    train.add_argument("--folder", type=Path, help="checkpoint and TensorBoard scalars; an interrupted run "
                       "is continued from here (default: runs/NAME)")  # fmt: skip
    train.add_argument(
        "--data-dir", type=Path, help="where image datasets lie (default: ODEOPT_DATA or a cache folder)"
    )
    train.add_argument("--device", type=_device, default="cpu", help="where to train (default: %(default)s); under "
                       "torchrun, cuda is one GPU for each rank")  # fmt: skip
    train.add_argument("--compile", action="store_true", help="compile the rule's steps: a minute, then about twice "
                       "as fast (port-Hamiltonian rules)")  # fmt: skip
    train.add_argument("--stop-after", type=float, metavar="SECONDS", help="stop at the next validation after "
                       "so long; the same command continues")  # fmt: skip
    train.add_argument("--timeout", type=arguments.positive, default=1800, metavar="SECONDS", help="how long a rank "
                       "waits for the others before it counts them as lost (default: %(default)s)")  # fmt: skip
    train.add_argument("--overwrite", action="store_true", help="replace the file that --out names")

    _add_search(commands)

    tune = commands.add_parser("tune", help="tune the hand-designed optimizers and write their table")
    tune.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    tune.add_argument("--data-dir", type=Path, help="as for train")

    matrix = commands.add_parser(
        "matrix",
        help="run a rule beside tuned Adam over networks, data, horizons and scales",
        description="Run a rule beside Adam, constant and with cosine decay, tuned for each cell. Cells are kept as "
        "they are done: an interrupted run continues with the same command.",
    )
    matrix.add_argument("--rule", default="port-hamiltonian", help="a .safetensors file, or one of "
                        f"{', '.join(artifacts.available_pretrained())} (default: %(default)s)")  # fmt: skip
    matrix.add_argument("--runs", type=arguments.positive, default=5, help="runs per cell (default: %(default)s)")
    matrix.add_argument("--tuning-runs", type=arguments.positive, default=4, help="runs per learning rate that is "
                        "tried (default: %(default)s)")  # fmt: skip
    matrix.add_argument("--cells", default="", metavar="PATTERN", help="only cells in whose name this regular "
                        "expression is found")  # fmt: skip
    matrix.add_argument("--max-horizon", type=arguments.positive, metavar="STEPS", help="only cells of at most so many "
                        "steps")  # fmt: skip
    matrix.add_argument("--quick", action="store_true", help="everything on the digits, for at most 50 steps")
    matrix.add_argument("--references-from", type=Path, metavar="FILE", help="matrix.json of another rule with the "
                        "same settings, from which Adam's results are taken")  # fmt: skip
    matrix.add_argument("--data-dir", type=Path, help="as for train; data sets other than MNIST are left out where "
                        "they are not found")  # fmt: skip
    matrix.add_argument("--device", type=arguments.device, default="cpu", help="where to run (default: %(default)s)")
    matrix.add_argument("--out", type=arguments.folder, default="runs/matrix", help="folder of matrix.json and "
                        "matrix.png (default: %(default)s)")  # fmt: skip
    matrix.add_argument("--markdown", action="store_true", help="print the table as markdown")

    _add_suite(commands)
    _add_solvers(commands)

    args = parser.parse_args(argv)
    programs = {"train": _train, "search": _search, "tune": _tune, "matrix": _matrix}
    programs |= {"suite": _suite, "solvers": _solvers}
    try:
        return programs[args.command](args)
    except (ValueError, OSError, DatasetCorrupt, DatasetUnavailable, MissingOptunaError) as error:
        status, message = 2, error
    except LostRankError as error:
        status, message = 1, error
    except _Terminated as error:
        status, message = 128 + signal.SIGTERM, error
    print(f"{parser.prog} {args.command}: {message}", file=sys.stderr, flush=True)
    return status


def _add_search(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "search",
        help="try settings of a meta-training, and keep the best rule",
        description="Train with one set of settings after the other, as a configuration with a section [search] says, "
        "and keep the rule that validates best. An interrupted search continues with the same command, inside the "
        'trial that was interrupted. Needs Optuna: pip install "odeopt[search]".',
    )
    parser.add_argument("--config", required=True, help="a TOML file, or one of "
                        f"{', '.join(available_configs('search'))}")  # fmt: skip
    parser.add_argument("--out", type=Path, help="where the best rule goes (default: runs/NAME.safetensors)")
    parser.add_argument("--folder", type=Path, help="study, table and logs; a search that is found here is continued "
                        "(default: runs/NAME.search)")  # fmt: skip
    parser.add_argument("--trials", type=arguments.positive, help="trials in all, in place of the configuration's")
    parser.add_argument("--meta-steps", type=arguments.positive, help="meta-steps per trial, in place of the "
                        "configuration's, with as many validations: for a quick look")  # fmt: skip
    parser.add_argument("--data-dir", type=Path, help="as for train")
    parser.add_argument("--device", type=arguments.device, default="cpu", help="where to train (default: %(default)s)")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="stop at the next validation after so "
                        "long; the same command continues")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the file that --out names")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")


def _add_suite(commands: argparse._SubParsersAction) -> None:
    problems = available_suite_problems()
    parser = commands.add_parser(
        "suite",
        help="train today's architectures by learned rules and by tuned opponents",
        description="Train networks by learned rules, at learning rate 1 and told the number of steps, and by "
        "hand-designed optimizers, whose learning rates are chosen by grid for each network. Runs are kept as they are "
        "done: an interrupted suite continues with the same command, and two processes may share one. Schedule-Free "
        'and Prodigy need pip install "odeopt[opponents]".',
    )
    parser.add_argument("--rule", action="append", metavar="NAME", help="a .safetensors file, or one of "
                        f"{', '.join(artifacts.available_pretrained())}; may be given several times (default: "
                        "port-hamiltonian-spectral)")  # fmt: skip
    parser.add_argument("--untold", action="store_true", help="also run the rules without the number of steps")
    parser.add_argument("--untrained", action="store_true", help="also run the rules with their initial weights")
    parser.add_argument("--problems", nargs="+", choices=problems, default=problems, metavar="NAME", help="problems, "
                        f"of {', '.join(problems)} (default: all)")  # fmt: skip
    parser.add_argument("--contenders", nargs="*", choices=[*OPPONENTS], default=[*OPPONENTS], metavar="NAME",
                        help=f"opponents, of {', '.join(OPPONENTS)} (default: all); {REFERENCE}, with which the others "
                        "are compared, is always among them")  # fmt: skip
    parser.add_argument("--runs", type=arguments.positive, help="paired runs per problem and optimizer (default: 5)")
    parser.add_argument("--quick", action="store_true", help="the digits in place of MNIST, 20 steps, two learning "
                        "rates per optimizer, and 2 runs unless --runs is given")  # fmt: skip
    parser.add_argument("--data-dir", type=Path, help="as for train")
    parser.add_argument("--device", type=arguments.device, default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument("--out", type=arguments.folder, default="runs/suite", help="folder of suite.json and "
                        "suite.png (default: %(default)s)")  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown")


def _add_solvers(commands: argparse._SubParsersAction) -> None:
    problems, methods = available_problems(), comparable_methods()
    parser = commands.add_parser(
        "solvers",
        help="compare ODE solvers: error, evaluations, seconds, energy, gradients and orders",
        description="Run solvers over tolerances or sizes of steps on common problems, against accurate references.",
    )
    parser.add_argument("--problems", nargs="+", metavar="NAME", help=f"problems, {', '.join(problems)}, or classes "
                        f"of them, {', '.join(dict.fromkeys(problems.values()))} (default: all)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"methods, {', '.join(methods)}, or kinds, "
                        "fixed, adaptive, structure (default: all)")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=("float64", "float32"), default=["float64"], help="precisions "
                        "(default: float64)")  # fmt: skip
    parser.add_argument("--device", type=arguments.device, default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one problem each of most classes, unless "
                        "--problems are given, and fewer settings")  # fmt: skip
    parser.add_argument("--out", type=arguments.folder, default="runs/solvers", help="folder of solvers.json and of "
                        "the figures (default: %(default)s)")  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown")


class _Terminated(BaseException):
    """The process was asked to stop; like KeyboardInterrupt, nothing that handles errors should take it for one."""


def _train(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    name = config.name
    if args.seed is not None:
        config, name = config.with_seed(args.seed), f"{name}-seed{args.seed}"
    folder = args.folder or Path("runs") / name
    out = args.out or Path("runs") / f"{name}.safetensors"
    with _stoppable(folder), joined_world(args.device, timeout=args.timeout) as world:
        return _train_with(world, config, folder, out, args)


def _train_with(world: World, config: Config, folder: Path, out: Path, args: argparse.Namespace) -> int:
    world.from_first(lambda: _prepare(out, args.overwrite))
    rule = config.build_rule().to(args.device)
    task = world.in_turn(lambda: config.build_task(data_dir=args.data_dir, device=args.device))
    began, results = time.monotonic(), []
    for stage in config.stages:
        is_start = stage is config.start
        # apart from the folder of a training without a start, whose checkpoint may not be taken for this one's
        where = folder if config.start is None else folder / (START if is_start else "main")
        what = f"{config.name}, start" if is_start else config.name
        left = None if args.stop_after is None else max(0.0, args.stop_after - (time.monotonic() - began))
        result = meta_train(rule, task, stage, folder=where, stop_after=left, compile=args.compile)
        results.append(result)
        n_done, n_wanted = len(result.meta_losses), stage.n_meta_steps
        if world.is_first:
            print(
                f"{what}, meta-seed {stage.seed}: {n_done} of {n_wanted} meta-steps in {result.seconds:.0f} s; best "
                f"validation loss {result.best_score:.4f} at meta-step {result.best_step}; skipped "
                f"{result.n_skipped_outliers} outliers and {result.n_skipped_nonfinite} non-finite meta-gradients"
            )
        if n_done < n_wanted:
            if world.is_first:
                best = folder / "best.safetensors"
                artifacts.save(rule, best, trained_for=config.trained_for(*results), overwrite=True)
                print(f"stopped early with the best rule so far in {best}; the same command continues from {folder}")
            return 0
    if world.is_first:
        artifacts.save(rule, out, trained_for=config.trained_for(*results), overwrite=args.overwrite)
        print(f"saved {out}")
    return 0


def _prepare(out: Path, may_overwrite: bool) -> None:
    """See before the work that its result can be written."""
    if out.exists() and not may_overwrite:
        raise FileExistsError(f"Parameter `--out` should be a new file, or --overwrite be given. Found `{out}`.")
    out.parent.mkdir(parents=True, exist_ok=True)


def _search(args: argparse.Namespace) -> int:
    config = load_search(args.config, n_trials=args.trials, n_meta_steps=args.meta_steps)
    folder = args.folder or Path("runs") / f"{config.name}.search"
    out = args.out or Path("runs") / f"{config.name}.safetensors"
    _prepare(out, args.overwrite)
    result = search(config, folder, data_dir=args.data_dir, device=args.device, stop_after=args.stop_after)
    if result.trials:
        print(draw_table(*result.rows(), markdown=args.markdown), end="\n\n")
        print(("  \n" if args.markdown else "\n").join(result.caption()))
        print(f"saved {folder / 'trials.json'}")
    if not result.is_finished:
        print(f"stopped early; the same command continues from {folder}")
        return 0
    if result.rule is None:
        raise ValueError(f"none of the {len(result.trials)} trials of {config.name} is complete: there is no rule.")
    artifacts.save(result.rule, out, trained_for=result.trained_for, overwrite=args.overwrite)
    print(f"saved {out}, the rule of trial {result.best.number}")
    return 0


@contextmanager
def _stoppable(folder: Path) -> Iterator[None]:
    """Make SIGTERM, which torchrun sends to the ranks that are left when one fails, an exception with a message."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated(
            f"Rank {os.environ.get('RANK', 0)} was told to stop (SIGTERM), as torchrun does when another rank has "
            f"stopped; the same command continues from {folder}."
        )

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, where alone signals arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _device(text: str) -> torch.device:
    """Read a device that is there; under torchrun, that of this rank."""
    rank = local_rank()
    is_cuda = text.startswith("cuda") or (text == "auto" and torch.cuda.is_available())
    return arguments.device(f"cuda:{rank}" if is_cuda and rank is not None else text)


def _tune(args: argparse.Namespace) -> int:
    make_baselines_table(args.out, data_dir=args.data_dir, progress_bar=True)
    return 0


def _matrix(args: argparse.Namespace) -> int:
    name, rule = _named_rule(args.rule)
    select = partial(grid, max_horizon=args.max_horizon or math.inf, pattern=args.cells, quick=args.quick)
    found = []
    for dataset in sorted({cell.dataset for cells in select().values() for cell in cells.values()}):
        try:
            load_dataset(dataset, args.data_dir, download=dataset == "mnist")
            found.append(dataset)
        except DatasetUnavailable as error:
            if dataset == "mnist":
                raise
            print(f"Left out: {error}", file=sys.stderr, flush=True)
    matrix = evaluate_matrix(
        rule,
        select(datasets=found),
        name=name,
        path=args.out / "matrix.json",
        references_from=args.references_from,
        n_runs=args.runs,
        n_tuning_runs=args.tuning_runs,
        data_dir=args.data_dir,
        device=args.device,
    )
    print(matrix.table(markdown=args.markdown))
    print(f"\nsaved {args.out / 'matrix.json'} and {matrix.plot(args.out / 'matrix.png')}")
    return 0


def _named_rule(text: str) -> tuple[str, UpdateRule]:
    """Load a rule from a file, or one of the package; and its name."""
    if text.endswith(".safetensors"):
        return Path(text).stem, artifacts.load(text)
    return text, artifacts.load_pretrained(text)


def _suite(args: argparse.Namespace) -> int:
    found, notes = opponents()
    contenders = {name: found[name] for name in found if name in (REFERENCE, *args.contenders)}
    for text in args.rule or ["port-hamiltonian-spectral"]:
        name, rule = _named_rule(text)
        entries = [learned(rule, name)]
        entries += [learned(rule, name, is_told=False)] * args.untold
        entries += [learned(untrained(rule), f"{name}, untrained")] * args.untrained
        for contender in entries:
            if contender.name in contenders:
                raise ValueError(f"Parameter `--rule` should give rules of different names. Found {name!r} again.")
            contenders[contender.name] = contender
    for note in notes:
        print(note, file=sys.stderr, flush=True)
    options = {"dataset": "digits", "n_steps": 20} if args.quick else {"data_dir": args.data_dir}
    if args.quick:
        contenders = {name: replace(c, rates=c.rates[-2:]) for name, c in contenders.items()}
    suite = evaluate_suite(
        {name: make_problem(name, **options) for name in args.problems},
        contenders,
        path=args.out / "suite.json",
        n_runs=args.runs or (2 if args.quick else 5),
        n_extensions=0 if args.quick else 3,
        device=args.device,
    )
    print(suite.table(markdown=args.markdown))
    print(f"\nsaved {args.out / 'suite.json'} and {suite.plot(args.out / 'suite.png')}")
    return 0


def _solvers(args: argparse.Namespace) -> int:
    problems, settings = args.problems, {}
    if args.quick:
        problems = problems or ["A3", "B4", "D1", "pendulum", "quadratic"]
        settings = {"tolerances": (1e-3, 1e-6), "n_steps": (2, 8, 32), "max_evals": 800, "n_repeats": 1}
        settings["max_gradient_evals"] = 100
    dtypes = [getattr(torch, name) for name in dict.fromkeys(args.dtypes)]
    comparison = compare_solvers(problems, args.methods, dtypes=dtypes, device=args.device, **settings)
    comparison.save(args.out / "solvers.json")
    print(comparison.table(markdown=args.markdown))
    saved = [args.out / "solvers.json", *comparison.figures(args.out)]
    print(f"\nsaved {', '.join(map(str, saved))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
