"""Trajectories of every shipped rule, frozen as numbers beside the artefacts.

Other properties of a rule hold for many rules; these numbers hold for the rules that are shipped. Whoever means to
change what an artefact computes writes them anew and reviews the difference::

    python tests/test_goldens.py --write

The input is in closed form, so that no random number generator enters. It runs in double precision, where other
processors, vector units and orders of summation move results by less than the tolerance.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import odeopt
from odeopt.stepping import layout

PATH = Path(odeopt.__file__).parent / "pretrained" / "goldens.json"
F64 = torch.float64

# the pace of the memory changes after the tenth step
N_STEPS = 12
# A matrix of more than one row of a packed buffer, a bias, and a kernel; each with a size of its own, none of them one,
# whose logarithm is zero. The kernel's parameters are so small that the bound under their logarithm counts.
SHAPES = {"weight": (40, 30), "bias": (7,), "kernel": (4, 3, 2, 2)}
PARAM_SIZES = {"weight": 0.2, "bias": 3.0, "kernel": 2e-3}
GRAD_SIZES = {"weight": 0.5, "bias": 0.02, "kernel": 4.0}
# In each tensor a coordinate with a large gradient, one with a small one, and the one that has none.
COORDINATES = {"weight": (0, 1034), "bias": (0, 4), "kernel": (0, 34)}
SILENT = 3
# Double precision: rounding of 1e-16 grows by far less than 1e5 over the steps. Numbers are written with 12 digits.
TOLERANCE = 1e-9
DIGITS = 12


def waves(n, phase):
    """Numbers of order one that repeat nowhere; from the scalar sine, which is the same everywhere to rounding."""
    return torch.tensor([math.sin(1.7 * i + phase) + 0.3 * math.cos(0.9 * i * i) for i in range(n)], dtype=F64)


def initial_params():
    """Parameters of a size per tensor, flattened."""
    return {name: PARAM_SIZES[name] * waves(math.prod(shape), 0.4) for name, shape in SHAPES.items()}


def gradients(step):
    """Gradients, flattened: seven magnitudes from 1 to 1e-6 in each tensor, turning, and falling from step to step.

    The bias has no gradient at all in the first step, and one coordinate of each tensor never has any.
    """
    grads = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        n = math.prod(shape)
        magnitudes = torch.tensor([10.0 ** -(i % 7) for i in range(n)], dtype=F64)
        fall = 0.8**step * (1 + 0.5 * math.sin(2 * step + number))
        grads[name] = GRAD_SIZES[name] * fall * magnitudes * (waves(n, 0.6 * step + number) + 0.4)
        grads[name][SILENT] = 0.0
    if step == 0:
        grads["bias"].zero_()
    return grads


@torch.no_grad()
def by_rule(rule, is_progress_known, dtype=F64):
    """Updates per tensor, shape ``(N_STEPS, n)``, by calling the rule, told how many matrices there are."""
    rule, updates = rule.for_depth(sum(rule.is_whole(shape) for shape in SHAPES.values())), {}
    for name, param in initial_params().items():
        param = param.to(dtype)
        state, updates[name] = rule.init_state(param), []
        for step in range(N_STEPS):
            progress = torch.tensor(step / N_STEPS, dtype=dtype) if is_progress_known else None
            grad = gradients(step)[name].to(dtype)
            update, state = rule(grad, state, param=param, shape=SHAPES[name], progress=progress)
            param = param + update
            updates[name].append(update)
    return {name: torch.stack(steps) for name, steps in updates.items()}


def by_optimizer(rule, is_progress_known):
    """The same from the parameters that :class:`odeopt.LearnedOptimizer` moves."""
    params = {name: nn.Parameter(x.reshape(SHAPES[name])) for name, x in initial_params().items()}
    optimizer = odeopt.LearnedOptimizer(params.values(), rule, total_steps=N_STEPS if is_progress_known else None)
    updates = {name: [] for name in params}
    for step in range(N_STEPS):
        before = {name: param.detach().clone() for name, param in params.items()}
        for name, grad in gradients(step).items():
            params[name].grad = grad.reshape(SHAPES[name])
        optimizer.step()
        for name, param in params.items():
            updates[name].append((param.detach() - before[name]).flatten())
    return {name: torch.stack(steps) for name, steps in updates.items()}


def summary(updates):
    """Per tensor and step the norm of the update and a few of its coordinates, in units of the parameter."""
    return {
        name: torch.cat((steps.norm(dim=1, keepdim=True), steps[:, [*COORDINATES[name], SILENT]]), 1).to(F64)
        for name, steps in updates.items()
    }


def cases():
    """The cases that differ: a rule that does not look at progress has one."""
    for name in odeopt.available_pretrained():
        for is_known in (True, False) if odeopt.load_pretrained(name).config.get("uses_progress") else (False,):
            yield name, is_known


def key(name, is_known):
    return f"{name}, progress {'known' if is_known else 'unknown'}"


def write():
    """Write the trajectories of the shipped rules anew."""
    tensors = [
        f'"{key(*case)}, {tensor}": {json.dumps([[float(f"{x:.{DIGITS}g}") for x in step] for step in steps.tolist()])}'
        for case in cases()
        for tensor, steps in summary(by_rule(odeopt.load_pretrained(case[0]).to(F64), case[1])).items()
    ]
    PATH.write_text("{\n" + ",\n".join(tensors) + "\n}\n", encoding="utf-8")


def assert_golden(updates, name, is_known, *, tolerance=TOLERANCE, share=1e-6):
    """Compare each number, relative to itself or to a share of the norm: coordinates differ in size."""
    goldens = json.loads(PATH.read_text(encoding="utf-8"))
    for tensor, found in summary(updates).items():
        expected = torch.tensor(goldens[f"{key(name, is_known)}, {tensor}"], dtype=F64)
        size = torch.maximum(expected.abs(), share * expected[:, :1])
        assert found.shape == expected.shape == (N_STEPS, 2 + len(COORDINATES[tensor]))
        is_close = (found - expected).abs() <= tolerance * size  # False where a NaN is found
        assert is_close.all(), (tensor, found[~is_close], expected[~is_close])


over_cases = pytest.mark.parametrize(("name", "is_known"), list(cases()), ids=lambda x: str(x))


def test_every_shipped_rule_has_its_golden_trajectories():
    goldens = json.loads(PATH.read_text(encoding="utf-8"))
    assert goldens.keys() == {f"{key(*case)}, {tensor}" for case in cases() for tensor in SHAPES}
    assert PATH.stat().st_size < 60_000  # it is part of every wheel


@over_cases
def test_rule_takes_its_golden_steps(name, is_known):
    assert_golden(by_rule(odeopt.load_pretrained(name).to(F64), is_known), name, is_known)


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "in place"])
@over_cases
def test_optimizer_takes_the_golden_steps(name, is_known, is_packed, monkeypatch):
    # all of these tensors are small enough to be packed, unless told otherwise
    n_calls, step_bucket = [], layout.step_bucket
    monkeypatch.setattr(layout, "step_bucket", lambda *a, **k: (n_calls.append(1), step_bucket(*a, **k)))
    if not is_packed:
        monkeypatch.setattr(layout, "_STEPPED_IN_PLACE", {"cpu": 0})
    rule = odeopt.load_pretrained(name).to(F64)
    assert_golden(by_optimizer(rule, is_known), name, is_known)
    is_packable = is_packed and (rule.is_staged or not rule.crosses_coordinates)
    # matrices that are stepped by their singular values are stacked with others of their shape, of which there are none
    n_alone = sum(rule.is_whole(shape) for shape in SHAPES.values())
    assert len(n_calls) == N_STEPS * (n_alone + 1 if is_packable else len(SHAPES))


@over_cases
def test_steps_in_single_precision_are_golden_to_its_rounding(name, is_known):
    # Rounding of 6e-8 grows a hundredfold where coordinates a millionth of the largest are taken logarithms of.
    updates = by_rule(odeopt.load_pretrained(name), is_known, torch.float32)
    assert_golden(updates, name, is_known, tolerance=2e-5, share=1.0)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
