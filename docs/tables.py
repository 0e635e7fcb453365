"""Tables of the documentation, from the numbers in ``figs/``.

``python docs/tables.py`` writes the tables of README.md and of the pages anew, each between its marks.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from odeopt.artifacts import load_pretrained
from odeopt.evaluation import RESOLUTION, Interval, ratio_interval, ratio_text
from odeopt.optimizer import LearnedOptimizer
from odeopt.report import draw_table
from odeopt.solvers import SolverComparison
from odeopt.suite import Contender, Suite
from odeopt.suite.evaluate import TUNING_SEED, steps_of
from odeopt.suite.opponents import OPPONENTS, REFERENCE
from odeopt.suite.problems import resolution_of
from odeopt.suite.result import Outcome

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / folder) for folder in ("studies", "benchmarks")]

# of studies and benchmarks, which the package does not hold
from cheaper import WAYS  # noqa: E402
from coordinate_check import table as changes_of_outputs  # noqa: E402
from depth import table as losses_over_rates  # noqa: E402
from equal_loss import table as at_equal_loss  # noqa: E402
from guard_figure import table as guarded_losses  # noqa: E402
from heads import HEAD  # noqa: E402
from held_out import read_columns, summary_tables  # noqa: E402
from laws import AS_ONE, LAWS  # noqa: E402
from laws import table as losses_of_variants  # noqa: E402
from reporting import ratio, ratio_table, spread  # noqa: E402
from seeds import OTHERS  # noqa: E402
from solver_step import REFERENCE as BY_HAND  # noqa: E402
from taught import OUTPUTS  # noqa: E402
from trained_energies import table as losses_of_trained_energies  # noqa: E402
from unseen import RULE  # noqa: E402
from variants import Row  # noqa: E402

FIGS = ROOT / "figs"
MARKED = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of the table -->", re.DOTALL)


class UnfinishedError(Exception):
    """Runs that a table is of have not all been made; the page keeps the table that it has."""


def read(name: str) -> dict[str, Any]:
    """Read a file of numbers."""
    return json.loads((FIGS / f"{name}.json").read_text(encoding="utf-8"))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Draw a markdown table."""
    return draw_table([(title, "") for title in titles], rows, markdown=True)


def score(entry: Mapping[str, Any], *, with_difference: bool = True) -> str:
    """Mean score ± half the range over meta-seeds [interval of the difference], and the runs that diverged."""
    row = Row(**entry | {"difference": Interval(*tensor(entry["difference"]).tolist())})
    return row.text(is_reference=not with_difference or row.difference.mean == 0)


def ablation() -> str:
    """Variants of the rule, meta-trained alike."""
    columns = read("ablation")["columns"]
    first = next(iter(columns.values()))
    rows = [
        [name, *(score(c[name]) for c in columns.values()), str(x["n_parameters"]), f"{x['ms_per_step']:.2f}"]
        for name, x in first.items()
    ]
    return table(["variant", *columns, "parameters", "milliseconds per step"], rows)


def generalisation() -> str:
    """Held-out losses at equal training loss, and after the last step."""
    return summary_tables(read_columns(FIGS / "generalisation.json", header={}), markdown=True)


def matrix() -> str:
    """Ratios of losses to that of tuned Adam in every cell: of the general rule, of the default one, also untrained."""
    rules, rows = {"port-hamiltonian": read("matrix"), RULE: read(f"{RULE}/matrix")}, []
    rules[f"{RULE}, untrained"] = read(f"{RULE}-untrained/matrix")
    for cell in read("matrix")["cells"]:
        rows.append([cell])
        for content in rules.values():
            scores = {name: tensor(outcome["scores"]) for name, outcome in content["cells"][cell].items()}
            mine = scores.pop("rule")
            rows[-1] += [ratio_text(ratio_interval(mine, theirs, floor=RESOLUTION)) for theirs in scores.values()]
    return table(["cell", *(f"{rule} to {name}, tuned" for rule in rules for name in scores)], rows)


