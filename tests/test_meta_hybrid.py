"""Hybrid meta-gradients, training on mixtures, averaged weights, and the memory of the rule that came with them."""

import math

import pytest
import torch
from meta_toys import configured
from rank_toys import on_threads
from rule_toys import flat_weights, port_hamiltonian

from odeopt.meta import Backpropagation, EvolutionStrategies, Hybrid, MetaObjective, meta_train, unroll
from odeopt.meta.files import load_config
from odeopt.rules import PortHamiltonianUpdate
from odeopt.tasks import Mixture, NoisyQuadratic, RandomQuadratic, TaskFamily

f64 = torch.float64
TASK = RandomQuadratic(3, dtype=f64)
HEAD = "coefficient_network.2"


def rule_of(**options):
    torch.manual_seed(0)
    rule = PortHamiltonianUpdate(hidden=(3,), modes=1, **options).double()
    torch.nn.init.normal_(rule.coefficient_network[-1].weight, std=0.3)
    return rule


class Counted(RandomQuadratic):
    """Quadratics that count how often they are evaluated."""

    def __init__(self):
        super().__init__(3, dtype=f64)
        self.n_evaluations = 0

    def loss(self, params, batch):
        self.n_evaluations += 1
        return super().loss(params, batch)


def gradients(estimator, rule, *, n=2, horizon=5, task=TASK, **options):
    rule.zero_grad()
    run = {"indices": torch.arange(n), "horizon": horizon, "seed": 0} | options
    (loss,) = estimator.gradients(rule, task, MetaObjective(), **run)
    return loss, {name: None if p.grad is None else p.grad.clone() for name, p in rule.named_parameters()}


def assert_equal(a, b):
    assert torch.equal(a[0], b[0])
    for name, grad in a[1].items():
        assert (grad is None and b[1][name] is None) or torch.equal(grad, b[1][name]), name


# -------------------- which estimator has the word


def evolution(**options):
    return EvolutionStrategies(**({"n_pairs": 3, "subspace": HEAD, "clip": 0.5} | options))


@pytest.mark.parametrize("longest", [5, 150])
def test_short_gradients_are_backpropagated(longest):
    rule = rule_of()
    hybrid = Hybrid(evolution=evolution(), threshold=1e6, longest=longest)
    assert_equal(gradients(hybrid, rule, horizon=5), gradients(Backpropagation(), rule, horizon=5))


@pytest.mark.parametrize("options", [{"threshold": 1e-9}, {"longest": 4}])
def test_long_gradients_and_long_runs_are_perturbed_on_the_first_task(options):
    rule = rule_of()
    got = gradients(Hybrid(evolution=evolution(), **options), rule)
    assert_equal(got, gradients(evolution(), rule, n=1))
    assert [name for name, grad in got[1].items() if grad is not None] == [f"{HEAD}.weight", f"{HEAD}.bias"]


DAMPINGS = (1.0, 0.5, 0.25)


@pytest.mark.parametrize("longest", [5, 4])
def test_damped_gradients_are_tried_before_the_perturbations(longest):
    rule = rule_of()
    expected = [gradients(Backpropagation(damping=damping), rule) for damping in DAMPINGS]
    lengths = [torch.cat([g.flatten() for g in grads.values()]).norm().item() for _, grads in expected]
    assert lengths[0] > lengths[1] > lengths[2]
    first = 0 if longest == 5 else 1  # a longer run leaves out the first
    for k in range(first, 3):
        hybrid = Hybrid(evolution=evolution(), dampings=DAMPINGS, longest=longest, threshold=1.001 * lengths[k])
        assert_equal(gradients(hybrid, rule), expected[k])
    hybrid = Hybrid(evolution=evolution(), dampings=DAMPINGS, longest=longest, threshold=0.999 * lengths[2])
    assert_equal(gradients(hybrid, rule), gradients(evolution(), rule, n=1))


def test_hybrid_tries_the_exact_gradient_alone_unless_told_otherwise():
    assert [attempt.damping for attempt in Hybrid(evolution=evolution()).attempts(1)] == [1.0]
    with pytest.raises(ValueError, match="`dampings` should be one falling number"):
        Hybrid(dampings=())
    with pytest.raises(ValueError, match=r"`evolution` should be evolution strategies. Found `evolution = 3`"):
        Hybrid(evolution=3)


@pytest.mark.parametrize("checkpoint_every", [1, 3])
def test_calm_gradients_may_be_checkpointed(checkpoint_every):
    rule = rule_of()
    plain, checkpointed = (gradients(Hybrid(threshold=1e6, checkpoint_every=n), rule) for n in (None, checkpoint_every))
    torch.testing.assert_close(checkpointed, plain, rtol=1e-10, atol=1e-12)


