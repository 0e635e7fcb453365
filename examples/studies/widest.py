"""Does the default rule keep its place on the widest networks of ``scale.py``?

A perceptron of width 2,048 and a transformer of width 512. Products of matrices are in bfloat16, which costs nothing in
loss that three runs of smaller networks show (``cheaper.py``), and without which a run takes up to an hour on a CPU.
"""

from __future__ import annotations

from scale import WIDEST, problems
from unseen import compare, parse


def main(argv: list[str] | None = None) -> None:
    """Run the rule and AdamW, print tables and draw the figure."""
    args = parse(argv, "widest", __doc__, WIDEST)
    every = problems(args.dataset, args.data_dir)
    widest = {name: every[name] for name in WIDEST}
    compare("widest", "The widest networks", widest, ("adamw",), args, matrix_products="bfloat16")


if __name__ == "__main__":
    main()
