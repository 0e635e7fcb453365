"""Models that learn from motions: that they do, what they are by construction, and how they are judged."""

import functools
import math
import re

import pytest
import torch
from portraits import portray
from torch import nn

from odeopt import systems
from odeopt.ode import Status
from odeopt.physics import GivenMatrix, PhaseState, PortHamiltonianSystem, PositiveDefinite, RelativisticEnergy
from odeopt.systems import (
    MODELS,
    FitConfig,
    Mechanism,
    Parts,
    PortHamiltonianModel,
    Trajectories,
    energy_rises,
    fit,
    fit_kept,
    fix_gauge,
    make_model,
    part_errors,
    parts_at,
    simulate,
    trajectory_errors,
)

# true systems do not change, and their motions are simulated once
MECHANISMS = {name: functools.cache(make) for name, make in systems.MECHANISMS.items()}
pendulum, embedded_pendulum, cart_pole, acrobot = MECHANISMS.values()
make_data = functools.cache(systems.make_data)
NAMES, KINDS = tuple(MECHANISMS), tuple(MODELS)
LEARNED = [(name, kind) for name in NAMES for kind in KINDS]


def model_of(kind, mechanism, **options):
    return make_model(kind, mechanism.model.coordinates.kinds, observes=mechanism.model.observes, **options)


def positions(mechanism, n=50):
    return mechanism.model.encode(mechanism.first_observations(n, seed=5))[:, : mechanism.model.dof]


def scaled(mechanism, scale, offset=0.0):
    """The same motions from other parts."""
    model = mechanism.model
    system = PortHamiltonianSystem(
        model.dof,
        inverse_mass=GivenMatrix(lambda q: model.inverse_mass(q) / scale),
        potential=lambda q: scale * (model.potential(q) + offset),
        dissipation=GivenMatrix(lambda q: scale * model.dissipation(q)),
        port=GivenMatrix(lambda q: scale * model.port(q)),
    )
    return PortHamiltonianModel(system, model.coordinates.kinds, observes=model.observes)


@pytest.mark.parametrize(("name", "kind"), LEARNED)
def test_fitting_reduces_the_error(name, kind):
    mechanism = MECHANISMS[name]()
    data, model = make_data(mechanism, n=4, n_times=6), model_of(kind, mechanism)
    before = trajectory_errors(model, data.train)
    result = fit(model, data.train, FitConfig(n_passes=8, n_batches=2, lr=1e-2))
    assert result.status == "success"
    assert len(result.losses) == 8
    assert result.losses[-1] < 0.9 * result.losses[0]
    assert trajectory_errors(model, data.train).mean < before.mean


def test_kinetic_energies_other_than_that_of_a_mass_are_not_observed():
    system = PortHamiltonianSystem(1, kinetic=RelativisticEnergy())
    with pytest.raises(ValueError, match=r"`system.hamiltonian.kinetic` should be None: momenta of observed"):
        PortHamiltonianModel(system, "R", observes="velocity")


@pytest.mark.parametrize(("name", "kind"), LEARNED)
def test_models_are_small_and_those_of_their_seed(name, kind):
    mechanism = MECHANISMS[name]()
    torch.manual_seed(7)
    following = torch.rand(1)
    torch.manual_seed(7)
    one, same, other = (model_of(kind, mechanism, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), following)  # the caller's random numbers are left alone
    assert one.n_parameters() == sum(p.numel() for p in one.parameters()) <= 20_000
    x = mechanism.first_observations(3, seed=0).float()
    t = mechanism.dt * torch.arange(4)
    rolled = [model.rollout(x, t, torch.ones(3, 1)).states for model in (one, same, other)]
    assert torch.equal(rolled[0], rolled[1])
    assert not torch.equal(rolled[0], rolled[2])
    # what is seen first is what was given
    torch.testing.assert_close(rolled[0][0], x)


def test_parameter_counts_are_those_of_the_networks():
    mechanism = pendulum()
    deep, small = 2 * 40 + 41 * 40 + 41, 2 * 16 + 17
    assert model_of("port-Hamiltonian", mechanism).n_parameters() == 2 * deep + 2 * small
    assert model_of("without dissipation", mechanism).n_parameters() == 2 * deep + small
    assert model_of("port-Hamiltonian", mechanism, small_widths=()).n_parameters() == 2 * deep + 2 * 2
    assert model_of("naive", mechanism).n_parameters() == 4 * 64 + 65 * 64 + 65 * 2


