"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
import importlib.util
import pkgutil

import pytest

import odeopt

MODULES = ["odeopt", *(m.name for m in pkgutil.walk_packages(odeopt.__path__, "odeopt.") if "__main__" not in m.name)]
if importlib.util.find_spec("triton") is None:  # the one module that is imported only where there is Triton
    MODULES.remove("odeopt.stepping.triton.kernels")
EXAMPLES = {
    test.name: test
    for name in MODULES
    for test in doctest.DocTestFinder().find(importlib.import_module(name))
    if test.examples
}


def failures(test):
    return doctest.DocTestRunner().run(test, clear_globs=False).failed


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_run(name):
    assert failures(EXAMPLES[name]) == 0


def test_examples_are_found_and_can_fail():
    assert {"odeopt.optimizer.LearnedOptimizer", "odeopt.ode.integrate.integrate"} <= EXAMPLES.keys()
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert failures(wrong) == 1
