"""How much of the default rule's success is the luck of its meta-training?

The rule from each of its meta-seeds (``python -m odeopt train --config port-hamiltonian-spectral --seed SEED``), on the
problems of ``laws.py``: losses over those of the rule that ships, which validated best. Runs are kept as they are done.
"""

from __future__ import annotations

from pathlib import Path

from laws import NAMES, WHOLE, compare
from unseen import RULE, parse

import odeopt
from odeopt.rules import UpdateRule

FOLDER = Path(__file__).with_suffix("")
OTHERS = {f"meta-seed {seed}": FOLDER / f"{RULE}-seed{seed}.safetensors" for seed in (1, 2)}


def rules() -> dict[str, UpdateRule]:
    """Read the rule that ships and those of the other meta-seeds."""
    return {WHOLE: odeopt.load_pretrained(RULE)} | {name: odeopt.load(path) for name, path in OTHERS.items()}


def main(argv: list[str] | None = None) -> None:
    """Compare the rule that ships with those of the other meta-seeds."""
    compare(parse(argv, "seeds", __doc__, NAMES), "seeds", "Meta-seeds of the default rule", rules())


if __name__ == "__main__":
    main()
