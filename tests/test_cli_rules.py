"""`odeopt rules` and `odeopt show`: what a rule answers to gradients, and the commands."""

import re
from importlib.metadata import entry_points

import pytest
import torch

import odeopt
from odeopt.cli.main import main
from odeopt.evaluation import response
from odeopt.tasks import RandomQuadratic


def test_gradient_descent_answers_in_proportion_whatever_was_before():
    found = response(odeopt.SGDUpdate(lr=0.1))
    for update in found.update.values():
        torch.testing.assert_close(update, -0.1 * found.gradient, rtol=1e-6, atol=1e-7)
    assert all(0.05 < size.mean() < 0.15 for size in found.step_size.values())  # .1 times that of the noise
    torch.testing.assert_close(found.matrix_update, 0.1 * found.singular_value, rtol=1e-4, atol=1e-6)


def test_momentum_answers_to_what_was_before():
    found = response(odeopt.SGDUpdate(lr=0.1, momentum=0.9)).update
    against, none, along = (found[name] for name in ("all -1", "-1 and +1 in turns", "all +1"))
    assert (against > none).all()
    assert (none > along).all()


def test_the_spectral_rule_moves_alike_along_strong_and_weak_directions_and_adam_does_not():
    spectral = response(odeopt.load_pretrained("port-hamiltonian-spectral"))
    adam = response(odeopt.AdamUpdate())
    strong = spectral.singular_value > 0.01
    # Muon's polynomials leave singular values between .68 and 1.13
    assert spectral.matrix_update[strong].min() > 0.5 * spectral.matrix_update.max()
    assert adam.matrix_update[strong].min() < 0.1 * adam.matrix_update.max()
    told, free = spectral.step_size.values()
    assert told[-1] < 0.01 * told.max()
    assert free[-1] > 0.1 * free.max()


@pytest.mark.parametrize("name", ["port-hamiltonian", "lstm", "hamiltonian"])
def test_answers_are_finite_and_the_same_each_time(name):
    first, again = (response(odeopt.load_pretrained(name)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        for x, y in zip(*(part.values() if isinstance(part, dict) else [part] for part in (a, b)), strict=True):
            assert torch.equal(x, y)
            assert x.isfinite().all()


def test_rules_are_listed_with_task_horizon_weights_and_price(capsys):
    assert main(["rules", "--markdown"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    listed = {cells[0].removeprefix("| "): cells[1:] for cells in lines[2:]}
    assert list(listed) == list(odeopt.available_pretrained())
    rule = odeopt.load_pretrained("lstm-mnist")
    task, horizon, weights, state, price = listed["lstm-mnist"]
    assert not any("Mixture" in cells[0] for cells in listed.values())
    assert listed["port-hamiltonian-mnist"][0] == "MLPClassification"
    assert listed["port-hamiltonian"][0].endswith(" other kinds")
    assert [task, int(horizon)] == [rule.trained_for["task"]["class"], rule.trained_for["horizon"]]
    assert int(weights.replace(",", "")) == rule.n_parameters()
    assert float(state) == 328  # two cells of two states of 20 numbers, and two moments of the gradient
    assert float(price.rstrip(" |")) > 1


def test_a_rule_is_drawn_by_name_and_from_a_file(tmp_path, capsys):
    assert main(["show", "port-hamiltonian", "--out", str(tmp_path)]) == 0
    assert "2,159 weights" in capsys.readouterr().out
    odeopt.save(odeopt.HamiltonianUpdate(), tmp_path / "mine.safetensors", trained_for={"horizon": 5, "task": "a toy"})
    assert main(["show", str(tmp_path / "mine.safetensors"), "--out", str(tmp_path)]) == 0
    assert "weights, meta-trained on runs of up to 5 steps of a toy." in capsys.readouterr().out
    described = {"horizon": 5, "task": RandomQuadratic().describe()}
    odeopt.save(odeopt.HamiltonianUpdate(), tmp_path / "mine.safetensors", trained_for=described, overwrite=True)
    assert main(["show", str(tmp_path / "mine.safetensors"), "--out", str(tmp_path)]) == 0
    assert "meta-trained on runs of up to 5 steps of RandomQuadratic." in capsys.readouterr().out
    assert all((tmp_path / f"rule-{name}.png").stat().st_size > 5000 for name in ("mine", "port-hamiltonian"))


def test_an_unknown_rule_is_refused_by_name(capsys, tmp_path):
    assert main(["show", "port-hamiltonion", "--out", str(tmp_path)]) == 2
    assert "port-hamiltonion" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["mine.safetensor", "./", "runs/mine", "mine.pt", "mine"])
def test_files_of_other_names_are_refused_with_what_would_be_taken(text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert main(["show", text]) == 2
    message = f"Parameter `rule` should be a file that ends in `.safetensors`, .*Found `rule = {text!r}`"
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_the_console_script_is_the_command_line():
    (script,) = entry_points(group="console_scripts", name="odeopt")
    assert script.load() is main
