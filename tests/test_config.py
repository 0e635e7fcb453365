"""Training configurations, the shipped ones among them, and the command that runs them."""

import math
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from rule_toys import draws, fields_of, run
from variants import train_variants

import odeopt
from odeopt.__main__ import main
from odeopt.cli import arguments
from odeopt.meta import Backpropagation, EvolutionStrategies, Hybrid, MetaConfig, MetaObjective, MetaResult
from odeopt.meta.files import available_configs, load_config
from odeopt.meta.search_files import load_search
from odeopt.rules import HamiltonianUpdate, LSTMUpdate, PortHamiltonianUpdate, UpdateRule
from odeopt.tasks import MLPClassification, RandomQuadratic
from odeopt.tasks.classification import SPLITS

QUADRATIC = """
[rule]
class = "port-hamiltonian"
modes = 1
hidden = [3]

[task]
class = "RandomQuadratic"
dim = 3

[training]
n_meta_steps = 4
n_tasks = 2
horizon = 3
validate_every = 2
n_validation_tasks = 2
"""


def write(folder, text=QUADRATIC, name="tiny.toml", **replaced):
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


# -------------------- reading


def test_configuration_holds_rule_task_and_training(tmp_path):
    config = load_config(write(tmp_path))
    assert config.name == "tiny"
    assert config.training == MetaConfig(n_meta_steps=4, n_tasks=2, horizon=3, validate_every=2, n_validation_tasks=2)
    rule = config.build_rule()
    assert type(rule) is PortHamiltonianUpdate
    assert rule.config | {"modes": 1, "hidden": [3]} == rule.config
    task = config.build_task()
    assert type(task) is RandomQuadratic
    assert task.dim == 3


@pytest.mark.parametrize(
    ("name", "rule_class"),
    [("port-hamiltonian", PortHamiltonianUpdate), ("lstm", LSTMUpdate), ("hamiltonian", HamiltonianUpdate)],
)
def test_rule_is_built_by_its_name_the_same_way_every_time(tmp_path, name, rule_class):
    text = f'[rule]\nclass = "{name}"\n[task]\nclass = "RandomQuadratic"\n[training]\nseed = 3\n'
    config, weights = load_config(write(tmp_path, text)), []
    for seed in (1, 2):
        before = torch.manual_seed(seed).get_state()
        rule = config.build_rule()
        assert torch.equal(before, torch.get_rng_state())
        assert type(rule) is rule_class
        weights.append(torch.nn.utils.parameters_to_vector(rule.parameters()))
    assert torch.equal(*weights)
    other = load_config(write(tmp_path, text.replace("seed = 3", "seed = 4"))).build_rule()
    assert not torch.equal(weights[0], torch.nn.utils.parameters_to_vector(other.parameters()))


def test_image_task_is_built_on_the_split_asked_for(tmp_path):
    text = QUADRATIC.replace("dim = 3", 'dataset = "digits"\nwidths = [5]\nactivation = "relu"')
    config = load_config(write(tmp_path, text.replace("RandomQuadratic", "MLPClassification")))
    train, held_out = config.build_task(), config.build_task("evaluation")
    assert type(train) is MLPClassification
    assert train.param_shapes["0.weight"] == (5, 64)
    assert (train.describe()["split"], held_out.describe()["split"]) == ("meta-train", "evaluation")
    assert config.build_task() is not train  # built anew: the configuration is not used up