def meta_seeds() -> str:
    """Three meta-trainings of each rule."""
    content = read("meta_seeds")
    columns = content["mnist"] | content["quadratic"]
    return table(["rule", *columns], by_kind(columns, lambda entry: score(entry, with_difference=False)))


def by_kind(columns: Mapping[str, Mapping[str, Any]], write: Callable[[Any], str]) -> list[list[str]]:
    """Rows of rules, of which those of one kind, each trained on the task of its column, share one."""
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        kinds.setdefault(re.sub("-(mnist|quadratic)$", "-", name), []).append(name)
    rows = []
    for kind, names in kinds.items():
        found = [[column[name] for name in names if name in column] for column in columns.values()]
        title = " / ".join([names[0], *(name.removeprefix(kind[:-1]) for name in names[1:])])
        rows.append([title, *(write(x[0]) if x else "" for x in found)])
    return rows


def compared(entry: Mapping[str, Any]) -> str:
    """Mean score [interval of the difference to the reference]."""
    if entry["score"] is None:
        return "diverged"
    difference = entry["difference"]
    if difference is None:
        return f"{entry['score']:.3f} (reference)"
    if None in difference:  # of one run, or to one that diverged
        return f"{entry['score']:.3f}"
    return f"{entry['score']:.3f} [{difference[1]:+.3f}, {difference[2]:+.3f}]"


def general() -> str:
    """The general rule beside hand-designed ones that are tuned for each column."""
    columns = read("general")
    return table(["rule", *columns], by_kind(columns, compared))


def own_tasks() -> str:
    """The rules that were trained for one task, on it."""
    mnist, title = read("mnist"), "state, bytes per parameter"
    columns = {"quadratics": read("quadratic"), "MNIST, sigmoid": mnist["sigmoid"], "MNIST, ReLU": mnist["relu"]}
    for key, column in columns.items():
        columns[key] = {name.split(" (")[0]: entry for name, entry in column.items()}
    columns[title] = {name: entry["state_bytes"] for name, entry in columns["MNIST, sigmoid"].items()}
    rows = by_kind(columns, lambda entry: f"{entry:.0f}" if isinstance(entry, float) else compared(entry))
    return table(["rule", *columns], rows)


def saddles() -> str:
    """Median step at which each rule leaves a saddle."""
    columns = read("saddle")
    names = next(iter(columns.values()))
    return table(["rule", *columns], [[name, *(column[name] for column in columns.values())] for name in names])


def optimizers_view() -> str:
    """The same rule trained with one solver and run with another."""
    content = read("optimizers_view")
    rules, costs = content["rules"], content["costs"]
    rows = [
        [
            name,
            *(score(ran[name] | {"by_seed": []}) for ran in rules.values()),
            f"{cost['field evaluations']:.0f}" if "field evaluations" in cost else "exact",
            f"{cost['ms']:.2f}",
        ]
        for name, cost in costs.items()
    ]
    titles = ["run with", *(f"trained with {name}" for name in rules), "evaluations", "milliseconds per step"]
    return table(titles, rows)


def physics(measure: Callable[[Mapping[str, Any]], str], only: str = "") -> str:
    """One number of each model of each mechanical system."""
    systems = read("physics")["systems"]
    names = [name for name in dict.fromkeys(n for s in systems.values() for n in s) if name.startswith(only)]
    rows = [[name, *(measure(s[name]) if name in s else "" for s in systems.values())] for name in names]
    return table(["model", *systems], rows)


def parts(entry: Mapping[str, Any]) -> str:
    """Relative errors of the four parts in percent."""
    return ", ".join(f"{100 * error:.1f}" for error in entry["parts"].values())


def rises(entry: Mapping[str, Any]) -> str:
    """Steps in which the energy rises, by the discrete gradient and by rk4."""
    found = entry["rises"]
    return " / ".join(str(found[f"{method}, 10 x"]["n"]) for method in ("discrete_gradient", "rk4"))


