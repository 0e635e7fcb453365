"""The suite: its problems, its runs, its opponents, and files that continue."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import odeopt.suite.evaluate
from odeopt import load_pretrained
from odeopt.__main__ import main
from odeopt.evaluation import student_interval
from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate, SGDUpdate
from odeopt.suite import Contender, available_problems, evaluate_suite, learned, make_problem, opponents, run, untrained
from odeopt.suite.evaluate import TUNING_SEED, neighbour, steps_of
from odeopt.suite.opponents import OPPONENTS, REFERENCE, MuonAndAdamW, hidden_matrices
from odeopt.suite.problems import english, next_character
from odeopt.suite.result import Outcome, Suite
from odeopt.suite.run import Run, smoothed

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")


def adam(model, n_steps):
    return torch.optim.Adam(model.parameters(), 1e-3)


def tiny(name, n_steps=3):
    return make_problem(name, dataset="digits", n_steps=n_steps)


# ------------------------------------------------------------------------------------- problems


@pytest.mark.parametrize("name", available_problems())
def test_problems_are_learned_from_equal_starts_and_batches(name):
    """The same seed gives the same run to the bit, another seed another one; each problem can be fitted."""
    problem = tiny(name, 12)
    first, again = (run(problem, adam, 0) for _ in range(2))
    other = run(tiny(name, 1), adam, 1)
    assert torch.equal(first.losses, again.losses)
    assert first.held_out == again.held_out
    assert first.losses[0] != other.losses[0]
    assert first.losses[-4:].mean() < first.losses[:4].mean()
    assert math.isfinite(first.held_out)


@pytest.mark.parametrize("name", available_problems())
def test_building_a_network_leaves_the_global_generator_alone(name):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    problem = tiny(name)
    weights = [[*problem.make_model(seed).state_dict().values()] for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not all(map(torch.equal, weights[0], weights[2]))


def test_text_is_ascii_and_says_nothing_twice():
    text = english()
    paragraphs = text.split("\n\n")
    assert text.isascii()
    assert len(text) > 200_000
    assert len(set(paragraphs)) == len(paragraphs)


# ----------------------------------------------------------------------------------------- runs


def test_smoothed_losses_are_means_of_a_twentieth_of_the_run():
    losses = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses[3] = 1e30  # is gone five steps later, which a running sum would not forget
    means = smoothed(losses)
    for step in range(100):
        assert means[step] == pytest.approx(losses[max(0, step - 4) : step + 1].mean().item(), rel=1e-12)


def test_the_run_is_the_loop_that_a_user_writes():
    """Also the held-out loss: statistics of BatchNorm are those of training, and the mode is that of evaluation."""
    problem = tiny("convnet", 4)
    result = run(problem, adam, 5)
    model = problem.make_model(5)
    optimizer = adam(model, 4)
    for step in range(4):
        loss = problem.loss(model, problem.batch(step, 5))
        assert loss.item() == result.losses[step]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    held_out = [*problem.data.held_out(5)]
    images, labels = (torch.cat([*parts]) for parts in zip(*((b.inputs[0], b.target) for b in held_out), strict=True))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(images), labels).item()
    assert result.held_out == pytest.approx(expected, rel=1e-5)  # summed in another order
    model.train()
    assert result.held_out != pytest.approx(problem.loss(model, held_out[0]).item(), rel=1e-3)


def test_a_run_that_diverges_stops_and_is_infinite():
    problem = tiny("few-examples", 50)
    result = run(problem, lambda model, n_steps: torch.optim.SGD(model.parameters(), 1e20), 0)
    assert math.isfinite(result.losses[0])
    assert result.train == result.held_out == math.inf


def test_averaged_weights_are_evaluated_with_statistics_of_their_own():
    """An optimizer that hands out other weights for evaluation is asked for them, and BatchNorm follows."""

    class Averaged(torch.optim.SGD):
        def train(self):
            modes.append("train")

        def eval(self):
            modes.append("eval")
            with torch.no_grad():
                for group in self.param_groups:
                    for param in group["params"]:
                        param.mul_(1.5)

    modes, models = [], []

    def make(kind):
        def make_optimizer(model, n_steps):
            models.append(model)
            return kind(model.parameters(), 1e-9)

        return make_optimizer

    problem = tiny("convnet", 60)
    run(problem, make(Averaged), 0)
    run(problem, make(torch.optim.SGD), 0)
    assert modes == ["train", "eval"]
    averaged, plain = (model.norm.running_var for model in models)
    # of 60 + 50 batches, the last 50 through weights 1.5 as large: all but .9^50 of it is theirs
    torch.testing.assert_close(averaged, 1.5**2 * plain, rtol=0.1, atol=0)


# ------------------------------------------------------------------------------------- opponents


@pytest.mark.parametrize("problem", ["deep-transformer", "recurrent", "vit", "convnet", "few-examples"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[needs_muon] * (name == "muon")) for name in OPPONENTS])
def test_opponents_move_every_parameter_and_learn(name, problem):
    found, models = opponents()[0], []

    def make(model, n_steps):
        models.append(model)
        return found[name].make(model, n_steps, found[name].rates[-1])

    problem = tiny(problem, 4)
    result = run(problem, make, 0)
    start = problem.make_model(0)
    assert result.losses[-1].isfinite()
    for (key, before), after in zip(start.named_parameters(), models[0].parameters(), strict=True):
        assert not torch.equal(before, after), key


@pytest.mark.parametrize("name", ["adamw", "nesterov", pytest.param("muon", marks=needs_muon), "prodigy"])
def test_learning_rates_end_at_zero_after_the_warm_up(name):
    model, rates = nn.Module(), []
    model.body, model.head = nn.Linear(3, 3), nn.Linear(3, 1)
    optimizer = OPPONENTS[name].make(model, 100, 0.25)
    parts = getattr(optimizer, "_parts", [optimizer])
    for _ in range(100):
        rates.append(parts[0].param_groups[0]["lr"])
        optimizer.zero_grad()
        model.head(model.body(torch.ones(2, 3))).sum().backward()
        optimizer.step()
    n_rising = 5 if name == "adamw" else 0
    wanted = [0.25 * (step + 1) / 5 for step in range(n_rising)]
    n_falling = 100 - n_rising
    wanted += [0.125 * (1 + math.cos(math.pi * step / n_falling)) for step in range(n_falling)]
    assert rates == pytest.approx(wanted)
    assert all(part.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12) for part in parts)


@pytest.mark.parametrize(
    ("problem", "others"),
    [
        ("deep-transformer", {"stem.weight", "positions.weight", "head.weight"}),
        ("recurrent", {"stem.weight", "head.weight"}),
        ("convnet", {"head.weight"}),
        ("few-examples", {"head.weight"}),
    ],
)
def test_muon_takes_all_matrices_but_embeddings_and_the_last_layer(problem, others):
    model = tiny(problem).make_model(0)
    hidden = {id(param) for param in hidden_matrices(model)}
    rest = {name for name, param in model.named_parameters() if id(param) not in hidden}
    assert rest == others | {name for name, param in model.named_parameters() if param.ndim < 2}


@needs_muon
def test_muon_steps_each_matrix_of_a_stack():
    """As torch's Muon does matrices of their own; there need be nothing for AdamW."""
    torch.manual_seed(0)
    model = nn.Module()
    model.experts, model.head = nn.Parameter(torch.randn(3, 4, 6)), nn.Identity()
    matrices = [nn.Parameter(x.clone()) for x in model.experts.detach()]
    ours, theirs = MuonAndAdamW(model, 8, 0.02), torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01)
    for step in range(2):
        model.experts.grad = torch.randn(3, 4, 6)
        for matrix, grad in zip(matrices, model.experts.grad, strict=True):
            matrix.grad = grad.clone()
        theirs.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / 8))
        ours.step()
        theirs.step()
    torch.testing.assert_close(model.experts.detach(), torch.stack([x.detach() for x in matrices]))


