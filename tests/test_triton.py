"""The step in Triton: equal to the eager one, on a device (``-m gpu``) or, without any, in Triton's interpreter.

The interpreter has to be chosen before Triton is imported: one test runs the others, in a process of their own. Triton
comes with torch's builds for CUDA, which is what PyPI has for Linux; beside a build for CPUs these tests are skipped.
"""

import importlib.util
import os
import subprocess
import sys
from functools import partial

import pytest
import test_native
import torch
from optimizer_toys import Subclass, Watching, parameter, port_hamiltonian
from test_native import OPTIONS, SETTINGS, give, params_of
from torch import nn

import odeopt
from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate
from odeopt.stepping import Bucket, layout
from odeopt.stepping.triton import step as kernels_step
from odeopt.stepping.triton import triton_obstacle

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton beside this torch")
on_device = pytest.mark.usefixtures("in_triton") if IS_INTERPRETED else pytest.mark.gpu
BFLOAT16 = torch.bfloat16
SHAPES = [(3, 2), (5,), (1030,)]
COORDINATEWISE = {"coordinatewise": True, "memory": 1}

# the interpreter computes in NumPy, which warns of what a device computes without a word, and masks throw away
pytestmark = pytest.mark.filterwarnings("ignore:.*is not finite:RuntimeWarning", "ignore:.*encountered:RuntimeWarning")


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason="this is that process")
def test_kernels_are_right_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(".") > 50, done.stdout


@pytest.fixture
def in_triton(monkeypatch):
    """Leave tensors on a CPU to Triton."""
    monkeypatch.setattr(layout, "native_obstacle", lambda *_: "this is about kernels")


@pytest.fixture
def in_place(monkeypatch):
    """Step each tensor where it lies."""
    monkeypatch.setattr(layout, "_STEPPED_IN_PLACE", {"cpu": 0, "cuda": 0})


pair = partial(test_native.pair, device=DEVICE)


def has_kernels(optimizer):
    return all(plan.kernels is not None for plan in optimizer._layout.plans)


def copy(optimizer):
    """Parameters and state, by value."""
    return [[x.detach().clone() for x in (p, *optimizer.state[p].values())] for p in params_of(optimizer)]


def assert_steps_alike(optimizers, n_steps=3):
    """Take each step from a common state; in the interpreter a rounding cuts off what bfloat16 does not hold."""
    eager, ours = optimizers
    test_native.assert_steps_alike(optimizers, n_steps, are_rounded_alike=lambda found, wanted: None)
    assert has_kernels(ours)
    assert not any(plan.kernels for plan in eager._layout.plans)


# -------------------- parity


@on_device
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        *((options, {"weight_decay": 0.001, "total_steps": 5}) for options in OPTIONS.values()),
        *((options, settings) for options in ({}, COORDINATEWISE) for settings in SETTINGS.values()),
    ],
    ids=str,
)
def test_step_is_the_eager_one(options, settings):
    is_spectral = "spectral" in (*options.get("kinetic", ()), options.get("output"))
    assert_steps_alike(pair(port_hamiltonian(**options), SHAPES[1:] if is_spectral else SHAPES, **settings), 2)


@on_device
@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("options", [{}, COORDINATEWISE, {"normalization": "tensor"}], ids=str)
def test_step_of_a_tensor_in_place_is_the_eager_one(options):
    optimizers = pair(port_hamiltonian(**options), [(), (5,), (2, 1025)], weight_decay=0.001)
    assert_steps_alike(optimizers)
    assert all(plan.placed[0].bucket.theta is None for plan in optimizers[1]._layout.plans)