BROKEN = {
    "not TOML": ('class = "port-hamiltonian"', "class = port", "tiny.toml is not valid TOML: .*line 3"),
    "missing argument": (
        'class = "RandomQuadratic"\ndim = 3',
        'class = "MLPClassification"',
        r"\[task\] of class MLPClassification should hold `dataset`, too",
    ),
    "missing section": (
        '[task]\nclass = "RandomQuadratic"\ndim = 3\n',
        "",
        r"should have the sections rule, task, training, and may have start and use. Found rule, training",
    ),
    "unknown section": (
        "[training]",
        "[trainer]",
        "sections rule, task, training, and may have start and use. Found rule, task, trainer",
    ),
    "unknown rule": (
        '"port-hamiltonian"',
        '"adam"',
        r"`class` in \[rule\] should be one of port-hamiltonian, lstm, hamiltonian, or package.module.*Found `adam`",
    ),
    "no rule": ('class = "port-hamiltonian"', "", r"`class` in \[rule\] should be one of .*. Found `None`"),
    "unknown task": (
        '"RandomQuadratic"',
        '"Rosenbrock"',
        r"`class` in \[task\] should be one of Autoencoder, .*, VisionTransformer, Mixture, or .*. Found `Rosenbrock`",
    ),
    "unknown rule option": ("modes = 1", "mode = 1", r"\[rule\] should hold only .*modes.*. Found `mode`"),
    "unknown task option": ("dim = 3", "size = 3", r"\[task\] should hold only dim. Found `size`"),
    "split": (
        '"RandomQuadratic"\ndim = 3',
        '"MLPClassification"\ndataset = "digits"\nsplit = "evaluation"',
        r"\[task\] should hold only .*widths. Found `split`",
    ),
    "unknown setting": (
        "\nn_tasks = 2",
        "\ntasks = 2",
        r"\[training\] should hold only .*n_tasks.*. Found `tasks`",
    ),
    "setting out of range": (
        "horizon = 3",
        "horizon = 0",
        "`horizon` should be a positive integer. Found `horizon = 0`",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_configuration_is_refused_with_the_place_and_what_was_found(tmp_path, name):
    old, new, match = BROKEN[name]
    with pytest.raises(ValueError, match=match):
        load_config(write(tmp_path, **{old: new}))


@pytest.mark.parametrize(
    "change", [("lr", '"fast"'), ("clip", "[1, 2]"), ("horizon", "[3]")], ids=lambda change: change[0]
)
def test_setting_of_the_wrong_type_is_refused_by_name(tmp_path, change):
    name, value = change
    text = QUADRATIC.replace("horizon = 3\n", "") + f"{name} = {value}\n"
    with pytest.raises(ValueError, match=f"`{name}` should be"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize("name", ["no-such-configuration", "folder/missing.toml"])
def test_missing_configuration_lists_the_shipped_ones(name):
    with pytest.raises(FileNotFoundError, match=f"`name` should be a TOML file or one of .*. Found `{name}`"):
        load_config(name)


def test_misspelt_configuration_is_told_the_one_that_was_meant():
    with pytest.raises(FileNotFoundError, match=r"`port-hamiltonian-minst`. Did you mean `port-hamiltonian-mnist`\?"):
        load_config("port-hamiltonian-minst")


# -------------------- the shipped ones


def test_every_trained_rule_ships_with_its_configuration():
    trained = {name for name in odeopt.available_pretrained() if name.endswith(("-quadratic", "-mnist"))}
    assert trained <= set(available_configs())


@pytest.mark.parametrize("name", available_configs())
def test_shipped_configuration_builds_a_rule_that_works(name):
    config = load_config(name)
    assert config.name == name
    rule = config.build_rule()
    updates, _ = run(rule, draws(3, 8, dtype=torch.float32), shape=(2, 4))
    assert updates.isfinite().all()
    assert config.task["class"] in ("MLPClassification", "RandomQuadratic", "Mixture")
    if config.task["class"] == "RandomQuadratic":
        assert config.build_task().param_shapes


def test_every_task_that_has_splits_is_built_on_the_one_asked_for(tmp_path):
    for text in (
        '"TextTransformer"\nwidth = 4',
        '"CoordinateNetwork"\nwidth = 4',
        '"ImageNetwork"\ndataset = "digits"',
    ):
        config = load_config(write(tmp_path, QUADRATIC.replace('"RandomQuadratic"\ndim = 3', text)))
        assert [config.build_task(split).describe()["split"] for split in SPLITS] == list(SPLITS)


def test_families_of_the_mixture_of_networks_can_be_trained_and_held_out():
    config = load_config("port-hamiltonian-spectral").with_dataset("digits")
    families = config.task["families"]
    assert sum(family["share"] for family in families) == pytest.approx(1)
    mixture, seen = config.build_task(), set()
    for number in range(150):
        draw = mixture.draw(number, seed=0)
        task = getattr(draw.task, "task", draw.task)
        if type(task) in seen:
            continue
        seen.add(type(task))
        params = {name: p.requires_grad_() for name, p in draw.task.init_params(draw.indices, 0).items()}
        losses = [
            draw.task.loss(params, sample(draw.indices, 0, 0))
            for sample in (draw.task.sample_batch, draw.task.sample_held_out)
        ]
        grads = torch.autograd.grad(losses[0].sum(), list(params.values()))
        assert all(x.isfinite().all() for x in (*losses, *grads))
    assert {task.__name__ for task in seen} == {family["class"] for family in families}


@pytest.mark.parametrize("name", sorted(set(available_configs()) & set(odeopt.available_pretrained())))
def test_shipped_rule_is_the_one_of_its_configuration(name):
    config, rule = load_config(name), odeopt.load_pretrained(name)
    assert rule.config == config.in_use(config.build_rule()).config
    assert rule.trained_for.get("use", {}) == config.use
    assert rule.trained_for["horizon"] == config.task.get("horizons", [config.training.horizon])[-1]
    assert rule.trained_for["task"] == config.task
    assert rule.trained_for["config"] == name


# -------------------- tables of estimator and meta-loss

TABLES = """
[training.estimator]
class = "hybrid"
dampings = [1.0, 0.9]

[training.estimator.evolution]
n_pairs = 3

[training.objective]
weights = "late"
eps = 1e-3
"""


def test_tables_are_the_objects_that_they_name(tmp_path):
    training = load_config(write(tmp_path, QUADRATIC + TABLES)).training
    assert training.estimator == Hybrid(dampings=(1.0, 0.9), evolution=EvolutionStrategies(n_pairs=3))
    assert training.objective == MetaObjective("late", eps=1e-3)
    assert load_config(write(tmp_path)).training.estimator == Backpropagation()


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"hybrid"', '"sgd"', r"`class` in \[training.estimator\] should be one of backpropagation, .*Found `sgd`"),
        ('"hybrid"', "3", r"`class` in \[training.estimator\] should be one of .*Found `3`"),
        ('class = "hybrid"', "", r"`class` in \[training.estimator\] should be one of .*Found `None`"),
        ('"hybrid"', '"es"', r"\[training.estimator\] should hold only .*sigma.*. Found `dampings`"),
        ("dampings", "damping", r"\[training.estimator\] should hold only .*threshold.*. Found `damping`"),
        ("0.9]", "1.1]", r"\[training.estimator\]: Parameter `dampings` should be .*Found `dampings = \[1.0, 1.1\]`"),
        ("n_pairs = 3", "pairs = 3", r"\[training.estimator.evolution\] should hold only .*. Found `pairs`"),
        ("n_pairs = 3", "n_pairs = 0", r"\[training.estimator.evolution\]: Parameter `n_pairs` should be .*= 0`"),
        ("n_pairs = 3", 'class = "pes"', r"\[training.estimator\]: Parameter `evolution` should be evolution strat"),
        ("eps = 1e-3", "log_eps = 1e-3", r"\[training.objective\] should hold only eps, .*. Found `log_eps`"),
        (
            '"late"',
            '"soon"',
            r"\[training.objective\]: Parameter `weights` should be one of .*Found `weights = 'soon'`",
        ),
        (TABLES, "[training.estimator.class]", r"`class` in \[training.estimator\] should be one of .*Found `{}`"),
        (
            TABLES,
            'estimator = "es"',
            r"`estimator` should be a section \[training.estimator\]. Found `estimator = 'es'`",
        ),
    ],
)
def test_broken_tables_are_refused_with_section_key_and_value(tmp_path, old, new, match):
    with pytest.raises(ValueError, match=match):
        load_config(write(tmp_path, QUADRATIC + TABLES, **{old: new}))


@pytest.mark.parametrize("horizons", ["3", "[]", "[5]", "[9, 4]", "[0, 4]", '"long"'])
def test_horizons_of_a_mixture_are_refused_before_anything_is_built(tmp_path, horizons):
    text = f"""
    [rule]
    class = "lstm"

    [task]
    class = "Mixture"
    horizons = {horizons}

    [[task.families]]
    class = "RandomQuadratic"
    dim = 3

    [training]
    n_meta_steps = 1
    """
    with pytest.raises(ValueError, match=r"`horizons` in \[task\] should be two rising integers of at least 1. Found"):
        load_config(write(tmp_path, text))


# -------------------- classes of the user's

OWN = """
from dataclasses import dataclass
from odeopt.meta import Backpropagation
from odeopt.rules import HamiltonianUpdate
from odeopt.tasks import RandomQuadratic

class OwnRule(HamiltonianUpdate):
    pass

class OwnTask(RandomQuadratic):
    def __init__(self, size):
        super().__init__(size)

@dataclass(frozen=True, kw_only=True)
class OwnEstimator(Backpropagation):
    key = ""
    speed: float = 1.0

class Rooms:
    Inner = OwnTask

class DatedRule(HamiltonianUpdate):
    def __init__(self, since=None):
        super().__init__()
        self.config = {"since": since}

class LSTMUpdate(HamiltonianUpdate):
    pass

def function():
    pass
"""


@pytest.fixture
def own_classes(tmp_path, monkeypatch):
    """A configuration that names classes of a module beside it."""
    (tmp_path / "own_classes.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_classes", raising=False)
    text = QUADRATIC.replace('"port-hamiltonian"\nmodes = 1\nhidden = [3]', '"own_classes:OwnRule"')
    text = text.replace('"RandomQuadratic"\ndim = 3', '"own_classes:Rooms.Inner"\nsize = 3')
    yield text + '[training.estimator]\nclass = "own_classes:OwnEstimator"\nspeed = 2.0\n'
    for name in ("OwnRule", "DatedRule"):
        UpdateRule.registry.pop(name, None)


def test_rule_task_and_estimator_may_be_classes_of_the_users(own_classes, tmp_path, capsys):
    path = write(tmp_path, own_classes)
    config = load_config(path)
    assert [type(x).__name__ for x in (config.build_rule(), config.build_task())] == ["OwnRule", "OwnTask"]
    assert config.build_task().dim == 3
    assert (type(config.training.estimator).__name__, config.training.estimator.speed) == ("OwnEstimator", 2.0)
    assert train(path, tmp_path) == 0
    rule = odeopt.load(tmp_path / "out" / "rule.safetensors")
    assert type(rule).__name__ == "OwnRule"
    assert rule.trained_for["task"] == {"class": "own_classes:Rooms.Inner", "size": 3}
    assert rule.trained_for["training"]["estimator"]["class"] == "own_classes:OwnEstimator"


def test_families_of_a_mixture_may_be_classes_of_the_users(own_classes, tmp_path):
    families = '"Mixture"\n[[task.families]]\nclass = "own_classes:OwnTask"\nchoices.size = [2, 3]'
    config = load_config(write(tmp_path, own_classes.replace('"own_classes:Rooms.Inner"\nsize = 3', families)))
    assert {config.build_task().draw(number, 0).task.dim for number in range(9)} == {2, 3}


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (
            "own_classes:OwnRule",
            "own_classes:NoRule",
            r"`class` in \[rule\] should be .*own_classes:NoRule` \(.*NoRule",
        ),
        (
            "own_classes:OwnRule",
            "no_classes:OwnRule",
            r"`class` in \[rule\] should be .*\(No module named 'no_classes'",
        ),
        ("own_classes:OwnRule", ":OwnRule", r"`class` in \[rule\] should be .*Found `:OwnRule`"),
        ("own_classes:OwnRule", "own_classes:OwnTask", "package.module:Name of a subclass of UpdateRule. Found `own_"),
        ("own_classes:Rooms.Inner", "own_classes:function", "a subclass of Task. Found `own_classes:function`"),
        ("own_classes:Rooms.Inner", "odeopt.tasks:Task", "a subclass of Task. Found `odeopt.tasks:Task`"),
        ("size = 3", "dim = 3", r"\[task\] should hold only size. Found `dim`"),
        ("speed", "pace", r"\[training.estimator\] should hold only .*speed.*. Found `pace`"),
    ],
)
def test_class_that_cannot_be_used_is_refused(own_classes, tmp_path, old, new, match):
    with pytest.raises(ValueError, match=match):
        load_config(write(tmp_path, own_classes, **{old: new}))


