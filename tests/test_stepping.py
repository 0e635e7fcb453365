"""The step of many parameters: packed, in chunks and tensor by tensor it is the same step."""

import pytest
import torch
from cuda_toys import no_waiting
from optimizer_toys import LeakySum, parameter, port_hamiltonian
from torch import nn

from odeopt.ode import LINEAR_METHODS
from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate, HamiltonianUpdate, LSTMUpdate, PortHamiltonianUpdate, SGDUpdate
from odeopt.stepping import Bucket, layout

f32, f64 = torch.float32, torch.float64

# sizes of one and none, of one row, beside a row, of several rows, and large enough to be stepped in place
LARGE = (70, 101)
SHAPES = [(), (1,), (7, 3), (1024,), (5, 0), (1025,), (2, 3, 200, 2), LARGE]


@pytest.fixture
def large_in_place(monkeypatch):
    """Step a few thousand coordinates where they lie, as 65,536 are: solvers that adapt take long over so many."""
    monkeypatch.setattr(layout, "_STEPPED_IN_PLACE", {"cpu": 4096})


def gradients(shapes, n_steps, dtype=f32):
    generator = torch.Generator().manual_seed(3)
    return [[torch.randn(s, generator=generator, dtype=f64).to(dtype) for s in shapes] for _ in range(n_steps)]


def parameters(shapes, dtype=f32):
    generator = torch.Generator().manual_seed(2)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=f64).to(dtype)) for s in shapes]


def follow(params, optimizer, grads):
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
    return [param.detach() for param in params]


def tensor_by_tensor(rule, params, grads, *, lr=1.0, decay=0.0, total_steps=None):
    """The rule's own forward, once per tensor and step."""
    results = []
    for index, param in enumerate(params):
        theta, work = param.detach().clone(), torch.promote_types(param.dtype, f32)
        state = rule.init_state(theta.reshape(-1).to(work))
        for step, row in enumerate(grads):
            if theta.numel() == 0 or row[index] is None:
                continue
            progress = None if total_steps is None else torch.tensor(step / total_steps, dtype=work)
            flat = theta.reshape(-1).to(work)
            grad = row[index].reshape(-1).to(work)
            with torch.no_grad():
                update, state = rule(grad, state, param=flat, shape=theta.shape, progress=progress)
            theta = ((1 - lr * decay) * flat + lr * update).reshape(theta.shape).to(theta.dtype)
        results.append((theta, state))
    return results


