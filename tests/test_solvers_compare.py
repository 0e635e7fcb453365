"""The comparison of solvers: orders, failures, precisions, gradients, tables, files and the command."""

import math
import re
from dataclasses import asdict, replace

import pytest
import torch

from odeopt import compare_solvers
from odeopt.__main__ import main
from odeopt.ode import STRUCTURE_ORDER, available_methods
from odeopt.ode.recorder import map_state
from odeopt.physics import PhaseState, PortHamiltonianSystem
from odeopt.solvers import (
    Method,
    Problem,
    SolverComparison,
    SolverRun,
    comparable_methods,
    compare,
    observed_order,
    select_problems,
)
from odeopt.solvers.compare import shortened
from odeopt.solvers.initial_value import flatten
from odeopt.solvers.tables import attainable

F64 = torch.float64
METHODS = comparable_methods()
JUDGED = [name for name, method in METHODS.items() if method.order is not None and method.kind != "structure"]
STRUCTURE = Method("made-up", "made-up", "structure", 2)
ORDER_PROBLEMS = {p.name: shortened(p) for p in select_problems(["pendulum", "driven-pendulum"])}


@pytest.fixture(autouse=True, scope="module")
def remembered():
    """Solve each problem at 1e-14, for its gradient and with steps of given sizes once: most of the time goes there."""
    known = {problem.name for problem in select_problems(None)}

    def once(function):
        found = {}

        def remembering(problem):
            # those made here have names in common, and most have closed forms
            key = (problem.name, *problem.t.tolist()) if problem.name in known else problem
            if key not in found:
                found[key] = function(problem)
            return found[key]

        return remembering

    orders = {}

    def observed_once(problem, method, *, states=None):
        name = getattr(method, "name", method)
        if problem.name not in ORDER_PROBLEMS:
            return observed_order(problem, method, states=states)
        key = (problem.name, *problem.t.tolist(), name)
        if key not in orders:
            orders[key] = observed_order(problem, method, states=states)
        return orders[key]

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("reference", "reference_gradient"):
            monkeypatch.setattr(compare, name, once(getattr(compare, name)))
        monkeypatch.setattr(compare, "observed_order", observed_once)
        yield


@pytest.fixture(scope="module")
def references(remembered):
    return {name: flatten(compare.reference(problem)) for name, problem in ORDER_PROBLEMS.items()}


def run(problems, methods, **settings):
    settings = {"with_orders": False, "max_gradient_evals": 0, "n_repeats": 1} | settings
    return compare_solvers(problems, methods, progress_bar=False, **settings)


def decay(**parts):
    """A problem of ours with a closed form."""
    x0, t = torch.tensor([1.0, 2.0], dtype=F64), torch.linspace(0.0, 2.0, 3, dtype=F64)
    good = {"field": lambda t, x: -x, "exact": lambda t: torch.exp(-t)[:, None] * x0}
    return Problem("decay", "ours", x0, t, **good | parts)


# ------------------------------------------------------------------------------------- methods


def test_every_method_of_the_installed_libraries_is_compared():
    assert {method.method for method in METHODS.values()} >= set(available_methods())
    assert {"scipy-RK45", "scipy-LSODA", "scipy-Radau", "scipy-BDF", "scipy-DOP853"} < METHODS.keys()
    assert METHODS["explicit_adams"].options == {"max_order": 5}
    assert METHODS["explicit_adams"].order is None
    assert METHODS["scipy-BDF"].is_external
    assert {name: method.order for name, method in METHODS.items() if method.order}["rk4"] == 4


