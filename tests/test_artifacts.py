"""A saved rule comes back as it was, or not at all: every field of the file is checked."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from rule_toys import fields_of
from torch import nn

import odeopt
from odeopt import artifacts
from odeopt.artifacts import available_pretrained, fingerprint, load, load_pretrained, save
from odeopt.rules import (
    AdamUpdate,
    HamiltonianUpdate,
    LSTMUpdate,
    PortHamiltonianUpdate,
    UpdateRule,
)

TRAINED_FOR = {
    "horizon": 100,
    "task": {"name": "mnist", "widths": [784, 20, 10]},
    "meta_steps": 150,
    "seed": 3,
}


class Toy(UpdateRule):
    def __init__(self, *, n: int = 2) -> None:
        super().__init__(n=n)
        self.w = nn.Parameter(torch.arange(1.0, n + 1))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("low", torch.ones(2, 2, dtype=torch.bfloat16))
        self.register_buffer("nothing", torch.zeros(0))

    def init_state(self, param):
        return ()

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        return -self.w.sum() * grad, state


RULES = {
    "toy": Toy,
    "adam": lambda: AdamUpdate(0.3, betas=(0.8, 0.95)),
    "lstm": lambda: LSTMUpdate(preprocess=True, hidden_size=4, output_scale=0.01),
    "hamiltonian": lambda: HamiltonianUpdate(normalize=True),
    "port-hamiltonian": lambda: PortHamiltonianUpdate(modes=3, solver="midpoint", hidden=(8,)),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "toy.safetensors"
    save(Toy(), path, trained_for=TRAINED_FOR)
    return path


def contents(path):
    with safetensors.safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name).clone() for name in names}, file.metadata()


def rewrite(path, edit, *, seal=True):
    """Edit weights and metadata in place; ``seal`` them with a checksum that is right, as a forger would."""
    weights, metadata = contents(path)
    edit(weights, metadata)
    if seal:
        rest = {name: text for name, text in metadata.items() if name != "sha256"}
        metadata["sha256"] = json.dumps(artifacts.checksum(weights, rest))
    safetensors.torch.save_file(weights, path, metadata)


def put(**fields):
    return lambda weights, metadata: metadata.update({name: json.dumps(v) for name, v in fields.items()})


# -------------------- what is saved comes back


@pytest.mark.parametrize("name", RULES)
def test_loaded_rule_is_the_saved_one(name, tmp_path):
    torch.manual_seed(0)
    rule = RULES[name]()
    save(rule, tmp_path / "rule.safetensors", trained_for=TRAINED_FOR)
    loaded = load(tmp_path / "rule.safetensors")
    assert type(loaded) is type(rule)
    assert loaded.config == rule.config
    assert loaded.trained_for == TRAINED_FOR
    assert loaded.state_dict().keys() == rule.state_dict().keys()
    for key, value in rule.state_dict().items():
        assert loaded.state_dict()[key].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[key], value)
    assert all(weight.requires_grad for weight in loaded.parameters())
    param, grad = torch.randn(5), torch.randn(5)
    for ours, theirs in zip(*(r(grad, r.init_state(param), param=param) for r in (rule, loaded)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_metadata_tells_scale_solver_horizon_task_and_version(tmp_path):
    save(RULES["lstm"](), tmp_path / "lstm", trained_for=TRAINED_FOR)
    save(RULES["port-hamiltonian"](), tmp_path / "ph", trained_for={"horizon": 50, "task": "quadratic"})
    lstm, ph = fields_of(tmp_path / "lstm"), fields_of(tmp_path / "ph")
    assert (lstm["class"], lstm["output_scale"], lstm["solver"]) == ("LSTMUpdate", 0.01, None)
    assert (ph["class"], ph["output_scale"], ph["solver"]) == ("PortHamiltonianUpdate", None, "midpoint")
    assert (ph["horizon"], ph["task"]) == (50, "quadratic")
    assert lstm["trained_for"] == TRAINED_FOR
    assert lstm["config"]["hidden_size"] == 4
    assert lstm["library_version"] == artifacts.__version__
    assert len(lstm["sha256"]) == 64


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_weights_keep_their_dtype_whatever_the_default(default, path):
    torch.set_default_dtype(default)
    try:
        assert load(path).w.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_loading_leaves_the_callers_generator_alone(tmp_path):
    save(RULES["lstm"](), tmp_path / "lstm", trained_for=TRAINED_FOR)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(tmp_path / "lstm")
    assert torch.equal(torch.rand(3), expected)


def test_loaded_rule_is_on_the_cpu_whatever_the_default_device(tmp_path):
    save(RULES["port-hamiltonian"](), tmp_path / "ph", trained_for=TRAINED_FOR)
    with torch.device("meta"):
        rule = load(tmp_path / "ph")
    assert {tensor.device.type for tensor in (*rule.parameters(), *rule.buffers())} == {"cpu"}


def test_loaded_weights_do_not_change_with_the_file(path):
    rule = load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(rule.w, torch.tensor([1.0, 2.0]))


# -------------------- saving is all or nothing


def test_existing_file_is_kept_unless_overwriting_is_asked_for(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"`overwrite` should be True or False. Found `overwrite = 'no'`"):
        save(Toy(n=3), path, trained_for=TRAINED_FOR, overwrite="no")
    with pytest.raises(FileExistsError, match=r"`overwrite` be True. Found `path = .*toy.safetensors`"):
        save(Toy(n=3), path, trained_for=TRAINED_FOR)
    assert path.read_bytes() == before
    save(Toy(n=3), path, trained_for=TRAINED_FOR, overwrite=True)
    assert load(path).config == {"n": 3}


@pytest.mark.parametrize("fails", ["write_bytes", "replace"])
def test_interrupted_save_leaves_the_old_file_and_no_rubbish(path, fails, monkeypatch):
    before = path.read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "replace") if fails == "replace" else (type(path), "write_bytes")), interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(Toy(n=3), path, trained_for=TRAINED_FOR, overwrite=True)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("trained_for", "message"),
    [
        ({}, "`trained_for` should be a dictionary with `horizon` and `task`: a number of steps, and a name or `task"),
        ({"task": "mnist"}, "with `horizon` and `task`: .*Found `trained_for = {'task': 'mnist'}`"),
        ({"task": "mnist", "horizon": 0}, "field `horizon` .*Found `horizon = 0`"),
        ({"task": "mnist", "horizon": True}, "field `horizon` .*Found `horizon = True`"),
        ({"horizon": 100}, "with `horizon` and `task`: .*Found `trained_for = {'horizon': 100}`"),
        ({"horizon": 100, "task": ""}, "field `task` should be a name or a description"),
        (
            {"horizon": 100, "task": "mnist", "rate": float("nan")},
            "field `trained_for` should be what JSON can hold. .*nan",
        ),
        (
            {"horizon": 100, "task": {"mnist"}},
            "field `task` should be what JSON can hold. Found `task = {'mnist'}`",
        ),
        ("mnist", "Parameter `trained_for` should be a dictionary with `horizon` and `task`: .*Found .*'mnist'"),
    ],
)
def test_incomplete_account_of_the_training_is_refused_and_writes_nothing(trained_for, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save(Toy(), tmp_path / "toy", trained_for=trained_for)
    assert list(tmp_path.iterdir()) == []


def test_rule_that_would_not_load_again_is_refused_and_writes_nothing(tmp_path):
    diverged = Toy()
    diverged.w.data[1] = float("nan")
    with pytest.raises(ValueError, match=r"toy: not saved: weight `w` should be finite. Found nan"):
        save(diverged, tmp_path / "toy", trained_for=TRAINED_FOR)
    misremembered = Toy()
    misremembered.config = {"n": 5}
    with pytest.raises(ValueError, match=r"not saved: weight `w` should have shape \(5,\). Found \(2,\)"):
        save(misremembered, tmp_path / "toy", trained_for=TRAINED_FOR)
    assert list(tmp_path.iterdir()) == []


def test_rule_whose_name_belongs_to_another_class_is_refused(tmp_path, monkeypatch):
    rule = Toy()
    monkeypatch.setitem(UpdateRule.registry, "Toy", AdamUpdate)
    with pytest.raises(ValueError, match=r"Parameter `rule` should be of a class in `UpdateRule.registry`"):
        save(rule, tmp_path / "toy", trained_for=TRAINED_FOR)


# -------------------- damaged and forged files


def test_missing_file_is_named(tmp_path):
    for absent in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"Found `path = '{absent}'`"):
            load(absent)


def test_no_single_flipped_byte_goes_unnoticed(path):
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x01]) + data[position + 1 :])
        with pytest.raises(ValueError, match=r"toy\.safetensors: "):
            load(path)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -30, -1])
def test_truncated_file_is_refused(path, kept):
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    with pytest.raises(ValueError, match=r"toy.safetensors: not a whole safetensors file"):
        load(path)


def test_pickle_is_not_opened(path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(path)


@pytest.mark.parametrize("field", sorted(artifacts._FIELDS - {"format", "format_version"}))
def test_every_edited_or_missing_field_is_noticed(path, field):
    original = path.read_bytes()
    rewrite(path, put(**{field: "edited"}), seal=False)
    with pytest.raises(ValueError, match=r"toy\.safetensors: field `sha256` should be .*the checksum of the contents"):
        load(path)
    path.write_bytes(original)
    rewrite(path, lambda weights, metadata: metadata.pop(field), seal=False)
    with pytest.raises(ValueError, match=f"toy.safetensors: field `{field}` should be there. Found nothing"):
        load(path)


@pytest.mark.parametrize(
    "edit",
    [lambda w: w + 1e-3, lambda w: w[:, None], lambda w: w.view(torch.int32)],
    ids=["value", "shape", "dtype"],
)
def test_edited_weight_is_noticed(path, edit):
    rewrite(path, lambda weights, metadata: weights.update(w=edit(weights["w"])), seal=False)
    with pytest.raises(ValueError, match="field `sha256`"):
        load(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "zip"}, "field `format` should be 'odeopt-rule'. Found `format = 'zip'`"),
        ({"format_version": "1"}, "field `format_version` should be a positive integer. Found .*'1'"),
        ({"format_version": 0}, "field `format_version` should be a positive integer"),
        (
            {"format_version": 2},
            "field `format_version` should be at most 1; a newer odeopt reads it. Found .* 2",
        ),
        ({"colour": "red"}, "field `colour` should be absent in this format. Found `colour = 'red'`"),
        (
            {"class": "Unheard"},
            r"field `class` should be a known rule \(.*Toy.*import its module first. .*'Unheard'",
        ),
        ({"class": ["Toy"]}, "field `class` should be the name of a class"),
        (
            {"config": {"width": 3}},
            "field `config` does not build a Toy: .*unexpected keyword argument 'width'",
        ),
        ({"config": [3]}, "field `config` should be a dictionary of constructor arguments"),
        ({"config": {"n": "many"}}, "field `config` does not build a Toy"),
        ({"config": {"n": 3}}, r"weight `w` should have shape \(3,\). Found \(2,\)"),
        (
            {"output_scale": 0.1},
            "field `output_scale` should be None, as in `config`. Found `output_scale = 0.1`",
        ),
        ({"output_scale": "big"}, "field `output_scale` should be None, as in `config`. Found `output_scale = 'big'`"),
        ({"solver": "rk4"}, "field `solver` should be None, as in `config`. Found `solver = 'rk4'`"),
        ({"solver": 4}, "field `solver` should be None, as in `config`. Found `solver = 4`"),
        ({"horizon": -1}, "field `horizon` should be a positive number of steps"),
        ({"horizon": 20}, "field `trained_for` should be a dictionary that agrees with `horizon` and `task`"),
        ({"task": 3}, "field `task` should be a name or a description"),
        ({"trained_for": []}, "field `trained_for` should be a dictionary that agrees"),
        ({"library_version": None}, "field `library_version` should be a version. Found .*None"),
    ],
)
def test_forged_field_is_refused_by_name_and_value(path, fields, message):
    rewrite(path, put(**fields))
    with pytest.raises(ValueError, match=f"toy.safetensors: {message}"):
        load(path)


def test_changed_output_scale_is_refused_although_the_weights_fit(tmp_path):
    path = tmp_path / "lstm"
    save(LSTMUpdate(output_scale=0.1), path, trained_for=TRAINED_FOR)
    config = fields_of(path)["config"]
    rewrite(path, put(config={**config, "output_scale": 1.0}))
    with pytest.raises(ValueError, match=r"field `output_scale` should be 1\.0, as in `config`\. Found .*0\.1"):
        load(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop("w"), "weight `w` is missing"),
        (lambda weights: weights.update(x=torch.ones(1)), "weight `x` is not one of the rule"),
        (
            lambda weights: weights.update(w=torch.ones(2, 1)),
            r"weight `w` should have shape \(2,\). Found \(2, 1\)",
        ),
        (lambda weights: weights["w"].fill_(float("inf")), "weight `w` should be finite. Found inf"),
        (lambda weights: weights["low"].fill_(float("nan")), "weight `low` should be finite. Found nan"),
        (
            lambda weights: weights.update(w=torch.ones(2, dtype=torch.int64)),
            "weight `w` should be torch.float32",
        ),
    ],
    ids=["missing", "extra", "shape", "infinite", "nan", "dtype"],
)
def test_forged_weights_are_refused_by_name(path, edit, message):
    rewrite(path, lambda weights, metadata: edit(weights))
    with pytest.raises(ValueError, match=f"toy.safetensors: {message}"):
        load(path)


def test_safetensors_file_of_another_library_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"other\.safetensors: field `format` should be 'odeopt-rule'. Found nothing"):
        load(path)
    safetensors.torch.save_file({"w": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"other\.safetensors: field `format` is not JSON: 'pt'"):
        load(path)


# -------------------- shipped rules


@pytest.fixture
def folder(path, tmp_path, monkeypatch):
    folder = tmp_path / "pretrained"
    folder.mkdir()
    for name in ("lstm-mnist", "lstm-quadratic", "port-hamiltonian-quadratic"):
        shutil.copy(path, folder / f"{name}.safetensors")
    (folder / "README.json").write_text("{}")
    monkeypatch.setattr(artifacts, "_folder", lambda: folder)
    return folder


def test_installed_names_are_listed_with_the_aliases_that_lead_to_one(folder):
    assert available_pretrained() == ("lstm", "lstm-mnist", "lstm-quadratic", "port-hamiltonian-quadratic")


def test_bare_name_is_the_rule_trained_on_mnist(folder):
    save(Toy(n=4), folder / "lstm-mnist.safetensors", trained_for=TRAINED_FOR, overwrite=True)
    assert load_pretrained("lstm").config == load_pretrained("lstm-mnist").config == {"n": 4}
    assert load_pretrained("lstm-quadratic").config == {"n": 2}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lstm-mnits", " Did you mean `lstm-mnist`?"),
        ("port-hamiltonian", " Did you mean `port-hamiltonian-quadratic`?"),
        ("../toy", " Files, and rules on the Hub, are read by `odeopt.load`."),
        ("README", ""),
        (None, ""),
    ],
)
def test_unknown_name_lists_what_there_is_and_suggests_the_closest(folder, name, hint):
    with pytest.raises(ValueError, match="`name` should be one of lstm, lstm-mnist, lstm-quadratic, ") as caught:
        load_pretrained(name)
    assert str(caught.value).endswith(f"Found `name = {name!r}`.{hint}")


@pytest.mark.parametrize("state", ["empty", "absent"])
def test_installation_without_rules_says_so(folder, state):
    shutil.rmtree(folder)
    if state == "empty":
        folder.mkdir()
    assert available_pretrained() == ()
    with pytest.raises(ValueError, match=r"should be one of \(none is installed\). Found `name = 'lstm'`"):
        load_pretrained("lstm")


def test_all_nine_names_are_shipped():
    rules, tasks = ("port-hamiltonian", "lstm", "hamiltonian"), ("", "-quadratic", "-mnist")
    assert {rule + task for rule in rules for task in tasks} <= set(available_pretrained())


@pytest.mark.parametrize("name", available_pretrained())
def test_shipped_rule_loads_and_moves_a_parameter_by_a_finite_update(name):
    rule = load_pretrained(name)
    param, grad = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    state = rule.init_state(param)
    for _ in range(3):
        update, state = rule(grad, state, param=param, shape=(3, 4))
        assert update.isfinite().all()
        assert update.abs().max() > 0


ROOT = Path(odeopt.__file__).parents[1]
FILES = sorted([*ROOT.glob("odeopt/pretrained/*.safetensors"), *ROOT.glob("examples/studies/*/*.safetensors")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_file_holds_every_option_of_its_rule(file):
    assert fields_of(file)["config"] == load(file).config


@pytest.mark.parametrize(("name", "match"), [("no/rule.safetensors", "in a folder that exists"), (".", "a file, not")])
def test_path_that_cannot_be_written_is_named(tmp_path, name, match):
    with pytest.raises(ValueError, match=f"`path` should be {match}"):
        save(RULES["lstm"](), tmp_path / name, trained_for=TRAINED_FOR, overwrite=True)


# -------------------- weights that are not one tensor each


class Odd(Toy):
    """A rule with one more weight or buffer, of a kind that a test chooses."""

    def __init__(self, *, kind: str) -> None:
        super().__init__()
        self.config = {"kind": kind}
        KINDS[kind](self)


def tied(rule):
    rule.other = nn.Linear(2, 1, bias=False)
    rule.again = nn.Linear(2, 1, bias=False)
    rule.again.weight = rule.other.weight


KINDS = {
    "tied layers": tied,
    "view of a weight": lambda rule: rule.register_buffer("part", rule.w.detach()[:1]),
    "hidden view of a weight": lambda rule: rule.register_buffer("part", rule.w.detach()[1:], persistent=False),
    "one number in many places": lambda rule: rule.register_buffer("many", torch.ones(1).expand(4)),
    "transposed": lambda rule: rule.register_parameter("m", nn.Parameter(torch.arange(6.0).reshape(2, 3).T)),
    "float8": lambda rule: rule.register_buffer("x", torch.ones(3).to(torch.float8_e4m3fn)),
    "uint16": lambda rule: rule.register_buffer("x", torch.arange(3).to(torch.uint16)),
    "complex64": lambda rule: rule.register_buffer("x", torch.ones(3, dtype=torch.complex64)),
    "complex128": lambda rule: rule.register_buffer("x", torch.ones(3, dtype=torch.complex128)),
    "sparse": lambda rule: rule.register_buffer("x", torch.eye(2).to_sparse()),
    "quantized": lambda rule: rule.register_buffer("x", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)),
    "meta": lambda rule: rule.register_buffer("x", torch.ones(3, device="meta")),
}
REFUSED = ["sparse", "quantized", "meta"]  # and complex numbers, depending on safetensors


def changed(kind):
    rule = Odd(kind=kind)
    for number, weight in enumerate(rule.parameters()):
        weight.data.add_(0.5 + number)
    return rule


@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in REFUSED and "complex" not in kind])
def test_odd_weights_come_back_as_they_were(kind, is_double, tmp_path):
    rule = changed(kind).double() if is_double else changed(kind)
    if is_double and kind == "hidden view of a weight":  # double() has made it a tensor of its own, which no file holds
        with pytest.raises(ValueError, match="not saved: buffer `part` should be persistent"):
            save(rule, tmp_path / "odd", trained_for=TRAINED_FOR)
        return
    save(rule, tmp_path / "odd", trained_for=TRAINED_FOR)
    loaded = load(tmp_path / "odd")
    assert artifacts._ties(loaded) == artifacts._ties(rule)
    for (name, x), (other, y) in zip(rule.named_buffers(), loaded.named_buffers(), strict=True):
        assert (name, x.dtype) == (other, y.dtype)
        assert torch.equal(x.double(), y.double())
    for x, y in zip(rule.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(x, y)
    if not is_double and kind == "tied layers":
        assert loaded.again.weight is loaded.other.weight
    if not is_double and "view" in kind:  # what is one memory stays one
        loaded.w.data.fill_(7.0)
        assert loaded.part.item() == 7.0


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("kind", REFUSED)
def test_weights_that_a_file_cannot_hold_are_refused_by_name(kind, tmp_path):
    with pytest.raises(ValueError, match="odd: not saved: weight `x` should be of a kind that safetensors can hold"):
        save(changed(kind), tmp_path / "odd", trained_for=TRAINED_FOR)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["complex64", "complex128"])
def test_complex_weights_come_back_or_are_refused_by_name(kind, tmp_path):
    rule = changed(kind)
    try:
        save(rule, tmp_path / "odd", trained_for=TRAINED_FOR)
    except ValueError as error:
        message = str(error)
        assert "weight `x` should be of a kind that safetensors can hold" in message
    else:
        assert torch.equal(load(tmp_path / "odd").x, rule.x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rule: setattr(rule.again, "weight", nn.Parameter(rule.other.weight.detach().clone())), "share memory"),
        (lambda rule: rule.register_buffer("count", torch.tensor(8), persistent=False), "`count` is missing"),
    ],
    ids=["untied", "hidden"],
)
def test_rule_that_is_built_otherwise_than_it_is_now_is_refused(change, message, tmp_path):
    rule = Odd(kind="tied layers")
    change(rule)
    with pytest.raises(ValueError, match=f"odd: not saved: weights? .*{message}"):
        save(rule, tmp_path / "odd", trained_for=TRAINED_FOR)
    assert list(tmp_path.iterdir()) == []


def test_buffer_that_is_neither_saved_nor_rebuilt_is_refused(tmp_path):
    rule = RULES["port-hamiltonian"]()
    rule.time_scales.mul_(2)
    with pytest.raises(
        ValueError, match="not saved: buffer `time_scales` should be persistent, or follow from `config`"
    ):
        save(rule, tmp_path / "ph", trained_for=TRAINED_FOR)


class Counting(Toy):
    """What it has beside its weights is a word; or a tensor."""

    def __init__(self, *, extra="word"):
        super().__init__()
        self.config, self.extra = {"extra": "word" if extra == "word" else "tensor"}, extra

    def get_extra_state(self):
        return self.extra if self.extra == "word" else self.extra_tensor()

    def extra_tensor(self):
        return torch.tensor([1.0, 2.0]) if isinstance(self.extra, str) else self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_extra_state_is_saved_if_it_is_a_tensor_and_refused_by_name_if_not(tmp_path):
    with pytest.raises(ValueError, match=r"not saved: weight `_extra_state` should be a tensor.*Found 'word'"):
        save(Counting(), tmp_path / "rule", trained_for=TRAINED_FOR)
    rule = Counting(extra=torch.tensor([3.0, 4.0]))
    save(rule, tmp_path / "rule", trained_for=TRAINED_FOR)
    assert torch.equal(load(tmp_path / "rule").extra, rule.extra)


@pytest.mark.parametrize("name", ["port-hamiltonian", "lstm"])
def test_rule_in_another_precision_computes_in_it_again(name, tmp_path):
    rule = RULES[name]().double()
    for weight in rule.parameters():
        weight.data.add_(0.01)
    save(rule, tmp_path / "rule", trained_for=TRAINED_FOR)
    param, loaded = torch.randn(5, dtype=torch.float64), load(tmp_path / "rule")
    assert {x.dtype for x in loaded.buffers()} == {x.dtype for x in rule.buffers()}
    for ours, theirs in zip(*(r(param, r.init_state(param), param=param) for r in (rule, loaded)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# -------------------- hints


def test_names_and_files_are_told_apart_by_a_hint():
    param = nn.Parameter(torch.ones(2))
    for name in ("mine.safetensors", "hf://me/rule"):
        with pytest.raises(ValueError, match=r"Files, and rules on the Hub, are read by `odeopt\.load`"):
            odeopt.LearnedOptimizer([param], name)
    with pytest.raises(FileNotFoundError, match=r"Found `path = 'lstm'`. `odeopt.load_pretrained` loads the rules"):
        load("lstm")
    with pytest.raises(FileNotFoundError, match=r"Found `path = 'none'`\.$"):
        load("none")


def test_rules_are_told_apart_by_weights_and_by_the_options_that_are_not_defaults():
    rule = odeopt.LSTMUpdate(hidden_size=4)
    other = odeopt.LSTMUpdate(hidden_size=4)
    assert fingerprint(rule) != fingerprint(other)
    other.load_state_dict(rule.state_dict())
    del other.config["output_scale"]  # as if the option had come later
    assert fingerprint(rule) == fingerprint(other)
    other.config["output_scale"] = 0.5
    assert fingerprint(rule) != fingerprint(other)