# -------------------- the command


@pytest.mark.parametrize("command", ["train", "search"])
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ('DatedRule"\nsince = 2026-01-01 #', "rule.safetensors: field `config` should be what JSON can hold"),
        ("LSTMUpdate", "Parameter `rule` should be .* by a name that no rule of odeopt has"),
    ],
)
def test_rule_that_cannot_be_saved_is_refused_before_the_training(
    own_classes, tmp_path, monkeypatch, capsys, command, name, match
):
    for work in ("train.meta_train", "search.search"):
        monkeypatch.setattr(f"odeopt.cli.{work}", lambda *args, **options: pytest.fail("begun"))
    searched = '[search]\nsampler = "grid"\n[search.space]\ntraining.lr = [0.1]\n'
    config = write(tmp_path, own_classes + (searched if command == "search" else ""), OwnRule=name)
    out = tmp_path / "out" / "rule.safetensors"
    assert main([command, "--config", str(config), "--out", str(out), "--folder", str(tmp_path / "run")]) == 2
    assert re.search(match, capsys.readouterr().err)
    assert list(out.parent.iterdir()) == []


def train(config, tmp_path, *options):
    out, folder = tmp_path / "out" / "rule.safetensors", tmp_path / "run"
    return main(["train", "--config", str(config), "--out", str(out), "--folder", str(folder), *options])


