"""``python -m odeopt suite``: today's architectures, trained by learned rules and by tuned opponents."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from odeopt import artifacts
from odeopt.checks import install_command
from odeopt.cli import arguments
from odeopt.cli.files import named_rule
from odeopt.suite import available_problems, evaluate_suite, learned, make_problem, opponents, untrained
from odeopt.suite.opponents import OPPONENTS, REFERENCE


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    problems = available_problems()
    parser = commands.add_parser(
        "suite",
        help="train today's architectures by learned rules and by tuned opponents",
        description="Train networks by learned rules, at learning rate 1 and told the number of steps, and by "
        "hand-designed optimizers, whose learning rates are chosen by grid for each network. Runs are kept as they are "
        "done: an interrupted suite continues with the same command, and two processes may share one. Schedule-Free "
        f"and Prodigy need {install_command('opponents')}.",
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
    out = {"default": "runs/suite", "help": "folder of suite.json and suite.png (default: %(default)s)"}
    arguments.add(parser, "data_dir markdown", device={"default": "cpu"}, out=out)
    parser.set_defaults(run=run, on_interrupt=arguments.RESUMES)


def run(args: argparse.Namespace) -> int:
    """Run the suite, print and draw it; return the exit status."""
    found, notes = opponents()
    contenders = {name: found[name] for name in found if name in (REFERENCE, *args.contenders)}
    for text in args.rule or ["port-hamiltonian-spectral"]:
        name, rule = named_rule(text)
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