@pytest.mark.parametrize("name", NAMES)
def test_the_learned_system_is_passive_for_any_weights(name):
    mechanism = MECHANISMS[name]()
    model = model_of("port-Hamiltonian", mechanism).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 1, generator=generator)
    x = torch.randn(2, 40, model.dof, dtype=torch.float64, generator=generator)
    balance = model.system.power_balance(PhaseState(*x), torch.ones(40, 1, dtype=torch.float64))
    assert balance.dissipated.min() >= 0
    assert balance.dissipated.max() > 0
    # relative to the terms that cancel
    size = balance.dissipated + balance.supplied.abs() + balance.energy_rate.abs() + 1
    assert ((balance.energy_rate - balance.supplied) / size).max() < 1e-9
    assert model_of("without dissipation", mechanism).dissipation(x[0].float()).abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_angles_stay_on_the_circle_but_for_the_naive(kind):
    mechanism = cart_pole()
    model = model_of(kind, mechanism, widths=(8,)).double()
    x0 = mechanism.first_observations(4, seed=0)
    with torch.no_grad():
        solution = model.rollout(x0, mechanism.dt * torch.arange(101 if kind != "naive" else 40))
    assert solution.is_success
    drift = model.drift(solution.states)
    assert drift > 1e-3 if kind == "naive" else drift < 1e-6


