"""Does the default rule keep its place on wider networks and in longer runs than it was trained on?

It was trained on perceptrons of widths up to 256, transformers of up to 64 and in runs of up to 1,000 steps. Here are
wider ones, and runs of 10,000 steps, at learning rate 1 throughout. AdamW is tuned for each problem, as in
``python -m odeopt suite``. Runs are kept as they are done. (``widest.py`` has the two widest networks.)
"""

from __future__ import annotations

from functools import partial

from laws import perceptron, transformer
from unseen import compare, parse

from odeopt.suite.networks import ResidualNet
from odeopt.suite.problems import Characters, Images, Problem, next_character

LONG = 10_000
WIDTHS = {"perceptron": (64, 256, 1024, 2048), "transformer": (64, 128, 256, 512)}
WIDEST = tuple(f"{kind}-{widths[-1]}" for kind, widths in WIDTHS.items())
NAMES = (
    *(f"{kind}-{width}" for kind, widths in WIDTHS.items() for width in widths[:-1]),
    *("long-perceptron", "long-convnet", "long-transformer"),
)


def problems(dataset: str, data_dir: str | None) -> dict[str, Problem]:
    """Make all problems."""
    images, text, short = Images(dataset, data_dir), Characters(), Characters(32, 8)

    def on_text(name: str, title: str, n_steps: int, data: Characters, *sizes: int) -> Problem:
        return Problem(name, title, n_steps, transformer(data, *sizes), data, next_character)

    every = [
        *(Problem(f"perceptron-{width}", f"perceptron, 2 of {width}", 200, perceptron(images, width, width), images)
          for width in WIDTHS["perceptron"]),
        *(on_text(f"transformer-{width}", f"transformer, 2 layers of {width}", 200, text, width, 2)
          for width in WIDTHS["transformer"]),
        Problem("long-perceptron", f"perceptron, 2 of 64, {LONG:,} steps", LONG, perceptron(images, 64, 64), images),
        Problem("long-convnet", f"convnet, {LONG:,} steps", LONG, partial(ResidualNet, (4, 8)), images),
        on_text("long-transformer", f"transformer, 1 layer of 32, {LONG:,} steps", LONG, short, 32, 1),
    ]  # fmt: skip
    return {problem.name: problem for problem in every}


def main(argv: list[str] | None = None) -> None:
    """Run the rule and AdamW, print tables and draw the figure."""
    args = parse(argv, "scale", __doc__, NAMES)
    every = problems(args.dataset, args.data_dir)
    compare("scale", "Wider networks, longer runs", {name: every[name] for name in NAMES}, ("adamw",), args)


if __name__ == "__main__":
    main()
