"""Steps beyond ``total_steps``: one warning, and weights that stay as they are."""

from contextlib import nullcontext

import pytest
import torch
from optimizer_toys import small_model

from odeopt.optimizer import LearnedOptimizer

BEYOND = r"Found step 4 and `total_steps = 3`"
PATHS = {
    "eager": {"implementation": "eager"},
    "native": {"implementation": "native"},
    "guarded": {"guard": True},
    "captured": {"capturable": True},
    "captured, eager": {"capturable": True, "implementation": "eager"},
}


def optimizer_of(model, path="eager", **options):
    return LearnedOptimizer(model.parameters(), total_steps=3, **PATHS[path], **options)


def step(optimizer, n_steps):
    for _ in range(n_steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.report(1.0)
        optimizer.step()


@pytest.mark.parametrize("path", ["eager", "native", "guarded"])
def test_the_first_step_beyond_the_run_is_warned_of_once(path):
    model = small_model()
    optimizer = optimizer_of(model, path)
    step(optimizer, 3)
    with pytest.warns(UserWarning, match=BEYOND) as record:
        step(optimizer, 1)
    assert [warning.filename for warning in record] == [__file__]
    step(optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer, 1)


def test_a_run_that_was_made_longer_is_warned_of_at_its_own_end():
    optimizer = optimizer_of(small_model())
    step(optimizer, 3)
    optimizer.param_groups[0]["total_steps"] = 6
    step(optimizer, 3)
    with pytest.warns(UserWarning, match="Found step 7 and `total_steps = 6`"):
        step(optimizer, 1)
    optimizer.param_groups[0]["total_steps"] = 8
    step(optimizer, 1)
    with pytest.warns(UserWarning, match="Found step 9 and `total_steps = 8`"):
        step(optimizer, 1)


@pytest.mark.filterwarnings("ignore:.*total_steps:UserWarning")
@pytest.mark.parametrize("path", PATHS)
def test_beyond_the_run_nothing_decays(path):
    weights = []
    for decay in (0.0, 1e-3):
        model = small_model()
        optimizer = optimizer_of(model, path, weight_decay=decay)
        step(optimizer, 3)
        at_end = model[0].weight.detach().clone()
        step(optimizer, 50)
        # the schedule's floor is a millionth of a step's size; a thousandth decayed per step would come to 5 percent
        torch.testing.assert_close(model[0].weight.detach(), at_end, rtol=0, atol=1e-4)
        weights.append(at_end)
    assert (weights[0] - weights[1]).abs().max() > 2e-4  # up to there they do


def test_diagnostics_beyond_the_run_see_no_decay():
    model = small_model()
    optimizer = optimizer_of(model, weight_decay=1e-3)
    step(optimizer, 3)
    assert all(x["update_to_weight"] < 1e-4 for x in optimizer.diagnostics().values())


@pytest.mark.parametrize("given", [7, 3, None])
def test_a_checkpoint_of_a_run_of_another_length_is_warned_of(given):
    model = small_model()
    saved = optimizer_of(model).state_dict()
    other = LearnedOptimizer(model.parameters(), total_steps=given)
    match = "`total_steps` is 3 from now on, as in `state_dict`; this optimizer had `total_steps = 7`"
    with pytest.warns(UserWarning, match=match) if given == 7 else nullcontext():
        other.load_state_dict(saved)
    assert other.param_groups[0]["total_steps"] == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")], ids=str)
def test_a_count_on_one_device_ends_the_decay_on_all(devices):
    params = [torch.nn.Parameter(torch.ones(4, device=device)) for device in devices]
    optimizer = LearnedOptimizer(params, total_steps=3, capturable=True, weight_decay=1e-3, implementation="eager")
    step(optimizer, 3)
    at_end = [param.detach().clone() for param in params]
    step(optimizer, 9)
    for param, end in zip(params, at_end, strict=True):
        torch.testing.assert_close(param.detach(), end, rtol=0, atol=1e-4)
