"""How does the default rule do on kinds of problems that nothing was chosen on?

A normalizing flow, segmentation, an LSTM, word embeddings, an image that is the parameter itself, a neural
differential equation, a mixer, a Gaussian process, an encoder with a decoder, grids of features, a mixture density and
a state space: written when weights, laws and settings of the rule were what they are, and not looked at before.
Opponents are tuned as in ``python -m odeopt suite``. Runs are kept as they are done.
"""

from __future__ import annotations

import torch
from blind_problems import problems
from unseen import study

NAMES = tuple(problems(torch.empty(0, 1), torch.empty(0), ""))  # whatever the images


def main(argv: list[str] | None = None) -> None:
    """Run the rule and its opponents, print tables and draw the figure."""
    study("blind", "Kinds of problems that nothing was chosen on", __doc__, problems, NAMES, argv)


if __name__ == "__main__":
    main()
