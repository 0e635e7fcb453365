"""The step in C: equal to the eager one, for all that it takes, and out of the way where it is not."""

import contextlib
import subprocess
import sys
import threading

import pytest
import torch
from optimizer_toys import Subclass, Watching, parameter, port_hamiltonian
from torch import nn
from torch._subclasses import FakeTensorMode

import odeopt
from odeopt.ode import LINEAR_METHODS, linear_step
from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate, PortHamiltonianUpdate
from odeopt.stepping.native import library as libraries
from odeopt.stepping.native import plan as plans
from odeopt.stepping.native.library import library

pytestmark = [
    pytest.mark.skipif(isinstance(library(), str), reason="the step in C was not built (.ci/run fails then)"),
    pytest.mark.filterwarnings("ignore:.*is not finite:RuntimeWarning"),
]

OPTIONS = {
    "default": {},
    "one mode, memory": {"modes": 1, "memory": 2, "hidden": (7,)},
    "three modes": {"modes": 3, "hidden": (), "time_scales": (5.0,)},
    **{f"{solver}": {"solver": solver} for solver in LINEAR_METHODS},
    "alignment": {"alignment_rate": 9.0, "memory": 1},
    "constant friction": {"friction": "constant", "modes": 3},
    "constant port": {"port": "constant", "solver": "exponential"},
    "both constant, coordinatewise": {"friction": "constant", "port": "constant", "coordinatewise": True},
    "coordinatewise": {"coordinatewise": True, "memory": 1, "uses_progress": True, "initial_kappa": 0.02},
    "tensor normalization": {"normalization": "tensor", "memory": 1},
    "ratio floor": {"ratio_floor": 0.9},
    "relativistic": {"kinetic": ("relativistic", "quadratic"), "speed_limit": 0.03},
    "relativistic, exponential": {"kinetic": "relativistic", "solver": "exponential", "modes": 1},
    "progress": {"uses_progress": True, "decay": 0.0},
    "schedule": {"schedule": "power", "uses_progress": True, "horizon_power": 0.3, "memory": 1},
    "vectors of a spectral rule": {"kinetic": ("spectral", "quadratic"), "schedule": "power"},
    "vectors, spectral output": {"output": "spectral"},
}
SETTINGS = {
    "plain": {},
    "decay, length told": {"lr": 0.7, "weight_decay": 0.001, "total_steps": 5},
    "climbing, tensor lr": {"lr": torch.tensor(0.3), "maximize": True},
}
VECTORS, LARGE = [(), (5,), (1030,)], [(150_001,), (3,)]
SHAPES = [(3, 2), (40, 50), *VECTORS]
BFLOAT16 = torch.bfloat16

needs_bfloat16 = pytest.mark.skipif(
    not isinstance(library(), str) and not library().has_bfloat16, reason="this processor has no AMX"
)
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def pair(rule, shapes, *, dtype=torch.float32, device="cpu", **settings):
    """An eager optimizer and a native one, on equal parameters."""
    generator, optimizers = torch.Generator().manual_seed(0), []
    start = [0.3 * torch.randn(shape, generator=generator) for shape in shapes]
    for implementation in ("eager", "native"):
        params = [nn.Parameter(x.clone().to(device, dtype)) for x in start]
        optimizers.append(LearnedOptimizer(params, rule, implementation=implementation, **settings))
    return optimizers


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def give(optimizers, step, *, scale=1.0, broken=()):
    """Set the same gradients, which a tenth of the coordinates sees a hundred times as large; some are not finite."""
    generator = torch.Generator().manual_seed(step + 1)
    for number, params in enumerate(zip(*map(params_of, optimizers), strict=True)):
        grad = scale * torch.randn(params[0].shape, generator=generator)
        grad = torch.where(torch.rand(grad.shape, generator=generator) < 0.1, 100 * grad, grad)
        if number in broken:
            grad[0] = torch.inf
        for param in params:
            param.grad = grad.to(param.device, param.dtype)


def is_native(optimizer):
    return all(plan.native is not None for plan in optimizer._layout.plans)


def equal_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copy(optimizer):
    """Parameters, gradients and state, by value."""
    state = {i: {k: v.clone() for k, v in optimizer.state[p].items()} for i, p in enumerate(params_of(optimizer))}
    return [p.detach().clone() for p in params_of(optimizer)], state


def assert_rounded_alike(found, wanted):
    """In bfloat16, only what lies within a rounding of float32 of the middle between two numbers may go elsewhere."""
    if wanted.dtype == BFLOAT16 and wanted.numel() > 1000:
        assert (found == wanted).float().mean() > 0.97


def assert_steps_alike(optimizers, n_steps=3, *, are_rounded_alike=assert_rounded_alike):
    """Take each step from a common state, so that no difference grows."""
    eager, native = optimizers
    for step in range(n_steps):
        give(optimizers, step)
        before = [param.detach().clone() for param in params_of(eager)]
        for optimizer in optimizers:
            optimizer.step()
        for start, a, b in zip(before, params_of(eager), params_of(native), strict=True):
            # a few roundings of float32 in sums, logarithms and exponentials, some of them times slopes of order one;
            # and one rounding onto the parameter
            update = (a - start).abs().max().item()
            rounding = torch.finfo(a.dtype).eps
            torch.testing.assert_close(b, a, rtol=rounding, atol=1e-5 * update)
            assert update > 0 or step == 0  # of euler, which moves by the momenta at the start
            for name, wanted in eager.state[a].items():
                found = native.state[b][name]
                rtol = 2**-7 if wanted.dtype == BFLOAT16 else 1e-5
                # momenta are sums that may cancel
                atol = 1e-5 * wanted.abs().max().item() if wanted.numel() > 0 else 0
                torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
                are_rounded_alike(found, wanted)
                found.copy_(wanted)
            are_rounded_alike(b, a)
            with torch.no_grad():
                b.copy_(a)
    assert native.n_steps == eager.n_steps == n_steps


# -------------------- parity


@over_options
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_step_is_the_eager_one(options, settings):
    is_spectral = "spectral" in (*options.get("kinetic", ()), options.get("output"))
    optimizers = pair(port_hamiltonian(**options), VECTORS if is_spectral else SHAPES, **settings)
    assert_steps_alike(optimizers)
    assert is_native(optimizers[1])
    assert not is_native(optimizers[0])


@over_options
@pytest.mark.parametrize(
    "dtypes", [{"dtype": BFLOAT16}, {"state_dtype": BFLOAT16}, {"dtype": BFLOAT16, "state_dtype": BFLOAT16}], ids=str
)
def test_step_is_the_eager_one_in_bfloat16(options, dtypes):
    optimizers = pair(port_hamiltonian(**options), VECTORS, **dtypes, weight_decay=0.001)
    assert_steps_alike(optimizers)
    assert is_native(optimizers[1])