@needs_muon
def test_muon_steps_each_block_of_a_matrix():
    torch.manual_seed(0)
    model = nn.Module()
    model.body, model.head = nn.GRU(4, 5, bias=False), nn.Identity()
    blocks = [nn.Parameter(x.clone()) for weight in model.body.parameters() for x in weight.detach().chunk(3)]
    ours, theirs = MuonAndAdamW(model, 8, 0.02), torch.optim.Muon(blocks, lr=0.02, weight_decay=0.01)
    for param in model.body.parameters():
        param.grad = torch.randn_like(param)
    for block, grad in zip(blocks, (x for param in model.body.parameters() for x in param.grad.chunk(3)), strict=True):
        block.grad = grad.clone()
    ours.step()
    theirs.step()
    found = [x for param in model.body.parameters() for x in param.detach().chunk(3)]
    for x, y in zip(found, blocks, strict=True):
        torch.testing.assert_close(x, y.detach())


@needs_muon
def test_muon_steps_convolutions_as_matrices():
    """As torch's Muon does a matrix of its own, whose gradient is the convolution's, reshaped."""
    torch.manual_seed(0)
    model = nn.Module()
    model.body, model.head = nn.Conv2d(2, 5, 3), nn.Linear(5, 1)
    matrix = nn.Parameter(model.body.weight.detach().flatten(1).clone())
    ours, theirs = MuonAndAdamW(model, 8, 0.02), torch.optim.Muon([matrix], lr=0.02, weight_decay=0.01)
    for step in range(8):
        x = torch.randn(4, 2, 3, 3)
        ours.zero_grad()
        model.head(model.body(x).flatten(1).relu()).square().mean().backward()
        matrix.grad = model.body.weight.grad.flatten(1).clone()
        theirs.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / 8))
        ours.step()
        theirs.step()
        torch.testing.assert_close(model.body.weight.flatten(1), matrix)


