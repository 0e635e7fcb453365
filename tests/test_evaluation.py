"""Comparisons are paired, intervals are Student's, nothing that diverged is hidden."""

import math

import pytest
import scipy.stats
import torch

from odeopt.artifacts import load_pretrained
from odeopt.evaluation import (
    EVALUATION_SEED,
    Comparison,
    RuleResult,
    compare,
    scores_of,
    student_interval,
    time_step,
)
from odeopt.meta import unroll
from odeopt.report import draw_table
from odeopt.rules import AdamUpdate, LSTMUpdate, PortHamiltonianUpdate, RMSpropUpdate, SGDUpdate
from odeopt.tasks import MLPClassification, RandomQuadratic, Task
from odeopt.tasks.random import TUNING_SEED, VALIDATION_SEED


class Bowls(Task):
    """f(theta) = a theta^2 / 2 from theta = 1; the curvature a of problem i is ``curvatures[i % len]``."""

    def __init__(self, *curvatures):
        super().__init__(dtype=torch.float64)
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)

    def init_params(self, indices, seed):
        return {"theta": torch.ones(len(indices), 1, dtype=torch.float64)}

    def sample_batch(self, indices, step, seed):
        return (self.curvatures[indices % len(self.curvatures)],)

    def loss(self, params, batch):
        return batch[0] * params["theta"].square().squeeze(-1) / 2


def result(losses, *, is_learned=False):
    return RuleResult(torch.as_tensor(losses, dtype=torch.float64), None, is_learned, False, 1.0, 4.0)


def quiet(rules, task, **options):
    return compare(rules, task, progress_bar=False, **options)


# ----------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("samples", [[1.0, 2.0], [0.3, -0.2, 1.1, 0.9], list(range(20))])
def test_the_interval_is_students(samples, confidence):
    samples = torch.tensor(samples, dtype=torch.float64)
    wanted = scipy.stats.t.interval(
        confidence, len(samples) - 1, loc=samples.mean().item(), scale=scipy.stats.sem(samples.numpy())
    )
    mean, low, high = student_interval(samples, confidence)
    assert mean == pytest.approx(samples.mean().item(), rel=1e-15)
    # two implementations of the quantile of t, each good to about 1e-12
    assert (low, high) == pytest.approx(wanted, rel=1e-10)


def test_the_interval_covers_the_expectation_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = 3 + torch.randn(4000, 4, generator=generator)
    n_covered = sum(low <= 3 <= high for _, low, high in map(student_interval, samples))
    # four standard deviations of a binomial count; normal quantiles instead of Student's would cover .86
    assert n_covered / 4000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_one_sample_bounds_nothing_and_a_missing_one_is_not_left_out():
    assert student_interval(torch.tensor([2.0])) == (2.0, -math.inf, math.inf)
    assert all(math.isnan(bound) for bound in student_interval(torch.tensor([1.0, math.nan, 2.0])))
    assert all(math.isnan(bound) for bound in student_interval(torch.tensor([1.0, math.inf])))


def test_the_interval_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match=r"Parameter `samples` should be a tensor of one, non-empty axis.*\(0,\)"):
        student_interval(torch.zeros(0))
    with pytest.raises(ValueError, match=r"Parameter `confidence` should be in \(0, 1\). Found .* = 95"):
        student_interval(torch.zeros(3), 95)


# ------------------------------------------------------------------------------------------------- pairing


def test_the_last_ten_losses_are_those_before_the_last_update():
    losses = torch.arange(101.0).unsqueeze(1)
    assert scores_of(losses, "last ten").tolist() == [94.5]
    assert scores_of(losses, "final").tolist() == [100.0]
    assert scores_of(losses[:4], "last ten").tolist() == [1.0]


@pytest.mark.parametrize("task", [RandomQuadratic(5), MLPClassification("digits", (4,), split="evaluation")])
def test_a_rule_compared_with_itself_differs_by_exactly_zero(task):
    comparison = quiet({"a": AdamUpdate(0.1), "b": AdamUpdate(0.1)}, task, n_steps=3, n_runs=4)
    assert torch.equal(comparison.results["a"].losses, comparison.results["b"].losses)
    assert comparison.difference("a", "b") == (0.0, 0.0, 0.0)


