"""Does the default rule generalise better than AdamW, or does it only fit better?

On the networks of the suite the rule is told shorter and shorter runs, down to a sixteenth of the suite's, so that one
ends at about the training loss that tuned AdamW ends with after a whole one. Held-out losses are compared there,
linear in the logarithms between two lengths. Beside it the same rule before its meta-training. AdamW's runs, and the
whole ones of the rule, are those of ``suite.json``; the others are kept as they are done.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from unseen import RULE, parse

import odeopt
from odeopt.evaluation import ratio_interval, ratio_text
from odeopt.files import read_json, write_json
from odeopt.progress import tqdm
from odeopt.report import PALETTE, draw_table, new_figure, panel_grid, save_figure, style, use_plain_numbers
from odeopt.suite import available_problems, evaluate_suite, learned, make_problem, opponents, untrained
from odeopt.suite.opponents import REFERENCE, Contender
from odeopt.suite.problems import Problem
from odeopt.suite.run import run

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the steps of a run of the suite
_N_COLUMNS = 3  # of panels
UNTRAINED = f"{RULE}, untrained"
TITLES = ("steps, of AdamW's", "training loss", "held-out loss")


def crossing(train: Tensor, held_out: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Length of the run that comes down to a training loss, and its losses.

    Args:
        train: Training losses of runs of growing length, shape ``(n_lengths, n_runs)``.
        held_out: Their held-out losses, of the same shape.
        level: The training loss to come down to, shape ``(n_runs,)``.

    Returns:
        Logarithms of the share of steps, of the training and of the held-out loss, each ``(n_runs,)``: linear between
        the first length at or below the level and the one before; of the longest run where none comes down so far.
    """
    is_below = train <= level
    after = torch.where(is_below.any(0), is_below.int().argmax(0), len(train) - 1)
    before = (after - 1).clamp_min(0)
    shares = torch.tensor(SHARES, dtype=train.dtype).log().unsqueeze(1).expand_as(train)
    rows = [x.gather(0, torch.stack((before, after))) for x in (shares, train.log(), held_out.log())]
    weight = ((level.log() - rows[1][0]) / (rows[1][1] - rows[1][0])).nan_to_num(1.0).clamp(0, 1)
    weight = torch.where(is_below.any(0), weight, 1.0)
    return tuple(torch.lerp(*row, weight) for row in rows)


def shortened(problem: Problem, rule: Contender, args: argparse.Namespace, content: dict, path: Path) -> Tensor:
    """Training and held-out losses of the shorter runs, shape ``(2, n_lengths - 1, n_runs)``."""
    runs, found = content["runs"], []
    for share in SHARES[:-1]:
        of = replace(problem, n_steps=round(share * problem.n_steps))
        keys = [f"{of.name} | {rule.name} | {of.n_steps} steps | seed {seed}" for seed in range(args.runs)]
        for seed, key in enumerate(keys):
            if key not in runs:
                result = run(of, lambda model, n_steps: rule.make(model, n_steps, 1.0), seed, device=args.device)
                runs[key] = [result.train, result.held_out]
                write_json(path, content, is_by_row=True)
        found.append([runs[key] for key in keys])
    return torch.tensor(found, dtype=torch.float64).movedim(-1, 0)


def table(found: Mapping[str, Mapping[str, Any]], *, markdown: bool = False) -> str:
    """Share of AdamW's steps, and losses over AdamW's, where training losses are closest to equal."""
    rows = []
    for name, of in found.items():
        rows.append([name])
        for each in (of[RULE], of[UNTRAINED]):
            share = torch.tensor(each["share"], dtype=torch.float64).log().mean().exp().item()
            pairs = zip(*(torch.tensor(x, dtype=torch.float64) for x in (each["losses"], of["adamw"])), strict=True)
            rows[-1] += [f"{share:.2f}", *(ratio_text(ratio_interval(a, b)) for a, b in pairs)]
    titles = ["network", *TITLES, *(f"untrained, {title}" for title in TITLES)]
    return draw_table([(title, "") for title in titles], rows, markdown=markdown)


def plot(found: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Draw held-out over training losses of growing runs, geometric means, beside where AdamW ends."""
    n_rows = -(-len(found) // _N_COLUMNS)
    with style():
        figure, _ = new_figure(9.6, 2.5 * n_rows + 0.8, n_columns=0)
        for axes, (name, of) in zip(panel_grid(figure, len(found), _N_COLUMNS), found.items(), strict=False):
            axes.plot(*of[RULE]["means"], "o-", color=PALETTE[0], label="default rule, told a sixteenth to all steps")
            axes.plot(*of[UNTRAINED]["means"], "o:", color=PALETTE[0], fillstyle="none", label="the same, untrained")
            ends = torch.tensor(of["adamw"], dtype=torch.float64).log().mean(-1).exp().unsqueeze(-1)
            axes.plot(*ends, "D", color=PALETTE[1], label="tuned AdamW, after all steps")
            axes.set(xscale="log", yscale="log", xlabel="training loss", ylabel="held-out loss", title=name)
            for axis, losses in zip((axes.xaxis, axes.yaxis), of[RULE]["means"], strict=True):
                if max(losses) < 50 * min(losses):  # over more decades they would overlap
                    use_plain_numbers(axis, (1, 2, 5))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        return save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Run the rule for shorter times, print the table and keep the numbers."""
    args = parse(argv, "equal_loss", __doc__, available_problems())
    path = args.out / "equal_loss.json"
    rule = odeopt.load_pretrained(RULE)
    contenders = {REFERENCE: opponents()[0][REFERENCE]}
    contenders |= {RULE: learned(rule, RULE), UNTRAINED: learned(untrained(rule), UNTRAINED)}
    content = {"dataset": args.dataset, **contenders[RULE].settings}
    if path.exists():
        content = read_json(path, dict, wanted="numbers of this study, of the same rule and images", header=content)
    content.setdefault("runs", {})
    found = content.setdefault("equal", {})
    for name in tqdm(args.problems or available_problems(), unit=" networks"):
        problem = make_problem(name, dataset=args.dataset, data_dir=args.data_dir, n_steps=args.steps)
        options = {"path": args.out / "suite.json", "n_runs": args.runs, "device": args.device}
        whole = evaluate_suite({name: problem}, contenders, **options, progress_bar=False).outcomes[name]
        found[name] = {"adamw": [whole[REFERENCE].train.tolist(), whole[REFERENCE].held_out.tolist()]}
        for key in (RULE, UNTRAINED):
            longest = torch.stack((whole[key].train, whole[key].held_out)).unsqueeze(1)
            runs = torch.cat((shortened(problem, contenders[key], args, content, path), longest), 1)
            share, *losses = (x.exp().tolist() for x in crossing(*runs, whole[REFERENCE].train))
            found[name][key] = {"share": share, "losses": losses, "means": runs.log().mean(-1).exp().tolist()}
    write_json(path, content, is_by_row=True)
    print(f"\n{table(found, markdown=args.markdown)}\n\nsaved {path} and {plot(found, path.with_suffix('.png'))}")


if __name__ == "__main__":
    main()
