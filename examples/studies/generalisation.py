"""Compare networks that different optimizers have trained to the same training loss, on images none of them saw.

Networks 784-20-10 on MNIST, sigmoid and ReLU, and 784-100-10 on a few of its images, which it can learn by heart. The
general rule is used as it is; learning rates of the hand-designed optimizers are tuned for each column by their last
training losses, on other images, initialisations and batches. Of two runs from one initialisation, on the same batches,
held-out loss and accuracy are compared where each first comes down to the lowest training loss that both reach.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

from held_out import (
    by_level,
    family_of,
    generalisation_table,
    read_columns,
    record,
    summary_tables,
    write_columns,
)
from held_out_figure import plot_generalisation
from torch import Tensor

import odeopt
from odeopt.artifacts import fingerprint
from odeopt.cli import arguments
from odeopt.evaluation import EVALUATION_SEED
from odeopt.evaluation.baselines import Family, build, tune_all
from odeopt.rules import AdamUpdate, SGDUpdate
from odeopt.tasks import MLPClassification
from odeopt.tasks.classification import SPLITS
from odeopt.tasks.random import TUNING_SEED

RULE = "port-hamiltonian"
# first grids, which extend where the best lies on an edge; few points and one momentum, as the runs are long
HAND_DESIGNED = (
    Family("Adam", AdamUpdate, lr=(3e-3, 3e-2)),
    Family("Adam, cosine", partial(AdamUpdate, cosine=True), lr=(3e-3, 3e-2)),
    Family("Nesterov", partial(SGDUpdate, nesterov=True), (1e-1, 1.0), "momentum", (0.9,), (0.9,)),
    Family("SGD", SGDUpdate, lr=(3e-1, 3.0)),
)
NETWORKS = (((20,), "sigmoid", None), ((20,), "relu", None), ((100,), "relu", 2_000))
N_RECORDS = 40
CAPTION = f"""Training loss, held-out loss, accuracy: means at the end of the runs. At training loss: the lowest that
both come down to, geometric mean. {RULE} - it: of paired runs, mean [95 % Student interval]; images are the
same in all runs, so that the intervals are of initialisations and batches alone. A number of runs behind an interval:
so many could be compared; in the others there is no training loss below the first that both come down to."""


def main(argv: list[str] | None = None) -> None:
    """Run the comparison, column by column; finished columns are read from the file of an earlier run."""
    args = parse(argv)
    began = time.perf_counter()
    dataset = arguments.dataset(args)
    rule = odeopt.load_pretrained(RULE)
    header = {"rule": {"name": RULE, "sha256": fingerprint(rule)}, "library_version": odeopt.__version__}
    header |= {"dataset": dataset.name, "runs": args.runs, "tuning_runs": args.tuning_runs, "records": N_RECORDS}
    header |= {"seed": EVALUATION_SEED + args.seed, "tuning_seed": TUNING_SEED}
    stem = "_".join(["generalisation", *[dataset.name] * (dataset.name != "mnist"), *["quick"] * args.quick])
    path = args.out / f"{stem}.json"
    try:
        columns = read_columns(path, header)
    except ValueError as error:
        sys.exit(f"{error} Delete it, or name another folder with --out.")
    shown = {}
    for widths, activation, n_examples in NETWORKS:
        n_examples = n_examples and min(n_examples, len(dataset.train_images) // 6)
        options = {"activation": activation, "n_examples": n_examples, "device": args.device}
        # few images are soon learned by heart: over longer runs training losses vanish in float32
        for n_steps in args.steps[: 1 if n_examples else None]:
            tuning, task = (MLPClassification(dataset, widths, split=split, **options) for split in SPLITS)
            images = f", {n_examples:,} images" if n_examples else ""
            column = f"{'-'.join(map(str, task.sizes))}, {activation}{images}, {n_steps:,} steps"
            if column not in columns:
                tuned = tune_all(tuning, n_steps=n_steps, n_tasks=args.tuning_runs, score=late, families=HAND_DESIGNED)
                run = {"n_steps": n_steps, "n_runs": args.runs, "seed": header["seed"]}
                run["every"] = -(-n_steps // N_RECORDS)
                rules = {RULE: rule} | build(tuned, HAND_DESIGNED)
                columns[column] = {name: record(rule, task, **run) for name, rule in rules.items()}
                write_columns(path, header, columns)
                columns = read_columns(path, header)  # with the digits of the file, as a later run has them
            shown[column] = columns[column]
            print(f"\n{dataset.name}, {column}, {args.runs} runs\n", flush=True)
            print(generalisation_table(shown[column], markdown=args.markdown), flush=True)
    print(f"\n{CAPTION}\n\n{summary_tables(shown, markdown=args.markdown)}")
    panels = {c: {family_of(name): by_level(x) for name, x in curves.items()} for c, curves in shown.items()}
    is_learned = {name: name == RULE for name in next(iter(panels.values()))}
    title = f"Held-out loss at equal training loss, {dataset.name}, mean of {args.runs} runs and its 95 % interval"
    print(f"\nFigure: {plot_generalisation(panels, is_learned, path.with_suffix('.png'), title=title)}")
    print(f"\nDone in {time.perf_counter() - began:.0f} s on {args.device}.")


def late(losses: Tensor) -> Tensor:
    """Score of tuning: the mean of the last fifty losses; fewer minibatches would leave it to chance."""
    return losses[:-1][-50:].mean(0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and check them before any work is done."""
    parser = arguments.parser(
        __doc__,
        "dataset data_dir runs device seed markdown",
        on_interrupt=arguments.RESUMES,
        tuning_runs={"default": 2},
        out={"help": "folder of the figure and its numbers; columns that these have are not run again"},
    )
    add = parser.add_argument
    add("--steps", type=arguments.positive, nargs="+", default=[1000, 3000], help="lengths of the runs; few "
        "images are learned over the first length only")  # fmt: skip
    add("--quick", action="store_true", help="digits, 3 runs, a thirtieth of the steps")
    args = parser.parse_args(argv)
    if args.quick:
        args.dataset, args.runs, args.tuning_runs = "digits", min(args.runs, 3), 1
        args.steps = [max(1, n_steps // 30) for n_steps in args.steps]
    return args


if __name__ == "__main__":
    main()