def test_structure_preserving_methods_are_among_them():
    found = {name: method for name, method in METHODS.items() if method.kind == "structure"}
    assert {name: method.order for name, method in found.items()} == STRUCTURE_ORDER


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_solves_an_easy_problem_with_its_gradient(name):
    problem = ORDER_PROBLEMS["pendulum"] if METHODS[name].kind == "structure" else decay()
    (found,) = run([problem], [name], tolerances=(1e-5,), n_steps=(32,), max_gradient_evals=40000).runs
    assert found.status in ("success", "implicit iteration did not converge")
    # euler with steps of 1/32 is off by 1/64 / e of the largest norm; the pendulum's steps are twice as long
    is_long = METHODS[name].kind == "structure"
    assert found.error < (5e-2 if is_long else 1e-2)
    assert found.gradient_error < (0.1 if is_long else 5e-2)
    assert found.n_evals > 0
    assert found.seconds > 0


# ------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize("problem", ORDER_PROBLEMS)
@pytest.mark.parametrize("name", JUDGED)
def test_methods_have_their_nominal_order_whether_the_field_depends_on_the_time_or_not(name, problem, references):
    row = compare.observed_order(ORDER_PROBLEMS[problem], name, states=references[problem])
    assert row.is_kept
    # of dopri8 two runs at most lie between the asymptotic regime and rounding
    assert row.observed == pytest.approx(row.nominal, abs=0.3 if row.nominal < 8 else 0.6)


def test_a_solver_that_holds_the_time_over_a_step_is_caught_where_the_field_depends_on_it(monkeypatch, references):
    integrate = compare.integrate

    def stale(field, x0, t, *, options, **others):
        h = options["step_size"]
        return integrate(lambda s, x: field(torch.floor(s / h + 1e-9) * h, x), x0, t, options=options, **others)

    monkeypatch.setattr(compare, "integrate", stale)
    kept, lost = (observed_order(ORDER_PROBLEMS[name], "rk4", states=references[name]) for name in ORDER_PROBLEMS)
    assert kept.observed == pytest.approx(4, abs=0.3)
    assert lost.observed == pytest.approx(1, abs=0.3)
    assert (kept.is_kept, lost.is_kept) == (True, False)
    names = ("device", "threads", "torch", "torchdiffeq", "scipy", "max_evals", "n_repeats")
    settings = dict.fromkeys(names, 1) | {"tolerances": [], "n_steps": []}
    text = SolverComparison((), (kept, lost), settings).table()
    assert re.search(r"rk4 +4 +(3\.9|4\.0)\d +(0\.9|1\.0)\d +no", text)


def test_a_field_that_jumps_costs_the_order():
    """The field itself may be what loses it: the measurement says so too."""
    t, at = torch.linspace(0.0, 2.0, 3, dtype=F64), 0.5**0.5  # which no step ends on

    def exact(t):
        return torch.where(t < at, t, at + 3 * (t - at))[:, None]

    jump = Problem(
        "jump", "ours", torch.zeros(1, dtype=F64), t, lambda t, x: torch.where(t < at, 1.0, 3.0) + 0 * x, exact
    )
    assert observed_order(jump, "rk4", n_steps=(4, 16, 64)).is_kept is False


def test_orders_that_cannot_be_measured_say_why():
    assert observed_order(decay(), STRUCTURE).status == "not applicable"
    assert observed_order(decay(), "scipy-RK45").status == "not applicable: its steps have no given size"
    unknown = Method("unknown", "unknown", "fixed", 1)
    row = observed_order(decay(), unknown)
    assert (row.observed, row.is_kept) == (None, None)
    assert row.status.startswith("error: ValueError: Parameter `method` should be one of")


def test_orders_of_multistep_methods_are_shown_and_not_judged():
    row = observed_order(decay(), "explicit_adams")
    assert row.observed > 3
    assert row.is_kept is None


# ------------------------------------------------------------------------------------- runs


def test_errors_evaluations_and_steps_are_those_of_the_run():
    (found,) = run(["A1"], ["euler"], n_steps=(4,)).runs
    assert (found.n_evals, found.n_steps, found.setting, found.dtype) == (40, 40, 0.5, "float64")
    # euler multiplies by 1/2: the largest error, of the first output, over the start
    assert found.error == pytest.approx(abs(0.5**4 - math.exp(-2)), rel=1e-3)  # four digits are kept


