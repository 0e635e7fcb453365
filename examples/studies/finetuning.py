"""Does the default rule fine-tune networks that already know something?

Networks are trained by Adam, then fine-tuned on little data of another kind: images on 500 that are inverted and
turned, English prose on 50,000 characters of Python. Learning rates of AdamW and Muon are chosen by held-out loss. The
rule is used at a learning rate of 1, and at .1, which leaves more of what the network knows. Runs are kept as they are
done.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import statistics
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from unseen import RULE, chosen, parse
from unseen_problems import pretrained

import odeopt
from odeopt.suite import evaluate_suite, learned, networks, opponents, untrained
from odeopt.suite.problems import Batch, Characters, Data, Images, Problem, english, next_character

NAMES = ("vit", "convnet", "transformer", "recurrent")
N_BEFORE, BEFORE = 600, 2000  # steps of the training before, and the seed of its batches


class Turned(Images):
    """Images that are inverted and turned by a right angle."""

    def __init__(self, *images: Any, **options: Any) -> None:
        super().__init__(*images, **options)
        self.description += ", inverted and turned"

    def _labelled(self, pixels: torch.Tensor, labels: torch.Tensor) -> Batch:
        batch = super()._labelled(255 - pixels.int(), labels)
        return Batch((batch.inputs[0].rot90(1, (2, 3)),), batch.target)


class Code(Characters):
    """Source code of Python in the characters of the prose: 50,000 for training, the next 20,000 held out."""

    def __init__(self) -> None:
        super().__init__()
        numbers = {character: i for i, character in enumerate(sorted(set(english())))}
        text = [x for module in (statistics, tarfile) for x in inspect.getsource(module) if x in numbers][:70_000]
        places = torch.tensor([*map(numbers.get, text)])
        self._train, self._held_out = places[:50_000], places[50_000:]
        self.description += f", then of {hashlib.sha256(''.join(text).encode()).hexdigest()[:16]}"


def problems(dataset: str, data_dir: str | None, n_before: int = N_BEFORE) -> dict[str, Problem]:
    """Make all problems, of networks that were trained for a number of steps."""
    images, text = Images(dataset, data_dir), Characters()
    turned, code = Turned(dataset, data_dir, n_examples=500), Code()
    for data in (turned, code):  # so that runs are told apart
        data.description += f", after {n_before} steps"
    transformer = partial(networks.CharacterTransformer, text.n_characters, text.context, width=64, n_layers=2)
    recurrent = partial(networks.CharacterGRU, text.n_characters, n_embedded=32, width=64)
    rows = [
        (partial(networks.VisionTransformer, images.side, width=32, n_layers=2), images, turned, F.cross_entropy),
        (partial(networks.ResidualNet, (4, 8)), images, turned, F.cross_entropy),
        (transformer, text, code, next_character),
        (recurrent, text, code, next_character),
    ]
    return {
        name: Problem(name, name, 200, knowing(make, before, criterion, n_before), data, criterion, "held_out")
        for name, (make, before, data, criterion) in zip(NAMES, rows, strict=True)
    }


def knowing(make: Callable[[], nn.Module], data: Data, criterion: Callable, n_steps: int) -> Callable[[], nn.Module]:
    """Make a maker of networks that were trained on data."""

    def batches() -> Iterator[Batch]:
        return (data.batch(step, BEFORE) for step in range(n_steps))

    return partial(pretrained, make, batches, criterion, {})


def compare(args: argparse.Namespace) -> None:
    """Run the rule at two learning rates, the untrained one, AdamW and Muon; print the table and draw the figure."""
    rule = odeopt.load_pretrained(RULE)
    contenders = {name: opponents()[0][name] for name in ("adamw", "muon")}
    gentle = replace(learned(rule, f"{RULE}, lr .1"), rates=(0.1,))
    for each in (learned(rule, RULE), gentle, learned(untrained(rule), f"{RULE}, untrained")):
        contenders[each.name] = each
    path = args.out / "finetuning.json"
    every = chosen(problems(args.dataset, args.data_dir, args.steps or N_BEFORE), args)  # a trial is short throughout
    found = evaluate_suite(every, contenders, path=path, n_runs=args.runs, device=args.device)
    print(found.table(markdown=args.markdown))
    print(f"\nsaved {path} and {found.plot(path.with_suffix('.png'), title='Fine-tuning')}")


def main(argv: list[str] | None = None) -> None:
    """Fine-tune by the rule and its opponents."""
    compare(parse(argv, "finetuning", __doc__, NAMES))


if __name__ == "__main__":
    main()
