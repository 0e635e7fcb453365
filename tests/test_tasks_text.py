"""Text of the standard library, and tasks on it."""

import argparse
import math

import pytest
import torch

from odeopt.tasks import TextRecurrence, TextTransformer, text
from odeopt.tasks.text import N_SYMBOLS, _docstrings, standard_library_text

INDICES = torch.tensor([4, 0])


def decoded(symbols):
    return "".join("\n" if s == N_SYMBOLS - 1 else chr(s + 32) for s in symbols.tolist())


def test_the_text_is_of_docstrings_up_to_a_cap():
    whole = standard_library_text()
    assert len(whole) == 500_000
    assert whole.isascii()
    assert argparse.__doc__.splitlines()[0] in whole
    assert whole is standard_library_text()


def test_text_depends_on_what_the_modules_are_called_and_on_nothing_else(tmp_path, monkeypatch):
    files = {
        "b.py": '"""Second text."""\nclass B:\n    """Third, in a class."""\n    x = "no docstring"',
        "a.py": '"""First, \u00e9 is no ASCII."""',
        "inner/c.py": 'def c():\n    """Fourth."""',
        "test/d.py": '"""A test."""',
        "site-packages/e.py": '"""Installed."""',
        "pydoc_data/topics.py": '"""Held for others."""',
        "broken.py": "def broken(:",
    }
    expected = "First,  is no ASCII.\n\nSecond text.\n\nThird, in a class.\n\nFourth."
    for k, names in enumerate((list(files), list(reversed(files)))):
        for name in names:
            path = tmp_path / str(k) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[name], encoding="utf-8")
        assert _docstrings(tmp_path / str(k)) == expected
    monkeypatch.setattr(text, "_N_CHARACTERS", 30)
    assert _docstrings(tmp_path / "0") == expected[:30]


def test_missing_sources_are_named(monkeypatch, tmp_path):
    (tmp_path / "few.py").write_text('"""A short module."""')
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RuntimeError, match=r"sources of the standard library should lie in .* Found 15 characters"):
        standard_library_text.__wrapped__()


def test_windows_are_of_the_text_and_are_followed_by_themselves():
    whole = standard_library_text()
    for split in ("meta-train", "evaluation"):
        task = TextTransformer(width=4, depth=1, context=24, batch_size=8, split=split)
        symbols, following = task.sample_batch(INDICES, 0, 0)
        assert symbols.shape == (2, 8, 24)
        assert torch.equal(symbols[..., 1:], following[..., :-1])
        windows = [decoded(window) for window in symbols.flatten(0, 1)]
        assert sum(window in whole for window in windows) >= 15  # one may lie over the seam
        assert 0 <= symbols.min() <= symbols.max() < N_SYMBOLS


def test_splits_are_different_halves():
    halves = [TextRecurrence(width=4, split=split).symbols for split in ("meta-train", "evaluation")]
    text_of = "".join(map(decoded, halves))
    assert abs(len(halves[0]) - len(halves[1])) <= 1
    assert text_of[:5000] == decoded(halves[0][:5000])
    assert decoded(halves[1][:200]) not in decoded(halves[0])


def test_masked_characters_are_what_is_predicted():
    task = TextTransformer(width=4, depth=1, context=20, batch_size=30, objective="masked")
    for draw in (task.sample_batch, task.sample_held_out):
        symbols, targets = draw(INDICES, 0, 0)
        is_masked = symbols == N_SYMBOLS
        assert is_masked.sum(-1).unique().tolist() == [3]  # 15 % of twenty
        assert torch.equal(is_masked, targets != -100)
        assert targets[is_masked].max() < N_SYMBOLS
        assert is_masked.any(1).all()  # at every place now and then
    plain, _ = TextTransformer(width=4, depth=1, context=20, batch_size=30).sample_batch(INDICES, 0, 0)
    symbols, targets = task.sample_batch(INDICES, 0, 0)
    assert torch.equal(torch.where(symbols == N_SYMBOLS, targets, symbols), plain)


def test_only_masked_characters_count():
    task = TextTransformer(width=4, depth=1, objective="masked")
    params, (symbols, targets) = task.init_params(INDICES, 0), task.sample_batch(INDICES, 0, 0)
    scores = torch.stack(
        [
            torch.func.functional_call(task.module, {name: p[k] for name, p in params.items()}, (symbols[k],))
            for k in range(2)
        ]
    )
    for k in range(2):
        is_masked = targets[k] != -100
        expected = torch.nn.functional.cross_entropy(scores[k][is_masked], targets[k][is_masked])
        torch.testing.assert_close(task.loss(params, (symbols, targets))[k], expected)


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_transformers_look_ahead_only_where_characters_are_masked(objective):
    task = TextTransformer(width=8, depth=2, context=10, objective=objective)
    changed = (symbols := task.sample_batch(INDICES[:1], 0, 0)[0][0]).clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % N_SYMBOLS
    scores, others = task.module(symbols), task.module(changed)
    is_same = torch.allclose(scores[:, :6], others[:, :6], atol=1e-6)
    assert is_same == (objective == "next")


def test_initial_weights_have_the_deviation_asked_for():
    task = TextTransformer(width=32, depth=1, init_std=0.02)
    params = task.init_params(INDICES, 0)
    for name, shape in task.param_shapes.items():
        if name.endswith("bias"):
            assert params[name].eq(0).all()
        elif len(shape) == 2 and "positions" not in name:
            assert params[name].std().item() == pytest.approx(0.02, rel=0.1)
    assert task.loss(params, task.sample_batch(INDICES, 0, 0)).mean() == pytest.approx(math.log(N_SYMBOLS), rel=0.02)
