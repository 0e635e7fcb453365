"""Compare the general rule, as it is, with hand-designed optimizers that are tuned for each column by itself.

Five columns: a 784-20-10 network on MNIST with sigmoid and with ReLU, for a hundred and for a thousand steps, and a
784-100-100-10 network with ReLU for a hundred. Learning rates (and momenta) of the hand-designed optimizers are found
by a refined grid for each column, on other images, initialisations and batches than those they are compared on.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import odeopt
from odeopt.cli import arguments
from odeopt.evaluation import EVALUATION_SEED, compare
from odeopt.evaluation.baselines import FAMILIES, Family, build, tune_all
from odeopt.files import write_json
from odeopt.report import draw_table
from odeopt.rules import AdamUpdate
from odeopt.tasks import MLPClassification

RULES = ("port-hamiltonian", "port-hamiltonian-mnist")
HAND_DESIGNED = (
    *(family for family in FAMILIES if family.name in ("Adam", "Nesterov")),
    Family("Adam, cosine", partial(AdamUpdate, cosine=True)),
)
COLUMNS = (
    ((20,), "sigmoid", 1),
    ((20,), "relu", 1),
    ((20,), "sigmoid", 10),
    ((20,), "relu", 10),
    ((100, 100), "relu", 1),
)


def main(argv: list[str] | None = None) -> None:
    """Run the comparison, column by column."""
    args = parse(argv)
    began = time.perf_counter()
    dataset = arguments.dataset(args)
    learned = {name: odeopt.load_pretrained(name) for name in RULES}
    cells: dict[str, list[str]] = {}
    headers, content = [("rule", "")], {}
    for widths, activation, factor in COLUMNS:
        n_steps = factor * args.steps
        options = {"activation": activation, "device": args.device}
        task, tuning = (MLPClassification(dataset, widths, split=s, **options) for s in ("evaluation", "meta-train"))
        tuned = tune_all(tuning, n_steps=n_steps, n_tasks=args.tuning_runs, families=HAND_DESIGNED)
        rules = learned | build(tuned, HAND_DESIGNED)
        seed = EVALUATION_SEED + args.seed
        comparison = compare(rules, task, n_steps=n_steps, n_runs=args.runs, seed=seed, loss_unit="nats")
        title = f"{'-'.join(map(str, task.sizes))}, {activation}, {n_steps:,} steps"
        figure = args.out / f"general_{'-'.join(map(str, widths))}_{activation}_{n_steps}.png"
        comparison.plot(figure, title=f"{dataset.name}, {title}, {args.runs} runs")
        print(f"\n{dataset.name}, {title}, {args.runs} runs\n\n{comparison.table()}\nFigure: {figure}", flush=True)
        headers.append((title, "[nats]"))
        content[title] = {name.split(" (")[0]: row for name, row in comparison.as_json().items()}
        for name in rules:
            difference = comparison.difference(name)
            text = f"{comparison.scores(name).mean():.3f}"
            if name != comparison.reference:
                text += f" [{difference.low:+.3f}, {difference.high:+.3f}]"
            cells.setdefault(name.split(" (")[0], []).append(text)
    print(f"\n{draw_table(headers, [[name, *row] for name, row in cells.items()], markdown=args.markdown)}\n")
    write_json(args.out / "general.json", content)
    print("Mean of the last ten losses [95 % Student interval of the paired difference to the best hand-designed one].")
    print(f"\nDone in {time.perf_counter() - began:.0f} s on {args.device}.")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and check them before any work is done."""
    parser = arguments.parser(__doc__, "dataset data_dir runs tuning_runs device seed out markdown")
    add = parser.add_argument
    add("--steps", type=arguments.positive, default=100, help="steps of the short runs; the long ones have ten times "
        "as many")  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