@pytest.mark.parametrize(
    "name", ["port-hamiltonian", "port-hamiltonian-coordinatewise-mnist", "port-hamiltonian-spectral"]
)
def test_shipped_rules_take_the_native_step_for_all_but_matrices(name):
    optimizers = pair(odeopt.load_pretrained(name), LARGE + VECTORS, total_steps=100)
    assert_steps_alike(optimizers)
    assert is_native(optimizers[1])


@pytest.mark.parametrize("products", ["full", pytest.param("bfloat16", marks=needs_bfloat16)])
@pytest.mark.parametrize("is_table", [False, True])
def test_only_matrices_whose_shorter_side_is_large_take_the_eager_step(is_table, products, monkeypatch):
    limits = {"_LARGEST_SIDE": 4, "_LARGEST_SIDE_IN_BFLOAT16": 99}
    for name, limit in (limits if products == "full" else dict(zip(limits, (1, 4), strict=True))).items():
        monkeypatch.setattr(plans, name, limit)
    rule = odeopt.load_pretrained("port-hamiltonian-spectral").with_options(matrix_products=products)
    params = [parameter(torch.ones(shape), torch.ones(shape)) for shape in [(5, 7), (9, 5), (8, 4), (3, 99), (30,)]]
    optimizer = LearnedOptimizer([{"params": params, "is_table": is_table}], rule, implementation="native")
    optimizer.step()
    eager = [placed.bucket.params for plan in optimizer._layout.plans if plan.native is None for placed in plan.placed]
    assert [list(map(id, some)) for some in eager] == ([] if is_table else [[id(params[0])], [id(params[1])]])


def test_matrices_of_learned_polynomials_take_the_eager_step():
    rule = port_hamiltonian(kinetic="spectral", matrix_polynomial="learned")
    optimizers = pair(rule, [(5, 7), (30,)])
    assert_steps_alike(optimizers)
    assert [(plan.native is None, plan.placed[0].bucket.is_whole) for plan in optimizers[1]._layout.plans] == [
        (True, True),
        (False, False),
    ]


# -------------------- parity of matrices that are stepped by their singular values

MATRIX_OPTIONS = {
    "spectral": {"kinetic": "spectral"},
    "all that is learned": {"kinetic": "spectral", "initial_coherence": 0.5, "initial_decay": 0.1, "decay_growth": 3.0},
    "mixture": {"kinetic": ("quadratic", "spectral"), "initial_decay": 0.1},
    "short": {"kinetic": "spectral", "matrix_polynomial": "short"},
    "three modes, exponential": {"kinetic": ("relativistic", "spectral", "spectral"), "modes": 3, "speed_limit": 0.1,
                                 "solver": "exponential", "initial_coherence": 1.0},
    "lookahead, muon's scale": {"kinetic": "spectral", "initial_lookahead": 1.7, "matrix_scale": "muon", "memory": 2},
    "by coordinate": {"kinetic": "spectral", "matrix_normalization": "coordinate", "solver": "heun3"},
    "by tensor": {"kinetic": ("spectral", "quadratic"), "normalization": "tensor", "ratio_floor": 0.5},
    "constant friction and port": {"kinetic": "spectral", "friction": "constant", "port": "constant"},
    "schedule": {"kinetic": "spectral", "schedule": "power", "uses_progress": True, "horizon_power": 0.3, "memory": 1},
    "decay of long runs": {"kinetic": "spectral", "schedule": "power", "uses_progress": True, "horizon_power": 0.4,
                           "initial_decay": 2.0, "decay_horizon": 2.0},
    "decay that takes all": {"kinetic": ("quadratic", "spectral"), "initial_decay": 20.0, "initial_matrix_kappa": 0.1},
    "depth": {"kinetic": "spectral", "depth_power": 0.5, "initial_decay": 0.1},
    "alignment, trust": {"kinetic": "spectral", "alignment_rate": 9.0, "trust_ratio": 0.05, "memory": 2},
    "alignment of a mixture": {"kinetic": ("quadratic", "spectral"), "alignment_rate": 9.0, "trust_ratio": 0.01},
    "rows": {"kinetic": "spectral", "row_power": 0.4, "initial_coherence": 0.8},
    "rows of a mixture": {"kinetic": ("spectral", "quadratic", "spectral"), "modes": 3, "row_power": 1.0},
    "narrow": {"kinetic": "spectral", "narrow": 4, "depth_power": 1.0, "trust_ratio": 0.05},
    "every second step": {"kinetic": "spectral", "matrix_interval": 2, "depth_power": 1.0, "trust_ratio": 0.05,
                          "initial_decay": 0.1, "row_power": 0.4},
    "every third step of a mixture": {"kinetic": ("quadratic", "spectral"), "matrix_interval": 3, "memory": 1,
                                      "initial_decay": 20.0, "alignment_rate": 9.0, "schedule": "power",
                                      "uses_progress": True},
    "spectral output every second step": {"output": "spectral", "matrix_interval": 2},
    "spectral output": {"output": "spectral", "modes": 3},
    "spectral output, euler": {"output": "spectral", "solver": "euler", "initial_decay": 0.05},
}  # fmt: skip
# wide, tall, square, one row, one column, convolutions; two of one shape; sides beside multiples of vectors; two chunks
MATRICES = [(20, 300), (300, 20), (17, 17), (1, 7), (9, 1), (6, 3, 3, 3), (5, 4), (5, 4), (40, 700), (3,)]


def assert_matrices_step_alike(optimizers, n_steps=3):
    """Take each step from a common state. Newton-Schulz multiplies small singular values, and what has been rounded of
    them, by up to 3.44^5 = 485: in float32 the eager update has an error of some 485 * 6e-8 = 3e-5 of its norm."""
    rule, group = optimizers[0].rule, optimizers[0].param_groups[0]
    # two iterations in bfloat16 round differently, each as far from the exact one as Muon's
    products = 0.06 if rule.matrix_products == "bfloat16" else 2e-4
    for step in range(n_steps if rule.matrix_interval == 1 else 5):
        give(optimizers, step)
        before = [param.detach().clone() for param in params_of(optimizers[0])]
        for optimizer in optimizers:
            optimizer.step()
        for start, a, b in zip(before, *map(params_of, optimizers), strict=True):
            update, rounding = (a - start).float().norm(), torch.finfo(a.dtype).eps if a.dtype == BFLOAT16 else products
            bound = rounding * (a.float().norm() if a.dtype == BFLOAT16 else update)
            assert (a - b).float().norm() <= bound
            if not rule.is_whole(a.shape) or (step + 1) % rule.matrix_interval == 0:
                assert update > 0 or step == 0
            else:  # between two moves
                assert group["weight_decay"] > 0 or (torch.equal(a, start) and torch.equal(b, start))
            for name, wanted in optimizers[0].state[a].items():
                found = optimizers[1].state[b][name]
                rtol = 2**-7 if wanted.dtype == BFLOAT16 else 1e-5
                atol = 1e-5 * wanted.abs().max().item() if wanted.numel() > 0 else 0
                torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
                found.copy_(wanted)
            with torch.no_grad():
                b.copy_(a)