def test_gradients_that_are_not_finite_are_perturbed(monkeypatch):
    def broken(self, rule, *args, **kwargs):
        for p in rule.parameters():
            p.grad = torch.full_like(p, math.nan)
        yield torch.tensor(1.0)

    rule = rule_of()
    expected = gradients(evolution(), rule, n=1)
    monkeypatch.setattr(Backpropagation, "gradients", broken)
    assert_equal(gradients(Hybrid(evolution=evolution()), rule), expected)


def test_large_tasks_are_perturbed_by_fewer_pairs():
    rule = rule_of()
    # three coordinates: eight pairs are 48 numbers at a time
    for coordinates, n_pairs in ((48, 8), (47, 4), (1, 2)):
        hybrid = Hybrid(evolution=evolution(n_pairs=8), longest=1, coordinates=coordinates)
        assert_equal(gradients(hybrid, rule), gradients(evolution(n_pairs=n_pairs), rule, n=1))


@pytest.mark.parametrize("n_pairs", range(1, 17))
def test_fewer_pairs_are_two_at_least_unless_fewer_are_asked_for(n_pairs, monkeypatch):
    used = []

    def recorded(self, rule, *args, **kwargs):
        used.append(self.n_pairs)
        yield torch.tensor(1.0)

    monkeypatch.setattr(EvolutionStrategies, "gradients", recorded)
    for coordinates in (1, 24, 1e9):  # nothing, four pairs of three coordinates, everything
        gradients(Hybrid(evolution=evolution(n_pairs=n_pairs), longest=1, coordinates=coordinates), rule_of())
    assert used[0] == min(n_pairs, 2)
    assert min(n_pairs, 2) <= used[1] <= 4
    assert used[2] == n_pairs


@pytest.mark.parametrize("make", [Backpropagation, lambda: Backpropagation(truncation=2), lambda: evolution()])
@pytest.mark.parametrize("tells_horizon", [True, False])
def test_run_is_told_the_horizon_where_it_is_to_be(make, tells_horizon, monkeypatch):
    seen = []

    def recorded(*args, **kwargs):
        seen.append((kwargs["total_steps"], kwargs["update_scale"]))
        return unroll(*args, **kwargs)

    for module in ("backpropagation", "es"):
        monkeypatch.setattr(f"odeopt.meta.estimators.{module}.unroll", recorded)
    options = {"horizon": 5, "seed": 0, "update_scale": 1.5, "tells_horizon": tells_horizon}
    list(make().gradients(rule_of(), TASK, MetaObjective(), indices=torch.arange(2), **options))
    assert set(seen) == {(5 if tells_horizon else None, 1.5)}


@pytest.mark.parametrize("changed", [{"update_scale": 1.5}, {"tells_horizon": False}])
def test_hybrid_hands_on_what_it_is_told(changed):
    rule = rule_of(uses_progress=True)
    for hybrid, estimator, n in (
        (Hybrid(evolution=evolution(), threshold=1e6), Backpropagation(), 2),
        (Hybrid(evolution=evolution(), longest=4), evolution(), 1),
    ):
        got = gradients(hybrid, rule, **changed)
        assert_equal(got, gradients(estimator, rule, n=n, **changed))
        assert got[0] != gradients(estimator, rule, n=n)[0]


@pytest.mark.parametrize(
    "options",
    [{"threshold": 1e-9}, {"longest": 4}, {"threshold": 1e6}, {"threshold": 1e-9, "dampings": (1.0, 0.5)}],
    ids=str,
)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_with_one_process_and_the_first_alone_perturbs(options, size):
    indices, rules, tasks = torch.arange(6, 10), [rule_of() for _ in range(size)], [Counted() for _ in range(size)]
    expected = gradients(Hybrid(evolution=evolution(), **options), rule_of(), indices=indices)

    def work(world):
        own = {"indices": indices[world.share(4)], "world": world, "task": tasks[world.rank]}
        return gradients(Hybrid(evolution=evolution(), **options), rules[world.rank], **own)

    _, got = on_threads(size, work)
    for result in got:
        assert_equal(result, got[0])  # to the bit, or ranks would drift apart
        if "threshold" in options and options["threshold"] > 1:
            torch.testing.assert_close(result, expected)  # a mean over tasks in another order
        else:
            assert_equal(result, expected)
    # six losses of a run of five steps, backpropagated on every rank; six perturbations on the first
    tried, perturbed = (
        6 * ("threshold" in options) * len(options.get("dampings", (1.0,))),
        6 * (options.get("threshold", 0) < 1),
    )
    assert [task.n_evaluations for task in tasks] == [tried + perturbed] + (size - 1) * [tried]


def test_hybrid_refuses_what_is_out_of_range():
    for name in ("threshold", "longest", "coordinates"):
        with pytest.raises(ValueError, match=f"`{name}` should be a positive .* Found `{name} = 0`"):
            Hybrid(evolution=evolution(), **{name: 0})