def test_rules_that_are_not_there_are_refused_by_name():
    comparison = quiet({"a": LSTMUpdate(hidden_size=2)}, RandomQuadratic(5), n_steps=3, n_runs=4)
    with pytest.raises(ValueError, match=r"`name` should be one of a\. Found `name = 'b'`"):
        comparison.difference("b", "a")
    with pytest.raises(ValueError, match=r"`reference` should be one of a, as none is hand-designed"):
        comparison.difference("a")


def test_all_rules_see_the_tasks_and_batches_that_unroll_draws():
    task = MLPClassification("digits", (4,), split="evaluation")
    rules = {"sgd": SGDUpdate(0.1), "learned": PortHamiltonianUpdate()}
    comparison = quiet(rules, task, n_steps=3, n_runs=5, seed=7, runs_per_batch=5)
    for name, rule in rules.items():
        with torch.no_grad():
            wanted = unroll(rule, task, indices=torch.arange(5), n_steps=3, seed=7, total_steps=3)
        assert torch.equal(comparison.results[name].losses, wanted.losses.double())
        assert torch.equal(comparison.results[name].accuracies, task.accuracy(wanted.params).double())
    other = quiet(rules, task, n_steps=3, n_runs=5, seed=8)
    assert not torch.equal(other.results["sgd"].losses, comparison.results["sgd"].losses)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_comparison_does_not_mind_that_gradients_are_off(mode):
    rules, task = {"learned": PortHamiltonianUpdate()}, RandomQuadratic(5)
    wanted = quiet(rules, task, n_steps=3, n_runs=2).results["learned"]
    with mode():
        found = quiet(rules, task, n_steps=3, n_runs=2).results["learned"]
    assert torch.equal(found.losses, wanted.losses)
    assert found.ms_per_step > 0


def test_rules_are_told_the_horizon():
    rule, seen = SGDUpdate(0.1), []
    rule.register_forward_pre_hook(lambda *call: seen.append(call[2]["progress"].item()), with_kwargs=True)
    quiet({"sgd": rule}, RandomQuadratic(3), n_steps=4, n_runs=2)
    assert seen[:4] == [0.0, 0.25, 0.5, 0.75]


def test_the_split_into_batches_of_runs_does_not_matter():
    task = RandomQuadratic(5)
    losses = [
        quiet({"sgd": SGDUpdate(0.01)}, task, n_steps=5, n_runs=7, runs_per_batch=n).results["sgd"].losses
        for n in (1, 3, 7)
    ]
    # float32: batched products may sum in another order
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-5, atol=1e-6)


def test_pairing_takes_the_tasks_own_spread_out_of_the_difference():
    """Scores of ten tasks spread over decades, their differences do not."""
    spread = torch.logspace(0, 3, 10, dtype=torch.float64)
    results = {
        "good": result(torch.stack((spread, spread))),
        "bad": result(torch.stack((spread, spread + 1))),
    }
    comparison = Comparison(results, "good", "final", {"task": "toy"}, 0)
    assert comparison.difference("bad") == pytest.approx((1.0, 1.0, 1.0), abs=1e-12)


def test_callers_rules_and_random_state_are_left_alone():
    rule, state = PortHamiltonianUpdate(), torch.get_rng_state()
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    quiet({"learned": rule}, RandomQuadratic(3), n_steps=2, n_runs=2)
    assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())
    assert all(parameter.grad is None for parameter in rule.parameters())
    assert torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------------------------- reference


def test_the_reference_is_the_best_hand_designed_rule():
    rules = {"learned": PortHamiltonianUpdate(), "slow": SGDUpdate(1e-6), "slower": SGDUpdate(1e-7)}
    comparison = quiet(rules, RandomQuadratic(5), n_steps=20, n_runs=8, score="final")
    assert comparison.scores("learned").mean() < comparison.scores("slow").mean()
    assert comparison.reference == "slow"
    assert comparison.difference("learned").high < 0 < comparison.difference("slower").low


def test_a_rule_that_diverges_is_no_reference():
    rules = {"diverging": SGDUpdate(1e200), "poor": SGDUpdate(1e-6)}
    assert quiet(rules, Bowls(1.0), n_steps=5, n_runs=2).reference == "poor"
    only = quiet({"diverging": SGDUpdate(1e200)}, Bowls(1.0), n_steps=5, n_runs=2)
    assert only.reference is None
    assert "difference" not in only.table()


