"""Properties of the steps written here: explicit methods for any field, and linear friction in closed form."""

import mpmath
import pytest
import torch
from cuda_toys import no_waiting
from hypothesis import given, settings
from hypothesis import strategies as st
from torchdiffeq import odeint

from odeopt.ode import EXPLICIT_METHODS, LINEAR_METHODS, explicit_step, integrate_unit, linear_step, nominal_order

F64 = torch.float64
DTYPES = [torch.float32, F64]
# The shipped rules keep their friction in [0, 2]. One is where the exponential changes from its series.
SPECIAL_FRICTIONS = [0.0, 1e-30, 1e-8, 1e-3, 0.3, 0.999, 1.0, 1.001, 2.0]
FRICTIONS = st.one_of(st.sampled_from(SPECIAL_FRICTIONS), st.floats(0, 2, width=32), st.floats(-5, 20, width=32))
VALUES = st.floats(-10, 10, width=32)

# torch scripts some of its own code (rules for forward derivatives, parts of the compiler) when it is first used
scripts_inside_torch = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def waving(t, x):
    return torch.cos(3 * t + 1) * torch.sin(x) - 0.4 * x


def random(*shape, dtype=F64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_within_rounding(found, expected, scale, n_roundings):
    """Equal up to ``n_roundings`` units of rounding of the numbers that were added up."""
    rounding = torch.finfo(found.dtype)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    # numbers under `tiny` have fewer digits
    assert ((found - expected).abs() <= n_roundings * rounding.eps * scale + rounding.tiny).all(), (found, expected)


# Explicit methods


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    shape=st.sampled_from([(4,), (3, 4), (2, 1, 4), (0, 4)]),
    dtype=st.sampled_from(DTYPES),
    method=st.sampled_from(EXPLICIT_METHODS),
    t0=st.floats(-2, 2, width=32),
    dt=st.sampled_from([1.0, 0.3, -0.7]),
    is_tensor=st.booleans(),
)
def test_step_is_torchdiffeqs_to_rounding(seed, shape, dtype, method, t0, dt, is_tensor):
    M, x0 = random(4, 4, dtype=dtype, seed=seed), random(*shape, dtype=dtype, seed=seed + 1)

    def field(t, x):
        assert t.shape == ()
        assert t.dtype == dtype
        return torch.tanh(x @ M) + torch.cos(3 * t + 1) * x

    t = torch.tensor([t0, t0 + dt], dtype=dtype)
    expected = odeint(field, x0, t, method=method)[-1]
    dt = t[1] - t[0]
    found = explicit_step(field, t[0] if is_tensor else t0, dt.double() if is_tensor else dt.item(), x0, method)
    # Ten sums of numbers of this size; three further stages multiply the errors of a stage by up to |M| + 1.
    scale = (1 + x0.abs().amax()) if x0.numel() else 1
    assert_within_rounding(found, expected, scale * (1 + M.abs().sum(0).amax()), 16)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
@pytest.mark.parametrize("method", EXPLICIT_METHODS)
def test_unit_steps_of_both_backends_agree(method, dtype):
    x0 = random(5, 3, dtype=dtype)
    found, expected = (integrate_unit(waving, x0, method=method, backend=name) for name in ("odeopt", "torchdiffeq"))
    assert_within_rounding(found, expected, 1 + x0.abs(), 16)
    assert torch.equal(integrate_unit(waving, x0, method=method), found)


def test_unit_step_leaves_other_methods_to_torchdiffeq():
    x0 = random(3)
    expected = integrate_unit(waving, x0, method="dopri5", backend="torchdiffeq")
    assert torch.equal(integrate_unit(waving, x0, method="dopri5"), expected)


@pytest.mark.parametrize("method", EXPLICIT_METHODS)
def test_steps_converge_at_their_order(method):
    # Nonlinear and explicit in time, so that every order condition counts; tan(x / 2) grows as exp(sin(t)).
    x0 = torch.tensor([0.5, -1.5], dtype=F64)
    exact = 2 * torch.atan(torch.tan(x0 / 2) * torch.tensor(2.0, dtype=F64).sin().exp())
    errors = []
    for n_steps in (64, 128):
        x = x0
        for i in range(n_steps):
            x = explicit_step(lambda t, x: torch.cos(t) * torch.sin(x), 2 * i / n_steps, 2 / n_steps, x, method)
        errors.append((x - exact).norm())
    # the next power of h moves the observed order by a few percent at these steps
    assert torch.log2(errors[0] / errors[1]).item() == pytest.approx(nominal_order(method), abs=0.15)