@pytest.mark.parametrize("kind", ["port-Hamiltonian", "unstructured"])
def test_gradients_of_windows_are_those_of_differences(kind):
    mechanism = cart_pole()
    model = model_of(kind, mechanism, widths=(4,), small_widths=(3,)).double()
    pieces = make_data(mechanism, n=2, n_times=4).train.windows(4)
    steps = pieces.t.diff().tolist()

    def loss():
        return (model.roll(model.encode(pieces.x[0]), steps, pieces.u) - pieces.x).square().sum()

    weights = list(model.parameters())
    # the zero of a Hamiltonian changes nothing
    gradients = torch.autograd.grad(loss(), weights, materialize_grads=True, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        at = gradient.abs().argmax()
        values = []
        for change in (1e-5, -2e-5):
            with torch.no_grad():
                weight.view(-1)[at] += change
            values.append(loss().item())
        with torch.no_grad():
            weight.view(-1)[at] += 1e-5
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(gradient.view(-1)[at].item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_gauge_is_what_motions_leave_free_and_is_recovered(name):
    mechanism = MECHANISMS[name]()
    truth, q = mechanism.model, positions(mechanism)
    is_free = truth.observes == "velocity"
    scale, offset = (2.5 if is_free else 1.0), 0.7
    other = scaled(mechanism, scale, offset)
    data = make_data(mechanism, n=8, n_times=5)
    assert trajectory_errors(other, data.test, n_substeps=10).mean < 1e-12  # it moves in the same way
    gauge = fix_gauge(other, truth, q)
    assert gauge.scale == pytest.approx(scale)
    assert gauge.offset == pytest.approx(offset)
    for found, wanted in zip(parts_at(other, q, gauge), parts_at(truth, q), strict=True):
        torch.testing.assert_close(found, wanted)
    assert max(part_errors(other, truth, q).values()) < 1e-9


def test_a_conserved_momentum_leaves_more_free():
    mechanism = cart_pole()
    truth, c = mechanism.model, 0.4

    def row(q):
        return torch.linalg.inv(truth.inverse_mass(q))[..., :1]

    def inverse_mass(q):
        return torch.linalg.inv(torch.linalg.inv(truth.inverse_mass(q)) + c * row(q) @ row(q).mT)

    other = PortHamiltonianSystem(
        2,
        inverse_mass=GivenMatrix(inverse_mass),
        potential=truth.potential,
        dissipation=GivenMatrix(truth.dissipation),
        port=GivenMatrix(lambda q: truth.port(q) + c * row(q)),
    )
    model = PortHamiltonianModel(other, "RS", observes="velocity")
    data = make_data(mechanism, n=8, n_times=8)
    assert trajectory_errors(model, data.test, n_substeps=10).mean < 1e-12
    assert part_errors(model, truth, positions(mechanism))["g"] > 0.1


def test_a_portrait_has_the_truth_and_the_energy_of_predictions():
    mechanism = embedded_pendulum()
    models = {kind: model_of(kind, mechanism) for kind in ("port-Hamiltonian", "naive")}
    x0, q = mechanism.first_observations(1, seed=0)[0], positions(mechanism)
    portrait = portray(mechanism, models, x0, q, n_times=30)
    assert list(portrait.paths) == list(portrait.energies) == ["truth", *models]
    assert list(portrait.parts) == ["truth", "port-Hamiltonian"]
    path = portrait.paths["truth"]
    assert path.shape == (30, 2)
    assert path[:, 0].diff().abs().max() < math.pi  # unwound
    torch.testing.assert_close(path[:, 0].cos(), simulate(mechanism, x0[None], 30).x[:, 0, 0])
    assert (portrait.energies["truth"].diff() < 0).all()
    assert portrait.energies["naive"][0] == pytest.approx(portrait.energies["truth"][0].item(), rel=1e-6)
    with pytest.raises(ValueError, match=r"`models` should be named otherwise than 'truth'"):
        portray(mechanism, {"truth": models["naive"]}, x0, q)


def test_part_errors_are_relative_and_the_gauge_does_not_hide_them():
    mechanism = embedded_pendulum()
    truth, q = mechanism.model, positions(mechanism)
    wrong = PortHamiltonianSystem(
        1,
        inverse_mass=1.5,
        potential=lambda q: 2 * truth.potential(q),
        dissipation=GivenMatrix(lambda q: 2.2 * truth.dissipation(q)),
        port=GivenMatrix(lambda q: 1.8 * truth.port(q)),
    )
    model = PortHamiltonianModel(wrong, "S", observes="velocity")
    errors = part_errors(model, truth, q)
    assert errors == pytest.approx({"V": 0.0, "inverse_mass": 0.0, "D": 0.1, "g": 0.1}, abs=1e-9)
    with pytest.raises(
        ValueError, match=r"`model` should be one that observes the momentum. Found `model = 'velocity'"
    ):
        fix_gauge(model, pendulum().model, q)
    parts = parts_at(embedded_pendulum(friction=0.0).model, q)
    assert isinstance(parts, Parts)
    assert parts.D.abs().max() == 0
    assert math.isnan(part_errors(model, embedded_pendulum(friction=0.0).model, q)["D"])


def test_the_parts_of_an_embedded_pendulum_are_found():
    mechanism = embedded_pendulum()
    data, model = make_data(mechanism, n=16), model_of("port-Hamiltonian", mechanism)
    fit(model, data.train, FitConfig(n_passes=30, n_batches=2, lr=2e-2))
    errors = part_errors(model, mechanism.model, positions(mechanism))
    # .05, .08 and .02 when this was written, after an eightieth of the example's training on an eighth of its data
    assert errors["V"] < 0.2
    assert errors["g"] < 0.2
    assert errors["inverse_mass"] < 0.2
    assert trajectory_errors(model, data.prediction).mean < 50.0  # 517 before


def test_errors_are_sums_of_squares_over_each_motion():
    mechanism = pendulum()
    data = make_data(mechanism, n=4).test
    off = Trajectories(data.t, data.x.clone(), data.u)
    off.x[1:, 0] += 0.1
    assert trajectory_errors(mechanism.model, data, n_substeps=10).mean < 1e-20
    errors = trajectory_errors(mechanism.model, off, n_substeps=10)
    n = data.x.shape[1]
    assert errors.mean == pytest.approx(19 * 2 * 0.01 / n)
    assert errors.deviation == pytest.approx(errors.mean * (n - 1) ** 0.5)
    assert str(errors) == "0.038 ± 0.11"


def test_predictions_that_diverge_are_counted():
    system = PortHamiltonianSystem(1, potential=lambda q: -q[..., 0].pow(4))
    model = PortHamiltonianModel(system, "R", observes="momentum")
    data = make_data(pendulum(), n=4, n_times=12).train
    errors = trajectory_errors(model, data)
    assert errors.n_diverged > 0
    assert errors.mean == math.inf
    assert str(errors) == f"diverged ({errors.n_diverged})"


def test_sampled_inputs_can_be_learned_from():
    mechanism = embedded_pendulum()
    data, model = make_data(mechanism, n=16, inputs="sampled"), model_of("port-Hamiltonian", mechanism)
    result = fit(model, data.train, FitConfig(n_passes=30, n_batches=2, lr=2e-2))
    assert result.losses[-1] < 0.05 * result.losses[0]
    assert part_errors(model, mechanism.model, positions(mechanism))["g"] < 0.2


# -------------------- clocks and angles


@pytest.mark.parametrize(("dt", "start"), [(0.05, -3e8), (1e-3, 1.6e9)])
def test_motions_are_the_same_whenever_their_clock_starts(dt, start):
    mechanism = cart_pole()._replace(dt=dt)
    data = make_data(mechanism, n=4, n_times=6, inputs="sampled").train
    later = data._replace(t=data.t + start)
    assert not torch.equal(later.t.diff(), data.t.diff())  # rounded, to 1e-6 and 1e-4 of a step
    found = []
    for each in (data, later):
        model = model_of("port-Hamiltonian", mechanism, widths=(8,))
        losses = fit(model, each, FitConfig(n_passes=3, n_batches=1)).losses
        rises = energy_rises(model, each, factor=1 / 4)
        found.append([*losses, trajectory_errors(model, each).mean, rises.largest])
        assert rises.status is Status.SUCCESS
    assert found[1] == pytest.approx(found[0], rel=2e-3)


def observed_in_momentum(mechanism):
    """The same system, observed in the momentum and in angles as they are."""
    model = mechanism.model
    seen = PortHamiltonianModel(model.system, model.coordinates.kinds, observes="momentum")
    return mechanism._replace(model=seen)


def wrapped(x, kinds):
    """Angles brought to (-pi, pi]."""
    x = x.clone()
    for i, kind in enumerate(kinds):
        if kind == "S":
            x[..., i] = torch.atan2(x[..., i].sin(), x[..., i].cos())
    return x


@functools.cache
def turning(make):
    """A system, its motions, and the same with wrapped angles: some turn through pi within the motion."""
    mechanism = observed_in_momentum(make())
    data = make_data(mechanism, n=8, n_times=20, inputs=(0.0,)).train
    jumping = data._replace(x=wrapped(data.x, mechanism.model.coordinates.kinds))
    assert (jumping.x.diff(dim=0).abs() > 5).any()
    return mechanism, data, jumping


@pytest.mark.parametrize("make", [acrobot, cart_pole])
def test_the_truth_moves_alike_whether_angles_are_wrapped(make):
    mechanism, _, jumping = turning(make)
    assert trajectory_errors(mechanism.model, jumping, n_substeps=10).mean < 1e-20


@pytest.mark.parametrize("make", [acrobot, cart_pole])
@pytest.mark.parametrize("kind", ["port-Hamiltonian", "unstructured", "geometric"])
def test_motions_are_the_same_whether_angles_are_wrapped(make, kind):
    mechanism, *both = turning(make)
    found = []
    for each in both:
        model = model_of(kind, mechanism, widths=(8,))
        losses = fit(model, each, FitConfig(n_passes=2, n_batches=1)).losses
        found.append([*losses, trajectory_errors(model, each).mean])
    assert found[1] == pytest.approx(found[0], rel=1e-4)  # rounding of 2 pi in float32


def test_whole_turns_count_on_lines_only():
    mechanism = observed_in_momentum(cart_pole())
    data = make_data(mechanism, n=2, n_times=5).test
    for i, wanted in ((0, 4 * (2 * math.pi) ** 2), (1, 0.0)):
        off = data._replace(x=data.x.clone())
        off.x[1:, :, i] += 2 * math.pi
        errors = trajectory_errors(mechanism.model, off, n_substeps=10)
        assert errors.mean == pytest.approx(wanted, abs=1e-12)


def test_a_portrait_unwinds_angles_only():
    system = PortHamiltonianSystem(2, inverse_mass=torch.ones(2).double(), potential=lambda q: q[..., 0] * 0)
    v = 90.0  # 4.5 between two observations, more than half a turn
    for kinds, wanted in (("SR", 4.5), ("RS", 4.5 - 2 * math.pi)):
        model = PortHamiltonianModel(system, kinds, observes="velocity")
        mechanism = Mechanism("free", model, 0.05, (0.0,) * 4, (1.0,) * 4)
        x0 = torch.cat((model.coordinates(torch.zeros(2).double()), torch.tensor([0.0, v], dtype=torch.float64)))
        path = portray(mechanism, {}, x0, torch.zeros(1, 2).double(), n_times=8).paths["truth"]
        torch.testing.assert_close(path[:, 0], wanted * torch.arange(8).double())


# -------------------- what may be passed


def small_fit():
    mechanism = embedded_pendulum()
    return model_of("port-Hamiltonian", mechanism, widths=(4,)), make_data(mechanism, n=4, n_times=5).train


@pytest.mark.parametrize("n_batches", [1, 4, 5, 8])
def test_a_pass_has_as_many_steps_as_batches_asked_for(monkeypatch, n_batches):
    steps, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: steps.append(self) or step(self))
    data = make_data(pendulum(), n=2, n_times=11, inputs=(0.0,)).train  # eight windows of four observations
    fit(model_of("naive", pendulum()), data, FitConfig(n_passes=2, n_batches=n_batches))
    assert len(steps) == 2 * n_batches


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fitting_does_not_mind_that_gradients_are_off(mode):
    config, found = FitConfig(n_passes=3, n_batches=2), []
    for context in (torch.enable_grad, mode):
        model, _ = small_fit()
        with context():  # not the data that are kept for other tests, which no inference mode has made
            data = systems.make_data(systems.embedded_pendulum(), n=4, n_times=5).train
            assert data.x.is_inference() == (context is torch.inference_mode)
            found.append(fit(model, data, config).losses)
            assert torch.is_grad_enabled() == (context is torch.enable_grad)
    assert found[0] == found[1]
    assert found[0][-1] < found[0][0]


@pytest.mark.parametrize("progress_bar", [True, False])
def test_fitting_shows_its_progress(progress_bar, capsys):
    model, data = small_fit()
    fit(model, data, FitConfig(n_passes=3, n_batches=2), progress_bar=progress_bar)
    assert ("3/3" in capsys.readouterr().err) == progress_bar


@pytest.mark.parametrize(
    ("coordinates", "observes", "observation"),
    [
        ("S", "velocity", "(cos q, sin q, dq/dt)"),
        ("S", "momentum", "(q, p)"),
        ("SR", "velocity", "(q2, cos q1, sin q1, dq1/dt, dq2/dt)"),
        ("RS", "momentum", "(q1, q2, p1, p2)"),
    ],
)
def test_errors_name_the_numbers_of_an_observation(coordinates, observes, observation):
    model = make_model("geometric", coordinates, observes=observes)
    assert observation.count(",") + 1 == model.n_observed
    message = rf"an observation of this model is {re.escape(observation)}\. Found `x.shape = \(6, 2, 7\)`"
    with pytest.raises(ValueError, match=message):
        fit(model, Trajectories(torch.arange(6.0), torch.zeros(6, 2, 7)), FitConfig(n_passes=1))


@pytest.mark.parametrize("kind", MODELS)
def test_models_have_an_input(kind):
    with pytest.raises(ValueError, match=r"`n_inputs` should be a positive integer.* Found `n_inputs = 0`"):
        make_model(kind, "S", observes="velocity", n_inputs=0)


def test_motions_keep_no_gradient_of_a_fit():
    model, data = small_fit()
    data = data._replace(x=data.x.float().requires_grad_(), u=data.u.float().requires_grad_())
    assert len(fit(model, data, FitConfig(n_passes=2, n_batches=2)).losses) == 2
    assert data.x.grad is data.u.grad is None


def test_weights_that_cannot_be_trained_are_refused():
    _, data = small_fit()
    with torch.inference_mode():
        model, _ = small_fit()
    with pytest.raises(ValueError, match=r"`model` should be made outside of `torch.inference_mode\(\)`. Found `model"):
        fit(model, data, FitConfig(n_passes=1, n_batches=1))


@pytest.mark.parametrize("part", ["weights", "a constant"])
def test_a_model_of_mixed_dtypes_is_refused(part):
    model, data = small_fit()
    if part == "weights":
        model.system.dissipation.bfloat16()
    else:
        model.system.dissipation = GivenMatrix(torch.ones(1, 1, dtype=torch.bfloat16))
    message = r"`model` should be of one dtype.*Found `model = \['torch.bfloat16 on cpu', 'torch.float32 on cpu'\]`"
    with pytest.raises(ValueError, match=message):
        fit(model, data, FitConfig(n_passes=1, n_batches=1))
    with pytest.raises(ValueError, match=message):
        trajectory_errors(model, data)
    with pytest.raises(ValueError, match=r"`x0.dtype` should be that of .*, torch.float32. Found `x0.dtype = "):
        small_fit()[0].rollout(data.x[0], data.t)


def test_what_is_of_another_class_is_refused():
    model, data = small_fit()
    config, halves = FitConfig(n_passes=1, n_batches=1), make_data(embedded_pendulum(), n=2, n_times=2)
    for judge in (trajectory_errors, energy_rises, lambda *both: fit(*both, config)):
        for name in ("x", "u"):
            arrays = data._replace(**{name: getattr(data, name).numpy()})
            with pytest.raises(TypeError, match=rf"`{name}` should be of class Tensor. Found one of class numpy"):
                judge(model, arrays)
        with pytest.raises(TypeError, match=r"`data` should be of class Trajectories. Found one of class .*\.Data\."):
            judge(model, halves)
        with pytest.raises(TypeError, match=r"`model` should be of class .*Found one of class torch.nn.*Linear"):
            judge(torch.nn.Linear(2, 2), data)
    with pytest.raises(TypeError, match=r"`config` should be of class FitConfig. Found one of class dict"):
        fit(model, data, {"n_passes": 1})
    assert fit(model, data._replace(t=data.t.numpy()), config).status == "success"


def test_a_fit_is_kept_and_read_again(tmp_path):
    mechanism, config = pendulum(), FitConfig(n_passes=2, n_batches=1)
    data, path = make_data(mechanism, n=4, n_times=5), tmp_path / "new" / "fit.pt"
    first, again = model_of("naive", mechanism), model_of("naive", mechanism, seed=9)
    result = fit_kept(first, data.train, config, path, settings={"noise": 0.0})
    assert fit_kept(again, data.train, config, path, settings={"noise": 0.0}) == result
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"`path` should be new or hold a fit of the same settings.*differs in noise;"):
        fit_kept(again, data.train, config, path, settings={"noise": 0.1})