def assert_close(found, wanted, dtype, factor=1.0):
    # sums and exponentials are rounded in another order, and the differences grow over a few steps
    tolerance = factor * {f64: 1e-11, f32: 3e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


RULES = {
    "sgd": lambda: SGDUpdate(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: AdamUpdate(0.02),
    "lstm": lambda: LSTMUpdate(preprocess=True, hidden_size=5),
    "lstm, normalized": lambda: LSTMUpdate(normalize=True, hidden_size=5),
    "hamiltonian": HamiltonianUpdate,
    "hamiltonian, across": lambda: HamiltonianUpdate(normalize=True),
    "toy, across": LeakySum,
    "port-hamiltonian": lambda: port_hamiltonian(uses_progress=True),
    "three modes": lambda: port_hamiltonian(modes=3),
    "coordinatewise": lambda: port_hamiltonian(coordinatewise=True),
    "networks of q": lambda: port_hamiltonian(mass="network", friction="network", port="network"),
    "potential": lambda: port_hamiltonian(potential="network"),
    "coordinatewise potential": lambda: port_hamiltonian(potential="network", coordinatewise=True),
    "adaptive": lambda: port_hamiltonian(solver="dopri5"),
}
over_rules = pytest.mark.parametrize("name", RULES)


# -------------------- in chunks


@over_rules
@pytest.mark.parametrize("dtype", [f32, f64, torch.bfloat16], ids=str)
def test_step_of_a_model_is_the_rules_step_of_each_tensor(name, dtype, monkeypatch, large_in_place):
    torch.manual_seed(0)
    # weights in the dtype of the step, or float32 would round what double precision is to show
    rule, grads = RULES[name]().to(f64 if dtype == f64 else f32), gradients(SHAPES, 4, dtype)
    monkeypatch.setattr(type(rule), "chunk_size", 3000)  # so that rows and columns are cut
    params = parameters(SHAPES, dtype)
    wanted = tensor_by_tensor(rule, params, grads, lr=0.5, decay=0.002, total_steps=8)
    optimizer = LearnedOptimizer(params, rule, lr=0.5, weight_decay=0.002, total_steps=8)
    found = follow(params, optimizer, grads)
    assert_close(found, [theta for theta, _ in wanted], dtype)
    for param, (_, state) in zip(params, wanted, strict=True):
        if param.numel() > 0:
            ours = optimizer.state[param]
            assert tuple(ours) == state._fields
            # bfloat16: only the parameters are, and their rounding feeds back into a state that sees them
            state_dtype = f32 if dtype == torch.bfloat16 else dtype
            assert_close([x.flatten() for x in ours.values()], [x.flatten() for x in state], state_dtype, 30)


@pytest.mark.parametrize("solver", LINEAR_METHODS)
def test_every_solver_gives_the_step_of_torchdiffeq(solver, large_in_place):
    grads = gradients(SHAPES, 5, f64)
    ours = port_hamiltonian(solver=solver).to(f64)
    params = parameters(SHAPES, f64)
    # torchdiffeq has no exponential method; dopri8 at its default tolerances interpolates, and is off by 1e-7
    reference, tolerance = (solver, 1.0) if solver != "exponential" else ("dopri8", 1e5)
    theirs = port_hamiltonian(solver=reference, backend="torchdiffeq").to(f64)
    theirs.load_state_dict(ours.state_dict())
    wanted = [theta for theta, _ in tensor_by_tensor(theirs, params, grads)]
    found = follow(params, LearnedOptimizer(params, ours), grads)
    assert_close(found, wanted, f64, tolerance)


def test_rules_are_called_once_for_all_small_tensors():
    calls = []

    class Counting(SGDUpdate):
        def forward(self, grad, state, **kwargs):
            calls.append(grad.shape)
            return super().forward(grad, state, **kwargs)

    params = parameters([(3,)] * 20 + [(30, 30)] * 10)
    follow(params, LearnedOptimizer(params, Counting(0.1)), gradients([p.shape for p in params], 1))
    assert calls == [(30, 1024)]  # one row each


def test_network_of_the_rule_runs_once_for_all_tensors():
    rule, params = port_hamiltonian(), parameters([(3,), (4, 4), (2000,)])
    optimizer, seen = LearnedOptimizer(params, rule, implementation="eager"), []
    placed = optimizer._layout.rule_for(params[0], optimizer.param_groups[0])
    placed.coefficient_network.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape)))
    follow(params, optimizer, gradients([p.shape for p in params], 1))
    assert seen == [(3, 13)]


@pytest.mark.parametrize("implementation", ["eager", "native"])
def test_large_parameters_are_stepped_where_they_lie(implementation):
    params = parameters([(300, 250), (10,), (11,)])
    optimizer = LearnedOptimizer(params, port_hamiltonian(), implementation=implementation)
    follow(params, optimizer, gradients([p.shape for p in params], 1))
    buckets = [placed.bucket for placed in optimizer._layout.placed]
    sizes = sorted((len(b.params), b.shape) for b in buckets)
    assert sizes == [(1, (1, 75_000)), (2, (2, 16))]  # short rows for short tensors
    # native steps copy nothing
    assert [b.theta is not None for b in buckets] == [len(b.params) > 1 and implementation == "eager" for b in buckets]


def test_tensors_that_come_and_go_keep_their_state():
    shapes = [(3,), (4, 4), (2000,), (5,)]
    rule, params = port_hamiltonian(), parameters(shapes)
    grads = gradients(shapes, 6)
    for step, missing in ((0, (3,)), (1, (1, 3)), (2, (0, 1, 2)), (4, (1,))):
        for index in missing:
            grads[step][index] = None
    wanted = [theta for theta, _ in tensor_by_tensor(rule, params, grads)]
    optimizer = LearnedOptimizer(params, rule)
    assert_close(follow(params, optimizer, grads), wanted, f32)
    assert [int(optimizer.state[p]["step"]) for p in params] == [5, 3, 5, 4]