@on_device
@pytest.mark.parametrize("options", [{}, COORDINATEWISE, {"normalization": "tensor"}], ids=str)
@pytest.mark.parametrize(
    "dtypes", [{"dtype": BFLOAT16}, {"state_dtype": BFLOAT16}, {"dtype": BFLOAT16, "state_dtype": BFLOAT16}], ids=str
)
@pytest.mark.parametrize("is_in_place", [False, True])
def test_step_is_the_eager_one_in_bfloat16(options, dtypes, is_in_place, request):
    if is_in_place:
        request.getfixturevalue("in_place")
    assert_steps_alike(pair(port_hamiltonian(**options), SHAPES[1:], **dtypes, weight_decay=0.001), 2)


@on_device
@pytest.mark.parametrize("name", ["port-hamiltonian", "port-hamiltonian-coordinatewise-mnist"])
def test_shipped_rules_are_stepped_by_kernels(name):
    assert_steps_alike(pair(odeopt.load_pretrained(name), SHAPES, total_steps=100))


@on_device
def test_matrices_of_a_spectral_rule_are_left_to_torch():
    params = [parameter(torch.ones(5, 4), torch.ones(5, 4)), parameter(torch.ones(3), torch.ones(3))]
    params = [nn.Parameter(p.detach().to(DEVICE)) for p in params]
    optimizer = LearnedOptimizer(params, implementation="native")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert sorted(plan.kernels is not None for plan in optimizer._layout.plans) == [False, True]


@on_device
@pytest.mark.parametrize("options", [{}, COORDINATEWISE], ids=str)
def test_processes_that_share_a_tensor_exchange_the_same_sums_by_kernels_and_eagerly(options, monkeypatch):
    shapes, add_up = [], Bucket.add_up
    monkeypatch.setattr(
        Bucket, "add_up", lambda self, x: (shapes.append((x.shape, x.is_contiguous())), add_up(self, x))[1]
    )
    for optimizer in pair(port_hamiltonian(**options), SHAPES):
        give([optimizer], 0)
        optimizer.step()
    half = len(shapes) // 2
    assert half == (1 if options else 2)
    assert shapes[:half] == shapes[half:]
    assert all(is_contiguous for _, is_contiguous in shapes)


# -------------------- gradients that are not finite, or not there


@on_device
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("options", [{}, COORDINATEWISE, {"normalization": "tensor"}], ids=str)
@pytest.mark.parametrize("is_in_place", [False, True])
def test_gradient_that_is_not_finite_leaves_its_tensor_as_it_is(bad, options, is_in_place, request):
    if is_in_place:
        request.getfixturevalue("in_place")
    _, optimizer = pair(port_hamiltonian(**options), [(1030,), (7,), (9,)], weight_decay=0.001)
    give([optimizer], 0)
    optimizer.step()
    before = copy(optimizer)
    give([optimizer], 1)
    params_of(optimizer)[0].grad[1027] = bad
    params_of(optimizer)[2].grad[4] = bad
    optimizer.step()
    after = copy(optimizer)
    for i, moves in enumerate((False, True, False)):
        changed = [not torch.equal(a, b) for a, b in zip(before[i], after[i], strict=True) if a.numel() > 0]
        assert sum(changed) >= 5 if moves else not any(changed)  # coordinatewise the scales of a tensor stay zero
    assert optimizer.n_skipped == 2
    assert has_kernels(optimizer)


@on_device
def test_parameters_without_a_gradient_are_left_alone():
    _, optimizer = pair(port_hamiltonian(), SHAPES)
    give([optimizer], 0)
    optimizer.step()
    before = copy(optimizer)
    give([optimizer], 1)
    params_of(optimizer)[1].grad = None
    optimizer.step()
    after = copy(optimizer)
    assert [torch.equal(a[0], b[0]) for a, b in zip(before, after, strict=True)] == [False, True, False]
    assert [int(optimizer.state[p]["step"]) for p in params_of(optimizer)] == [2, 1, 2]