@pytest.mark.parametrize("content", [b"", b"not a fit", None], ids=["empty", "other bytes", "another object"])
def test_a_file_that_holds_no_fit_is_refused_by_name(tmp_path, content):
    path, data = tmp_path / "fit.pt", make_data(pendulum(), n=4, n_times=5).train
    torch.save([1], path) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`path` should be new or hold a fit. Found `.*fit.pt`, which cannot be read"):
        fit_kept(model_of("naive", pendulum()), data, FitConfig(n_passes=1, n_batches=1), path, settings={})


def test_a_kept_fit_that_the_system_does_not_open_is_no_damaged_one(tmp_path):
    data = make_data(pendulum(), n=4, n_times=5).train
    with pytest.raises(OSError, match=re.escape(tmp_path.name)):  # a folder, or no permission
        fit_kept(model_of("naive", pendulum()), data, FitConfig(n_passes=1, n_batches=1), tmp_path, settings={})


def test_a_kept_fit_knows_its_data_and_its_model(tmp_path):
    mechanism, config, path = embedded_pendulum(), FitConfig(n_passes=1, n_batches=1), tmp_path / "fit.pt"
    data = make_data(mechanism, n=4, n_times=5).train

    def keep(data, settings=None, kind="port-Hamiltonian", **options):
        return fit_kept(model_of(kind, mechanism, **options), data, config, path, settings=settings or {})

    keep(data)
    nudged = data._replace(x=data.x.clone())
    nudged.x[3, 1, 2] += 1e-9
    for other in (nudged, data._replace(u=-data.u), data._replace(t=2 * data.t)):
        with pytest.raises(ValueError, match=r"`path` should be new or hold a fit of the same .*differs in data;"):
            keep(other)
    for options in ({"kind": "geometric"}, {"widths": (3,)}):
        with pytest.raises(ValueError, match=r"differs in model;"):
            keep(data, **options)
    with pytest.raises(ValueError, match=r"`settings\['seed'\]` should be 0, as fitted. Found `settings\['seed'\]"):
        keep(data, {"seed": 1})


