"""Compiled steps with a stand-in for the compiler: what is compiled apart, and what is done once."""

from functools import partial

import pytest
import torch
from optimizer_toys import parameter

from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate
from odeopt.stepping import loops


class InChunks(AdamUpdate):
    """Adam with a switch that its configuration does not know, compiled for chunks of coordinates."""

    fuses = False
    chunk_size = 2**15

    def __init__(self, sign=1, scales=(1.0, 0.5)):
        super().__init__(0.1)
        self.sign, self.scales = sign, scales

    def forward(self, grad, state, **kwargs):
        update, state = super().forward(grad, state, **kwargs)
        return self.sign * self.scales[0] * update, state


@pytest.fixture
def compiled(monkeypatch):
    """Names of the functions that went through the compiler, which takes them as they are."""
    names = []
    for name, empty in (("_COMPILED", {}), ("_WORKED", set()), ("_FAILED", set())):
        monkeypatch.setattr(loops, name, empty)
    monkeypatch.setattr(torch, "compile", lambda function, **_: names.append(function.__name__) or function)
    return names


def trajectory(n_steps, *, size=2**17 + 1, **options):
    """Parameters after each step, and the state after the last: a large tensor and two that lie side by side."""
    generator = torch.Generator().manual_seed(0)
    params = [parameter(torch.ones(n), torch.zeros(n)) for n in (size, size // 4, 7)]
    optimizer, thetas = LearnedOptimizer(params, InChunks(), **options), []
    for step in range(n_steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        if step == 2:
            params[0].grad[-1] = float("inf")
        optimizer.step()
        thetas += [param.detach().clone() for param in params]
    return thetas, [x.clone() for param in params for x in optimizer.state[param].values()], optimizer.n_skipped


@pytest.mark.filterwarnings("ignore:.*is not finite:RuntimeWarning")
def test_what_a_tensor_holds_once_advances_once_however_many_chunks_it_has(compiled, monkeypatch):
    monkeypatch.setattr(loops, "_ONE_CALL", 0)
    eager, found = trajectory(4, compile=False), trajectory(4, compile=True)
    assert any(name.startswith("_move") for name in compiled)
    for a, b in zip(eager[0] + eager[1], found[0] + found[1], strict=True):
        assert torch.equal(a, b)
    assert [x.item() for x in found[1][2::3]] == [3, 4, 4]  # steps; the first tensor skipped one
    assert found[2] == eager[2] == 1


@pytest.mark.parametrize("failing_call", [1, 2, 5])
def test_chunk_that_cannot_be_compiled_leaves_the_others_moved_once(compiled, monkeypatch, failing_call):
    calls = []

    def refuses_late(function, **_):
        def run(*args):
            calls.append(1)
            if len(calls) == failing_call:
                raise torch._dynamo.exc.TorchDynamoException("no more")
            return function(*args)

        return run if function.__name__.startswith("_move") else function

    wanted = trajectory(2, compile=False)
    monkeypatch.setattr(torch, "compile", refuses_late)
    with pytest.warns(RuntimeWarning, match="could not be compiled and runs eagerly.*no more") as record:
        found = trajectory(2, compile=True)
    assert len(record) == 1
    for a, b in zip(wanted[0] + wanted[1], found[0] + found[1], strict=True):
        assert torch.equal(a, b)


def test_chunks_are_alike_in_size(compiled, monkeypatch):
    sizes = []
    moved = loops._moved
    monkeypatch.setattr(
        loops, "_moved", lambda rule, piece, *args: sizes.append(piece.grad.shape[1]) or moved(rule, piece, *args)
    )
    param = parameter(torch.ones(2**17 + 1), torch.ones(2**17 + 1))
    LearnedOptimizer([param], InChunks(), compile=False).step()
    assert sum(sizes) == 2**17 + 1
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("other", "is_shared"),
    [
        (InChunks, True),
        (partial(InChunks, sign=-1), False),
        (partial(InChunks, sign=True), False),  # equal to 1, but another type of number
        (partial(InChunks, scales=(0.5, 0.5)), False),
    ],
    ids=["alike", "number", "truth value", "tuple"],
)
def test_rules_share_compiled_code_only_if_their_constants_are_alike(compiled, other, is_shared):
    for rule in (InChunks(), other()):
        n_compiled = len(compiled)
        LearnedOptimizer([parameter([1.0], [1.0])], rule, compile=True).step()
    assert n_compiled > 0
    assert (len(compiled) == n_compiled) == is_shared
