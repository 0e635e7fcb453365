"""The benchmark of meta-training: its two ways compute the same, and it prints, draws and saves what it says."""

import json

import pytest
import torch

import odeopt
from odeopt.meta import Backpropagation, MetaConfig, unroll
from odeopt.tasks import MLPClassification, RandomQuadratic, load_dataset

TINY = ["--quick", "--dataset", "digits", "--repeats", "1"]


@pytest.fixture
def benchmark(load):
    return load("meta")


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("name", ["port-hamiltonian", "lstm", "hamiltonian"])
@pytest.mark.parametrize("family", ["quadratic", "mnist"])
def test_the_loop_runs_the_tasks_of_the_batch(benchmark, family, name, is_training):
    dtype = torch.float64
    task = RandomQuadratic(dtype=dtype)
    if family == "mnist":
        task = MLPClassification(load_dataset("digits"), dtype=dtype)
    rule = odeopt.load_pretrained(f"{name}-{family}").to(dtype)
    config = MetaConfig(gain_margin=1.5, estimator=Backpropagation(detach=name == "lstm"))
    case = benchmark.Case(family, name, rule, task, config, 3, is_training, rule)
    gradients = {}
    weights = [w for w in rule.parameters() if w.requires_grad]
    rule.zero_grad = lambda: gradients.update({len(gradients): [w.grad.clone() for w in weights if w.grad is not None]})
    scale = config.gain_margin if is_training else 1.0
    with torch.no_grad():
        indices = torch.arange(benchmark.N_LOOP)
        batch = unroll(rule, task, indices=indices, n_steps=3, total_steps=3, update_scale=scale).losses
    torch.testing.assert_close(benchmark.one_by_one(case), batch, rtol=1e-8, atol=0)  # three steps of rounding
    assert (len(gradients) > 0) == is_training
    if is_training:
        benchmark.N_TASKS[family] = benchmark.N_LOOP
        loop = [grad / benchmark.N_LOOP for grad in gradients[len(gradients) - 1]]  # the loop adds its tasks up
        for weight in weights:
            weight.grad = None
        benchmark.batched(case)
        for ours, theirs in zip(gradients[len(gradients) - 1], loop, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9 * max(1.0, theirs.abs().max().item()))


def test_benchmark_prints_draws_and_saves(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measured_apart", lambda horizon, length, args: 10**7 * horizon / (1 + length))
    benchmark.main([*TINY, "--out", str(tmp_path / "new"), "--json", str(tmp_path / "numbers.json")])
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert f"{torch.get_num_threads()} thread(s)" in text
    assert (tmp_path / "new" / "memory.png").stat().st_size > 5000
    results = json.loads((tmp_path / "numbers.json").read_text())
    assert len(results["timings"]) == 12
    for row in results["timings"]:
        assert len(row["batched_us"]) == len(row["loop_us"]) == len(row["ratio"]) == 1
        assert row["ratio"][0] == pytest.approx(row["loop_us"][0] / row["batched_us"][0])
        assert sum(line.split()[:3] == [row["family"], row["rule"], row["pass"]] for line in text.splitlines()) == 1
    assert results["memory"] == [[2, 0, 2e7], [4, 0, 4e7], [2, 1, 1e7], [4, 1, 2e7]]


def test_memory_is_measured_in_a_process_of_its_own(benchmark):
    ballast = torch.ones(10**8)  # 400 MB that must not count
    sizes = [benchmark.measured_apart(*case, benchmark.parse(TINY)) for case in ((30, 0), (30, 2))]
    # 8 networks of 1,510 coordinates: every step keeps some 200 bytes for each, about 70 MB; segments a fraction
    assert 2e7 < sizes[0] < 2e8, sizes
    assert sizes[1] < sizes[0] / 2, sizes
    assert ballast.numel() == 10**8


def test_missing_images_are_replaced_and_said(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measured_apart", lambda *args: 1e6)
    monkeypatch.setattr(benchmark, "timed", lambda *args: {})
    monkeypatch.setattr(benchmark, "timing_table", lambda timings: "")

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(odeopt.tasks.datasets, "import_torchvision", no_network)
    benchmark.main(["--quick", "--data-dir", str(tmp_path / "nothing"), "--out", str(tmp_path)])
    assert "using scikit-learn's handwritten digits instead." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--repeats", "0"], "--repeats: should be a positive integer"), (["--device", "quantum"], "quantum is not")],
)
def test_bad_options_are_refused(benchmark, argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(argv)
    assert message in capsys.readouterr().err
