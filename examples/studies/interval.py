"""What does it cost in loss to move matrices at every k-th step only?

The default rule with several values of ``matrix_interval``, on the problems of ``laws.py``: losses over those of the
rule that moves matrices at every step. Most of the cost of a step of large networks is saved so, as
``benchmarks/step.py`` shows. Runs are kept as they are done.
"""

from __future__ import annotations

from laws import WHOLE, compare

INTERVALS = {WHOLE: {}, "every 2nd step": {"matrix_interval": 2}, "every 4th step": {"matrix_interval": 4}}


def main(argv: list[str] | None = None) -> None:
    """Compare the rule with itself at each interval."""
    compare(argv, "interval", __doc__, "Matrices moved at every k-th step", INTERVALS)


if __name__ == "__main__":
    main()