@over_rules
def test_one_bad_gradient_stops_its_own_tensor_only(name, large_in_place):
    torch.manual_seed(0)
    shapes = [(3,), (4, 4), LARGE, (5,)]
    rule, params, grads = RULES[name](), parameters(shapes), gradients(shapes, 4)
    clean = [list(row) for row in grads]
    for index in (1, 2):
        grads[2][index] = grads[2][index].clone()
        grads[2][index].view(-1)[-1] = float("nan")
        clean[2][index] = None
    wanted = [theta for theta, _ in tensor_by_tensor(rule, params, clean)]
    optimizer = LearnedOptimizer(params, rule)
    with pytest.warns(RuntimeWarning, match="is not finite"):
        found = follow(params, optimizer, grads)
    assert_close(found, wanted, f32)
    assert optimizer.n_skipped == 2


@pytest.mark.parametrize("implementation", ["eager", "native"])
def test_padding_stays_zero(implementation):
    rule, params = port_hamiltonian(), parameters([(5,), (1030,)])
    optimizer = LearnedOptimizer(params, rule, implementation=implementation)
    follow(params, optimizer, gradients([p.shape for p in params], 5))
    bucket = optimizer._layout.placed[0].bucket
    theta = [] if bucket.theta is None else [bucket.theta]
    for field in (*bucket.state.p.unbind(1), bucket.state.second_moment, *theta):
        assert field[0, 5:].eq(0).all()
        assert field[2, 6:].eq(0).all()
        assert field[1].ne(0).all()


def test_state_in_the_shape_of_the_parameter_is_the_one_that_is_stepped():
    params = parameters([(3, 2), (4,)])
    optimizer = LearnedOptimizer(params, port_hamiltonian())
    grads = gradients([p.shape for p in params], 2)
    follow(params, optimizer, grads[:1])
    shapes = {name: tuple(value.shape) for name, value in optimizer.state[params[0]].items()}
    assert shapes["p"] == (2, 3, 2)
    assert shapes["q"] == (0, 3, 2)
    assert shapes["second_moment"] == (3, 2)
    assert shapes["step"] == (1,)
    before = optimizer.state[params[0]]["p"].clone()
    follow(params, optimizer, grads[1:])
    assert not torch.equal(optimizer.state[params[0]]["p"], before)


@pytest.mark.parametrize("model_size", [3, 5000])
def test_state_takes_twelve_bytes_a_parameter_and_half_of_it_in_bfloat16(model_size):
    for dtype, per_parameter in ((None, 12), (torch.bfloat16, 6)):
        params = parameters([(model_size, 7), (model_size, 2)])
        optimizer = LearnedOptimizer(params, PortHamiltonianUpdate(), state_dtype=dtype)
        follow(params, optimizer, gradients([p.shape for p in params], 1))
        sizes = [sum(x.nbytes for x in optimizer.state[p].values()) for p in params]
        # and three numbers of a tensor, in float32
        assert sizes == [per_parameter * p.numel() + 12 for p in params]
        assert {x.dtype for x in optimizer.state[params[0]].values()} == {f32, dtype or f32}


def test_bfloat16_state_follows_float32():
    shapes = [(50, 20), (7,)]
    grads = gradients(shapes, 30)
    results = []
    for dtype in (None, torch.bfloat16):
        params = parameters(shapes)
        start = [p.detach().clone() for p in params]
        optimizer = LearnedOptimizer(params, port_hamiltonian(), state_dtype=dtype)
        results.append([a - b for a, b in zip(follow(params, optimizer, grads), start, strict=True)])
    for a, b in zip(*results, strict=True):
        error = (a - b).norm() / a.norm()
        assert 0 < error < 0.02  # eight bits of momentum; random gradients, so what is moved is a small difference


def test_state_dtype_survives_load_copy_and_pickle():
    import copy
    import pickle

    params = parameters([(5,), (4,)])
    optimizer = LearnedOptimizer(params, AdamUpdate(), state_dtype=torch.bfloat16)
    follow(params, optimizer, gradients([(5,), (4,)], 2))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (twin.state_dtype, twin.capturable) == (torch.bfloat16, False)
    again = LearnedOptimizer(params, AdamUpdate(), state_dtype=torch.bfloat16)
    again.load_state_dict(optimizer.state_dict())
    assert again.state[params[0]]["exp_avg"].dtype == torch.bfloat16


