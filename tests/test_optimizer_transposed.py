"""Matrices that are stored (in, out): stepped as the same matrices stored (out, in)."""

import pytest
import torch
from torch import nn

import odeopt

N_STEPS = 12
SHAPES = [(784, 20), (20, 784), (64, 64), (5, 700), (33, 4), (6, 1)]  # (in, out)


def targets(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def followed(shapes, rule, *, is_transposed: bool, flip: bool, **options) -> list[torch.Tensor]:
    """Matrices after steps on noisy quadratics, in the form (out, in); those that ``flip`` are stored (in, out)."""
    turn = (lambda x: x.mT.contiguous()) if flip else (lambda x: x.clone())
    fulls = [(*shape[:-2], shape[-1], shape[-2]) for shape in shapes]
    params = [nn.Parameter(turn(0.1 * targets(k, full))) for k, full in enumerate(fulls)]
    is_stack = any(len(shape) > 2 for shape in shapes)
    groups = [{"params": params, "is_transposed": is_transposed, "is_stack": is_stack}]
    optimizer = odeopt.LearnedOptimizer(groups, rule, total_steps=N_STEPS, **options)
    for step in range(N_STEPS):
        for k, (param, full) in enumerate(zip(params, fulls, strict=True)):
            noise, curvature = 0.1 * targets(1000 * k + step, full), torch.linspace(0.2, 3, full[-2]).unsqueeze(-1)
            matrix = (param.mT if flip else param).detach()
            param.grad = turn(curvature * (matrix - 0.05 * targets(k + 77, full)) + noise)
        optimizer.step()
    return [(param.mT if flip else param).detach().contiguous() for param in params]


@pytest.mark.parametrize("implementation", ["native", "eager"])
@pytest.mark.parametrize("name", ["port-hamiltonian-spectral", "port-hamiltonian"])
@pytest.mark.parametrize("shapes", [SHAPES, [(3, 40, 8), (2, 8, 40)]], ids=["matrices", "stacks"])
def test_transposed_matrices_move_as_they_would_stored_out_in(shapes, name, implementation):
    rule = odeopt.load_pretrained(name)
    options = {"implementation": implementation}
    expected = followed(shapes, rule, is_transposed=False, flip=False, **options)
    found = followed(shapes, rule, is_transposed=True, flip=True, **options)
    untold = followed(shapes, rule, is_transposed=False, flip=True, **options)
    for k, shape in enumerate(shapes):
        moved = (expected[k] - 0.1 * targets(k, tuple(expected[k].shape))).norm()
        # rounding alone: sums over coordinates are in another order, and polynomials of singular values amplify it
        assert (found[k] - expected[k]).norm() < 2e-3 * moved, shape
        if max(shape[-2:]) > 4 * min(shape[-2:]):
            assert (untold[k] - expected[k]).norm() > 0.05 * moved, shape


def test_a_step_of_transposed_convolution_kernels_goes_by_their_first_axis():
    """(in, out, k, k) is a matrix (in, rest), and its step the transpose of that of (rest, in)."""
    rule = odeopt.load_pretrained("port-hamiltonian-spectral")
    matrix = 0.1 * targets(0, (6, 18))
    kernel, flat = nn.Parameter(matrix.view(6, 2, 3, 3).clone()), nn.Parameter(matrix.clone())
    grad = targets(1, (6, 18))
    kernel.grad, flat.grad = grad.view(6, 2, 3, 3).clone(), grad.clone()
    for param in (kernel, flat):
        odeopt.LearnedOptimizer([{"params": [param], "is_transposed": True}], rule).step()
    assert torch.equal(kernel.detach().flatten(1), flat.detach())


def test_state_has_the_shape_of_the_parameter_and_continues_bit_for_bit():
    def make():
        param = nn.Parameter(targets(3, (9, 4)))
        return param, odeopt.LearnedOptimizer([{"params": [param], "is_transposed": True}], total_steps=8)

    def steps(param, optimizer, seeds):
        for seed in seeds:
            param.grad = targets(seed, (9, 4))
            optimizer.step()

    param, optimizer = make()
    steps(param, optimizer, range(4))
    assert optimizer.state[param]["p"].shape == (2, 9, 4)
    saved, weights = optimizer.state_dict(), param.detach().clone()
    other, resumed = make()
    other.data.copy_(weights)
    resumed.param_groups[0]["is_transposed"] = False
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["is_transposed"] is True
    for each in ((param, optimizer), (other, resumed)):
        steps(*each, range(4, 8))
    assert torch.equal(param, other)


def test_the_option_counts_from_the_next_step_on():
    def last_move(*told: bool) -> float:
        param = nn.Parameter(targets(5, (50, 5)))
        optimizer = odeopt.LearnedOptimizer([param])
        for seed, is_transposed in enumerate(told):
            param.grad = targets(seed, (50, 5))
            optimizer.param_groups[0]["is_transposed"] = is_transposed
            before = param.detach().clone()
            optimizer.step()
        return (param.detach() - before).norm().item()

    assert last_move(False, True) == pytest.approx(last_move(True, True), rel=0.1)
    assert last_move(False, True) < 0.5 * last_move(False, False)


@pytest.mark.parametrize("others", [{"is_table": True}, {"n_blocks": 5}])
def test_tables_and_blocks_that_are_transposed_are_refused(others):
    group = {"params": [nn.Parameter(torch.ones(10, 5))], "is_transposed": True, **others}
    with pytest.raises(ValueError, match=r"`is_transposed` should be False for tables .* and for matrices of blocks"):
        odeopt.LearnedOptimizer([group])


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_what_is_not_a_truth_value_is_refused(value):
    with pytest.raises(ValueError, match="`is_transposed` should be True or False"):
        odeopt.LearnedOptimizer([{"params": [nn.Parameter(torch.ones(3, 2))], "is_transposed": value}])


class Conv1D(nn.Module):
    """As Transformers has it, of which it bears the name here: the package is no requirement of the tests."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))


class Projection(Conv1D):
    """A class of a user's, derived from it."""


def test_groups_know_the_transposed_layers_of_transformers():
    model = nn.ModuleDict({"c_attn": Conv1D(12, 4), "c_proj": Projection(4, 4), "head": nn.Linear(4, 3)})
    groups = odeopt.param_groups(model, weight_decay=1e-5)
    told = {name: group.get("is_transposed", False) for group in groups for name, _ in group["params"]}
    assert told == {
        "c_attn.weight": True, "c_proj.weight": True, "head.weight": False,
        "c_attn.bias": False, "c_proj.bias": False, "head.bias": False,
    }  # fmt: skip
    assert [group["weight_decay"] for group in groups] == [1e-5, 1e-5, 0.0]
    odeopt.LearnedOptimizer(groups)