def test_the_energy_is_compared_with_the_dissipated_truth():
    (found,) = run(["quadratic"], ["rk4"], n_steps=(8,)).runs
    problem = select_problems(["quadratic"])[0]
    solution = compare.integrate(problem.field, problem.x0, problem.t, method="rk4", options={"step_size": 0.25})
    energies = problem.energy(solution.states)
    truth = problem.energy(problem.exact(problem.t))
    assert found.energy_error == pytest.approx(((energies - truth).abs().max() / truth.max()).item(), rel=1e-3)
    assert run(["A1"], ["rk4"], n_steps=(8,)).runs[0].energy_error is None


def test_runs_in_two_precisions_are_paired_and_measured_against_one_reference():
    comparison = run(["B4", "pendulum"], ["rk4", "dopri8"], tolerances=(1e-2, 1e-10), n_steps=(2, 64),
                     dtypes=(F64, torch.float32))  # fmt: skip
    assert comparison.dtypes == ["float64", "float32"]
    for double in comparison.select(dtype="float64"):
        (single,) = comparison.select(problem=double.problem, method=double.method, level=double.level, dtype="float32")
        assert single.setting == pytest.approx(double.setting, rel=1e-7)
        if double.level == 0:  # truncation, the same in both but for decisions on the steps
            assert single.error == pytest.approx(double.error, rel=0.1)
        elif double.method == "rk4":
            assert single.error == pytest.approx(double.error, abs=2e-5)  # a few hundred roundings of 6e-8
        else:
            assert double.error < 1e-8
            assert single.error is None or single.error > 1e-8  # rounding, or a step size that underflows


@pytest.mark.parametrize("name", ["dopri5", "scipy-RK45"])
def test_the_error_of_the_gradient_falls_with_the_tolerance(name):
    runs = run(["A3"], [name], tolerances=(1e-3, 1e-5, 1e-7), max_gradient_evals=2000).runs
    loose, middle, tight = (found.gradient_error for found in runs)
    assert loose > 5 * middle > 25 * tight
    assert tight < 1e-5


def test_gradients_are_left_out_beyond_their_budget():
    runs = run(["A3"], ["rk4"], n_steps=(1, 2, 4), max_gradient_evals=100).runs
    assert [found.n_evals for found in runs] == [40, 80, 160]
    assert [found.gradient_error is not None for found in runs] == [True, True, False]


# ------------------------------------------------------------------------------------- failures


def test_failures_are_kept_with_their_reason():
    def broken(t, x):
        raise ZeroDivisionError("of all things")

    by_name = {
        "raises": (decay(field=broken), {}),
        "blows up": (decay(field=lambda t, x: 1e300 * x), {}),
        "too dear": (decay(), {"max_evals": 20}),
    }
    found = {
        name: run([problem], ["rk4"], n_steps=(1, 2, 4, 8), **limits).runs
        for name, (problem, limits) in by_name.items()
    }
    assert all(len(runs) == 4 for runs in found.values())
    assert {(r.status, r.message) for r in found["raises"]} == {("error", "ZeroDivisionError: of all things")}
    assert {r.status for r in found["blows up"]} == {"non-finite state"}
    assert all("reached t = 0 of 2" in r.message and r.error is None for r in found["blows up"])
    assert [r.status for r in found["too dear"]] == ["success", "success", *2 * ["over the budget"]]
    assert [r.message for r in found["too dear"]][2:] == [
        "not tried: more evaluations were to be expected, after looser settings.",
        "not tried: more evaluations were to be expected, after looser settings.",
    ]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_compared_where_the_caller_has_switched_them_off(mode):
    problems, options = [decay(), decay()], {"n_steps": (8,), "max_gradient_evals": 400}
    (wanted,) = run(problems[:1], ["rk4"], **options).runs
    with mode():
        (found,) = run(problems[1:], ["rk4"], **options).runs
    assert found.gradient_error == wanted.gradient_error > 0


