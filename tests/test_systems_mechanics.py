"""The true systems: their energy and power, how they are observed, their circles, and the data drawn from them."""

import math

import pytest
import torch

from odeopt.ode import Status
from odeopt.physics import GivenMatrix, PhaseState, PortHamiltonianSystem
from odeopt.systems import MECHANISMS, Coordinates, PortHamiltonianModel, Trajectories, make_data, pendulum, simulate

NAMES = tuple(MECHANISMS)


def states_of(mechanism, n=16):
    """Random states, and random inputs for them."""
    state = mechanism.model.encode(mechanism.first_observations(n, seed=3))
    return state, torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", NAMES)
def test_energy_is_conserved_without_friction_and_inputs(name):
    mechanism = MECHANISMS[name](friction=0.0)
    motions = simulate(mechanism, mechanism.first_observations(8, seed=0), 20)
    H = mechanism.model.energy(motions.x)
    assert (H - H[0]).abs().max() < 1e-6 * H.abs().max()  # of rk4 at a tenth of the interval
    assert motions.x.diff(dim=0).abs().amax(0).min() > 0  # and something moves


@pytest.mark.parametrize("name", NAMES)
def test_friction_takes_energy_and_the_power_balances(name):
    mechanism = MECHANISMS[name]()
    motions = simulate(mechanism, mechanism.first_observations(8, seed=0), 20)
    H = mechanism.model.energy(motions.x)
    assert (H.diff(dim=0) <= 1e-9).all()
    assert (H[-1] < H[0] - 1e-4).all()
    state, u = states_of(mechanism)
    balance = mechanism.model.system.power_balance(PhaseState(*state.chunk(2, -1)), u)
    assert balance.dissipated.min() > 0
    assert balance.supplied.abs().min() > 0
    assert balance.residual.abs().max() < 1e-12 * balance.energy_rate.abs().max()


def accelerations(name, q, v, u):
    """Written out from Newton's and Lagrange's equations, as the environments of the paper's code have them."""
    q1, q2 = q[:, 0], q[:, -1]
    if "pendulum" in name:
        return (3 * u[:, 0] - (1 if name == "pendulum" else -1) * 15 * q1.sin() - 0.3 * v[:, 0])[:, None]
    if name == "cart-pole":
        push = u[:, 0] + 0.25 * v[:, 1] ** 2 * q2.sin()
        turn = (9.8 * q2.sin() - q2.cos() * push - 0.3 * v[:, 1]) / (0.5 * (4 / 3 - 0.5 * q2.cos() ** 2))
        return torch.stack((push - 0.25 * turn * q2.cos(), turn), -1)
    m11, m12, m22 = 3.5 + q2.cos(), 1.25 + 0.5 * q2.cos(), 1.25
    weight2 = 4.9 * (q1 + q2).sin()
    whirl = 0.5 * q2.sin() * (v[:, 1] ** 2 + 2 * v[:, 0] * v[:, 1])
    force1 = whirl - 14.7 * q1.sin() - weight2 - 0.3 * v[:, 0]
    force2 = u[:, 0] - 0.5 * q2.sin() * v[:, 0] ** 2 - weight2 - 0.3 * v[:, 1]
    determinant = m11 * m22 - m12**2
    return torch.stack((m22 * force1 - m12 * force2, m11 * force2 - m12 * force1), -1) / determinant[:, None]


@pytest.mark.parametrize("name", NAMES)
def test_accelerations_are_those_of_the_equations_of_motion(name):
    mechanism = MECHANISMS[name]()
    model = mechanism.model
    state, u = states_of(mechanism)

    def velocity(state):
        return model.system.hamiltonian.velocity(PhaseState(*state.chunk(2, -1)))

    rate = model.field(state, u)
    v, a = torch.autograd.functional.jvp(velocity, state, rate)
    q = state[:, : model.dof]
    torch.testing.assert_close(rate[:, : model.dof], v)
    torch.testing.assert_close(a, accelerations(name, q, v, u))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pendulum"])
def test_embedded_and_angle_forms_agree(name):
    mechanism = MECHANISMS[name]()
    seen = mechanism.model
    plain = PortHamiltonianModel(seen.system, seen.coordinates.kinds, observes="momentum")
    x0 = mechanism.first_observations(6, seed=1)
    t, u = torch.arange(15) * mechanism.dt, torch.randn(14, 6, 1, dtype=torch.float64)
    embedded = seen.rollout(x0, t, u).states
    states = plain.rollout(seen.encode(x0), t, u).states
    torch.testing.assert_close(embedded, seen.decode(states))
    # what is encoded and decoded again is the same, up to whole turns
    torch.testing.assert_close(seen.decode(seen.encode(embedded)), embedded)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pendulum"])