def test_a_reference_can_be_named():
    rules = {"a": SGDUpdate(0.1), "b": SGDUpdate(0.2)}
    assert quiet(rules, Bowls(1.0), n_steps=2, n_runs=2, reference="a").reference == "a"


# ---------------------------------------------------------------------------------------------- divergence


def test_runs_that_end_above_their_start_are_counted():
    # |1 - lr a| is .4 for a = 1 and 1.4 for a = 4, which every third problem has
    comparison = quiet({"sgd": SGDUpdate(0.6)}, Bowls(1.0, 1.0, 4.0), n_steps=4, n_runs=9)
    assert comparison.results["sgd"].is_diverged.tolist() == [False, False, True] * 3
    assert "3/9" in comparison.table()
    assert "one batch, so noise alone can put a run here" in comparison.table()


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (1, ("1 run of 1 step,", "rule  last loss  ", "Difference: of the last loss before the last update")),
        (2, ("2 runs of 2 steps,", "rule  last 2 losses  ", "the mean of the last 2 losses before the last update")),
        (
            10,
            (
                "10 runs of 10 steps,",
                "rule  last 10 losses  ",
                "the mean of the last ten losses before the last update",
            ),
        ),
    ],
)
def test_captions_count_runs_and_steps(n, words):
    table = quiet({"sgd": SGDUpdate(0.1)}, Bowls(1.0), n_steps=n, n_runs=n).table()
    assert all(each in table for each in words)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_shown_as_diverged(value):
    bad = torch.ones(12, 4)
    bad[-3:, 0] = value
    results = {"good": result(torch.ones(12, 4)), "bad": result(bad)}
    comparison = Comparison(results, "good", "last ten", {"task": "toy"}, 0)
    line = next(line for line in comparison.table().splitlines() if line.startswith("bad"))
    # last ten losses, all losses, difference
    assert line.split()[1:4] == ["diverged"] * 3
    assert "1/4" in line
    assert "nan" not in comparison.table()
    assert "inf" not in comparison.table()


def test_the_median_counts_a_diverged_run_as_the_worst():
    losses = torch.tensor([[1.0] * 3, [1.0, 2.0, math.nan]])
    comparison = Comparison({"sgd": result(losses)}, None, "final", {"task": "toy"}, 0)
    line = comparison.table().splitlines()[3]
    assert line.split()[1:3] == ["diverged", "2.0000"]


def test_the_accuracy_of_a_run_that_is_lost_is_not_that_of_guessing():
    task = MLPClassification("digits", (4,), split="evaluation")
    comparison = quiet({"sgd": SGDUpdate(3e38)}, task, n_steps=4, n_runs=2)
    assert comparison.results["sgd"].accuracies.isnan().all()


# -------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("score", ["last ten", "final"])
def test_columns_are_aligned(score):
    rules = {"a rule with a long name": LSTMUpdate(), "Adam": AdamUpdate(0.1), "RMSprop": RMSpropUpdate(1e9)}
    comparison = quiet(rules, RandomQuadratic(4), n_steps=3, n_runs=3, score=score, loss_unit="nats")
    titles, units, ruler, *rows = comparison.table().split("\n\n")[0].splitlines()
    assert len(rows) == len(rules)
    assert {len(row) for row in rows} == {len(titles), len(units), len(ruler)}
    for title, unit in (("all losses", "[nats]"), ("diverged", "[runs]"), ("state", "[B/param]")):
        end = max(titles.index(title) + len(title), units.index(unit) + len(unit))
        assert all(line[end - 1] != " " and line[end] == " " for line in (titles, units, *rows))