def test_a_run_over_its_budget_is_stopped():
    (found,) = run([decay()], ["dopri5"], tolerances=(1e-6,), max_evals=10).runs
    assert (found.status, found.message) == ("over the budget", "asked for more than 10 evaluations.")


def test_a_method_that_takes_a_system_has_the_same_budget():
    (found,) = run(["pendulum"], ["implicit_midpoint"], n_steps=(8,), max_evals=50).runs
    assert (found.status, found.error) == ("over the budget", None)
    assert re.fullmatch(r"took \d+ evaluations\.", found.message)
    (enough,) = run(["pendulum"], ["implicit_midpoint"], n_steps=(8,), max_evals=3000).runs
    assert enough.is_success
    assert enough.n_evals > 50


@pytest.mark.parametrize("n_steps", [(4, 2, 1), (0, 1), (), "12"])
def test_an_order_is_measured_over_finer_and_finer_steps(n_steps):
    with pytest.raises(ValueError, match=r"`n_steps` should be a rising list of positive numbers. Found `n_steps = "):
        observed_order(decay(), "rk4", n_steps=n_steps)


def test_an_iteration_that_does_not_converge_has_an_error_and_a_remark():
    (found,) = run(["A3"], ["implicit_adams"], n_steps=(4,)).runs
    assert found.status == "implicit iteration did not converge"
    assert "maybe" not in found.message
    assert "may be inaccurate" in found.message
    assert 0 < found.error < 1


def test_explicit_methods_fail_on_stiff_problems_and_stiff_ones_do_not():
    comparison = run(["robertson"], ["rk4", "scipy-LSODA"], tolerances=(1e-6,), n_steps=(1, 16))
    assert {found.status for found in comparison.select(method="rk4")} == {"non-finite state"}
    (stiff,) = comparison.select(method="scipy-LSODA")
    assert stiff.error < 1e-4
    assert comparison.failures() == {("rk4", "non-finite state", "stiff"): 2}


def test_structure_preserving_methods_are_not_applicable_without_a_system():
    comparison = run([decay()], [STRUCTURE, "rk4"], n_steps=(1, 2))
    runs = comparison.select(method="made-up")
    assert [found.status for found in runs] == ["not applicable"] * 2
    assert "keeps the structure of a port-Hamiltonian system" in runs[0].message
    row = next(line for line in comparison.table().splitlines() if line.startswith("made-up"))
    assert row.split() == ["made-up", "n/a"]
    assert "made-up, not applicable" not in comparison.table()


def test_structure_preserving_methods_get_the_system_the_effort_and_the_step_size(monkeypatch):
    integrate, calls = compare.integrate, []

    def ours(system, x0, t, *, method, options, u=None):
        calls.append((system, x0, method, options, u))
        solution = integrate(problem.field, x0, t, method="rk4", options={"step_size": 0.125})
        return replace(solution, n_field_evals=7)

    problem = ORDER_PROBLEMS["driven-pendulum"]
    monkeypatch.setattr(compare, "integrate", ours)
    monkeypatch.setattr("odeopt.solvers.reference.integrate", integrate)
    (found,) = run([problem], [STRUCTURE], n_steps=(4,)).runs
    (system, x0, method, options, u) = calls[0]
    assert isinstance(system, PortHamiltonianSystem)
    assert isinstance(x0, PhaseState)
    assert (method, options, u) == ("made-up", {"step_size": 0.5}, problem.effort)
    assert found.error < 1e-4
    assert (found.kind, found.n_evals) == ("structure", 7)


