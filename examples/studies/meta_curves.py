"""Draw how meta-trainings went: validation over the meta-steps, from each meta-seed.

Artefacts note the validations of their meta-training (``rule.trained_for["validations"]``; those that were trained
before this was noted have none). By default the shipped rules are drawn, with those of other meta-seeds in the folders
beside this file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from variants import by_configuration

import odeopt
from odeopt.checks import require
from odeopt.cli import arguments
from odeopt.report import new_figure, save_figure, style
from odeopt.rules import UpdateRule


def main(argv: list[str] | None = None) -> None:
    """Print the times and draw the curves."""
    parser = arguments.parser(__doc__, "out")
    parser.add_argument("rules", type=Path, nargs="*", help="files of rules (none: the shipped ones and their company)")
    args = parser.parse_args(argv)
    shipped = Path(odeopt.__file__).parent.glob("pretrained/*.safetensors")
    try:
        groups = with_curves(args.rules or sorted([*shipped, *Path(__file__).parent.glob("*/*.safetensors")]))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    for name, rules in groups.items():
        for rule in rules:
            made = rule.trained_for
            (_, before), *_, (_, after) = made["validations"]
            before, after = (math.nan if score is None else score for score in (before, after))  # not finite
            kept = f"{made['validation_loss']:.3f} at meta-step {made['best_meta_step']} (kept)"
            print(f"{name}, meta-seed {seed_of(rule)}: {before:.3f} before, {kept}, {after:.3f} at the end; ", end="")
            print(f"{made['seconds']:.0f} s")
    print(f"Figure: {plot(groups, args.out / 'meta_curves.png')}")


def with_curves(paths: Sequence[Path]) -> dict[str, list[UpdateRule]]:
    """Read those rules that note their validations: by configuration, in the order of their meta-seeds."""
    noted = [rule for rule in map(odeopt.load, paths) if rule.trained_for.get("validations")]
    require(len(noted) > 0, "rules", list(map(str, paths)), "files of rules that note their validations")
    return {name: sorted(rules, key=seed_of) for name, rules in by_configuration(noted).items()}


def seed_of(rule: UpdateRule) -> int:
    """Return the meta-seed."""
    return rule.trained_for["training"]["seed"]


def plot(groups: Mapping[str, Sequence[UpdateRule]], path: Path) -> Path:
    """Draw a panel per configuration, a line per meta-seed, and a ring at the weights that were kept."""
    with style():
        figure, panels = new_figure(4.2 * len(groups), 3.2, n_columns=len(groups))
        for axes, (name, rules) in zip(panels, groups.items(), strict=True):
            for rule, dashes in zip(rules, ("-", "--", ":", "-.") * len(rules), strict=False):
                steps, scores = zip(*rule.trained_for["validations"], strict=True)
                scores = [math.nan if score is None else score for score in scores]
                (line,) = axes.plot(steps, scores, dashes, label=str(seed_of(rule)))
                best = rule.trained_for["best_meta_step"], rule.trained_for["validation_loss"]
                axes.plot(*best, "o", fillstyle="none", color=line.get_color())
            axes.set(title=name, xlabel="meta-step")
            axes.legend(title="meta-seed", fontsize=8)
        panels[0].set_ylabel("validation score")
        return save_figure(figure, path)


if __name__ == "__main__":
    main()