def solvers(title: str) -> str:
    """One of the tables of the comparison of solvers, by the words with which its title begins."""
    blocks = SolverComparison.load(FIGS / "solvers.json").table(markdown=True).split("\n\n")
    index = next(i for i, block in enumerate(blocks) if block.startswith(title))
    return f"{blocks[index]}:\n\n{blocks[index + 1]}"


def read_suite(name: str = "suite", names: Collection[str] = ()) -> Suite:
    """Read the runs of the suite, or of problems like its own.

    With the names of contenders, their runs alone, on those problems and seeds that all of them have run.

    Raises:
        UnfinishedError: If there are none, or not those of all.
    """
    if not (FIGS / f"{name}.json").exists():
        raise UnfinishedError
    found: dict[str, dict[str, dict[tuple[str, str], Mapping[str, Any]]]] = {}
    for key, record in read(name)["runs"].items():
        problem, contender, lr, seed, _ = key.split(" | ")
        runs, place = found.setdefault(problem, {}).setdefault(contender, {}), (lr[3:], seed[5:])
        if place in runs:
            raise ValueError(f"figs/{name}.json has two runs like {key!r}, of which one is older. Make it anew.")
        runs[place] = record
    if names:
        found = {p: {name: of[name] for name in names} for p, of in found.items() if of.keys() >= set(names)}
        common = set.intersection(*({seed for _, seed in runs} for of in found.values() for runs in of.values()))
        found = {
            p: {name: {at: x for at, x in runs.items() if at[1] in common} for name, runs in of.items()}
            for p, of in found.items()
        }
    outcomes = {problem: {name: outcome(runs) for name, runs in by_name.items()} for problem, by_name in found.items()}
    contenders = {
        name: OPPONENTS.get(name) or Contender(name, name, LearnedOptimizer, (1.0,), is_learned=True)
        for name in dict.fromkeys(name for by_name in outcomes.values() for name in by_name)
    }
    n_runs = {len(x.train) for by_name in outcomes.values() for x in by_name.values()}
    if len(n_runs) > 1 or any(by_name.keys() != contenders.keys() for by_name in outcomes.values()):
        raise UnfinishedError
    contenders = dict(sorted(contenders.items(), key=lambda item: not item[1].is_learned))
    problems = {
        name: SimpleNamespace(title=name, settings=next(iter(next(iter(by_name.values())).values()))["settings"])
        for name, by_name in found.items()
    }
    return Suite(problems, contenders, outcomes, n_runs.pop())


def outcome(runs: Mapping[tuple[str, str], Mapping[str, Any]]) -> Outcome:
    """Paired runs of one contender on one problem, beside those by which its learning rate was chosen."""
    compared = sorted((int(seed), lr) for lr, seed in runs if int(seed) < TUNING_SEED)
    rates = {float(lr) for lr, _ in runs}
    records = [runs[lr, str(seed)] for seed, lr in compared]
    numbers = [tensor([record[name] for record in records]) for name in ("train", "held_out", "seconds")]
    curves = torch.stack([tensor(record["curve"]) for record in records], 1)
    lr = float(compared[0][1])
    is_edge = len(rates) > 1 and lr in (min(rates), max(rates))
    return Outcome(lr, is_edge, *numbers, curves, steps_of(records[0]["settings"]["n_steps"]))


_SUITE = "python -m odeopt suite --untold --untrained"


