import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    """Python blocks of one section."""
    text = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_rule_of_ones_own_can_be_written_trained_and_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [write], [train] = section("Write a rule of your own"), section("Train it")
    assert "n_meta_steps=300, n_tasks=64" in train
    names = {}
    exec(write + train.replace("n_meta_steps=300, n_tasks=64", "n_meta_steps=40, n_tasks=16"), names)
    (_, first), *_, (_, last) = names["result"].validation
    assert last < first
    assert Path("sign-momentum.safetensors").exists()


def test_optimizer_is_used_as_the_readme_says():
    model = torch.nn.Linear(3, 1)
    torch.nn.init.zeros_(model.weight)
    x = torch.eye(3)
    names = {"model": model, "loss_fn": torch.nn.functional.mse_loss, "batches": [(x, x.sum(1, keepdim=True))] * 50}
    before = torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).item()
    [use] = section("Use it")
    exec(use, names)
    assert torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).item() < 0.5 * before


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\((figs/[^)]+)\)", README))))
def test_figures_are_there(path):
    assert (ROOT / path).is_file()
