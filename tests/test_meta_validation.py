"""What meta_train tells of its validations."""

import subprocess
import sys

import pytest
import torch

from odeopt.meta import MetaConfig, meta_train, trainer
from odeopt.rules import PortHamiltonianUpdate
from odeopt.tasks import RandomQuadratic


def test_meta_train_tells_each_validation_once_and_again_when_continued(tmp_path):
    def train(answer=lambda step: False, folder=None):
        heard, rule = [], PortHamiltonianUpdate(modes=1, hidden=(3,))
        settings = MetaConfig(n_meta_steps=6, n_tasks=2, horizon=3, validate_every=2, n_validation_tasks=2)

        def hear(step, score):
            heard.append((step, score))
            return answer(step)

        torch.manual_seed(0)
        rule.load_state_dict(PortHamiltonianUpdate(modes=1, hidden=(3,)).state_dict())
        result = meta_train(rule, RandomQuadratic(3), settings, folder=folder, progress_bar=False, on_validation=hear)
        return heard, result

    whole, result = train()
    assert whole == result.validation
    assert [step for step, _ in whole] == [0, 2, 4, 6]
    part, stopped = train(lambda step: step == 4, tmp_path)
    assert part == whole[:3]
    assert len(stopped.meta_losses) == 4
    again, continued = train(lambda step: False, tmp_path)
    assert again == continued.validation == whole
    assert continued.meta_losses == result.meta_losses
    at_once, untrained = train(lambda step: True)
    assert at_once == whole[:1]
    assert untrained.meta_losses == []


@pytest.mark.parametrize("before", [False, True])
def test_numbers_too_small_to_be_normal_are_zero_while_a_rule_is_trained(before):
    def is_flushing():
        return not (torch.full((1,), 1e-40) * 1).any()

    found = []
    torch.set_flush_denormal(before)
    try:
        settings = MetaConfig(n_meta_steps=1, n_tasks=1, horizon=2, n_validation_tasks=1)
        rule = PortHamiltonianUpdate(modes=1, hidden=(3,))
        heard = {"progress_bar": False, "on_validation": lambda *_: found.append(is_flushing())}
        meta_train(rule, RandomQuadratic(3), settings, **heard)
        assert found == [True, True]
        assert is_flushing() == before
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("before", [False, True])
def test_it_is_asked_on_the_cpu_whether_such_numbers_were_zero_before(before):
    torch.set_flush_denormal(before)
    try:
        with torch.device("meta"), trainer._flushed():
            assert not (torch.full((1,), 1e-40, device="cpu") * 1).any()
        assert bool((torch.full((1,), 1e-40) * 1).any()) is not before
    finally:
        torch.set_flush_denormal(False)


SCRIPT = """
import torch
from odeopt.meta import trainer
torch.set_num_threads(2)
with trainer._flushed():
    torch.ones(2**20).exp_()
assert (torch.full((2**20,), 1e-40) * 1).all()
"""


def test_threads_that_begin_while_a_rule_is_trained_do_not_flush_later():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
