"""Compare kinetic energies: the same rule, never trained, with the energies that tell the great optimizers apart.

Heavy ball, sign momentum and Muon are one port-Hamiltonian family. Each variant takes its untrained weights, the
learning rate 1 and one setting for all networks, so what differs is the energy alone; AdamW, tuned for each network,
stands beside them. Runs are kept as they are done: an interrupted command continues.
"""

from __future__ import annotations

import argparse

from odeopt import PortHamiltonianUpdate
from odeopt.cli import arguments
from odeopt.suite import available_problems, evaluate_suite, learned, make_problem, opponents
from odeopt.suite.opponents import REFERENCE

COMMON = {"uses_progress": True, "ratio_floor": 0.4, "schedule": "power", "initial_kappa": 0.008}
SPECTRAL = {"kinetic": "spectral", "initial_lookahead": 1.5}
VARIANTS = {
    "quadratic": {},
    "relativistic": {"kinetic": "relativistic", "speed_limit": 0.3},
    "spectral, of the sum": {"output": "spectral", "matrix_normalization": "coordinate"},
    "spectral, one mode": SPECTRAL | {"modes": 1, "initial_matrix_kappa": 0.04},
    "spectral": SPECTRAL | {"initial_matrix_kappa": 0.04},
    "spectral, effort by coordinate": SPECTRAL | {"initial_matrix_kappa": 0.04, "matrix_normalization": "coordinate"},
    "quadratic and spectral": SPECTRAL | {"kinetic": ("quadratic", "spectral"), "initial_matrix_kappa": 0.04},
    "spectral, coherent": SPECTRAL | {"initial_matrix_kappa": 0.07, "initial_coherence": 0.75},
}


def main(argv: list[str] | None = None) -> None:
    """Run the variants and the reference, print the tables and draw the figure."""
    args = parse(argv)
    options = {"dataset": args.dataset, "data_dir": args.data_dir, "n_steps": args.steps}
    problems = {name: make_problem(name, **options) for name in args.problems}
    contenders = {REFERENCE: opponents()[0][REFERENCE]}
    for name in args.variants:
        contenders[name] = learned(PortHamiltonianUpdate(**COMMON | VARIANTS[name]), name)
    suite = evaluate_suite(problems, contenders, path=args.out / "kinetic.json", n_runs=args.runs, device=args.device)
    print(suite.table(markdown=args.markdown))
    print(f"Figure: {suite.plot(args.out / 'kinetic.png')}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    names = available_problems()
    parser = arguments.parser(
        __doc__,
        "dataset data_dir markdown",
        on_interrupt=arguments.RESUMES,
        device={"default": "cpu"},
        runs={"default": 2, "help": "paired runs"},
        out={"default": "runs/kinetic"},
    )
    add = parser.add_argument
    add("--problems", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}")
    add("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], metavar="NAME",
        help=f"of {', '.join(VARIANTS)}")  # fmt: skip
    add("--steps", type=arguments.positive, help="length of a run (None: each problem's own)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
