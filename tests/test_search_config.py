"""Configurations of searches: what is read, what is refused, and those that ship."""

import pytest
from search_toys import TINY, write, written

from odeopt.meta import Backpropagation
from odeopt.meta.files import available_configs, load_config
from odeopt.meta.search import search
from odeopt.meta.search_files import load_search
from odeopt.rules import LSTMUpdate

optuna = pytest.importorskip("optuna")  # the extra that searches need

BROKEN = {
    "no search": ("[search", "[training.search", r"should have a section \[search\]. Found rule, task, training"),
    "unknown section": ("[training]", "[trainer]", r"should hold only base, rule, search, task, .*. Found `trainer`"),
    "missing section": (
        "[task]",
        "[rule.task]",
        r"should have the sections rule, task, training, and may have start and use. Found rule, training",
    ),
    "section that is a value": ('[search]\nsampler = "grid"\npruner = "none"\n', "", "section .search.|should be"),
    "unknown option": ("pruner =", "pruning =", r"\[search\] should hold only .*sampler.*. Found `pruning`"),
    "unknown sampler": ('"grid"', '"cma"', r"`sampler` in \[search\] should be one of grid, random, tpe. .*= 'cma'`"),
    "no sampler": ('sampler = "grid"', "", r"`sampler` in \[search\] should be one of .*. Found `sampler = None`"),
    "unknown pruner": ('"none"', '"hyperband"', "`pruner` in .* should be one of median, none. .*= 'hyperband'`"),
    "no number of trials": ('"grid"', '"tpe"', "`n_trials` in .* should be an integer of at least 1. .*= None`"),
    "too many trials": ('"grid"', '"grid"\nn_trials = 7', "`n_trials` .* at most 4, the size of the grid. .*= 7`"),
    "seed of a grid": ('"grid"', '"grid"\nseed = 1', "`seed` in .* should be left out where `sampler = .grid.`.*= 1`"),
    "warm-up of no pruner": ('"none"', '"none"\nwarmup_steps = 1', "`warmup_steps` in .* should be left out where"),
    "start of nothing": ('"none"', '"none"\nstartup_trials = 1', "`startup_trials` in .* should be left out where"),
    "truth value": ('"none"', '"median"\nwarmup_steps = true', "`warmup_steps` .* of at least 0. Found .* = True`"),
    "no space": ("[search.space]", "[search.room]", r"\[search\] should hold only .*space.*. Found `room`"),
    "empty space": ("training.lr = [0.1, 0.01]\nrule.initial_kappa = [0.03, 0.3]", "", "what is tried. Found"),
    "unknown place": (
        "training.lr",
        "meta.lr",
        "names such as training.lr, in one of rule, task, training. Found `meta`",
    ),
    "no place": ("training.lr", "lr", r"should hold names such as training.lr, .*. Found `lr`"),
    "too deep": (
        "training.lr",
        "training.meta.lr",
        r"with `training.meta.lr = 0.1`, .*: \[training\] should hold only .*. Found `meta`",
    ),
    "unknown setting": ("training.lr", "training.rate", r"with `training.rate = 0.1`.*: \[training\] .*. Found `rate`"),
    "unknown rule option": ("initial_kappa", "kappa", r"with .*`rule.kappa = 0.03`: \[rule\] .*. Found `kappa`"),
    "value out of range": ("[0.1, 0.01]", "[0.1, -1]", r"with `training.lr = -1`, .*`lr` should be a positive number"),
    "value of a rule": (
        "0.3]",
        "-3.0]",
        r"with .*`rule.initial_kappa = -3.0`: .*`initial_kappa` should be .*= -3.0`",
    ),
    "value of another type": (
        "[0.1, 0.01]",
        '[0.1, "a"]',
        "with `training.lr = 'a'`.*`lr` should be a positive number",
    ),
    "base value": ("horizon = 2", "horizon = 0", "`horizon` should be a positive integer. Found `horizon = 0`"),
    "empty list": ("[0.1, 0.01]", "[]", r"`training.lr` in .* should be a list of different values. .*= \[\]`"),
    "same twice": ("[0.1, 0.01]", "[1, 1.0]", r"`training.lr` in .* should be a list of different values"),
    "one value": ("[0.1, 0.01]", "0.1", r"`training.lr` in .* should be a list of values, or a table .*= 0.1`"),
    "range in a grid": (
        "[0.1, 0.01]",
        "{low = 0.1, high = 1.0}",
        "`training.lr` .* list of values where `sampler = .grid",
    ),
    "half a range": ("[0.1, 0.01]", "{low = 0.1}", "`training.lr` in .* with low and high.*= {'low': 0.1}`"),
    "unknown in a range": ("[0.1, 0.01]", "{low = 0, high = 1, q = 1}", "with low and high, and log or step"),
    "range upside down": ("[0.1, 0.01]", "{low = 1, high = 0.1}", "low <= high. must hold"),
    "range of words": ("[0.1, 0.01]", '{low = "a", high = "b"}', "a range of numbers"),
    "log of zero": (
        "[0.1, 0.01]",
        "{low = 0, high = 1, log = true}",
        "Optuna takes .*low.* must hold for .log=True.",
    ),
    "log and step": (
        "[0.1, 0.01]",
        "{low = 1, high = 9, log = true, step = 2}",
        "Optuna takes .*step.* `log` .* True",
    ),
    "step beside the end": ("[0.1, 0.01]", "{low = 0.1, high = 0.6, step = 0.2}", "is not divisible by `step`"),
    "step of zero": ("[0.1, 0.01]", "{low = 1, high = 2, step = 0}", "`step > 0` must hold"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_configuration_is_refused_with_key_and_value(tmp_path, name):
    old, new, match = BROKEN[name]
    with pytest.raises(ValueError, match=match):
        load_search(write(tmp_path, **{old: new}))


def test_last_value_of_a_list_and_the_ends_of_a_range_are_tried_before_the_work(tmp_path):
    for space in ("training.clip = {low = -1.0, high = 1.0}", "training.n_tasks = [1, 2, 0]"):
        with pytest.raises(ValueError, match=r"`training.clip = -1.0`|`training.n_tasks = 0`"):
            written(tmp_path, "random", 3, space)
    space = 'training.estimator.class = ["backpropagation", "es"]\ntraining.objective.eps = [1e-3, 0.0]\n'
    with pytest.raises(ValueError, match=r"with `.*class = 'backpropagation'`, `.*eps = 0.0`: .*`eps` should be a pos"):
        written(tmp_path, space=space)
    config = written(tmp_path, "random", 3, "task.dim = [3, 0]")
    with pytest.raises(ValueError, match=r"`dim`.*0"):  # seen when the tasks are built, before the first trial
        search(config, tmp_path / "study")
    assert not list((tmp_path / "study").glob("trial-*"))


@pytest.mark.parametrize(
    ("table", "drawn"),
    [
        ("{low = 0.1, high = 0.3, step = 0.1}", {0.1, 0.2, 0.3}),  # 0.2 / 0.1 is no integer in binary
        ("{low = 1, high = 9, step = 4}", {1, 5, 9}),
        ("{low = 1, high = 3, log = true}", {1, 2, 3}),
        ("{low = 2, high = 2}", {2}),
        ("[1, 5]", {1, 5}),
    ],
)
def test_what_is_tried_is_read_under_either_kind_of_key(tmp_path, table, drawn):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for key in ("training.clip", '"training.clip"'):
        config = written(tmp_path, "random", 1, f"{key} = {table}\n")
        values = {config.suggest(study.ask(), "training.clip") for _ in range(40)}
        assert {round(value, 12) for value in values} == drawn
        assert {type(value) for value in values} == {type(value) for value in drawn}
        assert config.at({"training.clip": 5}).training.clip == 5


def test_base_lends_its_sections_and_the_file_adds_to_them(tmp_path):
    head, tail = TINY.split("[search]")
    (tmp_path / "lent.toml").write_text(head, encoding="utf-8")
    own = 'base = "lent.toml"\n[rule]\nmodes = 2\n[training]\nseed = 3\n[search]' + tail
    config, plain = load_search(write(tmp_path, own)), load_search(write(tmp_path))
    assert config.sections["task"] == plain.sections["task"]
    assert config.sections["rule"] == plain.sections["rule"] | {"modes": 2}
    assert config.sections["training"] == plain.sections["training"] | {"seed": 3}
    with pytest.raises(FileNotFoundError, match=r"should be a TOML file or one of .*lstm-mnist.*. Found `no-such`"):
        load_search(write(tmp_path, own.replace("lent.toml", "no-such")))


@pytest.mark.parametrize(
    ("name", "found"),
    [("rule.class.x", "Parameter `class` should be a table .*'port-hamiltonian'`"),
     ("rule.hidden.0", r"Parameter `hidden` should be a table .* Found `hidden = \[3\]`")],
)  # fmt: skip
def test_what_is_tried_has_no_name_inside_of_a_value(tmp_path, name, found):
    text = write(tmp_path, **{"training.lr": name}).read_text()
    with pytest.raises(ValueError, match=rf"tiny.toml with `{name} = 0.1`.*: {found}"):
        load_search(write(tmp_path, text))


def test_options_of_the_use_are_those_of_the_base_and_of_the_file(tmp_path):
    head, tail = TINY.split("[search]")
    (tmp_path / "lent.toml").write_text(head + "[use]\nalignment_rate = 1.5\n", encoding="utf-8")

    def load(text):
        return load_search(write(tmp_path, text)).at({"training.lr": 0.1})

    assert load('base = "lent.toml"\n[search]' + tail).use == {"alignment_rate": 1.5}
    own = "[use]\nalignment_horizon = 9.0\n[search]" + tail
    assert load('base = "lent.toml"\n' + own).use == {"alignment_rate": 1.5, "alignment_horizon": 9.0}
    assert load(head + "[use]\nalignment_rate = 0.5\n[search]" + tail).use == {"alignment_rate": 0.5}
    with pytest.raises(ValueError, match=r"with `training.lr = 0.1`.*`alignment_horizon` should be 0.0 where"):
        load_search(write(tmp_path, head + own))  # what cannot be used is not trained first


def test_fewer_meta_steps_keep_the_number_of_validations(tmp_path):
    text = write(tmp_path, **{"n_meta_steps = 2": "n_meta_steps = 400", "every = 1": "every = 50"}).read_text()
    path = write(tmp_path, text.replace('"none"', '"median"\nwarmup_steps = 200'))
    config = load_search(path, n_meta_steps=40, n_trials=2)
    assert (config.sections["training"]["n_meta_steps"], config.sections["training"]["validate_every"]) == (40, 5)
    assert (config.warmup_steps, config.n_trials) == (20, 2)
    with pytest.raises(ValueError, match=r"`n_meta_steps` should be left out where .* searches over it"):
        load_search(write(tmp_path, **{"training.lr = [0.1, 0.01]": "training.n_meta_steps = [1, 2]"}), n_meta_steps=4)


def test_shipped_searches_load_and_are_no_training_configurations():
    names = available_configs("search")
    assert {"seed-grid-quadratic", "seed-grid-mnist", "port-hamiltonian-quadratic-tpe"} <= set(names)
    assert not set(names) & set(available_configs())
    for name in names:
        assert load_search(name).name == name
    with pytest.raises(FileNotFoundError, match="Found `seed-grid-mnist`"):
        load_config("seed-grid-mnist")


@pytest.mark.parametrize(
    ("name", "task"), [("seed-grid-quadratic", "RandomQuadratic"), ("seed-grid-mnist", "MLPClassification")]
)
def test_shipped_grids_are_those_of_the_seed_around_the_lstm(name, task):
    config = load_search(name)
    space = {"training.lr": (0.1, 0.01, 0.003, 0.001, 0.0001), "rule.output_scale": (0.1, 0.01, 0.001, 0.0001)}
    assert {key: tuple(tried) for key, tried in config.space.items()} == space
    assert config.n_trials == 20
    trial = config.at({"training.lr": 0.003, "rule.output_scale": 0.01})
    rule = trial.build_rule()
    assert type(rule) is LSTMUpdate
    assert rule.config["output_scale"] == 0.01
    assert trial.task["class"] == task
    assert (trial.training.lr, trial.training.estimator) == (0.003, Backpropagation(truncation=20, detach=True))
