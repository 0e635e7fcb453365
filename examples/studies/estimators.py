"""Measure how far estimators of the meta-gradient are from the exact one, and where training by them leads.

Eight random quadratics of five dimensions are optimized for forty steps by a small port-Hamiltonian rule, in
double precision, so that the exact gradient can be had. Bias and spread are measured before, early in and after
meta-training; another figure shows what meta-training makes of some of the estimators.
"""

from __future__ import annotations

import argparse
import time

import torch
from estimators_figure import plot_estimators
from torch import Tensor

from odeopt import meta
from odeopt.cli import arguments
from odeopt.report import draw_table
from odeopt.rules import PortHamiltonianUpdate
from odeopt.tasks import RandomQuadratic

DIM, N_TASKS, HORIZON, TRUNCATION, DAMPING = 5, 8, 40, 10, 0.9
FINE, COARSE = {"n_pairs": 32, "sigma": 1e-4}, {"n_pairs": 32, "sigma": 1e-2}
SEGMENTS = {"truncation": TRUNCATION, "n_groups": 4}
ESTIMATORS = {
    "backpropagation": meta.Backpropagation(),
    "detached": meta.Backpropagation(detach=True),
    "truncated": meta.Backpropagation(truncation=TRUNCATION),
    "truncated, detached": meta.Backpropagation(truncation=TRUNCATION, detach=True),
    "damped": meta.Backpropagation(damping=DAMPING),
    "ES, sigma 1e-4": meta.EvolutionStrategies(**FINE),
    "PES, sigma 1e-4": meta.PersistentEvolutionStrategies(**FINE, **SEGMENTS),
    "ES, sigma 1e-2": meta.EvolutionStrategies(**COARSE),
    "PES, sigma 1e-2": meta.PersistentEvolutionStrategies(**COARSE, **SEGMENTS),
}
TRAINED = ("backpropagation", "detached", "truncated", "damped", "PES, sigma 1e-2")
TITLES = ("estimator", "bias", "known to", "std. deviation", "cosine", "time")
UNITS = ("", "[of the norm]", "[of the norm]", "[of the norm]", "[of the mean]", "[s/estimate]")
CAPTION = """Norm: of the exact gradient. Known to: about what no bias at all comes out as. A truncated estimate, or one
of PES, takes a quarter of the steps; a damped one counts .9 per step on its way back. Where the exact norm is large,
runs are at the edge of stability: perturbed weights see a smoother loss there than the derivative does."""


class SameProblems(RandomQuadratic):
    """The same problems in every batch: what differs between two of them are the perturbations."""

    def draw(self, indices, seed):
        """Problems of the first batch."""
        return super().draw(self._indices(indices) % N_TASKS, seed)


def main(argv: list[str] | None = None) -> None:
    """Measure, train, print and draw."""
    args = parse(argv)
    began, device = time.perf_counter(), {"dtype": torch.float64, "device": args.device}
    measured = {}
    for n_steps in (0, max(1, args.steps // 10), args.steps):
        rule = new_rule(args)
        if n_steps:
            train(rule, RandomQuadratic(DIM, **device), args, n_meta_steps=n_steps)
        stage = f"after {n_steps} exact meta-steps" if n_steps else "untrained"
        measured[stage], norm = measure(rule, SameProblems(DIM, **device), args)
        rows = [[name, *map("{:.3f}".format, numbers)] for name, numbers in measured[stage].items()]
        print(f"\nMeta-gradients {stage}; norm of the exact one {norm:.3g}\n")
        print(draw_table(list(zip(TITLES, UNITS, strict=True)), rows))
    print(f"\n{CAPTION}\n\nMeta-training, {args.steps} steps\n")
    curves = {}
    for name in TRAINED:
        result = train(new_rule(args), RandomQuadratic(DIM, **device), args, estimator=ESTIMATORS[name])
        curves[name] = result.validation
        print(f"{name}: best validation loss {result.best_score:.4f} at meta-step {result.best_step}, "
              f"last {result.validation[-1][1]:.4f}")  # fmt: skip
    title = f"Meta-gradients over {HORIZON} steps on quadratics of {DIM} dimensions; truncated: {TRUNCATION} steps"
    print(f"\nFigure: {plot_estimators(measured, curves, args.out / 'estimators.png', title=title)}")
    print(f"\nDone in {time.perf_counter() - began:.0f} s on {args.device}.")


def measure(rule: torch.nn.Module, task: SameProblems, args: argparse.Namespace) -> tuple[dict[str, tuple], float]:
    """Bias, its standard error, standard deviation, all over the exact norm, cosine, seconds; and that norm."""
    exact, results = None, {}
    for name, options in ESTIMATORS.items():
        estimator = options.fresh()
        is_random = not isinstance(estimator, meta.Backpropagation)
        if estimator.is_stateful:  # until its runs are spread over the horizon
            estimates(estimator, rule, task, HORIZON // TRUNCATION, args.seed)
        grads, seconds = estimates(estimator, rule, task, args.runs if is_random else 2, args.seed)
        mean, exact = grads.mean(0), grads.mean(0) if exact is None else exact
        # estimates of one run have perturbations in common: pieces of the length of a run are nearly independent
        pieces = torch.stack([piece.mean(0) for piece in grads.split(HORIZON // TRUNCATION)])
        errors = pieces.var(0, correction=0) / max(1, len(pieces) - 1)
        error = errors.sum().sqrt() if is_random else torch.zeros(())
        spread = grads.var(0, correction=0).sum().sqrt()
        relative = [(value / exact.norm()).item() for value in ((mean - exact).norm(), error, spread)]
        results[name] = (*relative, torch.cosine_similarity(mean, exact, dim=0).item(), seconds)
    return results, exact.norm().item()


def estimates(estimator: meta.Estimator, rule, task, n: int, seed: int) -> tuple[Tensor, float]:
    """Estimates from ``n`` batches of the same problems, and seconds for each of them."""
    rule.zero_grad()  # training leaves some behind
    grads, began = [], time.perf_counter()
    for call in range(n):
        indices = torch.arange(N_TASKS) + call * N_TASKS  # by which perturbations are named
        for _ in estimator.gradients(rule, task, meta.MetaObjective(), indices=indices, horizon=HORIZON, seed=seed):
            grads.append(torch.cat([p.grad.flatten() for p in rule.parameters()]))
            rule.zero_grad()
    return torch.stack(grads), (time.perf_counter() - began) / len(grads)


def new_rule(args: argparse.Namespace) -> PortHamiltonianUpdate:
    """The rule before training, the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        return PortHamiltonianUpdate(hidden=(4,), modes=1).to(args.device, torch.float64)


def train(rule, task, args: argparse.Namespace, **options):
    """Meta-train on problems that never come again."""
    options = {"n_meta_steps": args.steps, "n_tasks": N_TASKS, "horizon": HORIZON, "seed": args.seed} | options
    config = meta.MetaConfig(**options, lr=1e-2, schedule="constant", validate_every=max(1, args.steps // 30))
    return meta.meta_train(rule, task, config, progress_bar=False)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and check them before any work is done."""
    parser = arguments.parser(
        __doc__,
        "device out",
        runs={"default": 100, "help": "estimates of each kind that are random"},
        seed={"help": "changes the problems and the perturbations"},
    )
    add = parser.add_argument
    add("--steps", type=arguments.positive, default=200, help="meta-steps")
    add("--quick", action="store_true", help="a tenth of the meta-steps and of the estimates")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.runs = max(1, args.steps // 10), max(1, args.runs // 10)
    return args


if __name__ == "__main__":
    main()