def suite(name: str = "suite", *, in_full: bool = False) -> str:
    """Training and held-out losses over those of tuned AdamW, of learned rules with intervals; and all else."""
    found = read_suite(name)
    learned = [name for name, contender in found.contenders.items() if contender.is_learned]
    others = [name for name in found.contenders if name not in (*learned, REFERENCE)]
    titles = [*(name.removeprefix(f"{learned[0]}, ") for name in learned), *(found.contenders[x].title for x in others)]
    tables = []
    for of, title in (("train", "training loss"), ("held_out", "held-out loss")):
        rows = [
            [
                problem,
                *(_with_spread(found, problem, name, of) for name in learned),
                *(ratio_text(found.ratio(problem, name, of)).split(" [")[0] for name in others),
            ]
            for problem in found.problems
        ]
        tables.append(table([title, *titles], rows))
    spread = "(and each of them)" if found.n_runs == 2 else "[95 % Student interval]"
    untuned = " and ".join(
        f"{OPPONENTS[name].title.split(',')[0]}'s" for name in others if len(OPPONENTS[name].rates) == 1
    )
    command = _SUITE if name == "suite" else f"python examples/studies/{name}.py"
    caption = (
        f"Losses over those of tuned AdamW with warm-up and cosine decay: geometric means of {found.n_runs} paired\n"
        f"runs {spread}, below one is better.\n"
        "Cross-entropies below 1.2e-7 count as 1.2e-7. Learned rules are used as they are; the other learning rates\n"
        f"{f'(except {untuned}) ' if untuned else ''}are chosen by grid for each problem\n"
        f"(`{command} --runs {found.n_runs} --out figs`)."
    )
    rest = ["All numbers:", found.table(markdown=True)] if in_full else [*map(found.summary, learned)]
    return "\n\n".join([caption, *tables, *rest])


def _with_spread(found: Suite, problem: str, name: str, of: str) -> str:
    """A ratio to tuned AdamW with its interval, or with both ratios of two runs, of which an interval says nothing."""
    ratio, outcomes = found.ratio(problem, name, of), found.outcomes[problem]
    if found.n_runs != 2 or not 0 < ratio.mean < math.inf:
        return ratio_text(ratio)
    floor = resolution_of(found.problems[problem].settings["criterion"])
    pairs = [[getattr(outcomes[x], of)[k : k + 1] for x in (name, REFERENCE)] for k in range(2)]
    each = (ratio_text(x).split(" ")[0] for x in sorted(ratio_interval(*pair, floor=floor) for pair in pairs))
    return f"{ratio_text(ratio).split(' ')[0]} ({', '.join(each)})"


def suite_in_short() -> str:
    """Training / held-out losses over those of tuned AdamW: of the first learned rule, and of the opponents."""
    found = read_suite()
    learned = [name for name, contender in found.contenders.items() if contender.is_learned]
    names = [learned[0], *(name for name in found.contenders if name not in (*learned, REFERENCE))]
    untrained = [name for name in learned if name == f"{learned[0]}, untrained"]
    rows = []
    for p, results in found.outcomes.items():
        times = [results[name].seconds.median().item() for name in (learned[0], REFERENCE)]
        mine, *others = _with_least_in_bold(found, p, names)
        rows.append([p, mine, *(both(found, p, name) for name in untrained), *others, f"{times[0] / times[1]:.1f}"])
    caption = (
        "Training / held-out loss over that of tuned AdamW with warm-up and cosine decay, geometric means of\n"
        f"{found.n_runs} paired runs; below one is better, in bold the best of rule and opponents. The rule is used\n"
        "as it is, at `lr=1`; untrained: the same before meta-training. Other learning rates (but Adam's and\n"
        "Prodigy's) are chosen by grid for each network, by training loss (few-examples: by held-out loss; a\n"
        "larger rate brings AdamW's training loss there near the rule's). Time: of the rule's runs over AdamW's,\n"
        "medians, on one thread "
        f"of a CPU (`{_SUITE} --runs {found.n_runs} --out figs`; intervals, all\n"
        "numbers and the data: [Results](docs/results.md))."
    )
    titles = [learned[0], *("untrained" for _ in untrained), *(found.contenders[name].title for name in names[1:])]
    return f"{caption}\n\n{table(['network', *titles, 'time'], rows)}"


def both(found: Suite, problem: str, name: str) -> str:
    """Training / held-out loss of a contender over that of tuned AdamW."""
    return " / ".join(map(_briefly, (found.ratio(problem, name, of).mean for of in ("train", "held_out"))))


def _briefly(ratio: float) -> str:
    """A ratio in as many digits as one reads."""
    return "<0.01" if ratio < 0.005 else f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