def test_command_trains_saves_and_refuses_to_overwrite(tmp_path, capsys):
    config, out = write(tmp_path), tmp_path / "out" / "rule.safetensors"
    assert train(config, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "tiny, meta-seed 0: 4 of 4 meta-steps" in printed
    assert f"saved {out}" in printed
    rule, fields = odeopt.load(out), fields_of(out)
    assert rule.config == load_config(config).build_rule().config
    assert (fields["horizon"], fields["task"]) == (3, {"class": "RandomQuadratic", "dim": 3})
    assert fields["trained_for"]["config"] == "tiny"
    assert fields["trained_for"]["training"]["n_meta_steps"] == 4
    kept = out.read_bytes()
    assert train(config, tmp_path) == 2
    assert f"--out` should be a new file, or --overwrite be given. Found `{out}`" in capsys.readouterr().err
    assert out.read_bytes() == kept
    assert train(config, tmp_path, "--overwrite") == 0


def test_stopped_command_saves_nothing_and_the_same_command_continues(tmp_path, capsys):
    config, out = write(tmp_path), tmp_path / "out" / "rule.safetensors"
    assert train(config, tmp_path, "--stop-after", "0") == 0
    assert "2 of 4 meta-steps" in (printed := capsys.readouterr().out)
    assert f"the same command continues from {tmp_path / 'run'}" in printed
    assert not out.exists()
    assert train(config, tmp_path) == 0
    assert "4 of 4 meta-steps" in capsys.readouterr().out
    whole = tmp_path / "whole"
    assert train(config, whole) == 0
    for a, b in zip(
        odeopt.load(out).parameters(),
        odeopt.load(whole / "out" / "rule.safetensors").parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)


START = """
[start]
n_meta_steps = 4
n_tasks = 2
horizon = 2
validate_every = 1
n_validation_tasks = 2

[start.estimator]
class = "backpropagation"
truncation = 1
detach = true

[start.objective]
weights = "uniform"
"""


def test_training_goes_on_from_the_rule_of_its_start(tmp_path, capsys):
    path, out = write(tmp_path, QUADRATIC + START, "staged.toml"), tmp_path / "out" / "rule.safetensors"
    config = load_config(path).with_seed(5)
    assert [(stage.seed, stage.n_meta_steps, stage.estimator.detach) for stage in config.stages] == [
        (5, 4, True),
        (5, 4, False),
    ]
    assert train(path, tmp_path, "--seed", "5") == 0
    printed = capsys.readouterr().out
    assert printed.index("staged, start, meta-seed 5: 4 of 4") < printed.index("staged, meta-seed 5: 4 of 4")
    rule = config.build_rule()
    first = odeopt.meta_train(rule, config.build_task(), config.start)
    second = odeopt.meta_train(rule, config.build_task(), config.training)
    found = odeopt.load(out)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), rule.parameters(), strict=True))
    assert found.trained_for["start"]["estimator"]["detach"]
    assert found.trained_for["validation_loss"] == second.best_score
    assert found.trained_for["validations"] == [list(pair) for pair in second.validation]
    assert config.trained_for(first, second)["seconds"] == round(first.seconds + second.seconds, 1)
    without = config.build_rule()
    odeopt.meta_train(without, config.build_task(), config.training)
    assert not all(torch.equal(a, b) for a, b in zip(found.parameters(), without.parameters(), strict=True))