@pytest.mark.parametrize("options", MATRIX_OPTIONS.values(), ids=MATRIX_OPTIONS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_step_of_matrices_is_the_eager_one(options, settings):
    optimizers = pair(port_hamiltonian(**options), MATRICES, **settings)
    assert_matrices_step_alike(optimizers)
    assert is_native(optimizers[1])
    assert not is_native(optimizers[0])


@pytest.mark.parametrize("total_steps", [None, 9])
@pytest.mark.parametrize("times", [1.3, 5.0, 20.0, 1e6])
def test_decay_grows_as_in_the_eager_step(times, total_steps):
    rule = port_hamiltonian(
        kinetic="spectral", initial_decay=2.0, decay_growth=16.0, decay_onset=4.0, uses_progress=True
    )
    optimizers = pair(rule, MATRICES, total_steps=total_steps)
    give(optimizers, 0)
    for optimizer in optimizers:
        optimizer.step()
        for state in optimizer.state.values():
            state["slow_scale"].mul_(times)
    assert_matrices_step_alike(optimizers)


@pytest.mark.parametrize("total_steps", [None, 9000])
def test_step_of_a_long_run_is_the_eager_one(total_steps):
    schedule = {"schedule": "power", "uses_progress": True, "horizon_power": 0.4, "memory": 1}
    laws = {"initial_decay": 50.0, "decay_horizon": 1000.0, "alignment_rate": 2.0, "alignment_horizon": 1000.0}
    optimizers = pair(port_hamiltonian(kinetic="spectral", **schedule, **laws), MATRICES, total_steps=total_steps)
    give(optimizers, 0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.param_groups[0]["n_steps"] = 6000
        for state in optimizer.state.values():
            state["step"].fill_(6000.0)
            state["memory"].fill_(1.5)
    assert_matrices_step_alike(optimizers)
    lost = [1.5 - state["memory"][..., -1].item() for state in optimizers[1].state.values()]
    assert sum(x > 0.9 * 1.5 / 6000 for x in lost) > len(lost) // 2  # growth, at one step or more that asked for none


@pytest.mark.parametrize("options", MATRIX_OPTIONS.values(), ids=MATRIX_OPTIONS)
@pytest.mark.parametrize(
    "dtypes", [{"dtype": BFLOAT16}, {"state_dtype": BFLOAT16}, {"dtype": BFLOAT16, "state_dtype": BFLOAT16}], ids=str
)
def test_step_of_matrices_is_the_eager_one_in_bfloat16(options, dtypes):
    optimizers = pair(port_hamiltonian(**options), [(20, 300), (70, 6), (5, 4)], **dtypes, weight_decay=0.001)
    assert_matrices_step_alike(optimizers)
    assert is_native(optimizers[1])


@pytest.mark.parametrize("shape", [(29, 239), (3, 24), (9, 8, 3, 3), (261, 530), (1026, 256)], ids=str)
def test_matrices_step_alike_whichever_way_their_products_are_taken(shape):
    optimizers = pair(port_hamiltonian(kinetic="spectral"), [shape, shape[::-1], (4, 4)])
    assert_matrices_step_alike(optimizers, n_steps=2)
    assert is_native(optimizers[1])


@pytest.mark.parametrize("n", [239, 240])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_matrices_that_are_not_finite_stay_whichever_way_their_products_are_taken(bad, n):
    optimizer = pair(port_hamiltonian(kinetic="spectral"), [(30, n), (n, 30), (9, 9)])[1]
    assert_broken_stay(optimizer, bad, {0: (3, 4), 2: (0, 0)})


@pytest.mark.parametrize("instructions", range(3))
@pytest.mark.parametrize("kinetic", ["spectral", ("spectral", "quadratic")], ids=str)
def test_every_instruction_set_takes_the_same_step_of_matrices(kinetic, instructions, monkeypatch):
    if instructions > library().instructions:
        pytest.skip("not on this processor")
    chosen = library()._replace(instructions=instructions)
    monkeypatch.setattr(plans, "library", lambda: chosen)
    assert_matrices_step_alike(pair(port_hamiltonian(kinetic=kinetic), MATRICES))


def moved_by(shape, products, implementation, *, seed=0, grad=None):
    """Update of a matrix in the first step of one spectral mode."""
    param = nn.Parameter(torch.zeros(shape))
    param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) if grad is None else grad
    rule = port_hamiltonian(kinetic="spectral", modes=1, matrix_products=products)
    LearnedOptimizer([param], rule, implementation=implementation).step()
    return param.detach()


@needs_bfloat16
@pytest.mark.parametrize("options", [{}, {"kinetic": ("spectral", "quadratic", "spectral"), "modes": 3},
                                     {"kinetic": "quadratic", "output": "spectral"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_step_of_matrices_in_bfloat16_is_the_eager_one(options, settings):
    rule = port_hamiltonian(**{"kinetic": "spectral"} | options, matrix_products="bfloat16")
    optimizers = pair(rule, MATRICES, **settings)
    assert_matrices_step_alike(optimizers)
    assert is_native(optimizers[1])


@needs_bfloat16
@pytest.mark.parametrize("n", [1, 31, 33, 255, 257, 545])  # about a tile, a block, several together
@pytest.mark.parametrize("m", [1, 16, 31, 33, 97])
@pytest.mark.parametrize("is_tall", [False, True])
def test_products_in_bfloat16_are_as_exact_in_c_as_in_torch(m, n, is_tall):
    shape, errors = (n, m) if is_tall else (m, n), []
    for seed in range(5):
        exact, found, wanted = (
            moved_by(shape, products, implementation, seed=seed)
            for products, implementation in (("full", "eager"), ("bfloat16", "native"), ("bfloat16", "eager"))
        )
        errors.append(torch.stack([(x - exact).norm() / exact.norm() for x in (found, wanted)]))
    assert torch.equal(found, moved_by(shape, "bfloat16", "native", seed=seed))
    mean = torch.stack(errors).mean(0)
    assert 1e-9 < mean[0] < max(1.2 * mean[1], 0.01)


@needs_bfloat16
def test_products_in_bfloat16_of_what_is_extreme():
    found = moved_by((40, 70), "bfloat16", "native", grad=torch.zeros(40, 70))
    assert torch.equal(found, torch.zeros(40, 70))
    line = torch.linspace(-1, 1, 40).unsqueeze(-1) * torch.cos(torch.arange(70.0))
    whole = moved_by((40, 70), "bfloat16", "native", grad=line)
    for scale in (2.0**-120, 2.0**100):  # the step does not depend on the scale
        scaled = moved_by((40, 70), "bfloat16", "native", grad=scale * line)
        torch.testing.assert_close(scaled, whole, rtol=1e-5, atol=0)
    # what is rounded of a matrix of rank one grows in the other directions, in any product in bfloat16
    values, wanted = (torch.linalg.svdvals(moved_by((40, 70), products, "eager", grad=line))
                      for products in ("bfloat16", "full"))  # fmt: skip
    found = torch.linalg.svdvals(whole)
    assert abs(found[0] / wanted[0] - 1) < 0.02
    assert found[1] < 1.2 * values[1]
    broken = line.clone()
    broken[3, 4] = torch.nan
    assert torch.equal(moved_by((40, 70), "bfloat16", "native", grad=broken), torch.zeros(40, 70))


def test_products_in_bfloat16_are_left_to_torch_where_the_processor_has_no_units_for_them(monkeypatch):
    wanted = moved_by((20, 30), "bfloat16", "eager")
    without = library()._replace(has_bfloat16=False)
    monkeypatch.setattr(plans, "library", lambda: without)
    assert torch.equal(moved_by((20, 30), "bfloat16", "auto"), wanted)
    assert not torch.equal(moved_by((20, 30), "full", "auto"), moved_by((20, 30), "full", "eager"))  # in C


def test_matrices_of_low_rank_and_of_zeros_step_alike():
    optimizers = pair(port_hamiltonian(kinetic="spectral"), [(30, 50), (50, 30), (4, 6)])
    column = torch.linspace(-1, 1, 30).unsqueeze(-1)
    for step in range(3):
        row = torch.cos((step + 1) * torch.arange(50.0))
        for optimizer in optimizers:
            grads = column * row, (column * row).mT, torch.zeros(4, 6)
            for param, grad in zip(params_of(optimizer), grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
    for i, (a, b) in enumerate(zip(*map(params_of, optimizers), strict=True)):
        # a difference of 3e-5 of the update in each of three steps, as in assert_matrices_step_alike; updates near .1
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert (optimizers[0].state[a]["p"].norm() == 0) == (i == 2)


@pytest.mark.parametrize("size", [1e-20, 1e-25, 1e-34])
@pytest.mark.parametrize("kinetic", ["spectral", ("spectral", "quadratic")], ids=str)
def test_momenta_that_no_gradient_has_driven_for_long_step_alike(kinetic, size):
    optimizers = pair(port_hamiltonian(kinetic=kinetic), [(30, 50), (50, 30)])
    assert_matrices_step_alike(optimizers, n_steps=1)
    before = [param.detach().clone() for param in params_of(optimizers[0])]
    for optimizer in optimizers:
        for param in params_of(optimizer):
            param.grad.zero_()
            optimizer.state[param]["p"].mul_(size)
        optimizer.step()
    for a, b, start in zip(*map(params_of, optimizers), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert not torch.equal(a, start)


# at, below and above the sides from which on step.c takes the products another way, wide and tall
SIDES = [(30, 239), (30, 240), (241, 30), (255, 2040), (256, 2048), (256, 1023), (1024, 256)]


def ill_conditioned(kind, m, n):
    """Matrices with singular values near and below those that the iteration brings to one, beside large ones."""
    generator = torch.Generator().manual_seed(m)
    noise = torch.randn(m, n, dtype=torch.float64, generator=generator)
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    if kind == "graded":
        return u @ torch.diag(torch.logspace(0, -8, min(m, n), dtype=torch.float64)) @ v
    if kind == "equal":
        return torch.ones(m, n, dtype=torch.float64)
    if kind == "of one sign":
        return torch.rand(m, 1, dtype=torch.float64, generator=generator) + noise / 100
    return noise * torch.logspace(-5, 0, m, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("kind", ["graded", "equal", "of one sign", "rows of many sizes"])
@pytest.mark.parametrize("shape", [*SIDES, (40, 90), (150, 64), (70, 71), (130, 600), (260, 1050)], ids=str)
@pytest.mark.parametrize("polynomial", ["muon", "short"])
def test_steps_of_ill_conditioned_matrices_are_those_in_double_precision(kind, shape, polynomial):
    updates, grad = [], ill_conditioned(kind, *shape)
    for dtype, implementation in ((torch.float64, "eager"), (torch.float32, "native")):
        rule = port_hamiltonian(kinetic="spectral", modes=1, matrix_polynomial=polynomial).to(dtype)
        param = parameter(torch.zeros(shape, dtype=dtype), grad.to(dtype))
        LearnedOptimizer([param], rule, implementation=implementation).step()
        updates.append(param.detach().double())
    wanted, found = updates
    # see assert_matrices_step_alike; where matrices are large and elongated, and for three factors in place of five,
    # their Gram matrix is computed only once
    is_once = polynomial == "short" or (min(shape) >= 256 and max(shape) >= 4 * min(shape))
    bound = (1e-3 if is_once else 1e-4) * (6 if kind == "equal" else 1)  # equal terms are rounded alike
    assert torch.linalg.matrix_norm(found - wanted, 2) <= bound * torch.linalg.matrix_norm(wanted, 2)


def assert_broken_stay(optimizer, bad, places):
    """Step, and again with bad gradients of some of the three tensors, which stay as they are."""
    give([optimizer], 0)
    optimizer.step()
    params, state = copy(optimizer)
    give([optimizer], 1)
    for i, place in places.items():
        params_of(optimizer)[i].grad[place] = bad
    optimizer.step()
    after, state_after = copy(optimizer)
    for i in range(3):
        assert torch.equal(params[i], after[i]) == (i in places)
        assert equal_state(state[i], state_after[i]) == (i in places)
    assert optimizer.n_skipped == len(places)


def assert_threads_change_nothing(monkeypatch, shapes, broken_at=None, **options):
    """Take three steps on one to five threads, one of them with a gradient that is not finite if asked for."""
    found, used = [], library()
    for n_threads, parallel in [(1, None), (2, None), (5, None), (2, used.parallel), (5, used.parallel)]:
        monkeypatch.setattr(plans, "library", lambda parallel=parallel: used._replace(parallel=parallel))
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        _, optimizer = pair(port_hamiltonian(**options), shapes)
        for step in range(3):
            give([optimizer], step)
            if step == broken_at:
                params_of(optimizer)[0].grad[-1] = float("nan")
            optimizer.step()
        assert optimizer.n_skipped == (broken_at is not None)
        (plan,) = optimizer._layout.plans
        assert (plan.native._options.n_threads, plan.native._options.parallel) == (n_threads, parallel)
        found.append(copy(optimizer))
    for params, state in found[1:]:
        assert all(map(torch.equal, params, found[0][0]))
        assert all(equal_state(state[i], found[0][1][i]) for i in state)


@pytest.mark.parametrize("kinetic", ["spectral", "quadratic", "relativistic"])
def test_momenta_too_small_to_be_normal_become_zero_and_nothing_else_does(kinetic):
    # a processor is a hundred times slower on such numbers, at which decaying momenta would stay
    param = nn.Parameter(torch.full((128, 256), 1e-40))
    param.grad = torch.zeros(128, 256)
    optimizer = LearnedOptimizer([param], port_hamiltonian(kinetic=kinetic, initial_decay=0.0), lr=0.0)
    optimizer.step()
    optimizer.state[param]["p"].fill_(1e-40)
    optimizer.step()
    assert is_native(optimizer)
    assert optimizer.state[param]["p"].count_nonzero() == 0
    assert (param == torch.tensor(1e-40)).all()
    assert (torch.full((100,), 1e-40) * 1).count_nonzero() == 100


@pytest.mark.parametrize("solver", LINEAR_METHODS)
def test_polynomial_of_a_solver_is_what_its_step_integrates(solver):
    friction = torch.linspace(0, 2, 1001, dtype=torch.float64)  # as far as twice a logistic function goes
    _, displacement = linear_step(torch.zeros(1001, dtype=torch.float64), 1.0, friction, solver)
    found = sum((term * friction**k for k, term in enumerate(plans._PSI[solver])), torch.zeros_like(friction))
    torch.testing.assert_close(found, displacement, rtol=0, atol=2.5e-8 if solver == "exponential" else 1e-15)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("kinetic", ["spectral", ("spectral", "quadratic")], ids=str)
def test_matrix_whose_gradient_is_not_finite_stays_as_it_is(bad, kinetic):
    _, optimizer = pair(port_hamiltonian(kinetic=kinetic, initial_decay=0.1), [(40, 700), (9, 4), (4, 9)])
    assert_broken_stay(optimizer, bad, {0: (-1, 3), 2: (-1, 3)})


@pytest.mark.parametrize("options", [{}, {"matrix_interval": 2}, pytest.param({"matrix_products": "bfloat16"},
                                     marks=needs_bfloat16)], ids=str)  # fmt: skip
def test_number_of_threads_changes_no_matrix_to_the_bit(options, monkeypatch):
    shapes = [(60, 301), (200_003,), (301, 60), (33, 33), (33, 33), (5, 3, 3, 3), (20, 784)]
    assert_threads_change_nothing(monkeypatch, shapes, kinetic=("spectral", "relativistic"), **options)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.001}], ids=["plain", "weight decay"])
def test_matrices_that_rest_at_different_steps_step_alike(settings):
    optimizers = pair(port_hamiltonian(kinetic="spectral", matrix_interval=3), [(20, 30), (20, 30), (6, 4)], **settings)
    for step in range(7):
        give(optimizers, step)
        before = [param.detach().clone() for param in params_of(optimizers[1])]
        for optimizer in optimizers:
            if step == 0:
                params_of(optimizer)[1].grad = None
            optimizer.step()
        for k, (a, b, old) in enumerate(zip(*map(params_of, optimizers), before, strict=True)):
            moves = step in ((2, 5), (3, 6), (2, 5))[k]
            kept = old if k == 1 and step == 0 else (1 - settings.get("weight_decay", 0.0)) * old
            # one rounding of each weight; an orthogonalised step changes each by some hundredths
            assert torch.allclose(b, kept, rtol=2e-7, atol=0) != moves
            # an error of 3e-5 of the update in each step, as in assert_matrices_step_alike; updates near .1
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
    for a, b in zip(*map(params_of, optimizers), strict=True):
        assert torch.equal(optimizers[0].state[a]["step"], optimizers[1].state[b]["step"])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_shipped_spectral_rule_steps_matrices_natively(settings):
    optimizers = pair(odeopt.load_pretrained("port-hamiltonian-spectral"), MATRICES, **settings)
    assert_matrices_step_alike(optimizers)
    assert is_native(optimizers[1])


@pytest.mark.parametrize("instructions", range(3))
@pytest.mark.parametrize("options", [{}, {"coordinatewise": True}, {"solver": "exponential"}], ids=str)
def test_every_instruction_set_takes_the_same_step(options, instructions, monkeypatch):
    if instructions > library().instructions:
        pytest.skip("not on this processor")
    chosen = library()._replace(instructions=instructions)
    monkeypatch.setattr(plans, "library", lambda: chosen)
    assert_steps_alike(pair(port_hamiltonian(**options), SHAPES))


def test_scale_of_the_loss_changes_nothing_to_the_bit():
    found = []
    for power in (-100, 0, 100):
        _, optimizer = pair(port_hamiltonian(), SHAPES)
        for step in range(3):
            give([optimizer], step, scale=2.0**power)
            optimizer.step()
        found.append(params_of(optimizer))
    for params in zip(*found, strict=True):
        assert torch.equal(params[0], params[1])
        assert torch.equal(params[1], params[2])


# -------------------- exponentials and logarithms


def evaluated(x, *, is_log, instructions):
    x = x.clone()
    library().functions(x.data_ptr(), len(x), is_log, instructions)
    return x


def units_of_rounding(found, wanted):
    """Error in units of the spacing of float32 at the result, which is given in double precision."""
    exponent = torch.frexp(wanted).exponent
    return ((found.double() - wanted).abs() / torch.ldexp(torch.ones_like(wanted), exponent - 24)).max().item()


@pytest.mark.parametrize("instructions", range(3))
def test_powers_and_logarithms_are_within_their_bounds(instructions):
    if instructions > library().instructions:
        pytest.skip("not on this processor")
    x = torch.cat((torch.linspace(-126, 127, 1_000_003), torch.linspace(-1, 1, 300_001)))
    assert units_of_rounding(evaluated(x, is_log=0, instructions=instructions), x.double().exp2()) <= 3
    # all mantissas near one, where the logarithm is small, and all magnitudes
    x = torch.cat((torch.linspace(0.5, 2, 1_000_003), torch.linspace(-33, 120, 300_001).exp2()))
    x = x[x != 1]
    assert units_of_rounding(evaluated(x, is_log=1, instructions=instructions), x.double().log2()) <= 6


def test_powers_saturate_and_nan_stays():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, -1e30, -127.0, 0.0, 128.0, 1e30, inf, nan])
    found = evaluated(x, is_log=0, instructions=library().instructions)
    low, high = 2.0**-126, 2.0**127
    assert found[:-1].tolist() == [low, low, low, 1.0, high, high, high]
    logs = evaluated(torch.tensor([1.0, inf, nan]), is_log=1, instructions=library().instructions)
    assert logs[:2].tolist() == [0.0, inf]
    assert found[-1].isnan()
    assert logs[-1].isnan()


# -------------------- gradients that are not finite, or not there


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 77_777, -1])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("options", [{}, {"coordinatewise": True}], ids=str)
def test_gradient_that_is_not_finite_leaves_its_tensor_as_it_is(bad, place, dtype, options):
    _, optimizer = pair(port_hamiltonian(**options), [*LARGE, (9,)], dtype=dtype, weight_decay=0.001)
    assert_broken_stay(optimizer, bad, {0: place, 2: 4})


