"""compare(): update rules on common tasks, with intervals of paired differences."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from odeopt.artifacts import find_pretrained
from odeopt.checks import check_class, require, require_counts, require_one_of
from odeopt.evaluation.result import SCORES, Comparison, RuleResult, scores_of
from odeopt.meta.unroll import unroll
from odeopt.modes import outside_inference_mode
from odeopt.progress import tqdm
from odeopt.rules.base import UpdateRule, check_tasks_apart, initial_state
from odeopt.tasks.base import Task, flattened
from odeopt.tasks.random import EVALUATION_SEED
from odeopt.timing import clock

BEST_HAND_DESIGNED = "best hand-designed"
_BATCH_BYTES = {"cpu": 16e6, "cuda": 2e9}  # on a CPU about what its cache holds: larger batches are slower


def compare(
    rules: Mapping[str, UpdateRule | str],
    task: Task,
    *,
    n_steps: int,
    n_runs: int = 20,
    seed: int = EVALUATION_SEED,
    score: str = "last ten",
    reference: str = BEST_HAND_DESIGNED,
    runs_per_batch: int | None = None,
    device: torch.device | str | None = None,
    loss_unit: str = "",
    progress_bar: bool = True,
) -> Comparison:
    """Run every rule on the same tasks: equal initialisations, equal minibatches at equal steps.

    Args:
        rules: Rules, or names that :func:`odeopt.load_pretrained` takes, by the name to show; those without learned
            parameters count as hand-designed.
        task: Where losses come from; its held-out accuracy is shown where it measures one
            (:meth:`odeopt.tasks.Task.accuracy`).
        n_steps: Updates per run; told to the rules as the horizon.
        n_runs: Number of tasks, numbered from 0.
        seed: Seed of initialisations and batches. Keep it apart from what rules were trained or tuned on.
        score: What judges a run, a name in :data:`SCORES`.
        reference: The rule that the others are compared with, or ``"best hand-designed"``: the hand-designed
            rule with the least mean score on these very runs, a choice that favours the hand-designed side.
        runs_per_batch: Runs computed at once; bounds the memory and changes results by rounding only.
            By default as many as are fast.
        device: Where to compute; the task is moved there. Where the task is, by default.
        loss_unit: Unit of the losses, for headers and axes.
        progress_bar: Whether to show one.

    Returns:
        The comparison, with its table and figure.

    Raises:
        TypeError: If ``rules`` is no mapping, one of them is neither a rule nor a name, or returns something else than
            :meth:`odeopt.UpdateRule.forward` should; or if ``task`` is not a task.
        ValueError: If an argument is out of range or names nothing, or a rule mixes tasks.
    """
    if not isinstance(rules, Mapping):
        raise TypeError(
            'Parameter `rules` should be a dictionary, such as {"mine": rule, "general": "port-hamiltonian"}. '
            f"Found {rules!r}."
        )
    check_class("task", task, Task)
    rules = {name: _as_rule(rule, f"rules[{name!r}]") for name, rule in rules.items()}
    require(len(rules) > 0, "rules", rules, "at least one rule by name")
    require_counts(n_runs=n_runs)
    wanted = f"{BEST_HAND_DESIGNED!r} or one of {', '.join(rules)}"
    require(reference in (BEST_HAND_DESIGNED, *rules), "reference", reference, wanted)
    require_one_of(SCORES, score=score)
    if device is not None:
        task.to(device)
    options = {"n_steps": n_steps, "n_runs": n_runs, "seed": seed, "runs_per_batch": runs_per_batch}
    results = {}
    with tqdm(total=len(rules) * n_runs, disable=not progress_bar, desc="comparing", unit=" runs") as bar:
        for name, rule in rules.items():
            bar.set_postfix_str(name)
            # a copy, so that the caller's rule stays where it is
            rule = copy.deepcopy(rule).to(task.device)
            check_tasks_apart(rule)
            losses, accuracies = run(rule, task, on_runs=bar.update, **options)
            results[name] = RuleResult(
                losses,
                accuracies,
                is_learned=rule.n_parameters() > 0,
                crosses_coordinates=rule.crosses_coordinates,
                ms_per_step=time_step(rule, task),
                state_bytes=_state_bytes(rule, task),
            )
    if reference == BEST_HAND_DESIGNED:
        reference = _best_hand_designed(results, score)
    return Comparison(results, reference, score, task.describe(), seed, loss_unit)


def _as_rule(rule: UpdateRule | str, parameter: str) -> UpdateRule:
    """The rule, or the one that ships under this name."""
    if isinstance(rule, str):
        return find_pretrained(rule, parameter)
    if not isinstance(rule, UpdateRule):
        raise TypeError(f"Parameter `{parameter}` should be an instance of UpdateRule or a name. Found {rule!r}.")
    return rule


@torch.no_grad()
def run(
    rule: UpdateRule,
    task: Task,
    *,
    n_steps: int,
    n_runs: int,
    seed: int,
    runs_per_batch: int | None = None,
    with_accuracy: bool = True,
    on_runs: Callable[[int], Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Optimize the tasks 0 ... n_runs - 1 with one rule, a few at a time.

    Args:
        rule: The rule, on the device of the task.
        task: Where losses come from.
        n_steps: Updates per run.
        n_runs: Number of tasks.
        seed: Seed of initialisations and batches.
        runs_per_batch: Runs computed at once; as many as are fast by default.
        with_accuracy: Whether to measure the accuracy where the task has one.
        on_runs: Called with the number of runs done, after each batch of them.

    Returns:
        Losses, float64 on the CPU, shape ``(n_steps + 1, n_runs)``; and accuracies ``(n_runs,)``, or None.

    Raises:
        ValueError: If ``n_runs`` or ``runs_per_batch`` is not a positive integer.
    """
    require_counts(n_runs=n_runs)
    require_counts(runs_per_batch=runs_per_batch, or_none=True)
    losses, accuracies = [], []
    for indices in torch.arange(n_runs).split(runs_per_batch or fast_batch(rule, task)):
        trajectory = unroll(rule, task, indices=indices, n_steps=n_steps, seed=seed, total_steps=n_steps)
        losses.append(trajectory.losses.double().cpu())
        accuracy = task.accuracy(trajectory.params) if with_accuracy else None
        if accuracy is not None:
            accuracies.append(accuracy.double().cpu().where(losses[-1][-1].isfinite(), float("nan")))
        if on_runs is not None:
            on_runs(len(indices))
    return torch.cat(losses, dim=1), torch.cat(accuracies) if accuracies else None