def test_states_stay_on_the_circle_over_a_thousand_steps(name):
    mechanism = MECHANISMS[name]()
    x0 = mechanism.first_observations(4, seed=2)
    solution = mechanism.model.rollout(x0, mechanism.dt * torch.arange(1001), torch.ones(4, 1))
    assert solution.is_success
    assert solution.n_field_evals == 4 * solution.n_steps == 4000
    assert mechanism.model.drift(solution.states) < 1e-6  # the requirement; it is rounding
    off = solution.states.clone()
    off[..., mechanism.model.coordinates.n_lines] += 0.1
    assert mechanism.model.drift(off) > 1e-3


def test_coordinates_see_angles_as_points_of_circles():
    coordinates = Coordinates("SRS")
    q = torch.tensor([[0.3, 7.0, -2.0], [-3.0, 0.1, 3.0]])
    features = coordinates(q)
    assert coordinates.n_features == features.shape[-1] == 5
    torch.testing.assert_close(features[:, 0], q[:, 1])
    torch.testing.assert_close(features[:, 1:3], q[:, [0, 2]].cos())
    torch.testing.assert_close(coordinates.positions(features), q)
    torch.testing.assert_close(coordinates(q + torch.tensor([2 * math.pi, 0, -2 * math.pi])), features)
    assert coordinates.drift(features) < 1e-6
    assert coordinates.drift(1.1 * features) == pytest.approx(0.21, abs=1e-6)
    assert Coordinates("RR").drift(q) == 0.0


@pytest.mark.parametrize("kinds", ["", "RX", "r", 2, None])
def test_coordinates_refuse_other_letters(kinds):
    with pytest.raises(ValueError, match=r"`coordinates` should be a letter R or S for each .* Found `coordinates = "):
        Coordinates(kinds)