def test_model_brought_to_another_dtype_takes_its_state_along():
    params = parameters([(5,), (4,)])
    optimizer = LearnedOptimizer(params, AdamUpdate(0.1))
    grads = gradients([(5,), (4,)], 2)
    follow(params, optimizer, grads[:1])
    for param in params:
        param.grad = None
        param.data = param.data.double()
    follow(params, optimizer, [[g.double() for g in grads[1]]])
    twins = parameters([(5,), (4,)])
    wanted = follow(twins, LearnedOptimizer(twins, AdamUpdate(0.1)), grads)
    assert optimizer.state[params[0]]["exp_avg"].dtype == f64
    assert_close([p.detach().float() for p in params], wanted, f32)


@pytest.mark.filterwarnings("ignore:.*total_steps:UserWarning")
def test_progress_and_steps_are_counted_on_the_device_where_a_graph_captures_them():
    shapes = [(6,), (3, 3)]
    grads, results = gradients(shapes, 6), []
    for capturable in (False, True):
        params = parameters(shapes)
        rule = port_hamiltonian(uses_progress=True)
        optimizer = LearnedOptimizer(params, rule, total_steps=4, capturable=capturable, weight_decay=1e-3)
        results.append(follow(params, optimizer, grads))
        assert isinstance(optimizer.param_groups[0]["n_steps"], torch.Tensor) == capturable
        assert optimizer.n_steps == 6
        again = LearnedOptimizer(params, rule, capturable=not capturable)
        again.load_state_dict(optimizer.state_dict())
        assert isinstance(again.param_groups[0]["n_steps"], torch.Tensor) != capturable
        assert again.n_steps == 6
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"state_dtype": torch.int8},
            r"`state_dtype` should be a floating-point dtype of 16 to 64 bits or None.*int8",
        ),
        ({"state_dtype": "bf16"}, r"`state_dtype` should be a floating-point dtype of 16 to 64 bits or None.*'bf16'"),
        ({"capturable": None}, r"`capturable` should be True or False"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([parameter([1.0], [1.0])], SGDUpdate(), **options)


# -------------------- on CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["port-hamiltonian", "adam", "lstm", "lstm, normalized"])
def test_captured_step_equals_the_plain_one(name):
    torch.manual_seed(0)
    shapes, rule = [(7, 3), (1025,), (300, 250)], RULES[name]()
    grads = gradients(shapes, 8)
    params = parameters(shapes)
    wanted = follow(params, LearnedOptimizer(params, rule, total_steps=20), grads)
    params = [nn.Parameter(p.detach().cuda()) for p in parameters(shapes)]
    optimizer = LearnedOptimizer(params, rule, total_steps=20, capturable=True)
    held = [torch.zeros_like(p) for p in params]
    for param, grad in zip(params, held, strict=True):
        param.grad = grad

    def feed(row):
        for grad, value in zip(held, row, strict=True):
            grad.copy_(value)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # three steps of warm-up, as torch asks for
        for row in grads[:3]:
            feed(row)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    feed(grads[3])
    with torch.cuda.graph(graph):
        optimizer.step()
    for row in grads[3:]:
        feed(row)
        graph.replay()
    assert optimizer.n_steps == 8
    # exponentials and sums round differently on the device
    assert_close([p.detach().cpu() for p in params], wanted, f32, 3)


@pytest.mark.gpu
def test_step_on_cuda_waits_for_nothing():
    params = [nn.Parameter(p.detach().cuda()) for p in parameters([(7, 3), (300, 250)])]
    optimizer = LearnedOptimizer(params, port_hamiltonian(uses_progress=True), total_steps=9)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    with no_waiting():
        optimizer.step()


def test_bucket_lays_out_its_tensors_row_by_row():
    params = parameters([(3, 2), (1025,)])
    bucket = Bucket(AdamUpdate(), params)
    for param in params:
        param.grad = torch.ones_like(param)
    grad, theta, has_grad = bucket.load()
    assert grad.shape == theta.shape == (3, 1024)
    assert torch.equal(theta[0, :6], params[0].detach().flatten())
    assert torch.equal(theta[1:3].flatten()[:1025], params[1].detach())
    assert grad.sum(1).tolist() == [6, 1024, 1]
    assert has_grad.flatten().tolist() == [True, True]
    assert bucket.rows.tensor.tolist() == [0, 1, 1]
    assert bucket.rows.sum(grad).sum(1).tolist() == [6, 1025]
