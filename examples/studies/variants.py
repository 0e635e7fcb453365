"""Variants of a rule: trained in the same way from several meta-seeds, kept in a folder, compared with one of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from odeopt.artifacts import load, save
from odeopt.checks import require
from odeopt.evaluation import EVALUATION_SEED, Interval, compare, student_interval, time_step
from odeopt.files import unfit
from odeopt.meta.config import MetaConfig
from odeopt.meta.files import Config
from odeopt.meta.trainer import meta_train
from odeopt.meta.validation import validation_score
from odeopt.progress import tqdm
from odeopt.rules.base import UpdateRule
from odeopt.tasks import Mixture, Task
from odeopt.tasks.random import VALIDATION_SEED

_N_TIMINGS = 5


def shortened(config: Config, n_meta_steps: int | None = None, horizon: int | None = None) -> Config:
    """The configuration with other numbers of meta-steps and of steps of a run, where they are given."""
    n_meta_steps, horizon = n_meta_steps or config.training.n_meta_steps, horizon or config.training.horizon
    training = dataclasses.replace(config.training, n_meta_steps=n_meta_steps, horizon=horizon)
    return dataclasses.replace(config, task=config.task | {"horizons": [horizon, horizon]}, training=training)


def train_variants(
    config: Config,
    variants: Mapping[str, Mapping[str, Any]],
    folder: str | os.PathLike,
    *,
    n_seeds: int = 1,
    data_dir: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    progress_bar: bool = True,
) -> dict[str, list[UpdateRule]]:
    """Meta-train variants of a configuration on its tasks, each from several meta-seeds.

    Every rule is kept as an artefact in a folder of its own, with the checkpoint of its training; what is found there
    is not trained again, so that the same call continues an interrupted one.

    Args:
        config: What all have in common.
        variants: By the variant's name, the options of the rule that differ from the configuration's.
        folder: Where the rules are kept.
        n_seeds: Meta-trainings of each variant; their seeds count up from the configuration's.
        data_dir: Where image datasets lie; see :func:`odeopt.tasks.load_dataset`.
        device: Where to compute.
        progress_bar: Whether to show one.

    Returns:
        Rules by variant, one for each meta-seed, on the device. ``rule.trained_for["seconds"]`` is what the training
        took, ``"cpu_seconds"`` what it took of the processor if it was not interrupted.

    Raises:
        ValueError: If an argument is out of range, or the folder holds a rule that was trained otherwise.
    """
    require(n_seeds >= 1, "n_seeds", n_seeds, "at least 1")
    require(config.start is None and not config.use, "config", config, "of one training, without a start and `use`")
    folders = {name: re.sub(r"\W+", "-", name).strip("-") for name in variants}
    require(len(set(folders.values())) == len(folders), "variants", list(variants), "named apart by letters and digits")
    task = config.build_task(data_dir=data_dir, device=device)
    rules: dict[str, list[UpdateRule]] = {name: [] for name in variants}
    # one meta-seed after the other: what an interrupted call leaves is a comparison of fewer of them
    with tqdm(total=n_seeds * len(variants), disable=not progress_bar, desc="training", unit=" rules") as bar:
        for seed in range(config.training.seed, config.training.seed + n_seeds):
            for name, options in variants.items():
                bar.set_postfix_str(f"{name}, meta-seed {seed}")
                own = dataclasses.replace(config.with_seed(seed), rule=config.rule | dict(options))
                rules[name].append(_trained(own, task, Path(folder) / f"{folders[name]}-{seed}", device))
                bar.update()
    return rules


def _trained(config: Config, task: Task | Mixture, folder: Path, device: torch.device | str) -> UpdateRule:
    path, rule = folder / "rule.safetensors", config.build_rule()
    wanted = {"rule": rule.config, "task": config.task, "training": config.training.describe()}
    if not path.exists():
        is_new, began = not (folder / "checkpoint.pt").exists(), time.process_time()
        result = meta_train(rule.to(device), task, config.training, folder=folder, progress_bar=False)
        # on a machine that others use too it says more than the clock, but of an interrupted training not all
        spent = {"cpu_seconds": round(time.process_time() - began, 1)} if is_new else {}
        save(rule, path, trained_for=config.trained_for(result) | spent)
    rule = load(path)
    made = rule.trained_for | {"rule": rule.config}
    for name, value in json.loads(json.dumps(wanted)).items():
        if made.get(name) != value:
            found = f", of another {name}; choose another folder or delete it"
            raise unfit(path, "rules that were trained as asked for", found)
    return rule.to(device)


class Row(NamedTuple):
    """Runs of one variant, summed up.

    Attributes:
        score: Mean score over runs and meta-seeds; NaN where a run did not stay finite.
        difference: To the reference: mean and 95 % Student interval over paired runs, each of them averaged over the
            meta-seeds. NaN where a run of either did not stay finite.
        by_seed: Mean difference of each meta-seed to the mean of the reference over all of its own.
        n_diverged: Runs, of all meta-seeds, whose final loss is not finite or above the first.
        n_runs: Runs of all meta-seeds.
        ms_per_step: Least time of a step on one task without the gradient, in milliseconds.
        n_parameters: Learned parameters.
    """

    score: float
    difference: Interval
    by_seed: tuple[float, ...]
    n_diverged: int
    n_runs: int
    ms_per_step: float
    n_parameters: int

    def text(self, *, is_reference: bool = False) -> str:
        """Score ± half the range over meta-seeds [interval of the difference], as far as there are any."""
        if not math.isfinite(self.score):
            return f"diverged ({self.n_diverged} of {self.n_runs} runs)"
        words = [f"{self.score:.3f}"]
        if len(self.by_seed) > 1:
            words.append(f"± {(max(self.by_seed) - min(self.by_seed)) / 2:.3f}")
        if not is_reference and all(map(math.isfinite, self.difference)):
            words.append(f"[{self.difference.low:+.3f}, {self.difference.high:+.3f}]")
        if self.n_diverged:
            words.append(f"({self.n_diverged} of {self.n_runs} runs diverged)")
        return " ".join(words)

    def as_json(self) -> dict[str, Any]:
        """The fields by name, with None in place of numbers that are not finite."""

        def finite(x: Any) -> Any:
            if isinstance(x, tuple):
                return [finite(y) for y in x]
            return x if math.isfinite(x) else None

        return {name: finite(value) for name, value in self._asdict().items()}


def validate(
    rule: UpdateRule, times: int, *, data_dir: str | os.PathLike | None = None, device: torch.device | str = "cpu"
) -> float:
    """Validate a trained rule again as its meta-training did, on more of the same tasks.

    Args:
        rule: The rule, made by ``python -m odeopt train``; moved to the device.
        times: How many times the tasks of the meta-training's validations.
        data_dir: Where image datasets lie; see :func:`odeopt.tasks.load_dataset`.
        device: Where to compute.

    Returns:
        The score, see :attr:`odeopt.meta.MetaResult.best_score`.
    """
    made = rule.trained_for
    training = made["training"]
    task = Config(made["config"], {}, made["task"], MetaConfig()).build_task(data_dir=data_dir, device=device)
    options = {"indices": torch.arange(times * training["n_validation_tasks"]), "horizon": training["horizon"]}
    options |= {"seed": VALIDATION_SEED, "held_out": training["objective"]["held_out"]}
    with torch.no_grad():
        return validation_score(rule.to(device), task, **options)


def by_configuration(rules: Sequence[UpdateRule]) -> dict[str, list[UpdateRule]]:
    """Put rules together that ``python -m odeopt train`` made from one configuration.

    Args:
        rules: Trained rules, read from artefacts.

    Returns:
        Rules by the configuration's name; those of one differ in their meta-seeds, the best validation comes first.

    Raises:
        ValueError: If a rule was made otherwise, two of one configuration share a meta-seed, or were not trained alike.
    """
    groups: dict[str, list[UpdateRule]] = {}
    for rule in rules:
        made = rule.trained_for
        missing = sorted({"config", "task", "training", "validation_loss", "seconds"} - set(made))
        wanted = f"made by `python -m odeopt train`, which notes {', '.join(missing)}"
        require(not missing, "rules", sorted(made), wanted)
        groups.setdefault(made["config"], []).append(rule)
    for name, group in groups.items():
        group.sort(key=lambda rule: rule.trained_for["validation_loss"])
        seeds = [rule.trained_for["training"]["seed"] for rule in group]
        alike = [(rule.config, rule.trained_for["task"], rule.trained_for["training"] | {"seed": 0}) for rule in group]
        is_right = len(set(seeds)) == len(seeds) and all(each == alike[0] for each in alike)
        wanted = f"of different meta-seeds, and trained alike: those of {name} are not"
        require(is_right, "rules", seeds, wanted)
    return groups


def compare_variants(
    rules: Mapping[str, Sequence[UpdateRule]],
    task: Task,
    *,
    reference: str,
    n_steps: int,
    n_runs: int = 20,
    score: str = "last ten",
    seed: int = EVALUATION_SEED,
    progress_bar: bool = True,
) -> dict[str, Row]:
    """Compare variants on common runs, each as the mean over its meta-seeds.

    The interval of a difference is over runs: it says what holds for these trained rules on other runs, not what other
    meta-trainings would give. That is what ``by_seed`` is for.

    Args:
        rules: Rules of each meta-seed, by variant; hand-designed rules as one.
        task: Where losses come from.
        reference: The variant that the others are compared with.
        n_steps: Updates per run; told to the rules as the horizon.
        n_runs: Runs of each rule.
        score: What judges a run; see :func:`odeopt.compare`.
        seed: Seed of initialisations and batches; likewise.
        progress_bar: Whether to show one.

    Returns:
        A row for each variant, in their order.

    Raises:
        ValueError: If an argument is out of range or names nothing, or a variant has no rule.
    """
    require(reference in rules, "reference", reference, f"one of {', '.join(rules)}")
    require(all(len(of_seeds) > 0 for of_seeds in rules.values()), "rules", rules, "one rule or more by each name")
    names = {name: [f"{name} #{k}" for k in range(len(of_seeds))] for name, of_seeds in rules.items()}
    flat = {key: rule for name, keys in names.items() for key, rule in zip(keys, rules[name], strict=True)}
    options = {"n_steps": n_steps, "n_runs": n_runs, "score": score, "seed": seed, "progress_bar": progress_bar}
    comparison = compare(flat, task, reference=names[reference][0], **options)
    scores = {name: torch.stack([comparison.scores(key) for key in keys]) for name, keys in names.items()}
    middle = scores[reference].mean(0)
    times = step_times({name: of_seeds[0] for name, of_seeds in rules.items()}, task)
    rows = {}
    for name, keys in names.items():
        results = [comparison.results[key] for key in keys]
        # inf - inf and the like are one thing: not a number
        values = scores[name].where(scores[name].isfinite(), float("nan"))
        rows[name] = Row(
            score=values.mean().item(),
            difference=student_interval(values.mean(0) - middle),
            by_seed=tuple((values.mean(1) - middle.mean()).tolist()),
            n_diverged=sum(int(result.is_diverged.sum()) for result in results),
            n_runs=n_runs * len(keys),
            ms_per_step=times[name],
            n_parameters=rules[name][0].n_parameters(),
        )
    return rows


def step_times(rules: Mapping[str, UpdateRule], task: Task) -> dict[str, float]:
    """Least milliseconds of a step by rule; taken in turns, so that what else the machine does strikes all alike."""
    rules = {name: copy.deepcopy(rule).to(task.device) for name, rule in rules.items()}
    times = dict.fromkeys(rules, math.inf)
    for _ in range(_N_TIMINGS):
        for name, rule in rules.items():
            times[name] = min(times[name], time_step(rule, task, n_steps=1, n_warmup=1))
    return times
