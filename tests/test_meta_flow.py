"""Optimization as one equation: the closed form where there is one, W never rises, events, solvers agree."""

import functools
import math

import pytest
import torch

import odeopt
from odeopt.meta import gradient_flow
from odeopt.physics import PortHamiltonianSystem, PositiveDefinite, Potential
from odeopt.rules import PortHamiltonianUpdate
from odeopt.tasks import MLPClassification, RandomQuadratic

F64 = torch.float64
TASK = RandomQuadratic(4, dtype=F64)
INDICES = torch.arange(3)
T = torch.linspace(0, 6, 13, dtype=F64)
HEAVY_BALL = PortHamiltonianSystem(1, dissipation=0.8).to(F64)


def test_heavy_ball_on_quadratics_is_the_matrix_exponential():
    flow = gradient_flow(TASK, HEAVY_BALL, T, indices=INDICES, scale=0.5, kappa=0.3, method="dopri8",
                         options={"step_t": T}, rtol=1e-11, atol=1e-12)  # fmt: skip
    (theta,) = flow.params.values()
    (start,) = TASK.init_params(INDICES, 0).values()
    batch = TASK.sample_batch(INDICES, 0, 0)
    for k in range(len(INDICES)):

        def loss(x, k=k):
            whole = start.clone()
            return TASK.loss({"theta": torch.cat((whole[:k], x[None], whole[k + 1 :]))}, batch)[k]

        H = torch.autograd.functional.hessian(loss, start[k])
        g = torch.autograd.functional.jacobian(loss, start[k])
        optimum = start[k] - torch.linalg.solve(H, g)
        n = len(g)
        A = torch.cat((torch.cat((torch.zeros(n, n), 0.3 * torch.eye(n)), 1),
                       torch.cat((-0.5 * H, -0.8 * torch.eye(n)), 1))).to(F64)  # fmt: skip
        x0 = torch.cat((start[k] - optimum, torch.zeros(n, dtype=F64)))
        expected = torch.stack([optimum + (torch.linalg.matrix_exp(A * t) @ x0)[:n] for t in T])
        torch.testing.assert_close(theta[:, k], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_loss_plus_stored_energy_never_rises_for_any_weights(seed):
    torch.manual_seed(seed)
    system = PortHamiltonianSystem(2, inverse_mass=PositiveDefinite(2, network=(8,)), potential=Potential(2),
                                   dissipation=0.3, port=lambda q: (1 + q.square()).unsqueeze(-1)).to(F64)  # fmt: skip
    flow = gradient_flow(TASK, system, T[:7], indices=INDICES, scale=0.3, kappa=0.7, rtol=1e-7, atol=1e-8)
    assert flow.solution.is_success
    W = flow.energy
    assert (W.diff(dim=0) <= 1e-5 * W[0]).all()
    assert (W[-1] < W[0]).all()
    assert (flow.energy[1:] > flow.losses[1:]).all()


def test_flow_of_a_rule_takes_its_system():
    rule = odeopt.load_pretrained("port-hamiltonian").to(F64)
    flow = gradient_flow(TASK, rule, T[:7], indices=INDICES, friction=[0.2, 1.4], gain=0.5, kappa=0.5)
    alike = PortHamiltonianSystem(2, dissipation=torch.tensor([0.2, 1.4]), port=torch.full((2, 1), 0.5)).to(F64)
    other = gradient_flow(TASK, alike, T[:7], indices=INDICES, kappa=0.5)
    torch.testing.assert_close(flow.losses, other.losses, rtol=1e-5, atol=1e-8)
    assert (flow.losses[-1] < flow.losses[0]).all()
    networks = PortHamiltonianUpdate(mass="network", potential="network").to(F64)
    assert gradient_flow(TASK, networks, T[:3], indices=INDICES).solution.is_success


@functools.cache
@torch.no_grad()
def best():
    return gradient_flow(TASK, HEAVY_BALL, T, indices=INDICES, method="dopri8", rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "options"),
    [("rk4", {"step_size": 0.05}), ("dopri5", None), ("bosh3", None), ("scipy_solver", {"solver": "LSODA"})],
)
def test_solvers_agree(method, options):
    with torch.no_grad():
        flow = gradient_flow(TASK, HEAVY_BALL, T, indices=INDICES, method=method, options=options, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flow.losses, best().losses, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("method", "options"), [("dopri5", None), ("rk4", {"step_size": 0.1})])
def test_flow_stops_when_the_gradients_are_small(method, options):
    t = [0.0, 1.0, 400.0]
    options_ = {"until_norm": 1e-2, "method": method, "options": options}
    easy = RandomQuadratic(1, dtype=F64)
    flow = gradient_flow(easy, HEAVY_BALL, t, indices=INDICES, **options_)
    assert 1.0 < flow.event_time < 400.0
    assert flow.t[-1].item() == pytest.approx(flow.event_time)
    assert flow.gradient_norms[-1].max() == pytest.approx(1e-2, rel=0.05)
    assert (flow.gradient_norms[:-1].max(1).values > 1e-2).all()
    never = gradient_flow(easy, HEAVY_BALL, [0.0, 0.5, 1.0], indices=INDICES, **options_)
    assert never.event_time is None
    assert never.t.tolist() == [0.0, 0.5, 1.0]
    at_once = gradient_flow(easy, HEAVY_BALL, t, indices=INDICES, until_norm=1e9)
    assert at_once.event_time == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("method", ["bosh3", "midpoint"])