# -------------------- a subspace, and differences that are clipped


def test_subspace_is_estimated_as_if_the_rest_were_frozen():
    rule, frozen = rule_of(), rule_of()
    for name, p in frozen.named_parameters():
        p.requires_grad_(name.startswith(HEAD))
    got, expected = (gradients(evolution(subspace=s), r)[1] for s, r in ((HEAD, rule), ("", frozen)))
    for name, grad in expected.items():
        assert (got[name] is None and grad is None) or torch.equal(got[name], grad)


def test_subspace_without_weights_is_refused():
    with pytest.raises(
        ValueError, match=r"`subspace` should be the beginning of the name of a weight of the rule. Found .*'no'"
    ):
        gradients(evolution(subspace="no"), rule_of())


def test_differences_count_up_to_the_clip():
    rule = rule_of()
    _, free = gradients(evolution(n_pairs=1, clip=None, sigma=0.5), rule)
    _, clipped = gradients(evolution(n_pairs=1, clip=1e-6, sigma=0.5), rule, n=1)
    a, b = (torch.cat([g.flatten() for g in grads.values() if g is not None]) for grads in (free, clipped))
    # one pair: both lie along the perturbation, whose factor is a difference of at most 1e-6 over two sigma
    torch.testing.assert_close(b / b.norm(), a / a.norm())
    assert b.norm() < 0.2 * a.norm()


# -------------------- relative losses, late weights


def test_relative_losses_do_not_change_with_the_unit_of_the_loss():
    losses, first = torch.rand(20, 3, dtype=f64), torch.rand(3, dtype=f64) + 0.5
    objective = MetaObjective("late", relative=True, eps=1e-3)
    a, b = (objective(c * losses, start=0, horizon=20, first=c * first) for c in (1.0, 1e6))
    torch.testing.assert_close(a, b)
    diverged = torch.cat((losses[:-1], torch.full((1, 3), math.inf, dtype=f64)))
    bounded = torch.cat((losses[:-1], 10 * first[None]))
    a, b = (objective(x, start=0, horizon=20, first=first) for x in (diverged, bounded))
    assert torch.equal(a, b)


def test_late_weights_are_half_linear_and_half_the_last_tenth():
    objective = MetaObjective("late", log=False)
    weights = torch.stack([objective(row[:, None], start=0, horizon=20)[0] for row in torch.eye(20, dtype=f64)])
    expected = torch.arange(1, 21, dtype=f64) / 420
    expected[-2:] += 0.25
    torch.testing.assert_close(weights, expected)
    parts = [objective(torch.ones(10, 1, dtype=f64), start=s, horizon=20) for s in (0, 10)]
    torch.testing.assert_close(sum(parts), torch.ones(1, dtype=f64))


# -------------------- training on a mixture


def mixture():
    families = [
        TaskFamily(RandomQuadratic, {"dtype": f64}, {"dim": [2, 3]}),
        TaskFamily(NoisyQuadratic, {"dtype": f64}, {"dim": [2, 4]}, log_range=0.5),
    ]
    return Mixture(families, horizons=(4, 9), n_problems=2)


CONFIG = {
    "n_meta_steps": 6,
    "n_tasks": 3,
    "estimator": Hybrid,
    "n_pairs": 2,
    "subspace": HEAD,
    "threshold": 2.0,
    "relative": True,
    "eps": 1e-3,
    "weights": "late",
    "validate_every": 2,
    "n_validation_tasks": 3,
    "averaging": 0.5,
    "lr": 1e-2,
}


def train(folder=None, stop_after=None, task=None, **options):
    rule = rule_of(memory=1, uses_progress=True)
    config = configured(**(CONFIG | options))
    return meta_train(rule, task or mixture(), config, folder=folder, stop_after=stop_after, progress_bar=False)


def test_interrupted_run_on_a_mixture_gives_the_result_of_the_whole_one(tmp_path):
    whole = train()
    part = train(tmp_path, stop_after=0.0)
    assert len(part.meta_losses) == 2
    resumed = train(tmp_path)
    assert resumed.meta_losses == whole.meta_losses
    assert resumed.validation == whole.validation
    assert torch.equal(flat_weights(resumed.rule), flat_weights(whole.rule))


def test_meta_step_averages_draws_of_bounded_length(monkeypatch):
    moves = []

    class Recorder(torch.optim.SGD):
        def __init__(self, params, lr, betas):
            super().__init__(params, lr)

        def step(self):
            moves.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]).norm().item())
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Recorder)
    train(clip=1e-3)
    assert len(moves) == 6
    # a mean of three vectors of length one at most, and not of nothing
    assert 1e-4 < min(moves) <= max(moves) <= 1e-3 * (1 + 1e-6)