def part_of(kind, part):
    """A function from a model to the part of it that the message names."""
    if part == "field":
        return lambda model: model.hamiltonian if kind == "unstructured" else model.network
    if kind == "unstructured":
        return lambda model: getattr(model, part)
    return lambda model: getattr(model.system.hamiltonian if part == "inverse_mass" else model.system, part)


OF_MECHANICS = ("inverse_mass", "dissipation", "port")
BROKEN = [(kind, "field") for kind in ("naive", "geometric", "unstructured")]
BROKEN += [(kind, part) for kind in ("port-Hamiltonian", "unstructured") for part in OF_MECHANICS]


@pytest.mark.parametrize(("kind", "part"), BROKEN)
def test_a_network_that_is_not_finite_is_named(kind, part):
    mechanism = embedded_pendulum()
    data, model = make_data(mechanism, n=4, n_times=5), model_of(kind, mechanism)
    with torch.no_grad():
        next(part_of(kind, part)(model).parameters()).fill_(math.nan)
    message = rf"`{part}` should be finite at every state. Found `nan`"
    with pytest.raises(ValueError, match=message):
        model.rollout(data.train.x[0].float(), data.train.t)
    with pytest.raises(ValueError, match=message):
        fit(model, data.train, FitConfig(n_passes=1, n_batches=1))