@pytest.mark.gpu
def test_solvers_are_compared_on_a_gpu():
    settings = {"tolerances": (1e-6,), "n_steps": (8,), "max_gradient_evals": 4000}
    cpu, gpu = (
        run(["C5", "softmax", "driven-pendulum"], None, device=device, **settings) for device in ("cpu", "cuda")
    )
    for here, there in zip(cpu.runs, gpu.runs, strict=True):
        assert (here.method, here.status) == (there.method, there.status)
        for measure in ("error", "energy_error"):
            if getattr(here, measure) is not None:  # rounding may change decisions on steps
                assert getattr(there, measure) == pytest.approx(getattr(here, measure), rel=0.5, abs=1e-10)


# ------------------------------------------------------------------------------------- what comes of it


@pytest.fixture(scope="module")
def comparison(remembered):
    return compare_solvers(
        # two intervals each of the mechanical ones: dopri8 at 1e-14 takes seconds for all ten
        ["A3", ORDER_PROBLEMS["pendulum"], *map(shortened, select_problems(["kepler"]))],
        ["rk4", "dopri5", "scipy-RK45", STRUCTURE],
        tolerances=(1e-3, 1e-6, 1e-9),
        n_steps=(2, 16, 64),
        n_repeats=1,
        max_gradient_evals=400,
        progress_bar=False,
    )