@pytest.mark.parametrize("method", EXPLICIT_METHODS)
def test_step_evaluates_the_field_once_per_stage_and_changes_nothing(method):
    calls, x0 = [], random(3, 2)
    kept = x0.clone()

    def field(t, x):
        calls.append(t)
        return waving(t, x)

    explicit_step(field, 0.0, 1.0, x0, method)
    assert len(calls) == nominal_order(method)
    assert torch.equal(x0, kept)


@scripts_inside_torch
@pytest.mark.parametrize("method", EXPLICIT_METHODS)
def test_step_has_first_and_second_derivatives(method):
    x0, B = random(2, 2).requires_grad_(), random(2, 2, seed=1).requires_grad_()
    t0, dt = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (0.2, 0.7))

    def step(x0, B, t0, dt):
        return explicit_step(lambda t, x: torch.tanh(x @ B) + torch.cos(3 * t + 1) * x, t0, dt, x0, method)

    assert torch.autograd.gradcheck(step, (x0, B, t0, dt), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(step, (x0, B, t0, dt))


@pytest.mark.parametrize("method", EXPLICIT_METHODS)
def test_step_can_be_mapped(method):
    x0, dt = random(5, 3), torch.linspace(0.1, 1, 5, dtype=F64)
    for_one = torch.func.vmap(lambda x, h: explicit_step(waving, 0.0, h, x, method))(x0, dt)
    # the same operations on the same numbers: vector units differ in the last bits at most
    torch.testing.assert_close(
        for_one, explicit_step(waving, 0.0, dt.unsqueeze(-1), x0, method), rtol=1e-14, atol=1e-14
    )


# Linear friction


def pair_of_torchdiffeq(p, force, friction, method):
    def field(t, y):
        return torch.stack((force - friction * y[0], y[0]))

    t = torch.tensor([0.0, 1.0], dtype=p.dtype)
    return odeint(field, torch.stack((p, torch.zeros_like(p))), t, method=method)[-1].unbind()


@settings(max_examples=200, deadline=None)
@given(
    columns=st.lists(st.tuples(VALUES, VALUES, FRICTIONS), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    method=st.sampled_from(EXPLICIT_METHODS),
)
def test_linear_step_is_the_pair_integrated_by_torchdiffeq(columns, dtype, method):
    p, force, friction = torch.tensor(columns, dtype=dtype).T
    found, expected = linear_step(p, force, friction, method), pair_of_torchdiffeq(p, force, friction, method)
    # what is added up: |p| and |F| times the series of exp(D), without its signs, as far as the method goes
    D = friction.abs()
    scale = (p.abs() + force.abs()) * torch.stack([D**k for k in range(nominal_order(method) + 1)]).sum(0)
    for a, b in zip(found, expected, strict=True):
        assert_within_rounding(a, b, scale, 8)


def phi(k, z):
    """phi_k(z): integral of ``exp((1 - s) z) s^(k - 1) / (k - 1)!`` over [0, 1]; phi_k' is phi_k - k phi_{k+1}."""
    return mpmath.hyp1f1(1, k + 1, z) / mpmath.factorial(k)


def phi_and_derivatives(k, z):
    z = mpmath.mpf(z)
    values = [phi(j, z) for j in range(k, k + 3)]
    first = [values[0] - k * values[1], values[1] - (k + 1) * values[2]]
    return values[0], first[0], first[0] - k * first[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponential_and_its_derivatives_are_accurate_for_every_friction(dtype):
    frictions = [*SPECIAL_FRICTIONS, *torch.linspace(-3, 3, 41).tolist(), 5.0, 20.0, 80.0, 1e3, 1e4, -0.999, -20.0]
    friction = torch.tensor(frictions, dtype=dtype, requires_grad=True)
    one, zero = torch.ones_like(friction), torch.zeros_like(friction)
    decay, phi_1 = linear_step(one, zero, friction, "exponential")
    same, phi_2 = linear_step(zero, one, friction, "exponential")
    assert torch.equal(phi_1, same)
    eps = torch.finfo(dtype).eps
    for k, value in enumerate((decay, phi_1, phi_2)):
        (first,) = torch.autograd.grad(value.sum(), friction, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), friction, retain_graph=True)
        with mpmath.workdps(50):
            for i, D in enumerate(friction.tolist()):
                expected = phi_and_derivatives(k, -D)
                for n, found in enumerate((value, (-1) * first, second)):
                    # The closed forms lose about one digit per derivative where they begin, at a friction of one. What
                    # underflows (exp(-1000)) has no digits.
                    tolerance = (4, 12, 100)[n] * eps * abs(expected[n]) + torch.finfo(dtype).tiny
                    assert abs(found[i].item() - expected[n]) <= tolerance, (k, n, D)


@settings(max_examples=100, deadline=None)
@given(columns=st.lists(st.tuples(VALUES, VALUES, FRICTIONS), min_size=1, max_size=4))
def test_exponential_step_is_the_matrix_exponential(columns):
    p, force, friction = torch.tensor(columns, dtype=F64).T
    zero, one = torch.zeros_like(p), torch.ones_like(p)
    rows = (-friction, zero, force, one, zero, zero, zero, zero, zero)  # d(p, s, 1)/dt
    end = (
        torch.linalg.matrix_exp(torch.stack(rows, -1).unflatten(-1, (3, 3)))
        @ torch.stack((p, zero, one), -1)[..., None]
    )
    found = torch.stack(linear_step(p, force, friction, "exponential"), -1)
    # matrix_exp squares up to 5 times at a norm of 20, which multiplies its rounding by that norm
    scale = (1 + p.abs() + force.abs()) * (1 + friction.abs()) * (1 + (-friction).exp())
    assert_within_rounding(found, end[..., :2, 0], scale[..., None], 64)


@pytest.mark.parametrize("method", LINEAR_METHODS)
@pytest.mark.parametrize("friction", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_step_without_friction_is_a_parabola(method, friction):
    p, force = random(4, dtype=torch.float32), random(4, dtype=torch.float32, seed=1)
    end, integral = linear_step(p, force, friction, method)
    assert torch.equal(end, p + force)
    torch.testing.assert_close(integral, p if method == "euler" else p + force / 2)


@settings(max_examples=200, deadline=None)
@given(
    p=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1),
    friction=st.floats(0, 2, width=32),
    factor=st.sampled_from([1.0, 1e3]),
)
def test_friction_never_adds_momentum(p, friction, factor):
    p = torch.tensor(p)
    for method in ("rk4", "exponential"):
        # exact friction may be any; rk4 is made for the friction of the rules
        end, integral = linear_step(p, 0.0, friction * factor if method == "exponential" else friction, method)
        assert (end.abs() <= p.abs()).all()
        assert (end * p.sign() >= 0).all()
        assert (integral * p.sign() >= 0).all()
        assert (integral.abs() <= p.abs()).all()


@scripts_inside_torch
@pytest.mark.parametrize("method", LINEAR_METHODS)
def test_linear_step_has_first_and_second_derivatives(method):
    p, force = random(2, 4).requires_grad_(), random(4, seed=1).requires_grad_()
    friction = torch.tensor([0.0, 0.4, 1.0, 1.7], dtype=F64, requires_grad=True)

    def step(p, force, friction):
        return linear_step(p, force, friction, method)

    assert torch.autograd.gradcheck(step, (p, force, friction), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(step, (p, force, friction))


@pytest.mark.parametrize("method", LINEAR_METHODS)
def test_linear_step_broadcasts_and_returns_numbers_of_its_own(method):
    p, force, friction = random(3, 1), random(4, seed=1), torch.tensor([[0.3], [0.0], [1.5]], dtype=F64)
    found = linear_step(p, force, friction, method)
    expected = linear_step(*(x.expand(3, 4).clone() for x in (p, force, friction)), method)
    kept = p.clone()
    for a, b in zip(found, expected, strict=True):
        assert a.shape == (3, 4)
        # vector units differ in the last bits at most
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
        a.mul_(2)
    assert torch.equal(p, kept)


@scripts_inside_torch
@pytest.mark.parametrize("method", LINEAR_METHODS)
def test_linear_step_can_be_mapped_and_differentiated_by_transforms(method):
    p, force, friction = random(5), random(5, seed=1), torch.linspace(0, 2, 5, dtype=F64)

    def total(p, force, friction):
        end, integral = linear_step(p, force, friction, method)
        return (end * integral).sum()

    arguments = [x.clone().requires_grad_() for x in (p, force, friction)]
    expected = torch.autograd.grad(total(*arguments), arguments)
    found = torch.func.vmap(torch.func.grad(total, argnums=(0, 1, 2)))(p, force, friction)
    directions = tuple(random(5, seed=seed) for seed in (2, 3, 4))
    _, slope = torch.func.jvp(total, (p, force, friction), directions)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    rates = sum((a * b).sum() for a, b in zip(expected, directions, strict=True))
    torch.testing.assert_close(slope, rates, rtol=1e-13, atol=1e-13)


@scripts_inside_torch
def test_steps_compile_whole_and_once_for_every_size():
    def steps(p, force, friction):
        pairs = [x for method in ("rk4", "exponential") for x in linear_step(p, force, friction, method)]
        return *pairs, explicit_step(waving, 0.0, 0.5, p, "heun3")

    compiled = torch.compile(steps, fullgraph=True, dynamic=True)
    for n in (37, 128):
        p, force, friction = (random(2, n, dtype=torch.float32, seed=seed) for seed in (n, n + 1, n + 2))
        with torch._dynamo.config.patch(error_on_recompile=n > 37):
            found = compiled(p, force, friction.abs())
        for a, b in zip(found, steps(p, force, friction.abs()), strict=True):
            # fused multiply-adds and other exponentials
            assert_within_rounding(a, b, (1 + p.abs() + force.abs()) * (1 + friction**4), 8)


@pytest.mark.gpu
@pytest.mark.parametrize("method", LINEAR_METHODS)
@pytest.mark.parametrize("friction", [0.5, torch.tensor([0.0, 0.5, 1.5])], ids=["number", "tensor"])
def test_linear_step_on_cuda_equals_cpu_and_does_not_wait_for_the_device(method, friction):
    p, force = random(2, 3, dtype=torch.float32), random(3, dtype=torch.float32, seed=1)
    on_cuda = [x.cuda() if isinstance(x, torch.Tensor) else x for x in (p, force, friction)]
    linear_step(*on_cuda, method)
    with no_waiting():
        found = linear_step(*on_cuda, method)
    for a, b in zip(found, linear_step(p, force, friction, method), strict=True):
        assert_within_rounding(a.cpu(), b, 2 + p.abs() + force.abs(), 8)


# Refusals


def test_exponential_is_refused_for_a_general_field():
    for backend in ("auto", "odeopt", "torchdiffeq"):
        with pytest.raises(ValueError, match=r"Found `method = 'exponential'`, which solves .* linear friction"):
            integrate_unit(waving, random(3), method="exponential", backend=backend)
    with pytest.raises(ValueError, match="see `linear_step`"):
        explicit_step(waving, 0.0, 1.0, random(3), "exponential")


@pytest.mark.parametrize("method", ["dopri5", "rk5", None])
def test_methods_that_are_not_here_are_named_with_those_that_are(method):
    message = f"`method` should be one of euler, .*rk4. Found `method = {method!r}`"
    with pytest.raises(ValueError, match=message):
        explicit_step(waving, 0.0, 1.0, random(3), method)
    with pytest.raises(ValueError, match=message):
        integrate_unit(waving, random(3), method=method, backend="odeopt")
    with pytest.raises(ValueError, match=f"one of euler, exponential, .*Found `method = {method!r}`"):
        linear_step(random(3), 0.0, 0.5, method)


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"Found `backend = 'ours'`"):
        integrate_unit(waving, random(3), backend="ours")