def test_kept_weights_are_a_running_mean(monkeypatch):
    module = __import__("odeopt.meta.trainer", fromlist=["validation_score"])
    seen = []
    monkeypatch.setattr(module, "validation_score", lambda rule, *a, **k: seen.append(flat_weights(rule)) or 0.0)
    train(averaging=0.0, validate_every=1)
    weights, seen[:] = list(seen), []
    train(averaging=0.5, validate_every=1)
    mean = weights[0]
    for plain, averaged in zip(weights, seen, strict=True):
        mean = 0.5 * mean + 0.5 * plain
        torch.testing.assert_close(averaged, mean)


def test_training_on_a_mixture_improves_validation():
    result = train(n_meta_steps=40, validate_every=20, n_validation_tasks=20, lr=3e-2)
    assert result.best_score < result.validation[0][1] - 0.1


def test_configuration_of_a_mixture_builds_its_tasks(tmp_path):
    text = """
    [rule]
    class = "port-hamiltonian"
    [task]
    class = "Mixture"
    horizons = [3, 5]
    [[task.families]]
    class = "MLPClassification"
    share = 2.0
    dataset = "digits"
    [task.families.choices]
    widths = [[], [4]]
    [[task.families]]
    class = "NoisyQuadratic"
    log_range = 1.0
    [task.families.choices]
    dim = [2, 3]
    [training]
    n_meta_steps = 1
    """
    (tmp_path / "mixed.toml").write_text(text)
    config = load_config(tmp_path / "mixed.toml")
    tasks = {repr(config.build_task().draw(n, seed=0).task) for n in range(100)}
    assert len(tasks) == 6  # two networks, two quadratics, each of these in other units too
    assert {"split='evaluation'" in repr(config.build_task("evaluation").draw(n, 0).task) for n in range(9)} == {
        True,
        False,
    }
    for before, after, message in (
        ("dim = [2", "dims = [2", r"\[task.families\] should hold only .*dim.*. Found `dims`"),
        ("horizons", "horizon", r"\[task\] should hold only .*horizons.*. Found `horizon`"),
        ('"NoisyQuadratic"', '"Noise"', r"`class` in \[task.families\] should be one of .*. Found `Noise`"),
    ):
        (tmp_path / "broken.toml").write_text(text.replace(before, after))
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path / "broken.toml")


# -------------------- memory


def test_untrained_memory_stays_empty_and_changes_nothing():
    plain, remembering = port_hamiltonian().double(), port_hamiltonian(memory=2).double()
    for rule in (plain, remembering):
        for p in rule.coefficient_network[-1].parameters():
            torch.nn.init.zeros_(p)
    states = [rule.init_state(torch.zeros(6, dtype=f64)) for rule in (plain, remembering)]
    for step in range(3):
        grad = torch.sin(torch.arange(6, dtype=f64) + step)
        (a, states[0]), (b, states[1]) = (rule(grad, s) for rule, s in zip((plain, remembering), states, strict=True))
        torch.testing.assert_close(a, b)
    assert torch.equal(states[1].memory, torch.zeros(2, dtype=f64))
    assert states[0].memory.shape == (0,)


@pytest.mark.parametrize("push", [5.0, -5.0])
def test_memory_moves_by_a_tenth_per_step_at_most_and_scales_the_step(push):
    rule = port_hamiltonian(memory=1).double()
    head = rule.coefficient_network[-1]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias[-1:])
    grad, state = torch.ones(4, dtype=f64), rule.init_state(torch.zeros(4, dtype=f64))
    for _ in range(3):
        before, _ = rule(grad, state._replace(memory=torch.zeros(1, dtype=f64)))
        with torch.no_grad():
            head.bias[-1] = push
        update, new_state = rule(grad, state)
        with torch.no_grad():
            head.bias[-1] = 0.0
        expected = state.memory + 0.1 * math.tanh(push)
        torch.testing.assert_close(new_state.memory, expected)
        torch.testing.assert_close(update, before * expected.exp())
        state = new_state


def test_memory_moves_in_logarithmic_time():
    rule = port_hamiltonian(memory=1).double()
    head = rule.coefficient_network[-1]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias[-1:], -9.0)
    state, grad = rule.init_state(torch.zeros(4, dtype=f64)), torch.ones(4, dtype=f64)
    memories = []
    for _ in range(400):
        _, state = rule(grad, state)
        memories.append(state.memory.item())
    # -tanh(9) times 1/10 ten times, then 1/t: a power of t
    assert memories[9] == pytest.approx(-1.0, rel=1e-6)
    assert memories[399] - memories[99] == pytest.approx(-math.log(4), rel=1e-2)


def test_memory_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"`memory` should be a non-negative integer. Found `memory = -1`"):
        PortHamiltonianUpdate(memory=-1)