@on_device
def test_padding_stays_zero():
    _, optimizer = pair(port_hamiltonian(), [(5,), (1030,)])
    for step in range(2):
        give([optimizer], step)
        optimizer.step()
    bucket = optimizer._layout.placed[0].bucket
    for field in (*bucket.state.p.unbind(1), bucket.state.second_moment, bucket.theta):
        assert field[0, 5:].eq(0).all()
        assert field[2, 6:].eq(0).all()
        assert field[1].ne(0).all()


# -------------------- memory, and what surrounds a step


@on_device
@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("layout", ["transposed", "expanded", "negated"])
def test_gradient_that_is_not_contiguous_gives_the_same_numbers(layout):
    x = torch.cos(torch.arange(24.0, device=DEVICE)).reshape(4, 6)
    views = {"transposed": x.mT, "expanded": x[:1, :1].expand(6, 4), "negated": torch._neg_view(x.view(6, 4))}
    found = []
    for grad in (views[layout], views[layout].resolve_neg().contiguous()):
        param = nn.Parameter(torch.linspace(-1, 1, 24, device=DEVICE).view(6, 4))
        optimizer = LearnedOptimizer([param], port_hamiltonian(), implementation="native")
        for _ in range(2):
            param.grad = grad
            optimizer.step()
        found.append(param.detach())
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.linspace(-1, 1, 24, device=DEVICE).view(6, 4))


@on_device
def test_default_dtype_changes_nothing(monkeypatch):
    found, dtypes, add_up = [], set(), Bucket.add_up
    monkeypatch.setattr(Bucket, "add_up", lambda self, x: (dtypes.add(x.dtype), add_up(self, x))[1])
    for dtype in (torch.float32, torch.float64):
        _, optimizer = pair(port_hamiltonian(), SHAPES)
        give([optimizer], 0)
        torch.set_default_dtype(dtype)
        try:
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(copy(optimizer))
    assert dtypes == {torch.float32}
    for a, b in zip(*found, strict=True):
        assert all(map(torch.equal, a, b))


@on_device
@pytest.mark.parametrize("is_in_place", [False, True])
def test_autograd_sees_that_parameters_have_changed(is_in_place, request):
    if is_in_place:
        request.getfixturevalue("in_place")
    params = [nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(2)]
    optimizer = LearnedOptimizer(params, port_hamiltonian(), implementation="native")
    loss = sum(param.square().sum() for param in params)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_device
@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("kind", ["mode", "subclass"])
def test_operations_that_someone_watches_are_operations_of_torch(kind, monkeypatch):
    monkeypatch.setattr(kernels_step, "_launch", lambda *_, **__: pytest.fail("launched a kernel"))
    monkeypatch.setattr(
        kernels_step, "_kernels_on", lambda _: importlib.import_module("odeopt.stepping.triton.kernels")
    )
    optimizers = pair(port_hamiltonian(), SHAPES)
    give(optimizers, 0)
    if kind == "subclass":
        for param in params_of(optimizers[1]):
            param.grad = param.grad.as_subclass(Subclass)
    for optimizer in optimizers:
        if kind == "mode":
            with Watching():
                optimizer.step()
        else:
            optimizer.step()
    assert has_kernels(optimizers[1])
    for a, b in zip(*map(params_of, optimizers), strict=True):
        assert torch.equal(a, b)


# -------------------- where there are no kernels


@on_device
@pytest.mark.parametrize(
    ("make", "dtype", "reason"),
    [
        (AdamUpdate, torch.float32, "no native step of AdamUpdate"),
        (lambda: port_hamiltonian(mass="network"), torch.float32, "closed form"),
        (port_hamiltonian, torch.float64, "neither float32 nor of half precision"),
    ],
)
def test_what_has_no_kernels_is_stepped_eagerly_and_the_reason_is_known(make, dtype, reason):
    optimizer, _ = pair(make(), [(3,)], dtype=dtype)
    give([optimizer], 0)
    optimizer.step()
    (placed,) = optimizer._layout.placed
    assert reason in triton_obstacle(placed.rule, placed.bucket)