def test_training_with_a_start_is_continued_in_either(tmp_path, capsys):
    path, whole = write(tmp_path, QUADRATIC + START, "staged.toml"), tmp_path / "whole"
    assert train(path, whole) == 0
    capsys.readouterr()
    seen = []
    for _ in range(8):
        assert train(path, tmp_path, "--stop-after", "0") == 0
        printed = capsys.readouterr().out
        seen.append(re.findall(r"(\d) of \d meta-steps", printed))
        if "saved" in printed:
            break
        assert f"best.safetensors; the same command continues from {tmp_path / 'run'}" in printed
    # the end of the start is a stop like any other
    assert seen == [["2"], ["4", "2"], ["4", "4"]]
    for a, b in zip(
        odeopt.load(tmp_path / "out" / "rule.safetensors").parameters(),
        odeopt.load(whole / "out" / "rule.safetensors").parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("is_first_without", [True, False])
def test_training_without_a_start_is_not_taken_for_one_with_it(tmp_path, is_first_without):
    plain, staged = write(tmp_path), write(tmp_path, QUADRATIC + START, "staged.toml")
    first, second = (plain, staged) if is_first_without else (staged, plain)
    assert train(first, tmp_path) == 0
    assert train(second, tmp_path, "--overwrite") == 0  # in the same folder
    assert train(second, tmp_path / "new") == 0
    found, wanted = (odeopt.load(each / "out" / "rule.safetensors") for each in (tmp_path, tmp_path / "new"))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_meta_steps = 4", "n_meta_step = 4", r"\[start\] should hold only .*n_meta_steps.*Found `n_meta_step`"),
        ("n_meta_steps = 4", "seed = 2", r"\[start\] should hold only .*Found `seed`"),
        ("n_meta_steps = 4", "n_meta_steps = -2", r"tiny.toml: \[start\]: Parameter `n_meta_steps` should be .* = -2`"),
        (
            "truncation = 1",
            "truncation = 0",
            r"tiny.toml: \[start.estimator\]: Parameter `truncation` should be .* = 0`",
        ),
    ],
)
def test_bad_start_is_refused(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, QUADRATIC + START.replace(old, new)))


