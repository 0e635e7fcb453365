"""Should the last layer be stepped as the matrix that it is, or by coordinates, as beside Muon?

The default rule as it is, and with the weights of the last layer among the tables, which are stepped by coordinates and
not decayed; on the problems of ``laws.py``: losses over those of the rule as it is. Runs are kept as they are done.
"""

from __future__ import annotations

from dataclasses import replace

from laws import NAMES, WHOLE, compare
from torch import nn
from unseen import RULE, parse

import odeopt
from odeopt.suite import Contender, learned

HEAD = "head by coordinates"


def with_head_by_coordinates(rule: odeopt.rules.UpdateRule) -> Contender:
    """Make a contender of a rule, told the number of steps, that has the weights of the last layer among the tables."""

    def make(model: nn.Module, n_steps: int, lr: float) -> odeopt.LearnedOptimizer:
        weights = {param for param in model.head.parameters() if param.ndim > 1}
        groups = [{"params": [*weights], "weight_decay": 0.0, "is_table": True}]
        for group in odeopt.param_groups(model):
            others = [param for _, param in group["params"] if param not in weights]
            groups += [group | {"params": others}] * bool(others)
        return odeopt.LearnedOptimizer(groups, rule, lr=lr, total_steps=n_steps)

    as_it_is = learned(rule, HEAD)
    return replace(as_it_is, make=make, settings=as_it_is.settings | {"head": "by coordinates"})


def main(argv: list[str] | None = None) -> None:
    """Compare the rule with itself."""
    args, rule = parse(argv, "heads", __doc__, NAMES), odeopt.load_pretrained(RULE)
    rules = {WHOLE: rule, HEAD: with_head_by_coordinates(rule)}
    compare(args, "heads", "The last layer by coordinates", rules)


if __name__ == "__main__":
    main()