def test_data_are_those_of_the_seed():
    mechanism = pendulum()
    one, same, other = (make_data(mechanism, n=8, n_times=6, noise=0.01, seed=seed) for seed in (0, 0, 1))
    for a, b in zip(one[:3], same[:3], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(one.train.x, other.train.x)
    assert one.train.x.shape == one.test.x.shape == (6, 5 * 4, 2)
    assert one.prediction.x.shape == (12, 4, 2)
    assert one.prediction.u.abs().max() == 0
    assert sorted(one.train.u.unique().tolist()) == [-2, -1, 0, 1, 2]
    # each first observation under each input, and none of training's among those of testing
    assert torch.equal(one.test.x[0, :4], one.test.x[0, 4:8])
    assert not torch.isclose(one.train.x[0, :4, None], one.test.x[0, None, :4]).all(-1).any()


def test_noise_has_the_level_asked_for():
    mechanism = MECHANISMS["cart-pole"]()
    clean, noisy = (make_data(mechanism, n=256, n_times=5, noise=noise) for noise in (0.0, 0.01))
    assert torch.equal(clean.test.x, noisy.test.x)
    added = (noisy.train.x - clean.train.x).flatten(0, 1)
    deviation = clean.train.x.flatten(0, 1).std(0)
    torch.testing.assert_close(noisy.noise, 0.01 * deviation)
    assert ((added.std(0) / deviation / 0.01 - 1).abs() < 0.1).all()  # of 3,200 draws: 1 / sqrt(6400) = .013


def test_sampled_inputs_change_with_each_step_and_move_the_system():
    mechanism = pendulum()
    data = make_data(mechanism, n=16, inputs="sampled")
    assert data.train.u.shape == (19, 40, 1)
    assert data.train.u.diff(dim=0).abs().min() > 0
    assert data.train.u.std().item() == pytest.approx(2**0.5, rel=0.1)
    # step by step is all at once
    step = mechanism.model.rollout(data.train.x[5], data.train.t[:2], data.train.u[5], n_substeps=10)
    torch.testing.assert_close(step.states[1], data.train.x[6])


def test_windows_are_the_pieces_of_the_motions():
    t = 0.1 * torch.arange(6)
    x, u = torch.arange(24.0).reshape(6, 2, 2), torch.arange(10.0).reshape(5, 2, 1)
    pieces = Trajectories(t, x, u).windows(4)
    assert pieces.x.shape == (4, 6, 2)
    assert pieces.u.shape == (3, 6, 1)
    assert torch.equal(pieces.x[:, 3], x[1:5, 1])
    assert torch.equal(pieces.u[:, 3], u[1:4, 1])
    with pytest.raises(ValueError, match=r"`n_points` should be between 2 and the 6 .*Found `n_points = 7`"):
        Trajectories(t, x, u).windows(7)
    with pytest.raises(ValueError, match=r"`t` should be evenly spaced"):
        Trajectories(t**2, x, u).windows(4)


def test_windows_start_their_own_clock():
    x, u = torch.zeros(400, 1, 2), torch.zeros(399, 1, 1)
    t = 0.01 * torch.arange(400, dtype=torch.float64)
    for times, step in ((t, 0.01), (t - 4e8, 0.01), (0.01 * t + 1.6e9, 1e-4), ((100 + t).float(), 0.01)):
        pieces = Trajectories(times, x, u).windows(3)
        # a mean over 400 steps, of which the ends are rounded to .2 % of a step at worst
        torch.testing.assert_close(pieces.t, step * torch.arange(3, dtype=torch.float64), rtol=1e-5, atol=0)
    with pytest.raises(
        ValueError, match=r"evenly spaced .* torch.float32 may not be. Found steps of 0.01 at times up to 10\d\d\d\.$"
    ):
        Trajectories((1e4 + t).float(), x, u).windows(3)
    uneven = t - 4e8
    uneven[7] += 1e-4
    with pytest.raises(ValueError, match=r"Found steps of 0.01 and, from `t\[6\]` to `t\[7\]`, of 0.0101") as error:
        Trajectories(uneven, x, u).windows(3)
    assert len(str(error.value)) < 250
    late = t.clone()
    late[300:] += 1.0  # which changes the mean step
    with pytest.raises(ValueError, match=r"Found steps of 0.01 and, from `t\[299\]` to `t\[300\]`, of 1.01"):
        Trajectories(late, x, u).windows(3)


def test_motions_that_nothing_drives_need_no_inputs():
    mechanism = pendulum()
    data = simulate(mechanism, mechanism.first_observations(4, seed=0), 6)
    alone = Trajectories(data.t, data.x)
    assert alone.windows(4).u is None
    for name, value in alone.checked(mechanism.model)._asdict().items():
        assert torch.equal(value, getattr(data, name))


@pytest.mark.parametrize("n_points", [2.0, True, "3", None])
def test_windows_have_a_whole_number_of_points(n_points):
    with pytest.raises(ValueError, match=r"`n_points` should be between 2 and the 4 .*, an integer. Found `n_po"):
        Trajectories(torch.arange(4.0), torch.zeros(4, 1, 2), torch.zeros(3, 1, 1)).windows(n_points)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rollout_does_not_depend_on_the_clock(dtype):
    model = PortHamiltonianModel(MECHANISMS["acrobot"]().model.system.to(dtype), "SS", observes="momentum")
    x0, u = torch.randn(3, 4, dtype=dtype), torch.randn(20, 3, 1, dtype=dtype)
    t = torch.arange(21, dtype=torch.float64) / 32  # exact wherever the clock starts
    here, there = (model.rollout(x0, t + start, u) for start in (0, -1.9e9))
    assert torch.equal(here.states, there.states)
    assert here.states.dtype == dtype
    assert torch.equal(there.t, t - 1.9e9)


def test_differences_of_angles_take_the_shortest_way_round():
    q = torch.tensor([[3.0, 7.0, -3.1], [-3.1, 9.0, 40.0]], dtype=torch.float64, requires_grad=True)
    shortest = Coordinates("SRS").shortest(q.diff(dim=0))
    wanted = [[2 * math.pi - 6.1, 2.0, 43.1 - 14 * math.pi]]
    torch.testing.assert_close(shortest, torch.tensor(wanted, dtype=torch.float64))
    (slopes,) = torch.autograd.grad(shortest.sum(), q)
    assert torch.equal(slopes, torch.tensor([[-1.0] * 3, [1.0] * 3], dtype=torch.float64))
    assert torch.equal(Coordinates("RRR").shortest(q), q)
    assert torch.equal(Coordinates("SSS").shortest(q / 100), q / 100)  # to the bit where there is no turn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 3}, r"`n` should be an even number.*Found `n = 3`"),
        ({"n_times": 1}, r"`n_times` should be at least 2. Found `n_times = 1`"),
        ({"n_times": True}, r"`n_times` should be at least 2. Found `n_times = True`"),
        ({"seed": 2.5}, r"`seed` should be an integer of at least -2\^63 and below 2\^63. Found `seed = 2.5`"),
        ({"seed": -(10**20)}, r"`seed` should be .*Found `seed = -100000000000000000000`"),
        ({"noise": -0.1}, r"`noise` should be a finite number of at least 0. Found `noise = -0.1`"),
        ({"inputs": []}, r"`inputs` should be a list of finite numbers.*Found `inputs = \[\]`"),
        ({"inputs": [math.nan]}, r"`inputs` should be a list of finite numbers"),
        ({"inputs": 1.0}, r"`inputs` should be a list of finite numbers.*Found `inputs = 1.0`"),
        ({"inputs": torch.ones(2)}, r"`inputs` should be a list of finite numbers.*Found `inputs = tensor"),
        ({"inputs": torch.ones(2).numpy()}, r"`inputs` should be a list of finite numbers.*Found `inputs = array"),
        ({"inputs": "random"}, r"`inputs` should be .* or 'sampled'. Found `inputs = 'random'`"),
    ],
)
def test_data_refuse_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_data(pendulum(), **options)


