"""Evolution strategies: what they estimate, on which random numbers, in which batches, over which ranks."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from meta_toys import configured
from rank_toys import Thread, on_threads, on_two_processes
from rule_toys import RULES, flat_weights, port_hamiltonian, randomised
from torch import Tensor, nn

from odeopt.meta import Backpropagation, Hybrid, MetaConfig, MetaObjective, World, meta_train, unroll
from odeopt.meta.distributed import current_world
from odeopt.meta.estimators import EvolutionStrategies
from odeopt.meta.estimators.perturbations import perturbed
from odeopt.meta.files import load_config
from odeopt.rules import HamiltonianUpdate, PortHamiltonianUpdate
from odeopt.rules.base import UpdateRule
from odeopt.tasks import RandomQuadratic, TeacherStudent
from odeopt.tasks.random import normal

INDICES = torch.arange(6, 9)
LOOPED = {"port-hamiltonian-dopri5-auto"}  # whose solver looks at the numbers
LEARNED = {name: make for name, make in RULES.items() if any(p.requires_grad for p in make().parameters())} | {
    f"port-hamiltonian-{solver}-{backend}": lambda solver=solver, backend=backend: port_hamiltonian(
        solver=solver, backend=backend
    )
    for solver, backend in (("rk4", "torchdiffeq"), ("exponential", "auto"), ("dopri5", "auto"))
}


class TwoTensors(RandomQuadratic):
    """Least squares for a matrix and a vector, with other data at every step."""

    def __init__(self):
        super().__init__(3, dtype=torch.float64)
        self.n_tasks_at_once = set()

    def init_params(self, indices, seed):
        shapes = {"matrix": (3, 2), "vector": (3,)}
        draw = {"seed": seed, "dtype": torch.float64}
        return {name: normal(indices, shape, stream=name, **draw) for name, shape in shapes.items()}

    def sample_batch(self, indices, step, seed):
        return self.draw(indices, seed + 1000 * step)

    def loss(self, params, batch):
        W, y = batch
        self.n_tasks_at_once.add(len(W))
        residual = (W @ params["matrix"]).sum(-1) + params["vector"] - y
        return residual.square().sum(-1)


class SameTasks(RandomQuadratic):
    """The same tasks whatever they are called: what differs between two names are the perturbations."""

    def __init__(self):
        super().__init__(3, dtype=torch.float64)

    def draw(self, indices, seed):
        W, y = super().draw(torch.arange(len(INDICES)), 0)
        n = len(indices) // len(INDICES)
        return W.repeat(n, 1, 1), y.repeat(n, 1)


class Momentum(NamedTuple):
    """Momentum, shape ``(*batch, n)``."""

    m: Tensor


class ThreeWeights(UpdateRule):
    """Momentum and a step size, smooth in three weights, one of which says where the momentum starts."""

    def __init__(self, log_lr=-4.0):
        super().__init__(log_lr=log_lr)
        self.w = nn.Parameter(torch.tensor([log_lr, 0.3, 0.2], dtype=torch.float64))
        self.frozen = nn.Parameter(torch.tensor(0.5, dtype=torch.float64), requires_grad=False)

    def init_state(self, param):
        return Momentum(self.w[2] * torch.ones_like(param))

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        m = self.frozen * state.m + grad
        return -self.w[0].exp() * (m + self.w[1] * grad), Momentum(m)


def estimate(rule, task, *, indices=INDICES, horizon=4, seed=1, objective=None, world=World(), **options):  # noqa: B008
    """Meta-loss and meta-gradient, as one vector each."""
    options = {"n_pairs": 4, "sigma": 0.01} | options
    estimator = options.pop("estimator", None) or EvolutionStrategies(**options)
    rule.zero_grad()
    run = {"indices": indices, "horizon": horizon, "seed": seed, "world": world}
    (loss,) = estimator.gradients(rule, task, objective or MetaObjective(), **run)
    return loss, torch.cat([p.grad.flatten() for p in rule.parameters() if p.requires_grad])


# -------------------- what is estimated


def test_estimate_is_the_exact_gradient_within_its_own_error_which_falls_with_the_root_of_the_pairs():
    rule, task = ThreeWeights(), SameTasks()
    _, exact = estimate(rule, task, estimator=Backpropagation())
    rms = []
    for n_pairs in (2, 32):
        got = torch.stack([estimate(rule, task, n_pairs=n_pairs, sigma=1e-4, seed=seed)[1] for seed in range(100)])
        standard_error = got.std(0) / 100**0.5
        # 6 numbers in all, each beyond three standard errors once in 400 draws
        assert ((got.mean(0) - exact).abs() < 3 * standard_error).all()
        rms.append((got - exact).square().mean().sqrt())
    # sixteen times the pairs, a quarter of the error; 100 estimates of three numbers know it to a tenth
    assert rms[0] / rms[1] == pytest.approx(4.0, rel=0.25)
    assert rms[1] < 0.4 * exact.norm()  # so the comparison with the exact gradient says something


@pytest.mark.parametrize("make", [HamiltonianUpdate, lambda: PortHamiltonianUpdate(hidden=(3,))])
def test_estimate_is_what_changed_weights_give_one_after_the_other(make):
    rule, objective, sigma = randomised(make()), MetaObjective("last"), 0.05
    total, losses = 0.0, []
    for pair in range(3):
        both = []
        for sign in (1, -1):
            changed, eps = copy.deepcopy(rule), []
            for name, weight in changed.named_parameters():
                stream = f"meta/perturbation/{name}"
                draw = normal(torch.tensor([pair]), weight.shape, seed=1, stream=stream, step=6, dtype=weight.dtype)[0]
                weight.data += sign * sigma * draw
                eps.append(draw.flatten())
            with torch.no_grad():
                run = unroll(changed, TwoTensors(), indices=INDICES, n_steps=4, seed=1, total_steps=4)
            both.append(objective(run.losses[1:], start=0, horizon=4).mean())
        total = total + (both[0] - both[1]) / (2 * sigma) * torch.cat(eps) / 3
        losses += both
    before = flat_weights(rule)
    loss, grad = estimate(rule, TwoTensors(), n_pairs=3, sigma=sigma, objective=objective)
    # rounding of losses of order one, over 2 sigma
    torch.testing.assert_close(grad, total, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-13, atol=0.0)
    assert torch.equal(flat_weights(rule), before)
    assert not loss.requires_grad
    assert loss.shape == ()


def test_weights_that_are_not_learned_are_left_out():
    rule = ThreeWeights()
    _, grad = estimate(rule, TwoTensors())
    assert grad.shape == (3,)
    assert rule.frozen.grad is None


def test_update_scale_and_progress_reach_the_run(monkeypatch):
    seen = []

    def recorded(*args, **kwargs):
        seen.append((kwargs["update_scale"], kwargs["total_steps"], torch.is_grad_enabled()))
        return unroll(*args, **kwargs)

    monkeypatch.setattr("odeopt.meta.estimators.es.unroll", recorded)
    run = {"indices": INDICES, "horizon": 3, "seed": 0, "update_scale": 1.5}
    list(EvolutionStrategies(n_pairs=1).gradients(ThreeWeights(), TwoTensors(), MetaObjective(), **run))
    assert seen == [(1.5, 3, False)]


# -------------------- on which random numbers


def test_numbers_are_common_to_the_perturbations():
    # else the difference of two losses would not vanish with sigma, and the estimate would grow as 1 / sigma
    rule = ThreeWeights()
    _, fine = estimate(rule, TwoTensors(), sigma=1e-6)
    _, coarse = estimate(rule, TwoTensors(), sigma=1e-4)
    # third derivatives times the square of 1e-4; rounding is 1e-16 over 1e-6
    torch.testing.assert_close(fine, coarse, rtol=1e-5, atol=1e-7)


def test_perturbations_are_functions_of_seed_and_first_task():
    rule, task = ThreeWeights(), SameTasks()
    _, first = estimate(rule, task)
    estimate(rule, task, seed=2)
    torch.manual_seed(7)
    _, again = estimate(rule, task)
    assert torch.equal(first, again)
    for other in ({"seed": 2}, {"indices": INDICES + 3}):
        assert not torch.allclose(estimate(rule, task, **other)[1], first, rtol=0.01)


def test_pairs_and_weights_have_numbers_of_their_own():
    seen = []

    class Recorder(ThreeWeights):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def init_state(self, param):
            seen.append(torch.cat((self.w - self.w_before, self.v)).detach())
            return super().init_state(param)

    rule = Recorder()
    rule.w_before = rule.w.detach().clone()
    estimate(rule, SameTasks(), n_pairs=2, sigma=0.5, chunk=1)
    plus, minus, other, _ = (eps / 0.5 for eps in seen)
    torch.testing.assert_close(plus, -minus)
    assert len(torch.cat((plus, other)).abs().unique()) == 12


# -------------------- in which batches


@pytest.mark.parametrize("name", LEARNED)
def test_batched_equals_looped(name):
    rule = LEARNED[name]()
    horizon = 2 if name in LOOPED else 4  # these are slow, and looped anyway
    loss, looped = estimate(rule, TwoTensors(), n_pairs=3, chunk=1, horizon=horizon)
    for chunk in (None,) if name in LOOPED else (None, 2, 5):  # all, a pair, and boundaries within pairs
        got_loss, got = estimate(rule, TwoTensors(), n_pairs=3, chunk=chunk, horizon=horizon)
        # losses round at 1e-15 of their size, which four steps of a rule grow and a division by .02 too
        torch.testing.assert_close(got, looped, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(got_loss, loss, rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("chunk", [None, 4, 1])
def test_perturbations_advance_as_one_batch_of_at_most_a_chunk(name, chunk):
    rule, task = LEARNED[name](), TwoTensors()
    estimate(rule, task, n_pairs=3, chunk=chunk, horizon=1)
    sizes = [1] * 6 if name in LOOPED else {None: [6], 4: [4, 2], 1: [1] * 6}[chunk]
    assert task.n_tasks_at_once == {size * len(INDICES) for size in sizes}


# -------------------- with runs that diverge


class Cliff(SameTasks):
    """Quadratics whose loss is not finite a little way from where they start."""

    def __init__(self, height, width=0.4):
        super().__init__()
        self.height, self.width = height, width

    def loss(self, params, batch):
        loss = super().loss(params, batch)
        return loss.masked_fill(params["theta"].abs().amax(-1) > self.width, self.height)


@pytest.mark.parametrize("height", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("log", [True, False])
def test_diverged_perturbation_turns_the_gradient_away_from_it(height, log):
    rule, task, objective = ThreeWeights(log_lr=-4.2), Cliff(height), MetaObjective(log=log)
    options = {"n_pairs": 32, "sigma": 0.3, "objective": objective}
    loss, grad = estimate(rule, task, **options)
    smooth_loss, smooth = estimate(rule, SameTasks(), **options)
    assert grad.isfinite().all()
    assert loss > smooth_loss  # so some diverge
    assert smooth[0] < 0 < grad[0]  # a longer step is better, but for the cliff
    # the longest difference of two meta-losses: a logarithm of 11, or ten first losses; halved by 2 sigma = .6
    assert grad.norm() < (10.0 if log else 100.0)


def test_losses_count_at_most_as_the_ceiling_says():
    first = SameTasks().loss({"theta": torch.zeros(3, 3, dtype=torch.float64)}, SameTasks().draw(INDICES, 0))
    options = {"objective": MetaObjective(log=False), "ceiling": 2.5}
    loss, grad = estimate(ThreeWeights(), Cliff(math.nan, width=0.0), **options)
    torch.testing.assert_close(loss, 3.5 * first.mean())
    # where every run diverges there is no direction; the sum of three tasks' weights rounds
    torch.testing.assert_close(grad, torch.zeros(3, dtype=torch.float64), rtol=0.0, atol=1e-12)


def test_task_that_is_not_finite_from_the_start_is_not_hidden():
    loss, grad = estimate(ThreeWeights(), Cliff(math.nan, width=-1.0))
    assert loss.isnan()
    assert grad.isnan().all()


# -------------------- in the training loop

TASK = RandomQuadratic(3)
CONFIG = {"n_meta_steps": 12, "n_tasks": 3, "horizon": 5, "validate_every": 4, "n_validation_tasks": 32, "lr": 3e-2}
CONFIG |= {"estimator": EvolutionStrategies, "n_pairs": 4, "sigma": 0.05}


def tiny_rule(seed=0):
    torch.manual_seed(seed)
    return PortHamiltonianUpdate(hidden=(3,), modes=1)


def train(rule, folder=None, task=TASK, stop_after=None, **options):
    config = configured(**(CONFIG | options))
    return meta_train(rule, task, config, folder=folder, stop_after=stop_after, progress_bar=False)


def test_training_improves_validation():
    result = train(tiny_rule(), n_meta_steps=40, horizon=10, n_tasks=8)
    assert result.best_score < 0.85 * result.validation[0][1]
    assert result.n_skipped_nonfinite == result.n_skipped_outliers == 0


def test_resumed_run_gives_the_result_of_the_uninterrupted_one(tmp_path):
    uninterrupted = tiny_rule()
    expected = train(uninterrupted)
    assert len(train(tiny_rule(), tmp_path, stop_after=0).meta_losses) == 4
    rule = tiny_rule()
    result = train(rule, tmp_path)
    assert result.meta_losses == expected.meta_losses
    assert result.validation == expected.validation
    assert torch.equal(flat_weights(rule), flat_weights(uninterrupted))


def test_resumed_run_may_take_another_chunk_but_no_other_perturbations(tmp_path):
    train(tiny_rule(), tmp_path, stop_after=0)
    for changed in ({"sigma": 0.1}, {"n_pairs": 5}):
        with pytest.raises(ValueError, match=r"a checkpoint of the same run. Found .* with another `config`"):
            train(tiny_rule(), tmp_path, **changed)
    got, expected = tiny_rule(), tiny_rule()
    train(got, tmp_path, chunk=3)
    train(expected)
    # float32, of which 1e-7 over 2 sigma enters each meta-step; Adam moves weights by 1e-2 a step
    torch.testing.assert_close(flat_weights(got), flat_weights(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("estimator", ["es", {"class": "es"}, EvolutionStrategies, None])
def test_estimator_of_another_kind_is_refused(estimator):
    with pytest.raises(ValueError, match=r"`estimator` should be an estimator .*Found `estimator = "):
        MetaConfig(estimator=estimator)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_pairs": 1.5}, "`n_pairs` should be a positive integer. Found `n_pairs = 1.5`"),
        ({"n_pairs": 0}, "`n_pairs` should be a positive integer. Found `n_pairs = 0`"),
        ({"sigma": math.nan}, "`sigma` should be a positive number. Found `sigma = nan`"),
        ({"sigma": 0.0}, "`sigma` should be a positive number. Found `sigma = 0.0`"),
        ({"chunk": 0}, "`chunk` should be a positive integer or None. Found `chunk = 0`"),
        ({"ceiling": -1.0}, "`ceiling` should be a positive number. Found `ceiling = -1.0`"),
    ],
)
def test_arguments_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        EvolutionStrategies(**options)


def test_configuration_file_may_ask_for_it(tmp_path):
    path = tmp_path / "es.toml"
    training = '[training.estimator]\nclass = "es"\nn_pairs = 5\nsigma = 0.02\nchunk = 4\n'
    path.write_text(f'[rule]\nclass = "hamiltonian"\n[task]\nclass = "RandomQuadratic"\n[training]\n{training}')
    assert load_config(path).training.estimator == EvolutionStrategies(n_pairs=5, sigma=0.02, chunk=4)


# -------------------- over ranks


@pytest.mark.parametrize("name", ["lstm", "hamiltonian", "port-hamiltonian-default"])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_exchange_losses_alone_and_agree_with_one_process(name, size, monkeypatch):
    make, indices = LEARNED[name], torch.arange(6, 10)
    loss, grad = estimate(make(), TwoTensors(), indices=indices)
    # a rank that averaged its gradients would exchange as many numbers as there are weights
    monkeypatch.setattr(Thread, "average", None)

    def work(world):
        return estimate(make(), TwoTensors(), indices=indices[world.share(4)], world=world)

    worlds, got = on_threads(size, work)
    for world, (rank_loss, rank_grad) in zip(worlds, got, strict=True):
        assert world.sent == [(len(indices[world.share(4)]), 8)]
        assert world.broadcasted == [int]  # the first task
        assert torch.equal(rank_grad, got[0][1])  # to the bit, or ranks would drift apart
        assert torch.equal(rank_loss, got[0][0])
        # batches of other sizes round differently, over 2 sigma
        torch.testing.assert_close(rank_grad, grad, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(rank_loss, loss, rtol=1e-12, atol=0.0)


ESTIMATORS = {
    "es": {},
    "hybrid": {"estimator": Hybrid, "threshold": 1e-9, "n_meta_steps": 4},  # too long every time, so perturbed
}


def trained(n_tasks):
    task, out = RandomQuadratic(3, dtype=torch.float64), {}
    for name, options in ESTIMATORS.items():
        rule, options = tiny_rule().double(), {"n_tasks": n_tasks, "n_validation_tasks": 5, **options}
        result = train(rule, task=task, **options)
        out[name] = (flat_weights(rule), torch.tensor(result.meta_losses), torch.tensor(result.validation))
    return out


def train_on_two(rank, folder):
    assert current_world().size == 2
    return trained(3)


def test_two_processes_train_as_one_with_twice_the_tasks(tmp_path):
    expected, ranks = trained(6), on_two_processes(train_on_two, tmp_path)
    assert None not in ranks
    for got in ranks:
        for name in ESTIMATORS:
            for a, b in zip(got[name], expected[name], strict=True):
                # float64 losses in other batches, over 2 sigma, grown over the meta-steps
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["spectral_energy.raw", "coefficient_network.0.weight"])
def test_all_weights_are_perturbed_in_layers_or_not(name):
    rule = port_hamiltonian(kinetic="spectral", matrix_polynomial="learned", solver="exponential", dtype=torch.float32)
    task, options = TeacherStudent(), {"indices": torch.arange(2), "n_steps": 4}
    weight = dict(rule.named_parameters())[name]
    with torch.no_grad():
        found = unroll(perturbed(rule, {name: (weight + 1)[None]}), task, **options).losses
        before = unroll(rule, task, **options).losses
        weight.add_(1)
        wanted = unroll(rule, task, **options).losses
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(wanted[-1], before[-1], rtol=1e-4)
