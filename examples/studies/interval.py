"""What does it cost in loss to move matrices at every k-th step only?

The default rule with several values of ``matrix_interval``, on the problems of ``laws.py``: losses over those of the
rule that moves matrices at every step. Most of the cost of a step of large networks is saved so, as
``benchmarks/step.py`` shows. Runs are kept as they are done.
"""

from __future__ import annotations

from laws import NAMES, WHOLE, problems, table
from unseen import RULE, chosen, parse

import odeopt
from odeopt.suite import evaluate_suite, learned, opponents
from odeopt.suite.opponents import REFERENCE

INTERVALS = {WHOLE: 1, "every 2nd step": 2, "every 4th step": 4}


def main(argv: list[str] | None = None) -> None:
    """Run the rule with each interval, print the table and draw the figure."""
    args = parse(argv, "interval", __doc__, NAMES)
    rule = odeopt.load_pretrained(RULE)
    contenders = {REFERENCE: opponents()[0][REFERENCE]}
    contenders |= {name: learned(rule.with_options(matrix_interval=k), name) for name, k in INTERVALS.items()}
    path = args.out / "interval.json"
    every = chosen(problems(args.dataset, args.data_dir), args)
    found = evaluate_suite(every, contenders, path=path, n_runs=args.runs, device=args.device)
    print(table(found, INTERVALS, markdown=args.markdown))
    print(f"\nsaved {path} and {found.plot(path.with_suffix('.png'), title='Matrices moved at every k-th step')}")


if __name__ == "__main__":
    main()