@on_device
def test_without_triton_steps_are_eager(monkeypatch):
    monkeypatch.setitem(sys.modules, "odeopt.stepping.triton.kernels", None)
    monkeypatch.delattr("odeopt.stepping.triton.kernels", raising=False)
    kernels_step._kernels_on.cache_clear()
    try:
        param = nn.Parameter(torch.ones(3, device=DEVICE))
        param.grad = torch.ones_like(param)
        optimizer = LearnedOptimizer([param], port_hamiltonian())
        optimizer.step()
        assert not has_kernels(optimizer)
        (placed,) = optimizer._layout.placed
        assert triton_obstacle(placed.rule, placed.bucket).startswith("Triton does not work here (ModuleNotFoundError")
    finally:
        kernels_step._kernels_on.cache_clear()


@pytest.mark.skipif(IS_INTERPRETED, reason="on a CPU without the interpreter")
def test_parameters_on_a_cpu_are_none_of_its_business():
    bucket = Bucket(port_hamiltonian(), [nn.Parameter(torch.ones(3))])
    assert triton_obstacle(port_hamiltonian(), bucket) == "the parameters are not on CUDA"


# -------------------- for a device


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from odeopt.stepping.triton import kernels

FLOAT = "*fp32"
TYPES = {"tensor": "*i64", "offsets": "*i64", "n_columns": "i32", "mode_stride": "i32", "speed_limit": "fp32"}

def compiled(kernel, kept, **constants):
    types = {name: TYPES.get(name, kept if name in ("grad", "theta", "p", "second_moment") else FLOAT)
             for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    options = {"enable_fp_fusion": True}
    assert len(triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["cubin"]) > 1000

MODES = {"MODES": 2, "MAXIMIZE": True, "BLOCK": 1024}
compiled(kernels.magnitudes, FLOAT, N_FEATURES=7, N_SUMS=2, BLOCK=1024)
compiled(kernels.totals, FLOAT, N_SUMS=7, WIDTH=8, BLOCK=128)
for kind, kept in ((kernels.BY_COORDINATE, FLOAT), (kernels.BY_TENSOR, "*bf16"), (kernels.BY_HISTORY, "*bf16")):
    compiled(kernels.statistics, kept, N_NUMBERS=3, KIND=kind.value, **MODES)
    for stages, relativistic, n_gain, n_friction, floor in ((4, 0, 2, 4, None), (0, 3, 1, 1, -3.0), (1, 2, 1, 4, None)):
        one = {"n_columns": 1, "mode_stride": 1} if stages == 1 else {}  # which Triton takes for constants
        compiled(kernels.advance, kept, **one, N_NUMBERS=25, MEMORY=1, N_GAIN=n_gain, N_FRICTION=n_friction,
                 LOG_FLOOR=floor, STAGES=stages, IS_RELATIVISTIC=relativistic, KIND=kind.value, **MODES)
"""


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason="compiles in a process without the interpreter")
def test_kernels_compile_for_a_device_that_is_not_there(tmp_path):
    """What the interpreter does not see: types that do not fit, and what ptxas says."""
    command = [sys.executable, "-c", COMPILE]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if "unexpected keyword argument 'constexprs'" in done.stderr:
        pytest.skip("a Triton before 3.3, which is asked otherwise")
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_run_on_a_device_is_repeated_bit_for_bit():
    found = []
    for _ in range(2):
        _, optimizer = pair(port_hamiltonian(memory=1), [*SHAPES, (70, 1000), (3_000_001,)])
        for step in range(3):
            give([optimizer], step)
            optimizer.step()
        assert has_kernels(optimizer)
        found.append(copy(optimizer))
    for a, b in zip(*found, strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.gpu
@pytest.mark.usefixtures("in_place")
def test_large_tensor_on_a_device_is_stepped_as_eagerly():
    assert_steps_alike(pair(port_hamiltonian(), [(5_000_001,)]))