def test_flow_in_single_precision_does_not_depend_on_where_the_clock_starts(method):
    options = {"step_size": 0.125} if method == "midpoint" else None
    how = {"indices": INDICES, "method": method, "options": options, "rtol": 1e-5, "atol": 1e-6, "until_norm": 2.0}
    flows = []
    for start in (0.0, 1e9):
        t = start + torch.tensor([0.0, 0.25, 0.5, 2.5, 40.0], dtype=F64)
        flows.append(gradient_flow(RandomQuadratic(3), PortHamiltonianSystem(1, dissipation=1.0), t, **how))
        assert flows[-1].t.dtype == F64
    assert flows[1].event_time - 1e9 == pytest.approx(flows[0].event_time, abs=1e-4)
    torch.testing.assert_close(flows[1].t - 1e9, flows[0].t, rtol=0, atol=1e-4)
    torch.testing.assert_close(flows[1].losses, flows[0].losses, rtol=1e-3, atol=1e-4)


def test_networks_flow_too():
    task = MLPClassification("digits", (6,), activation="tanh", batch_size=64)
    flow = gradient_flow(task, PortHamiltonianSystem(1, dissipation=1.0), [0.0, 5.0, 20.0], indices=torch.arange(2),
                         rtol=1e-4, atol=1e-5)  # fmt: skip
    assert flow.losses.shape == (3, 2)
    assert {name: value.shape[:2] for name, value in flow.params.items()}.keys() == task.param_shapes.keys()
    assert (flow.losses[-1] < 0.9 * flow.losses[0]).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scale": 0.0}, "`scale` should be a positive number. Found `scale = 0.0`"),
        ({"t": [1.0, 0.0]}, r"`t` should be rising. Found `t = \[1.0, 0.0\]`"),
        ({"t": [0.0]}, "`t.shape` should be that of one dimension with at least two times"),
        ({"kappa": math.inf}, "`kappa` should be a positive number. Found `kappa = inf`"),
        ({"until_norm": -1.0}, "`until_norm` should be a positive number or None. Found `until_norm = -1.0`"),
        ({"rule": odeopt.AdamUpdate(0.1)}, "`rule` should be a port-Hamiltonian rule or system"),
        ({"rule": PortHamiltonianSystem(2, n_inputs=2)}, "`rule` should be a system of one input"),
        ({"rule": PortHamiltonianUpdate(), "friction": [1.0] * 3}, "`friction` should be one number, or one for each"),
        ({"rule": PortHamiltonianUpdate(), "friction": -1.0}, "`friction` should be not negative"),
        ({"rule": PortHamiltonianUpdate(), "z": 1}, "`z` should be None for a rule"),
        (
            {"until_norm": 1.0, "method": "rk4"},
            "`options` should be given a `step_size` for an event",
        ),
    ],
)
def test_wrong_arguments_are_named(change, match):
    arguments = {"rule": HEAVY_BALL, "t": [0.0, 1.0], "indices": INDICES} | change
    rule, t = arguments.pop("rule"), arguments.pop("t")
    with pytest.raises(ValueError, match=match):
        gradient_flow(TASK, rule, t, **arguments)


def test_flow_and_steps_do_not_mind_inference_mode():
    rule, found = PortHamiltonianUpdate(), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            steps = odeopt.unroll(rule, TASK, indices=INDICES, n_steps=3)
            found.append([steps.losses, *steps.params.values()])
            found[-1] += [gradient_flow(TASK, HEAVY_BALL, T[:3], indices=INDICES, until_norm=1e-9).losses]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not any(x.requires_grad for x in found[1])


@pytest.mark.parametrize("options", [{"kinetic": "relativistic"}, {"kinetic": "spectral"}, {"output": "spectral"}])
def test_rules_of_other_energies_are_refused(options):
    with pytest.raises(ValueError, match="should be quadratic in all modes; a `PortHamiltonianSystem` takes"):
        gradient_flow(TASK, PortHamiltonianUpdate(**options), T, indices=INDICES)


def test_event_at_the_start_is_found_whatever_the_dtype_of_the_times():
    for t in (torch.tensor([100.0, 101.0]), [100.0, 101.0]):
        flow = gradient_flow(TASK, HEAVY_BALL, t, indices=INDICES, until_norm=1e9)
        assert flow.event_time == pytest.approx(100, abs=1e-5)
        assert len(flow.losses) == 2


def test_event_of_fixed_steps_is_at_the_norm():
    options = {"indices": INDICES, "until_norm": 0.5}
    flow = gradient_flow(TASK, HEAVY_BALL, [0.0, 40.0], method="rk4", options={"step_size": 0.1}, **options)
    assert flow.gradient_norms[-1].max() == pytest.approx(0.5, rel=2e-3)
    exact = gradient_flow(TASK, HEAVY_BALL, [0.0, 40.0], method="rk4", options={"step_size": 0.005}, **options)
    assert flow.event_time == pytest.approx(exact.event_time, abs=5e-3)