def test_a_loss_that_is_not_finite_is_a_status():
    mechanism = pendulum()
    data, model = make_data(mechanism, n=8), model_of("port-Hamiltonian", mechanism)
    with pytest.warns(RuntimeWarning, match="lower `lr`") as record:
        result = fit(model, data.train, FitConfig(n_passes=200, n_batches=8, lr=1e6))
    assert record[0].filename == __file__
    assert result.status is Status.NON_FINITE_STATE
    assert result.message == str(record[0].message)
    assert len(result.losses) < 200


def test_times_in_units_far_too_small_are_what_a_fit_that_never_began_tells_of():
    mechanism = pendulum()
    data, model = make_data(mechanism, n=8).train, model_of("port-Hamiltonian", mechanism)
    with pytest.warns(RuntimeWarning, match="in pass 1 of 2: bring `t` and `x` to units in which the motions are"):
        result = fit(model, data._replace(t=1e4 * data.t), FitConfig(n_passes=2))
    assert result.losses == []


def test_observations_far_too_large_are_what_a_fit_that_ends_in_its_first_pass_tells_of():
    t = torch.arange(0, 2, 0.1)
    degrees = 57.3 * torch.cos(2 * t)  # an angle that somebody forgot to convert
    x = torch.stack((degrees.cos(), degrees.sin(), -114.6 * torch.sin(2 * t)), dim=-1)
    model = make_model("port-Hamiltonian", "S", observes="velocity")
    with pytest.warns(RuntimeWarning, match="in pass 1 of 3: bring `t` and `x` to units .*, or lower `lr`"):
        result = fit(model, Trajectories(t, x.unsqueeze(1)), FitConfig(n_passes=3), progress_bar=False)
    assert result.losses == []


