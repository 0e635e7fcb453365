"""Compare trained rules over meta-seeds: how much of a rule's success is the luck of its meta-training.

Rules that one configuration made (`python -m odeopt train --config NAME --seed SEED`) stand together: on random
quadratics, or training networks on MNIST. Of every configuration the rule that validated best ships: the choice never
sees the runs of this table. By default the shipped rules are compared with those in the folder beside this file.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from variants import Row, by_configuration, compare_variants, validate
from variants_figure import plot_ablation

import odeopt
from odeopt.checks import require
from odeopt.cli import arguments
from odeopt.evaluation import EVALUATION_SEED
from odeopt.evaluation.baselines import FAMILIES, build, tune_all
from odeopt.files import write_json
from odeopt.report import draw_table
from odeopt.rules import UpdateRule
from odeopt.tasks import DatasetCorrupt, MLPClassification, RandomQuadratic, Task, load_dataset_or_digits

FOLDER = Path(__file__).with_suffix("")
COLUMNS = (((20,), "sigmoid", 1), ((20,), "relu", 1), ((100, 100), "relu", 1), ((20,), "sigmoid", 10))
REFERENCE = {"quadratic": "Momentum", "mnist": "Nesterov"}  # what does best among the hand-designed, tuned
CAPTION = """{unit} of the hand-designed, tuned, and of the learned: mean, ± half the range of the meta-trainings, and
[95 % Student interval of the paired difference to {reference} over {runs} runs]. Validation and seconds: of each
meta-seed, the best validation first."""
Groups, Rows = dict[str, list[UpdateRule]], dict[str, Row]


def main(argv: list[str] | None = None) -> None:
    """Evaluate the rules of every configuration; print, draw and keep the numbers."""
    args = parse(argv)
    began = time.perf_counter()
    try:
        groups = grouped(args.rules)
        dataset, notice = load_dataset_or_digits(args.dataset, args.data_dir)
        pairs = {name: sorted(((account(rule, args), rule) for rule in rules), key=lambda pair: pair[0]["validation"])
                 for name, rules in groups.items()}  # fmt: skip
    except (DatasetCorrupt, ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    print(notice or f"Data: {dataset.name}", flush=True)
    accounts, groups = ({name: [pair[i] for pair in of_seeds] for name, of_seeds in pairs.items()} for i in (0, 1))
    content = {"library_version": odeopt.__version__, "evaluation_seed": EVALUATION_SEED + args.seed}
    content |= {"dataset": dataset.name, "runs": args.runs, "problems": args.problems, "tuning_runs": args.tuning_runs}
    for kind in sorted({kind_of(rules[0]) for rules in groups.values()}):
        chosen = {name: rules for name, rules in groups.items() if kind_of(rules[0]) == kind}
        columns, is_quadratic = {}, kind == "quadratic"
        if is_quadratic:
            task = RandomQuadratic(device=args.device)
            title = f"random quadratics, {args.steps} steps"
            columns[title] = rows_of(chosen, kind, task, task, args.steps, args)
        for widths, activation, factor in () if is_quadratic else COLUMNS:
            make = partial(MLPClassification, dataset, widths, activation=activation, device=args.device)
            task, tuning = make(split="evaluation"), make(split="meta-train")
            title = f"{'-'.join(map(str, task.sizes))}, {activation}, {factor * args.steps:,} steps"
            columns[title] = rows_of(chosen, kind, task, tuning, factor * args.steps, args)
        unit = "Loss after the last step" if is_quadratic else "Mean of the last ten losses"
        runs = f"{args.problems if is_quadratic else args.runs:,}"
        caption = CAPTION.format(unit=unit, reference=REFERENCE[kind], runs=runs)
        print(f"\n{table(columns, accounts, markdown=args.markdown)}\n\n{caption}", flush=True)
        path, label = args.out / f"meta_seeds_{kind}.png", f"difference to {REFERENCE[kind]}"
        title = f"Several meta-trainings of each rule, {unit.lower()}, {runs} runs"
        print(f"Figure: {plot_ablation(columns, path, reference=REFERENCE[kind], label=label, title=title)}")
        content[kind] = {c: {name: row.as_json() for name, row in rows.items()} for c, rows in columns.items()}
    content["meta-trainings"] = accounts
    write_json(args.out / "meta_seeds.json", content)
    print(f"Numbers: {args.out / 'meta_seeds.json'}\n\nDone in {time.perf_counter() - began:.0f} s on {args.device}.")


def grouped(paths: list[Path]) -> Groups:
    """Rules by configuration, the best validation first; of the shipped ones those that have company, by default."""
    rules = [odeopt.load(path) for path in paths or sorted(FOLDER.glob("*.safetensors"))]
    if not paths:
        shipped = {name: odeopt.load_pretrained(name) for name in odeopt.available_pretrained()}
        rules += [rule for name, rule in shipped.items() if rule.trained_for.get("config") == name]  # no aliases
    groups = by_configuration(rules)
    groups = {name: of_seeds for name, of_seeds in groups.items() if paths or len(of_seeds) > 1}
    require(len(groups) > 0, "rules", [], f"given, or lie in {FOLDER}")
    return groups


def kind_of(rule: UpdateRule) -> str:
    """Which comparison a rule belongs to."""
    return "quadratic" if rule.trained_for["task"]["class"] == "RandomQuadratic" else "mnist"


def account(rule: UpdateRule, args: argparse.Namespace) -> dict[str, float]:
    """Account of a meta-training, validated anew where that is asked for."""
    made, where = rule.trained_for, {"data_dir": args.data_dir, "device": args.device}
    score = validate(rule, args.validate, **where) if args.validate else made["validation_loss"]
    return {"seed": made["training"]["seed"], "validation": score, "seconds": made["seconds"]}


def rows_of(groups: Groups, kind: str, task: Task, tuning: Task, n_steps: int, args: argparse.Namespace) -> Rows:
    """Compare the rules with hand-designed ones that are tuned for this column."""
    is_quadratic = kind == "quadratic"  # whose losses have such tails that few would not tell settings apart
    score, n_tuning = ("final", args.problems) if is_quadratic else ("last ten", args.tuning_runs)
    families = [family for family in FAMILIES if family.name in ("Adam", REFERENCE[kind])]
    tuned = build(tune_all(tuning, n_steps=n_steps, n_tasks=n_tuning, score=score, families=families), families)
    rules = {name.split(" (")[0]: [rule] for name, rule in tuned.items()} | groups
    options = {"n_runs": args.problems if is_quadratic else args.runs, "seed": EVALUATION_SEED + args.seed}
    return compare_variants(rules, task, reference=REFERENCE[kind], n_steps=n_steps, score=score, **options)


def table(columns: dict[str, Rows], of_groups: dict[str, list[dict]], *, markdown: bool) -> str:
    """One line per configuration."""
    headers = [("rule", ""), *((title, "") for title in columns), ("validation", ""), ("meta-training", "[s]")]
    lines = []
    for name in next(iter(columns.values())):
        accounts = of_groups.get(name, ())
        cells = [rows[name].text(is_reference=name in REFERENCE.values()) for rows in columns.values()]
        validation = ", ".join(f"{a['validation']:.3f} (seed {a['seed']})" for a in accounts)
        lines.append([name, *cells, validation, ", ".join(f"{a['seconds']:.0f}" for a in accounts)])
    return draw_table(headers, lines, markdown=markdown)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and check them before any work is done."""
    parser = arguments.parser(
        __doc__,
        "dataset data_dir runs device markdown out",
        tuning_runs={"help": "runs per setting that is tried in tuning; on quadratics as many as problems"},
        seed={"help": "changes initialisations, batches and problems"},
    )
    add = parser.add_argument
    add("rules", type=Path, nargs="*", help="files of rules (none: the shipped ones and those beside this file)")
    add("--steps", type=arguments.positive, default=100, help="steps of a short run; long ones have ten times as many")
    add("--problems", type=arguments.positive, default=2000, help="number of quadratics")
    add("--validate", type=arguments.natural, default=0, help="validate anew, on this many times the tasks of "
        "meta-training, the same for all seeds (0: show what meta-training noted)")  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