def test_the_markdown_table_has_as_many_cells_in_every_line():
    comparison = quiet({"Adam": AdamUpdate(0.1)}, RandomQuadratic(4), n_steps=2, n_runs=2)
    lines = [line for line in comparison.table(markdown=True).splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1


def test_a_table_of_text():
    text = draw_table([("rule", ""), ("loss", "[nats]")], [["a", "1"], ["long", "22"]])
    assert text == "rule    loss\n      [nats]\n------------\na          1\nlong      22"


def test_digits_have_an_accuracy_and_quadratics_have_none():
    digits = MLPClassification("digits", (4,), split="evaluation")
    rules = {"Adam": AdamUpdate(0.1)}
    assert "accuracy" in quiet(rules, digits, n_steps=1, n_runs=2).table()
    assert "accuracy" not in quiet(rules, RandomQuadratic(3), n_steps=1, n_runs=2).table()


def test_one_run_claims_no_interval():
    rules = {"Adam": AdamUpdate(0.1), "SGD": SGDUpdate(0.1)}
    table = quiet(rules, RandomQuadratic(3), n_steps=1, n_runs=1).table()
    assert "[one run]" in table
    assert "inf" not in table


# --------------------------------------------------------------------------------------------------- price


@pytest.mark.parametrize(
    ("rule", "per_coordinate"),
    [(SGDUpdate(0.1), 4), (RMSpropUpdate(), 4), (AdamUpdate(), 8), (LSTMUpdate(), 320)],
)
def test_bytes_of_state_per_parameter(rule, per_coordinate):
    state_bytes = quiet({"rule": rule}, RandomQuadratic(50), n_steps=1, n_runs=1).results["rule"].state_bytes
    # what is held once per tensor (step counts, 4 bytes each) is spread over 50 coordinates
    assert per_coordinate <= state_bytes <= per_coordinate + 8 / 50


def test_the_time_of_a_step_grows_with_the_work():
    task = MLPClassification("digits", (20,))
    quick, slow = (time_step(rule, task, n_steps=15, n_warmup=3) for rule in (SGDUpdate(0.1), LSTMUpdate()))
    assert 0 < quick < slow


def test_whether_a_rule_looks_across_coordinates_is_reported():
    rules = {"global": PortHamiltonianUpdate(), "local": PortHamiltonianUpdate(coordinatewise=True)}
    results = quiet(rules, RandomQuadratic(3), n_steps=1, n_runs=2).results
    assert (results["global"].crosses_coordinates, results["local"].crosses_coordinates) == (True, False)


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_runs": 0}, "Parameter `n_runs` should be a positive integer. Found `n_runs = 0`"),
        ({"n_steps": 0}, "Parameter `n_steps` should be a positive integer. Found `n_steps = 0`"),
        ({"reference": "Adma"}, "Parameter `reference` should be .* Found `reference = 'Adma'`"),
        ({"score": "best"}, "Parameter `score` should be one of last ten, final. Found `score = 'best'`"),
        (
            {"runs_per_batch": 0},
            "Parameter `runs_per_batch` should be a positive integer or None. Found `runs_per_batch = 0`",
        ),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        quiet({"Adam": AdamUpdate()}, RandomQuadratic(3), **{"n_steps": 2, "n_runs": 2, **options})


@pytest.mark.parametrize("task", [5, RandomQuadratic])
def test_what_is_no_task_is_refused(task):
    with pytest.raises(TypeError, match=r"Parameter `task` should be of class Task. Found one of class"):
        quiet({"Adam": AdamUpdate()}, task, n_steps=2, n_runs=2)


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="Parameter `rules` should be at least one rule"):
        quiet({}, RandomQuadratic(3), n_steps=1)


def test_evaluation_draws_from_streams_of_its_own():
    used = {0, VALIDATION_SEED, TUNING_SEED}
    assert len(used | {EVALUATION_SEED}) == 4


def test_rules_that_ship_are_compared_by_name_and_nothing_else_is_taken_for_a_rule():
    by_name, by_rule = (
        compare({"a": rule}, RandomQuadratic(), n_steps=2, n_runs=1, reference="a", progress_bar=False)
        for rule in ("lstm", load_pretrained("lstm"))
    )
    assert torch.equal(by_name.results["a"].losses, by_rule.results["a"].losses)
    for rule, kind, message in (
        ("ltsm", ValueError, r"`rules\['a'\]` should be one of .* Did you mean `lstm`"),
        (AdamUpdate, TypeError, r"`rules\['a'\]` should be an instance of UpdateRule or a name"),
    ):
        with pytest.raises(kind, match=message):
            compare({"a": rule}, RandomQuadratic(), n_steps=2, n_runs=1)
    with pytest.raises(TypeError, match=r"`rules` should be a dictionary, .* Found \['lstm'\]"):
        compare(["lstm"], RandomQuadratic(), n_steps=2, n_runs=1)
