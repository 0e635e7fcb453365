"""Leave out, or add, one part of the port-Hamiltonian rule at a time, and see what that part is worth.

Every variant is meta-trained in the same way, by `ablation.toml` beside this file, on small sigmoid networks, from each
of a few meta-seeds; and compared with the default on images that no meta-training saw: on such networks, on ReLU
networks, and for three times as many steps. An interrupted run continues with the rules that it has trained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from variants import compare_variants, shortened, train_variants
from variants_figure import plot_ablation

import odeopt
from odeopt.cli import arguments
from odeopt.evaluation import EVALUATION_SEED
from odeopt.evaluation.baselines import FAMILIES, build, tune_all
from odeopt.evaluation.result import DIVERGED
from odeopt.files import write_json
from odeopt.meta.files import load_config
from odeopt.report import draw_table
from odeopt.tasks import DATASETS, DatasetCorrupt, MLPClassification, load_dataset_or_digits

DEFAULT, WIDTHS = "default", (20,)
NETWORKS = ("mass", "potential", "friction", "port")
VARIANTS = {
    "friction not modulated": {"friction": "constant"},
    "port not modulated": {"port": "constant"},
    "effort scaled by the tensor": {"normalization": "tensor"},
    # it cannot see the fan-in, and starts at the step size that the default has at 49
    "no signals of the tensor": {"coordinatewise": True, "initial_kappa": 0.0151, "ratio_floor": 0.0},
    "no floor of ratios": {"ratio_floor": 0.0},
    "no memory": {"memory": 0},
    "progress not told": {"uses_progress": False},
    "one mode": {"modes": 1},
    "three modes": {"modes": 3},
    **{f"solver {solver}": {"solver": solver} for solver in ("euler", "midpoint", "heun3", "exponential")},
    # the dear ones last
    **{f"{part}: network of q": {part: "network"} for part in reversed(NETWORKS)},
    "all four: networks of q": dict.fromkeys(NETWORKS, "network"),
}
HAND_DESIGNED = tuple(family for family in FAMILIES if family.name in ("Adam", "Nesterov"))
QUICK = {"dataset": "digits", "steps": 5, "horizon": 20, "seeds": 1, "runs": 5, "tuning_runs": 1}
QUICK["folder"] = Path("runs/ablation-quick")
CAPTION = f"""Mean of the last ten losses, ± half the range of {{seeds}} meta-trainings, [95 % Student interval of the
paired difference to the default over {{runs}} runs]. The
interval knows nothing of meta-training: hold it against the ±.
{DIVERGED}"""


def main(argv: list[str] | None = None) -> None:
    """Train what is not trained yet, compare, print and draw."""
    args = parse(argv)
    variants = {name: options for name, options in VARIANTS.items() if args.rows.search(name)}
    try:
        dataset, notice = load_dataset_or_digits(args.dataset, args.data_dir)
        print(notice or f"Data: {dataset.name}", flush=True)
        config = load_config(Path(__file__).with_suffix(".toml")).with_dataset(dataset.name)
        config = shortened(config, args.steps, args.horizon)
        where = {"data_dir": args.data_dir, "device": args.device}
        rules = train_variants(config, {DEFAULT: {}} | variants, args.folder, n_seeds=args.seeds, **where)
    except (DatasetCorrupt, ValueError) as error:
        sys.exit(str(error))
    trained = {name: [rule.trained_for for rule in of_seeds] for name, of_seeds in rules.items()}
    seconds = {name: [x.get("cpu_seconds", x["seconds"]) for x in of_seeds] for name, of_seeds in trained.items()}
    rules["untrained"] = [config.build_rule().to(args.device)]
    n, columns = config.training.horizon, {}
    for activation, n_steps in (("sigmoid", n), ("relu", n), ("sigmoid", 3 * n)):
        options = {"activation": activation, "device": args.device}
        task, tuning = (MLPClassification(dataset, WIDTHS, split=s, **options) for s in ("evaluation", "meta-train"))
        families = [family for family in HAND_DESIGNED if args.rows.search(family.name)]
        tuned = build(tune_all(tuning, n_steps=n_steps, n_tasks=args.tuning_runs, families=families), families)
        shown = rules | {f"{name.split(' (')[0]}, tuned": [rule] for name, rule in tuned.items()}
        of_column = {"n_steps": n_steps, "n_runs": args.runs, "seed": EVALUATION_SEED + args.seed}
        columns[f"{activation}, {n_steps} steps"] = compare_variants(shown, task, reference=DEFAULT, **of_column)
    title = f"{dataset.name}, {'-'.join(map(str, task.sizes))}, meta-trained on sigmoid, {n} steps"
    print(f"\n{title}\n\n{table(columns, seconds, markdown=args.markdown)}\n\n{CAPTION.format(**vars(args))}")
    path = args.out / f"ablation{'-quick' if args.quick else ''}.json"
    content = {"title": title, "library_version": odeopt.__version__, "evaluation_seed": EVALUATION_SEED + args.seed}
    content |= {"rule": config.rule, "task": config.task, "training": config.training.describe()}
    content |= {"seeds": args.seeds, "runs": args.runs, "tuning_runs": args.tuning_runs, "seconds": seconds}
    content["columns"] = {c: {name: row.as_json() for name, row in rows.items()} for c, rows in columns.items()}
    write_json(path, content)
    label = "difference of the last ten losses [nats]"
    print(f"\nFigure: {plot_ablation(columns, path.with_suffix('.png'), reference=DEFAULT, label=label, title=title)}")


def table(columns: dict[str, dict], seconds: dict[str, list[float]], *, markdown: bool) -> str:
    """One line per variant."""
    headers = [("variant", ""), *((title, "[nats]") for title in columns), ("parameters", "[learned]")]
    headers += [("time of a step", "[of default's]"), ("training", "[CPU s]")]
    least = {name: min(rows[name].ms_per_step for rows in columns.values()) for name in next(iter(columns.values()))}
    lines = []
    for name, ms in least.items():
        cells = [rows[name].text(is_reference=name == DEFAULT) for rows in columns.values()]
        size = next(iter(columns.values()))[name].n_parameters
        training = f"{sum(seconds[name]) / len(seconds[name]):.0f}" if name in seconds else ""
        lines.append([name, *cells, str(size), f"{ms / least[DEFAULT]:.2f}", training])
    return draw_table(headers, lines, markdown=markdown)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and check them before any work is done."""
    parser = arguments.parser(
        __doc__,
        "data_dir runs tuning_runs device out markdown",
        on_interrupt=arguments.RESUMES,
        dataset={
            "choices": ("mnist/4", "mnist/2", *DATASETS),
            "default": "mnist/4",
            "help": "images; mnist/4 has 7 x 7 pixels",
        },
        seed={"help": "changes initialisations and batches of the comparison"},
    )
    add = parser.add_argument
    add("--steps", type=arguments.positive, help="meta-steps of each training (None: those of ablation.toml)")
    add("--horizon", type=arguments.positive, help="steps of a run (None: those of ablation.toml)")
    add("--seeds", type=arguments.positive, default=2, help="meta-trainings of each variant")
    add("--rows", type=arguments.expression, default=".*", help="only rows in whose name this expression is found")
    add("--quick", action="store_true", help="on the digits, with few and short runs, unless told otherwise")
    add("--folder", type=Path, default=Path("runs/ablation"), help="where trained rules are kept")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    return args


if __name__ == "__main__":
    main()