def test_start_is_refused_where_nothing_would_train_it(tmp_path):
    config = load_config(write(tmp_path, QUADRATIC + START))
    with pytest.raises(ValueError, match="Parameter `config` should be of one training, without a start and `use`"):
        train_variants(config, {"as it is": {}}, tmp_path / "variants")
    space = '[search]\nsampler = "grid"\n[search.space]\ntraining.lr = [0.1]\n'
    search = write(tmp_path, f'base = "{tmp_path / "tiny.toml"}"\n' + space, "search.toml")
    with pytest.raises(
        ValueError, match=r"Parameter `base` should be of one training: .*tiny.toml has a section \[start\]"
    ):
        load_search(search)


USE = "[use]\nalignment_rate = 1.5\n"


def test_rule_is_trained_without_the_options_of_its_use_and_saved_with_them(tmp_path):
    path, plain = write(tmp_path, QUADRATIC + USE, "used.toml"), write(tmp_path)
    assert train(path, tmp_path) == train(plain, tmp_path / "plain") == 0
    used, trained = (odeopt.load(each / "out" / "rule.safetensors") for each in (tmp_path, tmp_path / "plain"))
    assert all(torch.equal(a, b) for a, b in zip(used.parameters(), trained.parameters(), strict=True))
    assert (used.alignment_rate, trained.alignment_rate) == (1.5, 0.0)
    assert used.trained_for["use"] == {"alignment_rate": 1.5}
    assert "use" not in trained.trained_for
    with pytest.raises(ValueError, match="Parameter `config` should be of one training, without a start and `use`"):
        train_variants(load_config(path), {"as it is": {}}, tmp_path / "variants")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("alignmentrate = 1.0", r"\[use\] should hold only .*alignment_rate.* Found `alignmentrate`"),
        ('class = "lstm"', r"\[use\] should hold only .* Found `class`"),
        ("alignment_rate = -1", "`alignment_rate` should be a non-negative number. Found `alignment_rate = -1`"),
        ("memory = 2", "`options` should be such that the weights stay as they are"),
    ],
)
def test_bad_use_is_refused_before_the_training(tmp_path, line, message, monkeypatch, capsys):
    monkeypatch.setattr("odeopt.cli.train.meta_train", lambda *args, **options: pytest.fail("trained"))
    path = write(tmp_path, f"{QUADRATIC}[use]\n{line}\n")
    assert train(path, tmp_path) != 0
    assert re.search(message, capsys.readouterr().err)


