"""Optimize a small image classifier with learned and with hand-designed optimizers, and compare them.

A 784-20-10 network is trained on MNIST for a hundred steps by the general rule, the rules that were
meta-trained for such networks and tuned hand-designed ones, on common initialisations and batches, first with
sigmoid activations (what all rules but the general one were trained on), then with ReLU. ``--rule
port-hamiltonian-spectral`` adds the default rule of ``odeopt.LearnedOptimizer``, which is made for larger networks.
"""

from __future__ import annotations

import argparse
import time

import odeopt
from odeopt.cli import arguments
from odeopt.cli.files import named_rule
from odeopt.evaluation import EVALUATION_SEED, compare
from odeopt.evaluation.baselines import baselines_for
from odeopt.files import write_json
from odeopt.meta import meta_train
from odeopt.meta.files import load_config
from odeopt.ode import available_methods
from odeopt.rules import UpdateRule
from odeopt.tasks import ImageDataset, MLPClassification

TITLES = {
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "kmnist": "KMNIST",
    "digits": "sklearn digits",
}
GENERAL = "port-hamiltonian"  # the others were trained on sigmoid networks on MNIST alone
RULES = ("port-hamiltonian-mnist", "port-hamiltonian-coordinatewise-mnist", "lstm-mnist", "hamiltonian-mnist")
WIDTHS, BATCH_SIZE = (20,), 128


def main(argv: list[str] | None = None) -> None:
    """Run the comparison."""
    args = parse(argv)
    began = time.perf_counter()
    dataset = arguments.dataset(args)
    if args.train:
        learned = {f"{name} (new)": train(name, dataset, args) for name in RULES}
    else:
        learned = {name: odeopt.load_pretrained(name) for name in (GENERAL, *RULES)}
    learned |= dict(args.rule)
    if args.solver:
        learned = dict(with_solver(name, rule, args.solver) for name, rule in learned.items())
    content = {}
    for activation in ("sigmoid", "relu"):
        evaluation, tuning = (
            MLPClassification(
                dataset,
                WIDTHS,
                activation=activation,
                batch_size=BATCH_SIZE,
                split=split,
                device=args.device,
            )
            for split in ("evaluation", "meta-train")
        )
        hand_designed, origin = baselines_for(evaluation, tuning, n_steps=args.steps)
        comparison = compare(
            learned | hand_designed,
            evaluation,
            n_steps=args.steps,
            n_runs=args.runs,
            seed=EVALUATION_SEED + args.seed,
            loss_unit="nats",
        )
        content[activation] = comparison.as_json()
        sizes = "-".join(map(str, evaluation.sizes))
        title = f"{TITLES[dataset.name]}, {sizes}, {activation}, batches of {BATCH_SIZE}, {args.runs} runs"
        path = args.out / f"{dataset.name}_{activation}.png"
        comparison.plot(path, title=title)
        print(f"\n{title}\n\n{comparison.table()}\nHand-designed rules: {origin}.\nFigure: {path}")
    write_json(args.out / f"{dataset.name}.json", content)
    print(f"\nDone in {time.perf_counter() - began:.0f} s on {args.device}.")


def train(name: str, dataset: ImageDataset, args: argparse.Namespace) -> UpdateRule:
    """Meta-train a rule from scratch, as its configuration says, on this dataset."""
    config = load_config(name).with_dataset(dataset.name)
    config = config.with_seed(config.training.seed + args.seed)
    rule = config.build_rule().to(args.device)
    task = config.build_task(data_dir=args.data_dir, device=args.device)
    for stage in config.stages:
        print(f"Meta-training {name} on {dataset.name}: {stage.n_meta_steps} meta-steps")
        result = meta_train(rule, task, stage)
        print(f"{name}: validation loss {result.best_score:.4f}, {result.seconds:.0f} s")
    return config.in_use(rule)


def with_solver(name: str, rule: UpdateRule, solver: str) -> tuple[str, UpdateRule]:
    """Rebuild a rule that solves an ODE, with another solver and the same weights."""
    if "solver" not in rule.config:
        return name, rule
    return f"{name}, {solver}", rule.with_options(solver=solver)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and check them before any work is done."""
    parser = arguments.parser(
        __doc__,
        "data_dir runs device seed out",
        out={"default": "runs/mnist"},
        dataset={"help": "images to classify; for others than the default the hand-designed rules are tuned first"},
    )
    add = parser.add_argument
    add("--train", action="store_true", help="meta-train the rules of this task from scratch first (takes long)")
    add("--steps", type=arguments.positive, default=100, help="optimizer steps per run; for others than the default "
        "the hand-designed rules are tuned first")  # fmt: skip
    add("--rule", action="append", metavar="NAME", help="a rule beside those, a .safetensors file or a name that "
        "`python -m odeopt rules` lists; may be given several times (None: no other)")  # fmt: skip
    add("--solver", metavar="METHOD", help="ODE solver of the port-hamiltonian rules (None: the one they were "
        f"trained with): {', '.join(available_methods())}")  # fmt: skip
    args = parser.parse_args(argv)
    if args.solver and args.solver not in available_methods():
        parser.error(f"--solver should be one of {', '.join(available_methods())}; found {args.solver}")
    try:
        args.rule = [named_rule(text) for text in args.rule or ()]
    except (OSError, ValueError) as error:
        parser.error(f"--rule: {error}")
    return args


if __name__ == "__main__":
    main()