def test_windows_of_motions_are_fitted_as_the_motions_are():
    """So motions of different lengths are stacked as windows."""
    mechanism = pendulum()
    motions = make_data(mechanism, n=4).train
    given = (motions, motions.windows(4))
    losses = [fit(model_of("port-Hamiltonian", mechanism), data, FitConfig(n_passes=2)).losses for data in given]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 4, 3)}, r"`x.shape` should be \(\*batch, 2\), as .*Found `x.shape = \(5, 4, 3\)`"),
        ({"x": torch.full((5, 4, 2), math.nan)}, r"`x` should be finite"),
        (
            {"t": torch.tensor([0.0, 0.1, 0.3, 0.2, 0.4])},
            r"`t` should be finite and strictly increasing.*`t\[2\] = 0.3` before",
        ),
        ({"t": torch.arange(4.0)}, r"`t` should be one time for each of 5 observations"),
        ({"u": torch.zeros(5, 4, 1)}, r"`u.shape` should be \(4, 1\), held, or \(4, 4, 1\).*`u.shape = \(5, 4, 1\)"),
        ({"u": torch.zeros(4, 4, 2)}, r"Found `u.shape = \(4, 4, 2\)`"),
    ],
)
def test_fitting_refuses_motions_that_do_not_fit(change, message):
    mechanism = pendulum()
    data = simulate(mechanism, mechanism.first_observations(4, seed=0), 5)
    with pytest.raises(ValueError, match=message):
        fit(model_of("naive", mechanism), data._replace(**change), FitConfig(n_passes=1, n_batches=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_passes": 0}, r"`n_passes` should be a positive integer. Found `n_passes = 0`"),
        ({"lr": math.nan}, r"`lr` should be a finite positive number. Found `lr = nan`"),
        ({"n_batches": 100}, r"`n_batches` should be at most the number of windows, 8. Found `n_batches = 100`"),
        ({"n_points": 2.5}, r"`n_points` should be an integer of at least 2. Found `n_points = 2.5`"),
        ({"n_points": True}, r"`n_points` should be an integer"),
        ({"n_passes": True}, r"`n_passes` should be a positive integer. Found `n_passes = True`"),
        ({"n_batches": 2.0}, r"`n_batches` should be a positive integer. Found `n_batches = 2.0`"),
        ({"n_substeps": "1"}, r"`n_substeps` should be a positive integer. Found `n_substeps = '1'`"),
        ({"lr": torch.tensor(0.1)}, r"`lr` should be a finite positive number. Found `lr = tensor"),
        ({"seed": 10**20}, r"`seed` should be an integer .*Found `seed = 100000000000000000000`"),
        ({"seed": None}, r"`seed` should be an integer .*Found `seed = None`"),
        ({"n_points": 1}, r"`n_points` should be between 2 and the 5 observations"),
    ],
)
def test_fitting_refuses_bad_options(options, message):
    mechanism = pendulum()
    data = simulate(mechanism, mechanism.first_observations(4, seed=0), 5)
    with pytest.raises(ValueError, match=message):
        fit(model_of("naive", mechanism), data, FitConfig(**options))


