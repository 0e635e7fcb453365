"""A tiny search, as a file; shared by the tests of searches."""

import json

from odeopt.meta.search_files import load_search

TINY = """
[rule]
class = "port-hamiltonian"
modes = 1
hidden = [3]

[task]
class = "RandomQuadratic"
dim = 3

[training]
n_meta_steps = 2
n_tasks = 2
horizon = 2
validate_every = 1
n_validation_tasks = 2

[search]
sampler = "grid"
pruner = "none"

[search.space]
training.lr = [0.1, 0.01]
rule.initial_kappa = [0.03, 0.3]
"""
RANGES = """
training.lr = {low = 1e-4, high = 1e-1, log = true}
training.n_tasks = {low = 1, high = 3}
"""


def write(folder, text=TINY, **replaced):
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


def written(folder, sampler="grid", n_trials=None, space=None, **options):
    """Load the tiny search with other options, and another space."""
    text = TINY if space is None else TINY.split("[search.space]")[0] + "[search.space]\n" + space
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items() if name != "pruner"]
    lines += [f"n_trials = {n_trials}"] if n_trials is not None else []
    text = text.replace('sampler = "grid"', "\n".join([f'sampler = "{sampler}"', *lines]))
    return load_search(write(folder, text.replace('"none"', f'"{options.get("pruner", "none")}"')))