def test_results_go_to_runs_under_the_name_of_the_configuration(tmp_path, monkeypatch):
    config = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", str(config)]) == 0
    assert (tmp_path / "runs" / "tiny.safetensors").exists()
    assert (tmp_path / "runs" / "tiny" / "checkpoint.pt").exists()


def test_meta_seed_of_the_command_line_names_the_result_and_gives_another_rule(tmp_path, monkeypatch, capsys):
    config = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", str(config)]) == 0
    for seed in (0, 7):
        assert main(["train", "--config", str(config), "--seed", str(seed)]) == 0
    rules = {
        name: odeopt.load(tmp_path / "runs" / f"{name}.safetensors") for name in ("tiny", "tiny-seed0", "tiny-seed7")
    }
    assert {name: rule.trained_for["training"]["seed"] for name, rule in rules.items()} == {
        "tiny": load_config(config).training.seed, "tiny-seed0": 0, "tiny-seed7": 7,
    }  # fmt: skip
    assert {rule.trained_for["config"] for rule in rules.values()} == {"tiny"}
    first, second = (torch.nn.utils.parameters_to_vector(rules[f"tiny-seed{seed}"].parameters()) for seed in (0, 7))
    assert not torch.equal(first, second)
    for seed in ("-1", str(2**63)):
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--config", str(config), "--seed", seed])
        wanted = f"argument --seed: should be an integer of at least 0 and below 2^63; found {seed}"
        assert wanted in capsys.readouterr().err


def test_other_images_take_the_place_of_all():
    digits = load_config("port-hamiltonian").with_dataset("digits")
    families = {family["class"]: family for family in digits.task["families"]}
    assert families["MLPClassification"]["dataset"] == "digits"
    assert "dataset" not in families["MLPClassification"]["choices"]
    assert families["MLPClassification"]["choices"]["activation"]
    assert "dataset" not in families["NoisyQuadratic"]
    assert digits.build_task()
    quadratic = load_config("lstm-quadratic")
    assert quadratic.with_dataset("digits").task == quadratic.task  # which has no images
    single = load_config("lstm-mnist").with_dataset("digits").build_task()
    assert single.sizes[0] == 64


@pytest.mark.parametrize("options", ["modes = 0", 'modes = "two"', 'solver = "rk5"'])
def test_rule_that_cannot_be_built_is_one_clear_line(tmp_path, capsys, options):
    assert train(write(tmp_path, **{"modes = 1": options}), tmp_path) == 2
    error = capsys.readouterr().err
    name = options.split()[0]
    assert error.startswith("python -m odeopt train: ")
    assert f"`{name}` should be" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["unknown rule option", "not TOML", "setting out of range"])
