"""What did meta-training teach the default rule, and what is each part of it worth?

The rule with one kind of its network's outputs at a time back at their initial value, and with all of them back, on the
problems of ``laws.py``: losses over those of the rule as it is, above which the training of that output has helped.
Runs are kept as they are done.
"""

from __future__ import annotations

import copy

import torch
from laws import NAMES, WHOLE, compare
from unseen import RULE, parse

import odeopt

OUTPUTS = {
    "gains and frictions": "per_mode",
    "steps of coordinates": "log_kappa",
    "schedule": "log_exponent",
    "steps of matrices": "log_matrix_kappa",
    "lookahead": "log_lookahead",
    "decay": "log_matrix_decay",
    "coherence": "log_coherence",
}


def untaught(rule: odeopt.PortHamiltonianUpdate, output: str) -> odeopt.PortHamiltonianUpdate:
    """Copy a rule; the copy's network says of one kind of outputs what it said before its training, which is zero."""
    rule = copy.deepcopy(rule)
    head, sizes = rule.coefficient_network[-1], rule.output_sizes
    kinds = [name for name, size in sizes._asdict().items() for _ in range(size)]
    is_kept = torch.tensor([name != output for name in kinds])
    with torch.no_grad():
        head.weight.mul_(is_kept.unsqueeze(-1))
        head.bias.mul_(is_kept)
    return rule


def main(argv: list[str] | None = None) -> None:
    """Compare the rule with itself."""
    args, rule = parse(argv, "taught", __doc__, NAMES), odeopt.load_pretrained(RULE)
    rules = {WHOLE: rule} | {name: untaught(rule, output) for name, output in OUTPUTS.items()}
    compare(args, "taught", "Outputs at their initial values", rules)


if __name__ == "__main__":
    main()
