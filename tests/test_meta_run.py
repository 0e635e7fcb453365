"""Parts of a meta-training run that are easily forgotten: buffers, devices, ranks with unlike numbers of estimates."""

import copy
import math

import pytest
import torch
from meta_toys import configured
from rank_toys import on_threads
from rule_toys import flat_weights
from test_meta_hybrid import rule_of, train
from test_meta_train import tiny_rule

from odeopt.meta import Hybrid, MetaConfig, meta_train
from odeopt.meta import trainer as trainer_module
from odeopt.meta.distributed import ALONE
from odeopt.meta.files import load_config
from odeopt.tasks import Mixture, RandomQuadratic, TaskFamily

f64 = torch.float64


def test_buffers_that_are_not_numbers_on_a_line_are_kept_as_they_are():
    rule = rule_of()
    rule.register_buffer("n", torch.tensor(3))
    rule.register_buffer("flag", torch.tensor(True))
    config = MetaConfig(n_meta_steps=2, n_tasks=2, horizon=3, n_validation_tasks=2, averaging=0.5)
    meta_train(rule, RandomQuadratic(2, dtype=f64), config, progress_bar=False)
    assert (rule.n.item(), rule.flag.item()) == (3, True)


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_resumed_weights_lie_where_the_rule_is(tmp_path, monkeypatch):
    config = MetaConfig(n_meta_steps=2, n_tasks=2, horizon=3, n_validation_tasks=2, averaging=0.5)
    task = RandomQuadratic(2)
    meta_train(tiny_rule(), task, config, folder=tmp_path, progress_bar=False)
    rule = tiny_rule().to("meta")  # in the place of another device
    run = trainer_module._Run(rule, task, config, task, tmp_path, trainer_module.current_world())
    monkeypatch.setattr(trainer_module, "are_close", lambda weights, others: True)  # which have no values there
    run.resume()
    run.close()
    for weights in (run.best_weights, run.averaged):
        assert {value.device.type for value in weights.values()} == {"meta"}


def test_a_step_without_any_finite_estimate_moves_nothing(monkeypatch):
    seen = []

    def broken(self, rule, task, objective, *, indices, **options):
        seen.append(flat_weights(rule))
        value = math.nan if len(seen) > 4 else 1.0  # from the third meta-step on
        for p in rule.parameters():
            p.grad = torch.full_like(p, value)
        yield torch.tensor(1.0, dtype=f64)

    monkeypatch.setattr(Hybrid, "gradients", broken)
    result = train(n_meta_steps=5, n_tasks=2)
    assert result.n_skipped_nonfinite == 6
    assert not torch.equal(seen[2], seen[4])
    assert torch.equal(seen[4], seen[8])


@pytest.mark.parametrize("size", [2, 3])
def test_truncated_draws_count_alike_on_any_number_of_ranks(size):
    def mixture():
        return Mixture([TaskFamily(RandomQuadratic, {"dim": 2, "dtype": f64})], horizons=(4, 12), n_problems=2)

    horizons = [mixture().draw(number, 0).horizon for number in range(6)]
    assert len({math.ceil(horizon / 4) for horizon in horizons}) > 1
    rule = rule_of()  # built here: threads that draw weights share torch's generator

    def first_step(world, n_tasks):
        own, task = copy.deepcopy(rule), mixture()
        config = configured(n_meta_steps=2, n_tasks=n_tasks, truncation=4, n_validation_tasks=1)
        run = trainer_module._Run(own, task, config, task, None, world)
        for _ in run.episode():
            pass
        return flat_weights(own), run.result.meta_losses

    alone, losses = first_step(ALONE, 6)
    _, got = on_threads(size, lambda world: first_step(world, 6 // size))
    for weights, others in got:
        # sums in another order
        torch.testing.assert_close(weights, alone, rtol=1e-12, atol=1e-12)
        assert others == pytest.approx(losses, rel=1e-12)


TINY = """
[rule]
class = "port-hamiltonian"

[task]
class = "Mixture"

[[task.families]]
class = "MLPClassification"
dataset = "digits"
[task.families.choices]
widths = [[4]]
activation = ["tanh"]

[training]
n_meta_steps = 1
"""


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('["tanh"]', '["tanh", "rellu"]', r"`activation` should be one of .* Found `activation = 'rellu'`"),
        ('"digits"', '"mnist"', "mnist"),
        ('["tanh"]', "3", r"`choices` in \[task.families\] should hold lists of values"),
    ],
)
def test_what_a_mixture_lacks_shows_before_the_training(tmp_path, old, new, error):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.replace(old, new))
    with pytest.raises((ValueError, RuntimeError), match=error):
        load_config(path).build_task(data_dir=tmp_path / "empty")


def test_horizon_of_a_mixture_is_its_greatest(tmp_path):
    path = tmp_path / "tiny.toml"
    for line, horizon in (("", 300), ("horizons = [7, 40]", 40)):
        path.write_text(TINY.replace('class = "Mixture"', f'class = "Mixture"\n{line}'))
        config = load_config(path)
        assert config.trained_for(trainer_module.MetaResult(config.build_rule()))["horizon"] == horizon


def test_time_spent_on_validation_counts_over_all_pieces(tmp_path, monkeypatch):
    now = [100.0]

    def validate(*args, **options):
        now[0] += 5.0
        return 1.0

    monkeypatch.setattr(trainer_module, "validation_score", validate)
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: now[0])
    config = MetaConfig(n_meta_steps=4, n_tasks=2, horizon=3, validate_every=2)
    options = {"folder": tmp_path, "progress_bar": False}
    untrained = meta_train(rule_of(), RandomQuadratic(2, dtype=f64), config, on_validation=lambda *_: True, **options)
    assert (untrained.meta_losses, untrained.seconds) == ([], 5.0)
    first = meta_train(rule_of(), RandomQuadratic(2, dtype=f64), config, stop_after=9.0, **options)
    assert (len(first.meta_losses), first.seconds) == (2, 10.0)  # validated before and after two meta-steps
    assert meta_train(rule_of(), RandomQuadratic(2, dtype=f64), config, **options).seconds == 15.0