def test_opponents_that_lack_a_package_are_left_out_with_a_note(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    found, notes = opponents()
    assert [*found] == ["adam", "adamw", "nesterov"]
    assert [note.split(" is left out")[0] for note in notes] == [
        OPPONENTS[name].title for name in ("muon", "schedule-free", "prodigy")
    ]
    assert "torch 2.9" in notes[0]
    assert 'pip install -c constraints.txt -e ".[opponents]"' in notes[1]


def test_a_learned_rule_is_told_the_steps_unless_it_is_not():
    rule, model = load_pretrained("port-hamiltonian"), nn.Linear(2, 1)
    told, untold = (learned(rule, "mine", is_told=is_told) for is_told in (True, False))
    optimizers = [contender.make(model, 77, 1.0) for contender in (told, untold)]
    assert all(isinstance(optimizer, LearnedOptimizer) for optimizer in optimizers)
    assert [optimizer.param_groups[0]["total_steps"] for optimizer in optimizers] == [77, None]
    assert [told.name, untold.name] == ["mine", "mine, not told"]
    assert told.settings != untold.settings != learned(untrained(rule), "mine", is_told=False).settings


def test_an_untrained_rule_has_weights_of_its_own_and_the_configuration_of_the_rule():
    rule = load_pretrained("port-hamiltonian")
    torch.manual_seed(1)
    first = untrained(rule).state_dict()
    torch.manual_seed(2)
    assert untrained(rule).config == rule.config
    assert all(torch.equal(x, first[name]) for name, x in untrained(rule).state_dict().items())
    assert any(not torch.equal(x, first[name]) for name, x in rule.state_dict().items())


# ---------------------------------------------------------------------------------------- suite


def small(*names, **options):
    """Contenders of a rule each, AdamW among them in name."""
    contenders = {name: Contender(name, name.title(), by_rate(AdamUpdate), (1e-3,), {"is": name}) for name in names}
    return contenders | options


def by_rate(kind):
    return lambda model, n_steps, lr: LearnedOptimizer(model.parameters(), kind(lr))


def evaluate(problem, contenders, **options):
    return evaluate_suite({problem.name: problem}, contenders, **{"n_runs": 2, "progress_bar": False} | options)


def test_ratios_are_those_of_paired_runs():
    problem = tiny("few-examples", 40)
    contenders = small(REFERENCE, "same", sgd=Contender("sgd", "SGD", by_rate(SGDUpdate), (0.02,), is_learned=True))
    suite = evaluate(problem, contenders, n_runs=3)
    assert suite.ratio(problem.name, "same") == suite.ratio(problem.name, "same", "held_out") == (1, 1, 1)
    makers = (contenders["sgd"], contenders[REFERENCE])
    runs = [[run(problem, lambda m, n, c=c: c.make(m, n, c.rates[0]), seed) for seed in range(3)] for c in makers]
    for of in ("train", "held_out"):
        logs = torch.tensor([[getattr(one, of) for one in by_seed] for by_seed in runs]).log()
        expected = torch.tensor(student_interval(logs[0] - logs[1])).exp().tolist()
        assert suite.ratio(problem.name, "sgd", of) == pytest.approx(expected, rel=1e-4)  # six digits are kept
    assert "SGD: train loss at most 1 times AdamW's on" in suite.table()
    assert suite.table(markdown=True).startswith("| perceptron, 2,000 examples | lr | train | ratio |")


def test_steps_to_a_loss_are_the_first_at_which_it_is_reached():
    curves = torch.tensor([[3.0, 3.0, math.inf], [2.0, 2.5, math.inf], [1.0, 2.4, math.inf], [1.5, 2.3, math.inf]])
    nothing = torch.zeros(3)
    outcome = Outcome(0.1, False, nothing, nothing, nothing, curves, torch.tensor([25, 50, 75, 100]))
    assert outcome.steps_to(torch.tensor([1.2, 2.4, 9.0])).tolist() == [75, 75, math.inf]
    assert outcome.steps_to(torch.tensor([2.0, 0.5, 9.0])).tolist() == [50, math.inf, math.inf]


def test_no_run_comes_to_a_loss_that_is_not_finite_and_diverged_runs_have_no_time():
    ends = torch.tensor([1.0, math.inf, 2.0])
    curves, steps = torch.stack((torch.full((3,), 3.0), ends)), torch.tensor([5, 10])
    outcome = Outcome(0.1, False, ends, ends, torch.tensor([9.0, 0.3, 11.0]), curves, steps)
    assert outcome.steps_to(ends).tolist() == [10, math.inf, 10]
    assert outcome.run_seconds == 9.0
    nowhere = outcome._replace(train=torch.full((3,), math.inf))
    assert math.isnan(nowhere.run_seconds)


def test_a_reference_that_diverges_is_named_and_nothing_is_better_than_it(made):
    wild = {REFERENCE: replace(grid_of(10.0)[REFERENCE])}
    suite = evaluate(tiny("vit"), wild | {"mine": replace(grid_of(0.1)[REFERENCE], name="mine", is_learned=True)})
    assert "the reference diverged" in suite.table()
    assert "at most 1 times AdamW's on 0 of 1 problems" in suite.summary("mine")
    assert suite.table().count("never") == 2


@pytest.mark.parametrize(("name", "wanted"), [("coordinates", 1e-2), ("few-examples", 1.0)])
def test_cross_entropies_are_told_apart_down_to_the_rounding_of_single_precision_and_others_further(name, wanted):
    def outcome(loss):
        return Outcome(0.1, False, *torch.full((3, 2), loss).double(), torch.full((1, 2), loss), torch.tensor([3]))

    problem = tiny(name)
    outcomes = {name: {REFERENCE: outcome(1e-8), "mine": outcome(1e-10)}}
    suite = Suite({name: problem}, small(REFERENCE, "mine"), outcomes, 2)
    assert suite.ratio(name, "mine").mean == pytest.approx(wanted)
    assert suite.ratio(name, REFERENCE, reference="mine").mean == pytest.approx(1 / wanted)


def test_the_reference_is_at_its_own_loss_at_the_end_at_the_latest():
    suite = evaluate(tiny("few-examples", 45), small(REFERENCE))
    outcome = suite.outcomes["few-examples"][REFERENCE]
    assert torch.equal(outcome.curves[-1], outcome.train)
    assert (outcome.steps_to(outcome.train) <= 45).all()


@pytest.mark.parametrize("n_steps", [1, 7, 200, 201, 1000, 1999])
def test_curves_are_thinned_and_end_with_the_run(n_steps):
    steps = steps_of(n_steps)
    assert len(steps) == min(200, n_steps)
    assert steps[-1] == n_steps
    assert (steps.diff() > 0).all()


def test_neighbours_are_the_rates_of_the_grids():
    for contender in OPPONENTS.values():
        for low, high in zip(contender.rates, contender.rates[1:], strict=False):
            assert neighbour(low, 1) == high
            assert neighbour(high, -1) == low


@pytest.fixture
def made(monkeypatch):
    """Runs that are made, each a learning rate and a seed.

    The train loss is least at .1, the held-out loss at .01; rates above 5 diverge.
    """

    def fake(problem, make_optimizer, seed, *, device):
        lr = make_optimizer(None, problem.n_steps)
        calls.append((lr, seed))
        train, held_out = (1 + abs(math.log10(lr / best)) if lr <= 5 else math.inf for best in (0.1, 0.01))
        return Run(torch.full((problem.n_steps,), train, dtype=torch.float64), held_out, 1.0)

    calls = []
    monkeypatch.setattr(odeopt.suite.evaluate, "run", fake)
    return calls


def rescaled(problem):
    """The network of a problem, from larger weights."""
    network = problem.make_network()
    for weight in network.parameters():
        weight.data *= 3
    return network


def grid_of(*rates, **settings):
    return {REFERENCE: Contender(REFERENCE, "AdamW", lambda model, n_steps, lr: lr, rates, settings)}


@pytest.mark.parametrize(
    ("rates", "n_extensions", "tried", "lr", "is_edge"),
    [
        ((0.03, 0.1, 0.3), 3, [], 0.1, False),
        ((1e-3, 3e-3), 3, [0.01, 0.03, 0.1], 0.1, True),
        ((1e-2, 3e-2), 3, [0.1, 0.3], 0.1, False),
        ((3.0, 10.0), 3, [1.0, 0.3, 0.1], 0.1, True),
        ((10.0, 30.0), 3, [3.0, 1.0, 0.3], 0.3, True),  # all diverge: down
        ((10.0, 30.0), 0, [], 10.0, True),
        ((1e-3, 3e-3), 0, [], 3e-3, True),
        ((1e-3,), 3, None, 1e-3, False),
    ],
)
def test_rates_are_chosen_on_a_seed_of_their_own_and_beyond_the_grid_if_need_be(
    made, rates, n_extensions, tried, lr, is_edge
):
    outcome = evaluate(tiny("vit"), grid_of(*rates), n_extensions=n_extensions).outcomes["vit"][REFERENCE]
    assert (outcome.lr, outcome.is_edge) == (lr, is_edge)
    trials = [] if tried is None else [(rate, TUNING_SEED) for rate in (*rates, *tried)]
    assert made == [*trials, (lr, 0), (lr, 1)]


def test_few_examples_are_tuned_on_the_held_out_loss(made):
    for name, lr in (("few-examples", 0.01), ("perceptron", 0.1)):
        assert evaluate(tiny(name), grid_of(3e-3, 0.01, 0.1, 0.3)).outcomes[name][REFERENCE].lr == lr


def test_a_divergence_is_counted_and_its_ratio_is_infinite(made):
    contenders = grid_of(0.1) | {"wild": replace(grid_of(10.0)[REFERENCE], name="wild", is_learned=True)}
    suite = evaluate(tiny("vit"), contenders)
    assert suite.outcomes["vit"]["wild"].n_diverged == 2
    assert suite.ratio("vit", "wild").mean == math.inf
    assert "worst diverged (vit)" in suite.summary("wild")
    assert "2 of 2 runs diverged" in suite.summary("wild")
    assert "diverged" in suite.table()


# ------------------------------------------------------------------------------------------ file


def test_a_suite_continues_where_it_was_interrupted(made, tmp_path, monkeypatch):
    path, whole = tmp_path / "suite.json", evaluate(tiny("vit"), grid_of(0.03, 0.1, 0.3))
    everything, n_left = [*made], 3
    fake = odeopt.suite.evaluate.run

    def interrupted(*args, **options):
        nonlocal n_left
        if n_left == 0:
            raise KeyboardInterrupt
        n_left -= 1
        return fake(*args, **options)

    monkeypatch.setattr(odeopt.suite.evaluate, "run", interrupted)
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny("vit"), grid_of(0.03, 0.1, 0.3), path=path)
    assert len(json.loads(path.read_text())["runs"]) == 3
    n_left = -1
    continued = evaluate(tiny("vit"), grid_of(0.03, 0.1, 0.3), path=path)
    assert made == everything
    assert continued.table() == whole.table()
    evaluate(tiny("vit"), grid_of(0.03, 0.1, 0.3), path=path)
    assert made == everything