def test_models_refuse_bad_options():
    with pytest.raises(ValueError, match=r"`kind` should be one of port-Hamiltonian, .*Found `kind = 'best'`"):
        make_model("best", "R", observes="momentum")
    with pytest.raises(ValueError, match=r"`observes` should be one of momentum, velocity. Found `observes = 'angle'`"):
        make_model("naive", "R", observes="angle")
    with pytest.raises(ValueError, match=r"`coordinates` should be a letter for each of 1 degrees"):
        PortHamiltonianModel(pendulum().model.system, "RS", observes="momentum")
    with pytest.raises(ValueError, match=r"`model` should be one that has weights to learn"):
        fit(pendulum().model, make_data(pendulum(), n=2).train)


# -------------------- the energy of what was learned


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_discrete_gradient_never_gains_energy_whatever_the_weights(name, seed):
    mechanism = MECHANISMS[name]()
    model, data = model_of("port-Hamiltonian", mechanism, seed=seed), make_data(mechanism, n=8, n_times=6)
    before = [value.clone() for value in model.state_dict().values()]
    found = energy_rises(model, data.prediction, factor=4)
    assert (found.n, found.status) == (0, Status.SUCCESS)
    assert found.n_steps == 4 * (len(data.prediction.t) - 1)
    assert -1 < found.largest < 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))  # its dtype, too


def test_energy_that_rises_is_found_and_measured():
    mechanism = pendulum()
    data, truth = make_data(mechanism, n=4, n_times=6).prediction, mechanism.model
    driven = PortHamiltonianSystem(
        1, inverse_mass=GivenMatrix(truth.inverse_mass), potential=truth.potential,
        dissipation=GivenMatrix(lambda q: -truth.dissipation(q)),
    )  # fmt: skip
    found = energy_rises(PortHamiltonianModel(driven, "R", observes="momentum"), data)
    assert found.n == found.n_steps > 0
    assert 0 < found.largest <= 1
    # a method that makes energy up: on a free pendulum explicit steps of 1.5 do, in some, and Euler's in nearly all
    free = pendulum(friction=0.0).model
    assert energy_rises(free, data, method="euler", factor=10).n > 0.5 * found.n_steps
    assert abs(energy_rises(free, data, factor=10).largest) < 1e-9
    assert energy_rises(truth, data, factor=10).n == 0
    with pytest.raises(ValueError, match=r"Parameter `factor` should be positive. Found `factor = 0`"):
        energy_rises(truth, data, factor=0)


def test_motions_that_leave_all_bounds_have_a_status():
    data = make_data(pendulum(), n=2, n_times=4).prediction
    system = PortHamiltonianSystem(1, potential=lambda q: -(q**4).sum(-1))
    found = energy_rises(PortHamiltonianModel(system, "R", observes="momentum"), data, method="rk4", factor=1e3)
    assert found.status == Status.NON_FINITE_STATE
    assert found.n_steps == data.x.shape[1] * (len(data.t) - 1)
    assert found.n > 0
    assert found.largest == math.inf
    assert found.as_json()["largest"] is None


def test_rounding_of_the_energy_is_no_rise():
    # without friction the energy stays what it is, so that every second change is a rounding upwards
    data, free = make_data(pendulum(), n=4, n_times=6).prediction, pendulum(friction=0.0).model
    for factor in (0.2, 1.0, 4.0):
        found = energy_rises(free, data, factor=factor)
        assert 0 < found.largest < 1e-11
        assert found.n == 0
    assert energy_rises(free, data, method="rk4").n > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_moves_in_inference_mode_too(kind):
    model, found = model_of(kind, embedded_pendulum()), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found.append(model.rollout(torch.tensor([[1.0, 0.0, 0.5]]), [0.0, 0.1, 0.2], torch.ones(1, 1)).states)
    assert torch.equal(*found)


class Stretched(nn.Module):
    """A spring whose gradient is NaN where it has no length."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(2.0))

    def forward(self, q):
        return self.k * (q.norm(dim=-1) - 0.5).square()


def test_a_gradient_that_is_not_finite_ends_a_fit_with_the_weights_before_it():
    torch.manual_seed(0)
    x = torch.cat((torch.zeros(8, 1, 4), 0.1 * torch.randn(8, 3, 4)), 1)
    system = PortHamiltonianSystem(2, potential=Stretched(), inverse_mass=PositiveDefinite(2))
    model = PortHamiltonianModel(system, "RR", observes="velocity")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.warns(RuntimeWarning, match="A gradient was nan in pass 1 of 2"):
        result = fit(model, Trajectories(0.1 * torch.arange(8.0), x), FitConfig(n_passes=2, n_batches=1))
    assert result.status is Status.NON_FINITE_STATE
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_rises_of_the_energy_are_counted_in_inference_mode_too():
    model, data = small_fit()
    wanted = energy_rises(model, data)
    with torch.inference_mode():
        found = energy_rises(model, data)
    assert found == wanted
