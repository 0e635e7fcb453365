"""Does the default rule keep its place on networks of the suite that train for ten times as many steps?

The long runs of ``scale.py`` are of networks so small that any optimizer reaches what they can learn. These are three
of those on which the rule is compared in short runs, as they are. AdamW and Muon are tuned anew, as in
``python -m odeopt suite``. Runs are kept as they are done.
"""

from __future__ import annotations

from dataclasses import replace

from unseen import compare, parse

from odeopt.suite import make_problem

NAMES = ("transformer", "recurrent", "vit")
FACTOR = 10


def main(argv: list[str] | None = None) -> None:
    """Run the rule, AdamW and Muon, print tables and draw the figure."""
    args = parse(argv, "long_runs", __doc__, NAMES)
    problems = {}
    for name in NAMES:
        problem = make_problem(name, dataset=args.dataset, data_dir=args.data_dir)
        n_steps = FACTOR * problem.n_steps
        problems[name] = replace(problem, n_steps=n_steps, title=f"{name}, {n_steps:,} steps")
    compare("long_runs", "Runs of ten times as many steps", problems, ("adamw", "muon"), args)


if __name__ == "__main__":
    main()