@pytest.mark.parametrize(
    ("problem", "contenders", "is_new"),
    [
        (tiny("recurrent", 3), grid_of(0.1, rule="a"), False),
        (tiny("recurrent", 4), grid_of(0.1, rule="a"), True),
        (tiny("deep-transformer", 3), grid_of(0.1, rule="a"), True),
        (tiny("recurrent", 3), grid_of(0.1, rule="b"), True),
        (tiny("recurrent", 3), grid_of(0.3, rule="a"), True),
        (replace(tiny("recurrent", 3), criterion=lambda *of: 100 * next_character(*of)), grid_of(0.1, rule="a"), True),
        (
            replace(tiny("recurrent", 3), make_network=lambda: rescaled(tiny("recurrent", 3))),
            grid_of(0.1, rule="a"),
            True,
        ),
    ],
)
def test_runs_of_other_settings_are_made_anew(made, tmp_path, problem, contenders, is_new):
    path = tmp_path / "suite.json"
    evaluate(tiny("recurrent", 3), grid_of(0.1, rule="a"), path=path)
    before = path.read_text()
    evaluate(problem, contenders, path=path)
    assert (len(made) == 4) == is_new
    assert json.loads(before)["runs"].items() <= json.loads(path.read_text())["runs"].items()


def test_two_suites_may_write_to_one_file(made, tmp_path, monkeypatch):
    path, fake = tmp_path / "suite.json", odeopt.suite.evaluate.run

    def meanwhile(*args, **options):
        monkeypatch.setattr(odeopt.suite.evaluate, "run", fake)
        evaluate(tiny("recurrent"), grid_of(0.1), path=path)
        return fake(*args, **options)

    monkeypatch.setattr(odeopt.suite.evaluate, "run", meanwhile)
    evaluate(tiny("vit"), grid_of(0.1), path=path)
    assert len(json.loads(path.read_text())["runs"]) == 4


