"""Compare kinetic energies: the same rule, never trained, with the energies that tell the great optimizers apart.

Heavy ball, sign momentum and Muon are one port-Hamiltonian family. Each variant takes its untrained weights, the
learning rate 1 and one setting for all networks. Energies have step sizes of their own, so the quadratic and the
relativistic one run at tuned learning rates, too. Beside them stand AdamW, tuned for each network, the default rule,
and what it has to beat: the rule ``port-hamiltonian`` as it ships, its updates of matrices orthogonalised. Runs are
kept as they are done: an interrupted command continues.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

import torch
from torch import nn
from unseen import RULE, make_parser

from odeopt import LearnedOptimizer, PortHamiltonianUpdate, load_pretrained, param_groups
from odeopt.physics import newton_schulz
from odeopt.suite import available_problems, evaluate_suite, learned, make_problem, opponents, untrained
from odeopt.suite.opponents import REFERENCE, Contender

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
TUNED, RATES = {f"{name}, tuned": name for name in ("quadratic", "relativistic")}, (0.1, 0.3, 1.0, 3.0)
ORTHOGONALISED = "port-hamiltonian, orthogonalised"


class Orthogonalised:
    """The rule ``port-hamiltonian``, its updates of matrices orthogonalised.

    Every matrix but embeddings moves by five Newton-Schulz iterations of its update, times .03 sqrt(out/in), and every
    other tensor by .3 times its update. Both fall linearly to zero.
    """

    def __init__(self, model: nn.Module, n_steps: int, lr: float) -> None:
        groups = param_groups(model)
        self._n_steps = n_steps
        self._optimizer = LearnedOptimizer(groups, "port-hamiltonian", lr=lr, total_steps=n_steps)
        groups = self._optimizer.param_groups
        self._tensors = [(param, group) for group in groups for param in group["params"]]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters."""
        starts = [param.clone() for param, _ in self._tensors]
        left = 1 - self._optimizer.n_steps / self._n_steps
        self._optimizer.step()
        for (param, group), start in zip(self._tensors, starts, strict=True):
            update, size = param - start, 0.3
            if param.ndim - group["is_stack"] >= 2 and not group["is_table"]:
                matrix = update.flatten(2 if group["is_stack"] else 1)
                size = 0.03 * math.sqrt(matrix.shape[-2] / matrix.shape[-1])
                update = newton_schulz(matrix).view_as(param)
            param.copy_(start + left * size * update)


def main(argv: list[str] | None = None) -> None:
    """Run the variants and the reference, print the tables and draw the figure."""
    args = parse(argv)
    options = {"dataset": args.dataset, "data_dir": args.data_dir, "n_steps": args.steps}
    problems = {name: make_problem(name, **options) for name in args.problems or available_problems()}
    contenders = {REFERENCE: opponents()[0][REFERENCE]}
    for name in args.variants:
        if name == ORTHOGONALISED:
            contenders[name] = Contender(name, name, Orthogonalised, (1.0,), {"version": 1}, is_learned=True)
        else:
            variant = VARIANTS.get(TUNED.get(name, name))
            rule = load_pretrained(name) if name == RULE else untrained(PortHamiltonianUpdate(**COMMON | variant))
            contenders[name] = learned(rule, name)
            if name in TUNED:
                contenders[name] = replace(contenders[name], rates=RATES)
    suite = evaluate_suite(problems, contenders, path=args.out / "kinetic.json", n_runs=args.runs, device=args.device)
    print(suite.table(markdown=args.markdown))
    print(f"Figure: {suite.plot(args.out / 'kinetic.png', title='Kinetic energies')}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("kinetic", __doc__, available_problems())
    names = (RULE, ORTHOGONALISED, *VARIANTS, *TUNED)
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"of {', '.join(names)}")  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