def test_work_is_interpolated_between_the_runs_around_the_target():
    blank = {"problem": "p", "group": "g", "method": "m", "kind": "fixed", "dtype": "float64", "setting": 1.0}
    points = [(100, 1e-2), (200, 1e-4), (400, 1e-6)]
    runs = [SolverRun(**blank, level=i, n_evals=n, error=e, seconds=n / 1e3) for i, (n, e) in enumerate(points)]
    found = SolverComparison(tuple(runs), (), {})
    assert found.work("p", "m", target=1e-4) == 200
    assert found.work("p", "m", target=1e-5) == pytest.approx(200 * 2**0.5, rel=1e-12)
    assert found.work("p", "m", target=1e-5, unit="seconds") == pytest.approx(0.2 * 2**0.5, rel=1e-12)
    assert found.work("p", "m", target=1e-7) == math.inf
    assert found.work("p", "m", target=0.5) == 100
    assert found.curve(["p"], "m", dtype="float64") == points
    with pytest.raises(ValueError, match=r"Parameter `unit` should be one of n_evals, seconds. Found `unit = 'hours'`"):
        found.work("p", "m", unit="hours")
    for wrong in ({"problem": "q"}, {"method": "n"}, {"dtype": "float32"}, {"measure": "err"}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` should be one of "):
            found.work(**{"problem": "p", "method": "m"} | wrong)


def test_failures_count_as_infinite_in_medians():
    blank = {"group": "g", "method": "m", "kind": "fixed", "dtype": "float64", "setting": 1.0, "level": 0}
    good = [SolverRun(f"p{i}", **blank, n_evals=10, error=e) for i, e in enumerate((1e-3, 1e-2))]
    bad = [SolverRun(f"b{i}", **blank, status="error") for i in range(2)]
    curve = SolverComparison((*good, bad[0]), (), {}).curve(["p0", "p1", "b0"], "m", dtype="float64")
    assert curve == [(10, 1e-2)]
    assert SolverComparison((*good[:1], *bad), (), {}).curve(["p0", "b0", "b1"], "m", dtype="float64") == []
    dear = replace(good[0], problem="dear", n_evals=30)
    assert SolverComparison((dear, good[1], bad[0]), (), {}).curve(["p1", "dear", "b0"], "m", dtype="float64") == [
        (30, 1e-2)
    ]


def test_the_table_has_work_errors_orders_and_failures(comparison):
    text = comparison.table(target=1e-4)
    titles = (
        "Evaluations to a relative error of 0.0001, float64",
        "Milliseconds to",
        "Relative errors at no more than 500",
        "Orders",
    )
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    work = text[places[0] : places[1]].splitlines()
    assert work[2].split() == ["method", "DETEST", "A", "mechanics"]
    rows = {line.split()[0]: line.split() for line in work[5:] if line}
    assert rows["made-up"][1] == "n/a"
    assert 250 < int(rows["rk4"][1]) < 320  # the error is 5.6e-5 at 320 evaluations
    orders = text[places[3] :]
    assert re.search(r"rk4 +4 +3\.9\d +4\.0\d +yes", orders)
    assert "scipy-RK45  " not in orders  # has no order here
    assert f"torchdiffeq {comparison.settings['torchdiffeq']}" in text
    markdown = comparison.table(markdown=True)
    assert "| method | DETEST A 1 problem | mechanics 2 problems |" in markdown


def test_failures_stand_under_the_table():
    text = run([decay(field=lambda t, x: 1e300 * x)], ["rk4"], n_steps=(1, 2)).table()
    assert "Runs without a result, or with a doubtful one" in text
    assert re.search(r"rk4, non-finite state +2", text)


def test_json_holds_everything(comparison, tmp_path):
    comparison.save(tmp_path / "solvers.json")
    again = SolverComparison.load(tmp_path / "solvers.json")
    assert again.rows() == comparison.rows() == [asdict(found) for found in comparison.runs]
    assert again.orders == comparison.orders
    assert again.settings == comparison.settings
    assert again.table() == comparison.table()
    assert [path.name for path in tmp_path.iterdir()] == ["solvers.json"]
    for content, reason in (
        ('{"runs": []}', "field 'orders' is missing"),
        ('{"columns": [], "runs": [[1]], "orders": []}', r"zip\(\) argument 2 is longer"),
        ('{"columns": [], "runs": [], "orders": [{"error": 1}]}', "unexpected keyword argument 'error'"),
        ("{", "Expecting property name"),
    ):
        (tmp_path / "solvers.json").write_text(content)
        with pytest.raises(ValueError, match=rf"solvers.json: not a comparison of solvers: .*{reason}"):
            SolverComparison.load(tmp_path / "solvers.json")


def test_figures_are_drawn(comparison, tmp_path):
    paths = comparison.figures(tmp_path)
    assert {path.name for path in paths} == {
        *(f"solvers_{kind}_{work}.png" for kind in ("fixed", "adaptive") for work in ("evaluations", "seconds")),
        *(f"solvers_{what}.png" for what in ("energies", "gradients", "orders")),
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    path = comparison.plot(tmp_path / "one.svg", kind="adaptive", unit="seconds")
    assert "scipy" in path.read_text(encoding="utf-8") or path.stat().st_size > 5000
    with pytest.raises(ValueError, match=r"Parameter `kind` should be adaptive or fixed. Found `kind = 'wild'`"):
        comparison.plot(tmp_path / "one.png", kind="wild")
    with pytest.raises(ValueError, match=r"Parameter `dtype` should be one of float64. Found `dtype = 'float16'`"):
        comparison.plot(tmp_path / "one.png", dtype="float16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"problems": ["A9"]}, "Parameter `problems` should be one of"),
        ({"problems": []}, "Parameter `problems` should be at least one. Found `problems = []`"),
        ({"methods": ["rk5"]}, "Parameter `methods` should be one of"),
        ({"methods": []}, "Parameter `methods` should be at least one"),
        ({"tolerances": (1e-6, 1e-3)}, "Parameter `tolerances` should be a falling list of positive numbers"),
        (
            {"n_steps": (1, 1)},
            "Parameter `n_steps` should be a rising list of positive numbers. Found `n_steps = (1, 1)`",
        ),
        ({"n_steps": (0.5,)}, "Parameter `n_steps` should be a rising list"),
        ({"dtypes": (torch.int64,)}, "Parameter `dtypes` should be a list of floating-point dtypes"),
        ({"max_evals": 0}, "Parameter `max_evals` should be a number of at least 1. Found `max_evals = 0`"),
        ({"max_gradient_evals": -1}, "Parameter `max_gradient_evals` should be a number of at least 0"),
        ({"n_repeats": True}, "Parameter `n_repeats` should be a number of at least 1. Found `n_repeats = True`"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare_solvers(**{"problems": ["A1"], "methods": ["rk4"], "progress_bar": False} | arguments)


def test_one_name_is_taken_for_a_list_of_one():
    comparison = run("A1", "euler", n_steps=(1,))
    assert (comparison.problems, comparison.methods) == (["A1"], ["euler"])
    assert map_state(torch.neg, torch.ones(1)).item() == -1


# ------------------------------------------------------------------------------------- the command


def test_the_command_prints_tables_and_leaves_file_and_figures(tmp_path, capsys, monkeypatch):
    command = [
        "solvers",
        "--quick",
        "--problems",
        "A1",
        "quadratic",
        "--methods",
        "rk4",
        "dopri5",
        "--out",
        str(tmp_path / "new"),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert {
        "solvers.json",
        "solvers_fixed_evaluations.png",
        "solvers_adaptive_seconds.png",
        "solvers_orders.png",
    } < files
    assert "Evaluations to a relative error of 0.0001, float64" in printed
    assert f"saved {tmp_path / 'new' / 'solvers.json'}" in printed
    assert SolverComparison.load(tmp_path / "new" / "solvers.json").problems == ["A1", "quadratic"]
    monkeypatch.setattr(SolverComparison, "figures", lambda *args: [])  # drawn above
    command = ["solvers", "--quick", "--problems", "A1", "--methods", "rk4", "--out", str(tmp_path)]
    assert main([*command, "--markdown", "--dtypes", "float32"]) == 0
    assert "| method | DETEST A 1 problem |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--problems", "DETEST"], "Parameter `problems` should be one of"),
        (["--methods", "ode45"], "Parameter `methods` should be one of"),
    ],
)
def test_unknown_names_end_with_a_message(tmp_path, capsys, options, message):
    assert main(["solvers", "--quick", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--dtypes", "half"], ["--device", "abacus"], ["--out", __file__]])
def test_options_are_read_before_any_work(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["solvers", *options])
    assert options[0] in capsys.readouterr().err


def test_default_accuracy_is_one_that_half_of_the_methods_reach():
    blank = {"group": "g", "kind": "fixed", "dtype": "float64", "setting": 1.0, "level": 0}

    def found(*errors):
        runs = [SolverRun("p", **blank, method=f"m{i}", error=error) for i, error in enumerate(errors)]
        return attainable(SolverComparison(tuple(runs), (), {}), "float64")

    assert found(1e-9, 4e-4, 0.2) == 1e-3
    assert found(1e-9, 1e-8, 0.2) == 1e-6  # no need for more
    assert found(1e-9, None, None) == 1.0


def test_two_things_of_one_name_are_refused():
    twins = [Method("dopri5", "dopri5", "adaptive"), Method("dopri5", "dopri5", "adaptive", options={"safety": 0.5})]
    with pytest.raises(ValueError, match="`methods` should be things with names of their own"):
        compare_solvers(["pendulum"], twins, tolerances=(1e-4,), progress_bar=False)


def test_times_may_fall():
    t = torch.linspace(4, 0, 5, dtype=F64)
    back = Problem("decay", "mine", torch.ones(1, dtype=F64), t, field=lambda t, x: -x)
    found = compare_solvers([back], ["rk4"], n_steps=(4, 8), with_orders=False, progress_bar=False)
    assert [run.is_success for run in found.runs] == [True, True]
    assert observed_order(back, METHODS["rk4"]).is_kept


def test_what_stays_where_it_is_is_solved_without_an_error():
    rest = Problem(
        "rest", "mine", torch.zeros(2, dtype=torch.float64), torch.linspace(0, 1, 3).double(), lambda t, x: -x
    )
    runs = compare_solvers([rest], ["rk4"], progress_bar=False).runs
    assert runs
    assert all(run.status == "success" and run.error == 0 for run in runs)