@pytest.mark.parametrize("friction", [-0.1, math.inf, "much"])
def test_friction_is_a_number_that_brakes(friction):
    for name in NAMES:
        with pytest.raises(ValueError, match=r"`friction` should be a finite number of at least 0. Found `friction = "):
            MECHANISMS[name](friction=friction)


X0, T = torch.zeros(3, 2, dtype=torch.float64), torch.arange(5.0)


@pytest.mark.parametrize(
    ("x0", "t", "u", "message"),
    [
        (X0[:, :1], T, None, r"`x0.shape` should be \(\*batch, 2\), as .*Found `x0.shape = \(3, 1\)`"),
        (X0 + math.nan, T, None, r"`x0` should be finite. Found `nan` in a tensor of shape \(3, 2\)"),
        (X0, T.flip(0), None, r"`t` should be increasing. Found `t = \[4.0, 3.0"),
        (X0, [0.0, 1.0, 1.0], None, r"Found `t\[1\] = 1` before `t\[2\] = 1`"),
        (X0, [0.0, math.nan], None, r"`t` should be finite and strictly increasing"),
        (X0, ["0", "1"], None, r"`t` should be a tensor or a sequence of numbers. Found `t = \['0', '1'\]`"),
        (X0, T + 0j, None, r"`t.dtype` should be floating point. Found `t.dtype = torch.complex"),
        (X0, T.clone().requires_grad_(), None, r"`t.requires_grad` should be False, .*Found `t.requires_grad = True`"),
        (X0, (T / 20 + 1e9).float(), None, r"`t` should be finite and strictly increasing.*before .* in torch.float32"),
        (X0.long(), T, None, r"`x0.dtype` should be floating point. Found `x0.dtype = torch.int64`"),
        (X0, T, torch.ones(3, 1) + 0j, r"`u.dtype` should be real. Found `u.dtype = torch.complex64`"),
        (X0, [0.0], None, r"`t.shape` should be that of one dimension with at least two times"),
        (X0, T, torch.ones(5, 3, 1), r"`u.shape` should be \(3, 1\), held, or \(4, 3, 1\).*Found `u.shape = \(5,"),
        (X0, T, torch.ones(3, 2), r"Found `u.shape = \(3, 2\)`"),
        (X0, T, torch.full((3, 1), math.inf), r"`u` should be finite. Found `inf` in a tensor of shape \(3, 1\)"),
    ],
)  # fmt: skip
def test_rollouts_refuse_what_does_not_fit(x0, t, u, message):
    with pytest.raises(ValueError, match=message):
        pendulum().model.rollout(x0, t, u)


@pytest.mark.parametrize("n_substeps", [0, 1.0, True])
def test_rollouts_take_a_whole_number_of_steps(n_substeps):
    with pytest.raises(ValueError, match=r"`n_substeps` should be a positive integer. Found `n_substeps = "):
        pendulum().model.rollout(X0, T, n_substeps=n_substeps)


def test_a_singular_mass_is_named():
    def inverse_mass(q):
        flat = torch.ones(*q.shape, 2, dtype=q.dtype)
        return torch.where((q[..., :1, None] > 0), flat + torch.eye(2), flat)

    system = PortHamiltonianSystem(2, inverse_mass=GivenMatrix(inverse_mass), potential=lambda q: q.square().sum(-1))
    model = PortHamiltonianModel(system, "RR", observes="velocity")
    model.rollout(torch.ones(3, 4), T)
    with pytest.raises(ValueError, match=r"`inverse_mass` should be invertible. Found `inverse_mass = \[\[1.0, 1.0\]"):
        model.rollout(torch.tensor([[1.0, 1, 1, 1], [-1, 1, 1, 1]]), T)


def test_a_motion_that_leaves_all_bounds_is_a_status():
    system = PortHamiltonianSystem(1, potential=lambda q: -q[..., 0].pow(4))
    model = PortHamiltonianModel(system, "R", observes="momentum")
    solution = model.rollout(torch.tensor([[0.1, 0.0], [3.0, 1.0]]), torch.arange(30.0))
    assert solution.status is Status.NON_FINITE_STATE
    assert "Non-finite state at t = " in solution.message
    assert not solution.is_success
