"""Modes of torch: where numbers may be read, and where nothing but shapes is known."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from odeopt.modes import has_values, is_readable, is_traced, is_watched


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def judgements(x):
    return is_traced(), is_watched(), is_readable(x), has_values(x)


def under(transform):
    """The judgements inside of a function that torch.func transforms."""
    found = []

    def function(x):
        found.append(judgements(x))
        return x.square().sum()

    transform(function)(torch.ones(3))
    return found


def test_numbers_of_a_plain_tensor_on_a_cpu_may_be_read():
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert judgements(torch.ones(2)) == (False, False, True, True)


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.vmap,
        torch.func.grad,
        torch.func.jacrev,
        torch.func.functionalize,
        lambda function: lambda x: torch.func.vjp(function, x),
    ],
    ids=["vmap", "grad", "jacrev", "functionalize", "vjp"],
)
def test_a_function_that_is_transformed_reads_nothing(transform):
    assert under(transform) == [(True, True, False, True)]
    assert judgements(torch.ones(2)) == (False, False, True, True)  # and it is over when the call is


def test_a_mode_of_dispatch_sees_each_operation():
    with Watching():
        assert judgements(torch.ones(2)) == (False, True, False, True)


def test_a_tensor_of_shape_only_has_no_values():
    assert judgements(torch.ones(2, device="meta")) == (False, False, False, False)
    with FakeTensorMode():
        fake = torch.ones(2)
    assert judgements(fake) == (False, False, False, False)


def test_a_compiled_function_reads_nothing():
    def function(x):
        return x + 1 if is_readable(x) else x - 1

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.zeros(2))