def test_command_fails_with_one_clear_line(tmp_path, capsys, name):
    old, new, _ = BROKEN[name]
    assert train(write(tmp_path, **{old: new}), tmp_path) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("python -m odeopt train: ")
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_module_runs_as_a_program_and_reports_errors_by_its_exit_status(tmp_path):
    command = [sys.executable, "-m", "odeopt", "train", "--config", str(tmp_path / "missing.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "missing.toml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("given", [[], ["train"], ["fly"], ["train", "--config", "x", "--fast"]])
def test_command_line_is_checked(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(given)
    assert "python -m odeopt" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "tune"])
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    printed = capsys.readouterr().out
    options = [line for line in printed.splitlines() if line.strip().startswith("--")]
    assert len(options) >= 2
    # an option without help would be followed by the next one, or by nothing
    lines = printed.splitlines()
    for option in options:
        rest = option.strip().split("  ", 1)[1:] or [lines[lines.index(option) + 1]]
        assert rest[0].strip()
        assert not rest[0].strip().startswith("--")


@pytest.fixture
def chosen(monkeypatch):
    """Numbers of threads that torch is asked for."""
    numbers = []
    monkeypatch.setattr("torch.set_num_threads", numbers.append)
    return numbers


@pytest.mark.parametrize(
    ("environment", "given", "wanted"),
    [(None, [], [1]), ("2", [], []), (None, ["--threads", "3"], [3]), ("2", ["--threads", "3"], [3])],
)
def test_commands_and_examples_compute_on_one_thread_unless_told(
    monkeypatch, capsys, chosen, environment, given, wanted
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    parse_example = arguments.parser("An example.", "seed").parse_args
    for parse in (lambda given: main(["solvers", "--problems", "none", *given]), parse_example):
        parse(given)
        assert chosen == wanted
        assert ("computing on one thread; for more, set --threads" in capsys.readouterr().err) is (wanted == [1])
        chosen.clear()


@pytest.mark.parametrize("found", ["0", "-1", "many"])
def test_number_of_threads_is_checked(capsys, chosen, found):
    with pytest.raises(SystemExit):
        main(["matrix", "--threads", found])
    assert f"--threads: should be a positive integer; found {found}" in capsys.readouterr().err
    assert chosen == []


@pytest.mark.parametrize("command", ["train", "search"])
@pytest.mark.parametrize("found", ["-1", "nan", "inf", "soon"])
def test_time_to_stop_after_is_checked(capsys, command, found):
    with pytest.raises(SystemExit):
        main([command, "--config", "lstm-mnist", f"--stop-after={found}"])
    assert f"--stop-after: should be a number of seconds of at least 0; found {found}" in capsys.readouterr().err


def test_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_bytes(b'class = "\xff"')
    with pytest.raises(ValueError, match=r"tiny.toml is not valid TOML: .*utf-8"):
        load_config(path)


class Sized(RandomQuadratic):
    def __init__(self, *sizes):
        super().__init__(3)


def test_a_class_may_take_any_number_of_arguments(tmp_path):
    text = QUADRATIC.replace('class = "RandomQuadratic"\ndim = 3', f'class = "{__name__}:Sized"')
    assert isinstance(load_config(write(tmp_path, text)).build_task(), RandomQuadratic)


def test_tuning_sees_before_the_work_that_its_table_can_be_written(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr("odeopt.cli.tune.make_baselines_table", lambda out, **options: made.append(out))
    out = tmp_path / "new" / "folder" / "table.json"
    assert main(["tune", "--out", str(out)]) == 0
    out.write_text("mine")
    assert main(["tune", "--out", str(out)]) == 2
    assert "`--out` should be a new file, or --overwrite be given" in capsys.readouterr().err
    assert main(["tune", "--out", str(out), "--overwrite"]) == 0
    assert made == [out, out]


def test_validations_that_are_not_finite_are_noted_as_none(tmp_path):
    config = load_config(write(tmp_path, QUADRATIC, "wild.toml"))
    result = MetaResult(config.build_rule(), 0.5, 4, validation=[(0, math.inf), (2, math.nan), (4, 0.5)])
    odeopt.save(result.rule, tmp_path / "rule.safetensors", trained_for=config.trained_for(result))
    noted = odeopt.load(tmp_path / "rule.safetensors").trained_for
    assert noted["validations"] == [[0, None], [2, None], [4, 0.5]]
    assert noted["validation_loss"] == 0.5


@pytest.mark.parametrize("command", ["train", "search", "tune"])
@pytest.mark.parametrize("name", ["folder", "tiny.toml/rule", "/proc/rule"])
def test_file_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, capsys, command, name):
    work = {"train": "train.meta_train", "search": "search.search", "tune": "tune.make_baselines_table"}[command]
    monkeypatch.setattr(f"odeopt.cli.{work}", lambda *args, **options: pytest.fail("begun"))
    out, searched = tmp_path / name, '[search]\nsampler = "grid"\n[search.space]\ntraining.lr = [0.1]\n'
    config = write(tmp_path, QUADRATIC + (searched if command == "search" else ""))
    (tmp_path / "folder").mkdir()
    given = [] if command == "tune" else ["--config", str(config), "--folder", str(tmp_path / "run")]
    assert main([command, *given, "--out", str(out), "--overwrite"]) == 2
    assert re.search(f"`--out` should be a file.* Found (the folder )?`{out}`", capsys.readouterr().err)


@pytest.mark.parametrize("option", [[], ["--stop-after", "0"]], ids=["whole", "stopped"])
def test_training_without_a_finite_validation_saves_no_rule(tmp_path, monkeypatch, capsys, option):
    monkeypatch.setattr("odeopt.meta.trainer.validation_score", lambda *args, **options: math.inf)
    with pytest.warns(RuntimeWarning, match="No validation came out finite"):
        assert train(write(tmp_path), tmp_path, *option) == (0 if option else 2)
    printed = capsys.readouterr()
    told = "stopped early before any validation" if option else "without a rule: no validation came out finite"
    assert told in printed.out + printed.err
    assert not list(tmp_path.rglob("*.safetensors"))