def test_parameters_without_a_gradient_are_left_alone():
    optimizers = pair(port_hamiltonian(), SHAPES)
    give(optimizers, 0)
    for optimizer in optimizers:
        optimizer.step()
    give(optimizers, 1)
    for optimizer in optimizers:
        params_of(optimizer)[1].grad = None
        optimizer.step()
    before, state = copy(optimizers[1])
    assert torch.equal(before[1], params_of(optimizers[1])[1])
    assert [int(state[i]["step"]) for i in range(len(SHAPES))] == [2, 1, 2, 2, 2]
    for a, b in zip(params_of(optimizers[0]), before, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


# -------------------- layouts of memory


def strided(layout):
    """Parameters and gradients of which some are not contiguous."""
    x, grad = torch.arange(24.0).reshape(2, 3, 2, 2) / 10 - 1, torch.cos(torch.arange(24.0)).reshape(2, 3, 2, 2)
    if layout == "transposed":
        return x.mT, grad.mT
    if layout == "channels last":
        return x.to(memory_format=torch.channels_last), grad
    if layout == "expanded gradient":
        return x, torch.tensor(0.7).expand(x.shape)
    if layout == "negated gradient":
        return x, torch._neg_view(-grad)
    return x[:, ::2], grad[:, ::2]


@pytest.mark.parametrize(
    "layout", ["transposed", "channels last", "expanded gradient", "negated gradient", "every other"]
)
def test_memory_that_is_not_contiguous_gives_the_same_numbers(layout):
    moved = []
    for is_contiguous in (False, True):
        x, grad = strided(layout)
        if is_contiguous:
            x, grad = x.clone(memory_format=torch.contiguous_format), grad.resolve_neg().contiguous()
        param = nn.Parameter(x.clone() if layout == "channels last" else x)
        optimizer = LearnedOptimizer([param, parameter([1.0], [1.0])], port_hamiltonian(), implementation="native")
        for _ in range(2):
            param.grad = grad
            optimizer.step()
        moved.append(param.detach())
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], strided(layout)[0])