def test_infinite_losses_come_back_from_the_file(made, tmp_path):
    for _ in range(2):
        outcome = evaluate(tiny("vit"), grid_of(10.0), path=tmp_path / "suite.json").outcomes["vit"][REFERENCE]
        assert (outcome.train == math.inf).all()
        assert (outcome.curves == math.inf).all()
    assert len(made) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"runs": {"a": {"train": 1.0}}}', '{"runs": {"a": 3}}'])
def test_a_damaged_file_is_refused_before_the_first_run(made, tmp_path, text):
    path = tmp_path / "suite.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: not a suite that can be continued"):
        evaluate(tiny("vit"), grid_of(0.1), path=path)
    assert made == []
    assert path.read_text() == text


def test_a_curve_of_another_length_is_refused(made, tmp_path):
    path = tmp_path / "suite.json"
    evaluate(tiny("vit"), grid_of(0.1), path=path)
    content = json.loads(path.read_text())
    next(iter(content["runs"].values()))["curve"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{path}: not a suite .*: field `curve` should have 3 numbers. Found 2"):
        evaluate(tiny("vit"), grid_of(0.1), path=path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_problem("imagenet"), "Parameter `name` should be one of transformer.* Found `name = 'imagenet'`"),
        (lambda: tiny("vit", 0), "Parameter `n_steps` should be a positive integer or None. Found `n_steps = 0`"),
        (
            lambda: evaluate(tiny("vit"), grid_of(0.1), n_runs=0),
            "Parameter `n_runs` should be a positive integer. Found",
        ),
        (
            lambda: evaluate(tiny("vit"), grid_of(0.1), n_extensions=-1),
            "`n_extensions` should be an integer of at least 0. Found",
        ),
        (lambda: evaluate(tiny("vit"), {}), "Parameter `contenders` should be contenders with 'adamw' among them"),
        (
            lambda: evaluate(tiny("vit"), grid_of(0.1) | {"mine": grid_of(0.1)[REFERENCE]}),
            r"`contenders` should be by their own names. Found `contenders = \{'mine': 'adamw'\}`",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("options", "title"), [({}, "The suite"), ({"title": "Others"}, "Others")])
def test_figure_has_the_title_that_it_is_given(made, tmp_path, options, title):
    path = evaluate(tiny("vit"), grid_of(0.1, 0.3)).plot(tmp_path / "figure.svg", **options)
    assert f"<!-- {title}, " in path.read_text()  # matplotlib writes each text as a comment beside its outlines


@pytest.mark.parametrize("loss", [0.0, 1e-3, float("nan")])
def test_figure_shows_losses_that_are_zero_or_not_finite(made, tmp_path, loss):
    suite = evaluate(tiny("vit"), grid_of(0.1, 0.3))
    for outcome in suite.outcomes["vit"].values():
        outcome.curves[1:] = loss
    assert suite.plot(tmp_path / "figure.png").stat().st_size > 0


# --------------------------------------------------------------------------------------- command


def test_command_prints_tables_and_writes_a_file_and_a_figure(tmp_path, capsys):
    words = ["suite", "--quick", "--problems", "few-examples", "coordinates", "--contenders", "prodigy", "--runs", "1"]
    words += ["--untold", "--untrained", "--out", str(tmp_path)]
    assert main(words) == 0
    first = capsys.readouterr().out
    rules = (f"port-hamiltonian-spectral{suffix}" for suffix in ("", ", not told", ", untrained"))
    for name in ("AdamW, warm-up and cosine", "Prodigy, cosine", *rules):
        assert sum(line.startswith(f"{name}  ") for line in first.splitlines()) == 2, name
    assert "Adam, 1e-3" not in first
    assert (tmp_path / "suite.png").stat().st_size > 10_000
    records = json.loads((tmp_path / "suite.json").read_text())["runs"]
    assert len(records) == 2 * (3 + 1 + 3)
    assert {record["settings"]["n_steps"] for record in records.values()} == {20}
    assert main(words) == 0
    assert capsys.readouterr().out == first  # seconds included: nothing was run again


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule", "nothing"], "Parameter `name` should be one of"),
        (["--rule", "lstm", "--rule", "lstm"], "Parameter `--rule` should give rules of different names. Found 'lstm'"),
    ],
)
def test_command_names_bad_rules(words, message, tmp_path, capsys):
    assert main(["suite", "--quick", "--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
