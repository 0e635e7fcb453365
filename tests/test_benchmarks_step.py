"""The benchmark of the step: its workloads are what they are called, its loop is the rule, its script runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import odeopt
from odeopt import LearnedOptimizer
from odeopt.evaluation import EVALUATION_SEED, run, scores_of
from odeopt.tasks import MLPClassification, load_dataset

CPU = torch.device("cpu")


def parameters():
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,))]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


@pytest.mark.parametrize(
    ("workload", "n_tensors", "n_parameters"),
    # torchvision's resnet18(), ViT-S/16 of timm, and GPT2LMHeadModel of transformers with its tied head
    [("resnet18", 62, 11_689_512), ("vit-s", 152, 22_050_664), ("gpt2", 148, 124_439_808), ("1e4", 1, 10_000)],
)
def test_workloads_have_as_many_parameters_as_the_models(load, workload, n_tensors, n_parameters):
    workloads = load("workloads")
    assert len(list(workloads.module(workload, "meta").parameters())) == n_tensors
    assert workloads.n_parameters(workload) == n_parameters


def test_gpt2_sees_no_token_before_its_turn_and_learns_from_all(load):
    torch.manual_seed(0)
    model = load("workloads").GPT2().eval()
    tokens = torch.randint(50257, (1, 6))
    changed = tokens.clone()
    changed[0, -1] += 1
    logits, others = model(tokens), model(changed)
    torch.testing.assert_close(logits[:, :-1], others[:, :-1], rtol=0, atol=1e-4)
    assert not torch.allclose(logits[:, -1], others[:, -1], atol=1e-2)
    assert all(grad.abs().max() > 0 for grad in torch.autograd.grad(logits.square().mean(), list(model.parameters())))


def test_muon_beside_adam_steps_every_parameter_and_matrices_as_muon_does(load):
    workloads = load("workloads")
    model = nn.Sequential(nn.Embedding(7, 4), nn.Conv1d(4, 3, 2), nn.LayerNorm(3))
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    before, kernel = [param.clone() for param in model.parameters()], nn.Parameter(model[1].weight.detach().flatten(1))
    kernel.grad = model[1].weight.grad.flatten(1)
    torch.optim.Muon([kernel]).step()
    optimizer = workloads.MuonAndAdam(model)
    optimizer.step()
    torch.testing.assert_close(model[1].weight.flatten(1), kernel)
    assert all((a != b).all() for a, b in zip(before, model.parameters(), strict=True))
    assert len(optimizer.state) == len(before)


@pytest.mark.parametrize("preprocess", [False, True])
def test_the_loop_of_cells_is_the_lstm_rule(load, preprocess):
    torch.manual_seed(0)
    rule = odeopt.LSTMUpdate(preprocess=preprocess)
    ours, loop = parameters(), parameters()
    optimizers = LearnedOptimizer(ours, rule), load("workloads").CellLoop(loop, rule)
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, loop, parameters(), strict=True):
        assert not torch.equal(a, start)
        # gates computed as one matrix product and through sigmoids only: a few roundings of numbers of size one
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_a_state_in_float32_gives_the_losses_of_the_rule_and_one_in_bfloat16_others(load):
    task = MLPClassification(load_dataset("digits"), (5,), split="evaluation")
    scores_with_state = load("measuring").scores_with_state
    wide, narrow = (scores_with_state(task, dtype, n_runs=2, n_steps=12) for dtype in (torch.float32, torch.bfloat16))
    losses, _ = run(odeopt.load_pretrained("port-hamiltonian"), task, n_steps=12, n_runs=2, seed=EVALUATION_SEED)
    # twelve steps in another order of sums
    torch.testing.assert_close(wide, scores_of(losses, "last ten"), rtol=1e-4, atol=0)
    assert not torch.equal(wide, narrow)
    # bfloat16 keeps 8 bits: one part in 256 of a momentum
    torch.testing.assert_close(wide, narrow, rtol=0.02, atol=0)


class Greedy(Optimizer):
    """Keeps a buffer outside its state, and makes another one in each step."""

    n_bytes = 2**26

    def __init__(self, params):
        super().__init__(params, {})
        self.buffer = torch.ones(self.n_bytes // 4)

    def step(self, closure=None):
        if not self.state:  # the first step does not count
            torch.ones(self.n_bytes)
        self.state[self.param_groups[0]["params"][0]]["momentum"] = torch.ones(self.n_bytes // 4)
        torch.ones(self.n_bytes // 4)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks the kernel of Linux")
def test_extra_memory_is_all_but_parameters_gradients_and_state(load):
    # in a process of its own, as the script does it: what earlier tests gave back late would count as well
    code = (
        f"from {__name__} import *; import measuring; print(measuring.extra_bytes(lambda: Greedy(parameters()), CPU))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    extra = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=True,
                           capture_output=True, text=True).stdout  # fmt: skip
    # the buffer, the temporary, and the new state while the old one is there; a few MB for the rest of the process
    assert int(extra) == pytest.approx(2 * Greedy.n_bytes, abs=6e6)


def test_the_script_prints_tables_and_saves_figure_and_numbers(load, tmp_path, capsys):
    step, workloads = load("step"), load("workloads")
    options = ["--dataset", "digits", "--repeats", "2", "--threads", str(torch.get_num_threads()), "--quick"]
    step.main(["--sizes", "300", *options, "--out-dir", str(tmp_path)])
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "step.json").read_text())
    names = [row["optimizer"] for row in results["rows"] if row["workload"] == "300"]
    assert names == list(workloads.contenders(CPU, has_lstm=True))
    table = text[text.index("300: 300 parameters") :].split("\n\n")[1].splitlines()[3:]
    assert [line.split("  ")[0] for line in table] == names
    rows = {row["optimizer"]: row for row in results["rows"] if row["workload"] == "300"}
    assert all(len(row["ms"]) == 2 and min(row["ms"]) > 0 for row in rows.values())
    # beside 12 bytes per parameter three numbers and counts per tensor
    assert 12 <= rows[workloads.FAST]["state_bytes"] / 300 < 12.1
    assert 6 <= rows[workloads.NARROW]["state_bytes"] / 300 < 6.1
    assert rows[workloads.LSTM]["state_bytes"] == rows[workloads.LOOP]["state_bytes"] == 300 * 320
    assert f"{workloads.LOOP} / {workloads.LSTM}, 300: " in text
    assert len(results["bfloat16"]["float32"]) == len(results["bfloat16"]["bfloat16"]) == 3
    assert (tmp_path / "step.png").stat().st_size > 5000


def test_numbers_of_other_workloads_stay_where_they_are_of_this_machine(load, tmp_path):
    earlier, path = load("step").earlier, tmp_path / "step.json"
    rows = [{"workload": name, "n": n, "optimizer": "Adam", "ms": [1.0]} for name, n in (("resnet18", 9), ("1e1", 10))]
    assert earlier(path, "this one", ["1e1"]) == []
    path.write_text(json.dumps({"machine": "this one", "rows": rows}))
    assert earlier(path, "this one", ["1e1"]) == rows[:1]
    assert earlier(path, "another", ["1e1"]) == []
    path.write_text("{")
    with pytest.raises(ValueError, match="numbers of this benchmark"):
        earlier(path, "this one", ["1e1"])


def test_memory_is_printed_for_the_parent_process(load, monkeypatch, capsys):
    step, workloads = load("step"), load("workloads")
    monkeypatch.setattr(step, "LARGE", 100)
    step.main(["--memory", "--sizes", "50", "200", "--threads", str(torch.get_num_threads())])
    memory = json.loads(capsys.readouterr().out)
    assert list(memory) == ["200"]
    assert set(memory["200"]) == set(workloads.contenders(CPU, has_lstm=True)) - {workloads.LOOP}


@pytest.mark.parametrize("size", ["0", "1.5", "vgg"])
def test_sizes_are_numbers_or_models(load, size, capsys):
    with pytest.raises(SystemExit, match="2"):
        load("step").parse(["--sizes", size])
    message = f"--sizes: should be a number of parameters or one of mlp, resnet18, vit-s, gpt2; found {size}"
    assert capsys.readouterr().err.strip().endswith(message)


def test_the_largest_tensor_is_for_gpus_and_the_patient(load):
    parse = load("step").parse
    assert "1e8" not in parse([]).sizes
    assert "1e8" in parse(["--full"]).sizes
    assert parse(["--quick"]).sizes == ["mlp", "1e4", "1e5", "1e6", "resnet18"]


def test_the_cost_of_a_guard_is_printed_and_saved(load, tmp_path, capsys):
    path = tmp_path / "guard_cost.json"
    load("guard").main(["--sizes", "10", "1e3", "--repeats", "2", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["parameters"], row["snapshot_bytes"]) for row in rows] == [(10, 40), (1000, 4000)]
    titles = ["step", "guarded step", "snapshot", "`diagnostics()`", "step after it"]
    assert all(list(row["ms"]) == titles and all(len(some) == 2 for some in row["ms"].values()) for row in rows)
    printed = capsys.readouterr().out
    assert [printed.count(word) for word in (*titles[1:4], "1,000")] == [1, 2, 1, 1]


def test_nothing_breaks_under_kills_flips_and_odd_calls(load, tmp_path, capsys):
    robustness = load("robustness")
    with pytest.raises(SystemExit) as ended:
        robustness.main(["--kills", "1", "--flips", "20", "--calls", "60", "--json", str(tmp_path / "table.json")])
    assert ended.value.code == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row[1:] for row in rows[:3]] == [["1", "1", "0", "0"]] * 2 + [["20", "0", "20", "0"]]
    assert all(int(done) + int(refused) == int(tried) == 20 for _, tried, done, refused, _ in rows[3:])
    assert "bit flipped" in capsys.readouterr().out


def test_robustness_tells_a_refusal_from_a_fault(load):
    outcome = load("robustness").outcome

    def fail(error):
        raise error

    assert outcome(lambda: None) == "done"
    assert outcome(lambda: fail(ValueError("Parameter `x` should be positive."))) == "refused"
    assert outcome(lambda: fail(ValueError())) == "ValueError"
    assert outcome(lambda: fail(RuntimeError("shape"))) == "RuntimeError: shape"