@pytest.mark.parametrize("size", [40, 400_000])
def test_parameters_that_overlap_are_stepped_one_after_the_other(size, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    def parts():
        flat = torch.linspace(-1, 1, size)
        params = [nn.Parameter(flat[: 3 * size // 4]), nn.Parameter(flat[size // 4 :])]
        for param in params:
            param.grad = torch.cos(torch.arange(float(len(param))))
        return flat, params

    rule = port_hamiltonian()
    found, params = parts()
    LearnedOptimizer(params, rule, implementation="native").step()
    wanted, params = parts()
    for param in params:
        LearnedOptimizer([param], rule, implementation="native").step()
    assert torch.equal(found, wanted)


PARTS = {
    "the same": lambda flat: (flat, flat),
    "neighbours": lambda flat: (flat[:8], flat[4:]),
    "strided": lambda flat: (flat[::3], flat[5:11]),
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("rule", ["port-hamiltonian", AdamUpdate(0.1)], ids=["port-hamiltonian", "adam"])
def test_no_update_is_lost_where_small_parameters_overlap(rule, parts):
    flat, moves = torch.zeros(12), []
    for which in ((0, 1), (0,), (1,)):
        flat.zero_()
        params = [nn.Parameter(PARTS[parts](flat)[k]) for k in which]
        others = [parameter(torch.ones(3), torch.ones(3)) for _ in range(3)]
        optimizer = LearnedOptimizer([*others, *params], rule, implementation="eager")
        for param, k in zip(params, which, strict=True):
            param.grad = torch.full_like(param, 1.0 + k)
        optimizer.step()
        moves.append(flat.clone())
        assert len(optimizer._layout.placed) == len(which)  # what overlaps nothing stays together
    torch.testing.assert_close(moves[0], moves[1] + moves[2], rtol=0.02, atol=0)


def test_gradients_that_fall_by_all_that_float32_has_leave_numbers_without_a_memory():
    optimizers = pair(port_hamiltonian(decay=0.0), [(3,)])
    for size in (1e18, 1e-2, 1e-20):
        for optimizer in optimizers:
            params_of(optimizer)[0].grad = torch.full((3,), size)
            optimizer.step()
    eager, native = (params_of(optimizer)[0] for optimizer in optimizers)
    assert eager.isfinite().all()
    torch.testing.assert_close(native, eager)


@pytest.mark.parametrize("beside", [False, True])
def test_no_update_is_lost_where_a_parameter_is_another_one_transposed(beside):
    """It is copied for the step in C, and would undo the step of the other when it is copied back."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(3, 20, 30, generator=generator)
    found = []
    for implementation in ("eager", "native"):
        whole = data[0].clone()
        params = [nn.Parameter(whole), nn.Parameter(whole.t()), nn.Parameter(data[1].clone())]
        params += [nn.Parameter(data[2].clone().t())] * beside  # copied, too, and nothing else
        optimizer = LearnedOptimizer(params, port_hamiltonian(kinetic="spectral"), implementation=implementation)
        for step in range(3):
            for number, param in enumerate(params):
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + number))
            optimizer.step()
        found.append([*params])
        assert (params[0] - data[0]).abs().max() > 1e-3
    for eager, native in zip(*found, strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-4, atol=1e-6)


def test_parts_of_one_tensor_that_do_not_overlap_share_threads(monkeypatch):
    flat, grad = torch.zeros(300_000), torch.cos(torch.arange(300_000.0))
    params = [nn.Parameter(x) for x in flat.split(100_000)]
    optimizer = LearnedOptimizer(params, port_hamiltonian(), implementation="native")
    for param, part in zip(params, grad.split(100_000), strict=True):
        param.grad = part
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    optimizer.step()
    (plan,) = optimizer._layout.plans
    assert plan.native._options.n_threads == 3
    assert flat.count_nonzero() == len(flat)


def test_parameter_that_was_given_other_memory_is_followed():
    optimizers = pair(port_hamiltonian(), SHAPES)
    for step in range(3):
        give(optimizers, step)
        for optimizer in optimizers:
            for param in params_of(optimizer):
                param.data = param.data.clone()
            optimizer.step()
    for a, b in zip(*map(params_of, optimizers), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


# -------------------- threads and processes


@pytest.mark.parametrize("options", [{}, {"coordinatewise": True}], ids=str)
def test_number_of_threads_changes_nothing_to_the_bit(options, monkeypatch):
    assert_threads_change_nothing(monkeypatch, [(200_003,), *SHAPES, (500, 333), (70_000,)], broken_at=1, **options)


def run_steps(optimizer, n_steps=10):
    for step in range(n_steps):
        give([optimizer], step)
        optimizer.step()


def test_threads_that_step_at_once_do_not_meet(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rule = port_hamiltonian(memory=1)
    wanted, *found = (pair(rule, [(140_000,), (50,)])[1] for _ in range(4))
    run_steps(wanted)
    threads = [threading.Thread(target=run_steps, args=(optimizer,)) for optimizer in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for optimizer in found:
        assert all(map(torch.equal, params_of(optimizer), params_of(wanted)))


def test_threads_that_step_one_optimizer_take_turns():
    wanted, found = (pair(port_hamiltonian(), [(60_000,), (50,)])[1] for _ in range(2))
    give([wanted, found], 0)
    for _ in range(9):
        wanted.step()
    found.step()  # lays out the state
    threads = [threading.Thread(target=lambda: [found.step() for _ in range(2)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, params_of(found), params_of(wanted)))


SCRIPT = """
import os, sys, torch, odeopt
from odeopt.stepping.native.library import library
assert library.cache_info().currsize == 0, "loaded by the import"
torch.set_num_threads(2)
rule = odeopt.load_pretrained("port-hamiltonian")
param = torch.nn.Parameter(torch.zeros(2, 100_000))
param.grad = torch.cos(torch.arange(200_000.0)).reshape(2, 100_000)
for is_stack in (False, True):
    group = {"params": [param], "is_stack": is_stack}
    optimizer = odeopt.LearnedOptimizer([group], rule, implementation="native")
    optimizer.step()
    tiny = torch.tensor(1e-40)
    assert (tiny * 1).item() != 0 and (torch.full((100,), 1e-40) * 1).count_nonzero() == 100, "denormals are flushed"
    read, write = os.pipe()
    if os.fork() == 0:
        optimizer.step()
        os.write(write, param.detach().numpy().tobytes()[:4000])
        os._exit(0)
    optimizer.step()
    assert os.read(read, 4000) == param.detach().numpy().tobytes()[:4000], f"the child took another step: {is_stack}"
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_child_process_steps_right_after_a_fork_and_no_number_is_flushed():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# -------------------- what surrounds a step


def test_autograd_sees_that_parameters_have_changed():
    param = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param], port_hamiltonian(), implementation="native")
    loss = param.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_step_of_fake_parameters_is_left_to_torch():
    with FakeTensorMode():
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = LearnedOptimizer([param], port_hamiltonian())
        optimizer.step()
    assert not is_native(optimizer)


@pytest.mark.parametrize("kind", ["mode of dispatch", "torch.func"])
def test_step_that_something_watches_is_left_to_torch(kind, monkeypatch):
    optimizers = pair(port_hamiltonian(), [(5,), (3, 2)])
    for number in range(2):
        give(optimizers, number)
        optimizers[0].step()
        if number == 0:
            optimizers[1].step()
    watched = library()._replace(step=lambda *_: pytest.fail("stepped in C"))
    monkeypatch.setattr(plans, "library", lambda: watched)
    if kind == "torch.func":
        torch.func.vmap(lambda x: (optimizers[1].step(), x)[1])(torch.ones(1))
    else:
        with Watching():
            optimizers[1].step()
    for a, b in zip(*map(params_of, optimizers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


REFUSED = {
    "other rule": (AdamUpdate, {}, r"no native step of AdamUpdate"),
    "subclass of the rule": (lambda: type("Mine", (PortHamiltonianUpdate,), {})(), {}, r"no native step of Mine"),
    "network of q": (lambda: port_hamiltonian(mass="network"), {}, r"not stepped in closed form"),
    "adaptive solver": (lambda: port_hamiltonian(solver="dopri5", coordinatewise=True), {}, r"closed form"),
    "torchdiffeq": (lambda: port_hamiltonian(backend="torchdiffeq"), {}, r"closed form"),
    "rule in double": (lambda: port_hamiltonian().double(), {}, r"weights of the rule are not float32"),
    "parameters in double": (port_hamiltonian, {"dtype": torch.float64}, r"neither float32 nor bfloat16"),
    "parameters in half": (port_hamiltonian, {"dtype": torch.float16}, r"neither float32 nor bfloat16"),
    "state in half": (port_hamiltonian, {"state_dtype": torch.float16}, r"neither float32 nor bfloat16"),
}


@pytest.mark.parametrize(("make", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_native_says_why_where_it_is_asked_for(make, options, reason):
    dtype, rule = options.get("dtype", torch.float32), make()
    options = {name: value for name, value in options.items() if name != "dtype"}
    params = [parameter(torch.ones(3), torch.ones(3), dtype)]
    optimizer = LearnedOptimizer(params, rule, implementation="native", **options)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"`implementation` should be 'auto' or 'eager' here: .*{reason}"):
            optimizer.step()
        assert torch.equal(params[0], torch.ones(3, dtype=dtype))
    optimizer = LearnedOptimizer(params, rule, **options)
    optimizer.step()
    assert not is_native(optimizer)
    assert not torch.equal(params[0], torch.ones(3, dtype=dtype))


def test_gradients_of_a_subclass_take_the_eager_step():
    optimizers = pair(port_hamiltonian(), SHAPES)
    for step in range(2):
        give(optimizers, step)
        params_of(optimizers[1])[0].grad = params_of(optimizers[1])[0].grad.as_subclass(Subclass)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(*map(params_of, optimizers), strict=True):
        assert torch.equal(a, b)


def test_gradient_of_an_odd_kind_leaves_only_its_bucket_to_the_eager_step():
    shapes = [(70_000,), (5,), (1030,)]  # the small ones are packed into one bucket
    (eager, native), (_, odd) = (pair(port_hamiltonian(), shapes) for _ in range(2))
    for step in range(3):
        give([eager, native, odd], step, broken=(0, 2) if step == 2 else ())
        params_of(odd)[1].grad = params_of(odd)[1].grad.as_subclass(Subclass)
        for optimizer in (eager, native, odd):
            optimizer.step()
    wanted = [params_of(native)[0], *params_of(eager)[1:]]
    assert all(map(torch.equal, params_of(odd), wanted))
    assert not torch.equal(params_of(eager)[0], params_of(native)[0])  # to rounding
    assert odd.n_skipped == 2


@pytest.mark.parametrize("size", [3, 70_000])
def test_parameter_that_is_listed_twice_is_stepped_once(size):
    moved = []
    for implementation in ("eager", "native"):
        for n_times in (1, 2):
            param = parameter(torch.ones(size), torch.ones(size))
            named = [*[("twice", param)] * n_times, ("once", parameter([1.0], [2.0]))]
            with pytest.warns(UserWarning, match="duplicate parameters") if n_times == 2 else contextlib.nullcontext():
                optimizer = LearnedOptimizer(named, port_hamiltonian(), implementation=implementation)
            assert optimizer.param_groups[0]["param_names"] == ["twice", "once"]
            for _ in range(2):
                optimizer.step()
            moved.append(param.detach())
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[2], moved[3])
    torch.testing.assert_close(moved[2], moved[0], rtol=1e-6, atol=0)  # a rounding of float32
    assert not torch.equal(moved[0], torch.ones(size))


@pytest.mark.parametrize("implementation", ["fast", None, True])
def test_implementation_is_checked(implementation):
    with pytest.raises(ValueError, match=r"`implementation` should be 'auto', 'native' or 'eager'\. Found"):
        LearnedOptimizer([parameter([1.0], [1.0])], implementation=implementation)


# -------------------- the library


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """A folder in place of that of the library, which is looked for anew."""
    monkeypatch.setattr(libraries, "_FOLDER", tmp_path)
    libraries.library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    libraries.library.cache_clear()


def test_status_names_the_instruction_set():
    assert odeopt.native_status() == f"native ({libraries._INSTRUCTIONS[library().instructions]})"


def test_without_the_library_steps_are_eager_and_the_status_says_why(unloaded):
    assert odeopt.native_status().startswith("eager: the step was not compiled when odeopt was installed")
    eager, other = (LearnedOptimizer([parameter([1.0, 2.0], [0.3, 0.4])], port_hamiltonian(), implementation=name)
                    for name in ("eager", "auto"))  # fmt: skip
    for optimizer in (eager, other):
        optimizer.step()
    assert torch.equal(params_of(eager)[0], params_of(other)[0])
    with pytest.raises(ValueError, match=r"should be 'auto' or 'eager' here: the step was not compiled"):
        LearnedOptimizer([parameter([1.0], [1.0])], port_hamiltonian(), implementation="native").step()


def test_library_that_cannot_be_loaded_is_no_error_but_a_status(unloaded):
    (unloaded / libraries._NAME).write_bytes(b"not a library")
    assert "cannot be loaded" in odeopt.native_status()


def test_library_of_another_version_is_not_called(monkeypatch):
    monkeypatch.setattr(libraries, "_VERSION", libraries._VERSION + 1)
    libraries.library.cache_clear()
    assert "belongs to another version" in odeopt.native_status()
    monkeypatch.undo()
    libraries.library.cache_clear()


def test_autocast_around_a_step_changes_nothing_to_the_bit(monkeypatch):
    monkeypatch.setattr(plans, "_LARGEST_SIDE", 100)
    shapes = [(40, 50), (150, 160), (5,)]  # in C, and by torch
    optimizers = [pair(odeopt.load_pretrained("port-hamiltonian-spectral"), shapes) for _ in range(2)]
    for step in range(2):
        for inside, some in zip((False, True), optimizers, strict=True):
            give(some, step)
            with torch.autocast("cpu", enabled=inside):
                for optimizer in some:
                    optimizer.step()
    for plain, inside in zip(*optimizers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(params_of(plain), params_of(inside), strict=True))


def test_one_call_steps_all_tensors_whatever_the_depth():
    rule = port_hamiltonian(kinetic="spectral", depth_power=1.0)
    optimizer = pair(rule, [(4, 3), (3, 4), (30, 4), (3,)])[1]
    give([optimizer], 0)
    optimizer.step()
    assert [len(plan.placed) for plan in optimizer._layout.plans] == [4]


def test_one_call_steps_each_tensor_with_the_options_of_its_group():
    rule = port_hamiltonian(kinetic=("quadratic", "spectral"), schedule="power", uses_progress=True)
    own = [{"total_steps": 9}, {"lr": 0.3, "weight_decay": 0.002}, {"lr": 0.6, "maximize": True, "total_steps": 20}]
    optimizers = []
    for implementation in ("eager", "native"):
        generator = torch.Generator().manual_seed(0)
        drawn = [[torch.randn(shape, generator=generator) for shape in [(6, 4), (5,)]] for _ in own]
        groups = [
            {"params": [nn.Parameter(x) for x in some], **options} for some, options in zip(drawn, own, strict=True)
        ]
        optimizers.append(LearnedOptimizer(groups, rule, implementation=implementation))
    for step in range(9):
        generator.manual_seed(step + 1)
        for of_all in zip(*([p for group in x.param_groups for p in group["params"]] for x in optimizers), strict=True):
            grad = torch.randn(of_all[0].shape, generator=generator)
            for param in of_all:
                param.grad = grad.clone()
        for optimizer in optimizers:
            first, second, third = optimizer.param_groups
            if step == 3:  # in the middle of a run, also what a group is told of its length
                first["lr"], second["maximize"], third["weight_decay"], third["n_steps"] = 0.5, True, 0.01, 12
            if step == 6:
                first["params"], third["params"] = third["params"], first["params"]
            optimizer.step()
        assert len(optimizers[1]._layout.plans) == 1
        for eager, native in zip(*(x.param_groups for x in optimizers), strict=True):
            for a, b in zip(eager["params"], native["params"], strict=True):
                # sums and orthogonalised matrices differ by roundings of float32, options by tenths of a step
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_views_that_interleave_but_share_nothing_stay_native():
    """The columns of one matrix, as the parts of queries, keys and values are."""
    found = []
    for implementation in ("eager", "native"):
        whole = torch.randn(20, 90, generator=torch.Generator().manual_seed(0))
        params = [nn.Parameter(whole[:, 30 * k : 30 * k + 30]) for k in range(3)]
        optimizer = LearnedOptimizer(params, port_hamiltonian(), implementation=implementation)
        for number, param in enumerate(params):
            param.grad = torch.randn(20, 30, generator=torch.Generator().manual_seed(number))
        optimizer.step()
        found.append(whole)
    torch.testing.assert_close(*found)
    (plan,) = optimizer._layout.plans
    assert plan.native._entangled() == set()