def _with_least_in_bold(found: Suite, problem: str, names: Sequence[str]) -> list[str]:
    """What :func:`both` says of each contender; the least loss of each kind, as it is written, is marked."""
    least = [_briefly(min(found.ratio(problem, name, of).mean for name in names)) for of in ("train", "held_out")]
    cells = (both(found, problem, name).split(" / ") for name in names)
    return [" / ".join(f"**{x}**" if x == best else x for x, best in zip(cell, least, strict=True)) for cell in cells]


def energies() -> str:
    """Training / held-out losses of each kinetic energy over those of tuned AdamW, on problems that all have run."""
    names = dict.fromkeys(key.split(" | ")[1] for key in read("kinetic")["runs"])
    found = read_suite("kinetic", names)
    rows = [[name, *(both(found, p, name) for p in found.problems)] for name in names if name != REFERENCE]
    caption = f"Training / held-out loss over that of tuned AdamW, geometric means of {found.n_runs} paired runs."
    return f"{caption}\n\n{table(['kinetic energy', *found.problems], rows)}"


def orthogonalised() -> str:
    """The default rule beside the orthogonalised updates of another one, on all problems of the suite."""
    names = (REFERENCE, RULE, "port-hamiltonian, orthogonalised")
    found = read_suite("kinetic", names)
    rows = [
        [p, *(both(found, p, name) for name in names[1:])]
        + [ratio_text(found.ratio(p, names[1], kind, reference=names[2])) for kind in ("train", "held_out")]
        for p in found.outcomes
    ]
    caption = (
        f"Training / held-out loss over that of tuned AdamW, geometric means of {found.n_runs} paired runs; and\n"
        "losses of the default rule over those of the other [95 % Student interval].\n"
        "Cross-entropies below 1.2e-7 count as 1.2e-7."
    )
    titles = ["problem", *names[1:], "training, one over the other", "held out, one over the other"]
    return f"{caption}\n\n{table(titles, rows)}"


def filled(page: str) -> str:
    """Put each table of a page between its marks, or leave what is there where its runs are not complete."""

    def fill(found: re.Match[str]) -> str:
        try:
            return f"<!-- table: {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end of the table -->"
        except UnfinishedError:
            return found[0]

    return MARKED.sub(fill, page)


_LAWS = {
    "initial_matrix_kappa": "operator norm of a step of a square matrix, about",
    "initial_kappa": "step of a coordinate at a fan-in of one; falls with the fourth root of the fan-in",
    "depth_power": "how fast steps of matrices fall with their number in the network, up to five",
    "horizon_power": "how fast steps fall with the length of the run",
    "initial_coherence": "power of the coherence of gradients in a step: short steps where they are mostly noise",
    "initial_lookahead": "steps ahead at which the velocity is taken, as Nesterov does",
    "alignment_rate": "how fast step sizes follow the cosine of gradients and momenta",
    "alignment_horizon": "step from which on that growth goes back",
    "trust_ratio": "largest step of a matrix over its entries, in the mean square",
    "row_power": "how fast the gain of a row falls with its momentum",
    "narrow": "most rows or columns of a matrix that is stepped by coordinates",
    "initial_decay": "decay of matrices, per step and unit of the step size",
    "decay_growth": "bound of its growth where gradients vanish",
    "decay_onset": "fall of the gradients up to which it grows by half at most",
    "decay_horizon": "length of a run from which on the decay per step falls",
}


def laws_of_the_rule() -> str:
    """What is built into the default rule, with the values that it ships with."""
    config = load_pretrained(RULE).config
    return table(["argument", "value"], [[f"`{name}`: {text}", f"{config[name]:,g}"] for name, text in _LAWS.items()])


def varied(name: str, variants: Iterable[str]) -> str:
    """Losses of variants of the default rule over those of the rule as it is."""
    return losses_of_variants(read_suite(name), variants, markdown=True)


def step(name: str = "step") -> str:
    """Times of a step over that of Adam."""
    content = read(name)
    return f"{content['machine']}:\n\n{ratio_table(content['rows'])}"