@outside_inference_mode
@torch.no_grad()
def time_step(rule: UpdateRule, task: Task, *, n_steps: int = 15, n_warmup: int = 3) -> float:
    """Median time of one optimizer step on one task, its gradient's own time excluded.

    Args:
        rule: The rule, on the device of the task.
        task: Gives the parameters and one gradient.
        n_steps: Steps that are timed.
        n_warmup: Steps before them that are not.

    Returns:
        Milliseconds.
    """
    params, states = _flat_start(rule, task)
    with torch.enable_grad():
        leaves = task.init_params(torch.arange(1), 0)
        leaves = {name: param.requires_grad_() for name, param in leaves.items()}
        loss = task.loss(leaves, task.sample_batch(torch.arange(1), 0, 0)).sum()
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), strict=True))
    shapes = {name: grad.shape[1:] for name, grad in grads.items()}
    grads = {name: grad.reshape(params[name].shape) for name, grad in grads.items()}
    times = []
    for step in range(n_warmup + n_steps):
        progress = torch.tensor(step / (n_warmup + n_steps), device=task.device)
        began = clock(task.device)
        for name, grad in grads.items():
            update, states[name] = rule(grad, states[name], param=params[name], shape=shapes[name], progress=progress)
            params[name] = params[name] + update
        times.append(clock(task.device) - began)
    return 1e3 * statistics.median(times[n_warmup:])


def _flat_start(rule: UpdateRule, task: Task) -> tuple[dict[str, Tensor], dict[str, NamedTuple]]:
    """Flattened parameters of one task, and the rule's states beside them."""
    params = {name: flattened(param) for name, param in task.init_params(torch.arange(1), 0).items()}
    return params, {name: initial_state(rule, param) for name, param in params.items()}


def _n_bytes(tensors: Any) -> int:
    """Bytes of all tensors in nested containers."""
    return sum(tensor.nbytes for tensor in tree_leaves(tensors))


def _state_bytes(rule: UpdateRule, task: Task) -> float:
    params, states = _flat_start(rule, task)
    return _n_bytes(states) / sum(param.numel() for param in params.values())


def fast_batch(rule: UpdateRule, task: Task) -> int:
    """Number of runs whose parameters, states and data fill the bytes that suit the device."""
    params, states = _flat_start(rule, task)
    batch = task.sample_batch(torch.arange(1), 0, 0)
    n_bytes = _n_bytes((params, states, batch))
    return max(1, int(_BATCH_BYTES.get(task.device.type, _BATCH_BYTES["cpu"]) // max(n_bytes, 1)))


def _best_hand_designed(results: Mapping[str, RuleResult], score: str) -> str | None:
    hand_designed = {name: result for name, result in results.items() if not result.is_learned}
    means = {name: scores_of(result.losses, score).mean().item() for name, result in hand_designed.items()}
    finite = {name: mean for name, mean in means.items() if mean < float("inf")}
    return min(finite, key=finite.get, default=None)
