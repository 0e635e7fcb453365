"""The optimizer's view of a solver: train the port-Hamiltonian rule with one, run it with the others.

A solver is the optimizer's discretisation of its equations. Each rule is meta-trained in the same way, as
`ablation.toml` says, on small sigmoid networks, with its own solver; then it takes its steps with every other one, on
images that no meta-training saw. All of them see one gradient of the network per step; what a solver costs is
evaluations of the rule's own field. An interrupted run continues with the rules that it has trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from studies.variants import Row, compare_variants, shortened, step_times, train_variants
from studies.variants_figure import plot_ablation

import odeopt
from odeopt.cli import arguments
from odeopt.evaluation import EVALUATION_SEED
from odeopt.files import write_json
from odeopt.meta.files import load_config
from odeopt.ode import available_methods, is_fixed_step
from odeopt.report import draw_table
from odeopt.rules import PortHamiltonianUpdate, UpdateRule
from odeopt.tasks import DATASETS, DatasetCorrupt, MLPClassification, Task, load_dataset_or_digits

TRAINED = ("euler", "midpoint", "heun3", "rk4", "exponential")
EXTERNAL = ("scipy_solver",)  # numbers leave for numpy
ADAPTIVE = ("dopri5",)  # the others end where it ends, for several or a hundred times its evaluations
CAPTION = """Mean of the last ten losses over {runs} runs{seeds}; for other solvers than
that of the training [95 % Student interval of the paired difference to it]."""
COSTS = """Every step takes one gradient. Field: evaluations per step where the solver takes its stages. Time of a step
on one network, its gradient not counted: of the rule as it is (in closed form where it can be), and of its stages."""


def main(argv: list[str] | None = None) -> None:
    """Train what is not trained yet, run each rule with every solver, print, and keep the numbers."""
    args = parse(argv)
    try:
        dataset, notice = load_dataset_or_digits(args.dataset, args.data_dir)
        print(notice or f"Data: {dataset.name}", flush=True)
        config = load_config(Path(__file__).parent / "studies" / "ablation.toml").with_dataset(dataset.name)
        config = shortened(config, args.steps, args.horizon)
        variants, where = {name: {"solver": name} for name in args.trained}, {"data_dir": args.data_dir}
        trained = train_variants(config, variants, args.folder, n_seeds=args.seeds, device=args.device, **where)
    except (DatasetCorrupt, ValueError) as error:
        sys.exit(str(error))
    task = MLPClassification(dataset, (20,), activation="sigmoid", split="evaluation", device=args.device)
    options = {"n_steps": args.horizon, "n_runs": args.runs, "seed": EVALUATION_SEED + args.seed}
    found = {}
    for own, rules in trained.items():
        variants = {name: [rule.with_options(solver=name) for rule in rules] for name in args.solvers}
        found[own] = compare_variants(variants, task, reference=own, **options)
    title = f"{dataset.name}, {'-'.join(map(str, task.sizes))}, sigmoid, {args.horizon} steps"
    seeds = f" and {args.seeds} meta-trainings, ± half the range of these" if args.seeds > 1 else ""
    print(f"\n{title}\n\n{losses_table(found, args)}\n\n{CAPTION.format(runs=args.runs, seeds=seeds)}")
    costs = costs_of(next(iter(trained.values()))[0], task, args)
    print(f"\n{costs_table(costs, args)}\n\n{COSTS}")
    columns = {f"trained with {own}": rows for own, rows in found.items()}
    references = dict(zip(columns, found, strict=True))
    path, words = args.out / "optimizers_view.png", f"{title}: last ten losses, less those with the solver of training"
    print(f"\nFigure: {plot_ablation(columns, path, reference=references, label='difference', title=words)}")
    content = {"title": title, "library_version": odeopt.__version__, "training": config.training.describe()}
    content |= {"rule": config.rule, "task": config.task, "runs": args.runs, "seeds": args.seeds, "costs": costs}
    content["rules"] = {own: {name: row.as_json() for name, row in rows.items()} for own, rows in found.items()}
    write_json(args.out / "optimizers_view.json", content)
    print(f"Numbers: {args.out / 'optimizers_view.json'}")


def costs_of(rule: UpdateRule, task: Task, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Evaluations of the field per step, and milliseconds, of each solver; the same rule throughout."""
    own = {name: rule.with_options(solver=name) for name in args.solvers}
    in_stages = {name: rule.with_options(solver=name, backend="torchdiffeq") for name in own if name != "exponential"}
    costs = {name: {"ms": ms} for name, ms in step_times(own, task).items()}
    for name, ms in step_times(in_stages, task).items():
        costs[name] |= {"ms in stages": ms, "field evaluations": evaluations(in_stages[name], task, args.horizon)}
    return costs


def evaluations(rule: PortHamiltonianUpdate, task: Task, n_steps: int) -> float:
    """Evaluations of the field per step, the mean over a run."""
    count, field = 0, rule.system.vector_field_and_output

    def counted(*arguments):
        nonlocal count
        count += 1
        return field(*arguments)

    rule.system.vector_field_and_output = counted
    with torch.no_grad():
        odeopt.unroll(rule, task, indices=torch.arange(1), n_steps=n_steps, seed=EVALUATION_SEED)
    return count / n_steps


def losses_table(found: dict[str, dict[str, Row]], args: argparse.Namespace) -> str:
    """One line per solver of the run, one column per solver of the training."""
    lines = [
        [name, *(rows[name].text(is_reference=name == own) for own, rows in found.items())] for name in args.solvers
    ]
    return draw_table([("", "run with"), *(("trained with", own) for own in found)], lines, markdown=args.markdown)


def costs_table(costs: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    """One line per solver."""
    keys = ("field evaluations", "ms", "ms in stages")
    headers = [("solver", ""), ("field", "[per step]"), ("step", "[ms]"), ("torchdiffeq's", "[ms]")]
    lines = [[name, *(f"{cost[key]:.4g}" if key in cost else "" for key in keys)] for name, cost in costs.items()]
    return draw_table(headers, lines, markdown=args.markdown)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the options and check them before any work is done."""
    parser = arguments.parser(
        __doc__,
        "data_dir runs device seed markdown out",
        on_interrupt=arguments.RESUMES,
        dataset={"choices": ("mnist/4", "mnist/2", *DATASETS), "default": "mnist/4", "help": "images"},
    )
    add = parser.add_argument
    fixed = ["exponential", *filter(is_fixed_step, available_methods())]
    solvers = [*fixed, *(name for name in available_methods() if name not in (*fixed, *EXTERNAL))]
    add("--trained", nargs="+", choices=solvers, default=list(TRAINED), help="solvers to train with")
    add("--solvers", nargs="+", choices=solvers, default=[*fixed, *ADAPTIVE], help="solvers to run with, beside those")
    add("--steps", type=arguments.positive, help="meta-steps of each training (None: those of ablation.toml)")
    add("--horizon", type=arguments.positive, default=100, help="steps of a run")
    add("--seeds", type=arguments.positive, default=2, help="meta-trainings with each solver")
    add("--folder", type=Path, default=Path("runs/optimizers-view"), help="where trained rules are kept")
    args = parser.parse_args(argv)
    args.solvers = list(dict.fromkeys([*args.trained, *args.solvers]))
    return args


if __name__ == "__main__":
    main()