def meta() -> str:
    """Times of meta-training and of evaluation, per task and optimizee step."""
    content = read("meta")
    by_case: dict[tuple[str, str], list[str]] = {}
    for row in content["timings"]:
        cells = by_case.setdefault((row["rule"], row["pass"]), [])
        cells += [spread(row["batched_us"]), f"{statistics.median(row['loop_us']):,.0f}"]
    titles = ["", "quadratics, 128 at once", "one by one", "MNIST 784-20-10, 4 at once", "one by one"]
    rows = [[", ".join(case), *cells] for case, cells in by_case.items()]
    return f"{content['machine']}:\n\n{table(titles, rows)}"


def solver_step() -> str:
    """Times of a step of solvers, over that of a loop written by hand."""
    content = read("solver_step")
    us = {(row["problem"], row["solver"]): row["us"] for row in content["rows"]}
    rows = [[problem, name, spread(ratio(of, us[problem, BY_HAND]))] for (problem, name), of in us.items()]
    return f"{content['machine']}:\n\n{table(['128 pendulums', 'solver', 'x loop by hand'], rows)}"


def guard_cost() -> str:
    """Milliseconds of steps with and without a guard, of a snapshot and of a look at diagnostics."""
    content = read("guard_cost")
    rows = [[f"{row['parameters']:,}", *map(spread, row["ms"].values())] for row in content["rows"]]
    return f"{content['machine']}:\n\n{table(['parameters', *content['rows'][0]['ms']], rows)}"


def tensor(values: Sequence[float | None]) -> torch.Tensor:
    """Losses in double precision; JSON has null for those that are not finite."""
    return torch.tensor([math.inf if value is None else value for value in values], dtype=torch.float64)


TABLES: dict[str, Callable[[], str]] = {
    "ablation": ablation,
    "blind": lambda: suite("blind"),
    "cheaper": lambda: varied("cheaper", WAYS),
    "coordinate_check": lambda: changes_of_outputs(read("coordinate_check"), markdown=True),
    "depth": lambda: losses_over_rates(read("depth"), markdown=True),
    "equal_loss": lambda: at_equal_loss(read("equal_loss")["equal"], markdown=True),
    "finetuning": lambda: suite("finetuning"),
    "general": general,
    "generalisation": generalisation,
    "guard": lambda: guarded_losses(read("guard"), markdown=True),
    "guard_cost": guard_cost,
    "heads": lambda: varied("heads", [HEAD]),
    "kinetic": energies,
    "laws": lambda: varied("laws", (*LAWS, AS_ONE)),
    "laws_of_the_rule": laws_of_the_rule,
    "long_runs": lambda: suite("long_runs"),
    "matrix": matrix,
    "meta": meta,
    "meta_seeds": meta_seeds,
    "optimizers_view": optimizers_view,
    "orthogonalised": orthogonalised,
    "own_tasks": own_tasks,
    "physics": lambda: physics(lambda entry: entry["prediction"]["text"]),
    "physics_parts": lambda: physics(parts, "port-Hamiltonian"),
    "physics_rises": lambda: physics(rises, "port-Hamiltonian"),
    "robustness": lambda: table(("", "tried", "as it should", "refused in words", "otherwise"), read("robustness")),
    "saddles": saddles,
    "scale": lambda: suite("scale"),
    "seeds": lambda: varied("seeds", OTHERS),
    "solvers": lambda: solvers("Evaluations"),
    "solvers_errors": lambda: solvers("Relative errors"),
    "solvers_orders": lambda: solvers("Orders"),
    "solver_step": solver_step,
    "step": step,
    "step_epyc": lambda: step("step_epyc"),
    "suite": lambda: suite(in_full=True),
    "suite_in_short": suite_in_short,
    "taught": lambda: varied("taught", OUTPUTS),
    "trained_energies": lambda: losses_of_trained_energies(read_suite("trained_energies"), markdown=True),
    "unseen": lambda: suite("unseen"),
    "widest": lambda: suite("widest"),
}

if __name__ == "__main__":
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
