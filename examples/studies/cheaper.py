"""What do cheaper steps of matrices cost in loss?

The default rule that moves matrices at every k-th step only, with products in bfloat16, and with three factors in its
polynomial in place of five, on the problems of ``laws.py``: losses over those of the rule as it is on a CPU. The first
two save most of the cost of a step of large networks, as ``benchmarks/step.py`` shows. Runs are kept as they are done.
"""

from __future__ import annotations

from laws import NAMES, WHOLE, compare, varied
from unseen import parse

WAYS = {
    WHOLE: {},
    "every 2nd step": {"matrix_interval": 2},
    "every 4th step": {"matrix_interval": 4},
    "in bfloat16": {"matrix_products": "bfloat16"},
    "short polynomial": {"matrix_polynomial": "short"},
}


def main(argv: list[str] | None = None) -> None:
    """Compare the rule with itself in each way."""
    compare(parse(argv, "cheaper", __doc__, NAMES), "cheaper", "Cheaper steps of matrices", varied(WAYS))


if __name__ == "__main__":
    main()
