"""Every error that Koinon raises on purpose is raised on purpose by a test."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from house.source import ROOT, Function, modules

ERRORS = sorted(node.name for node in modules()["koinon.errors"].tree.body if isinstance(node, ast.ClassDef))


def words(node: ast.AST) -> set[str]:
    """The last words of all names in an expression: `RunError` of `koinon.errors.RunError`."""
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    return names | {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}


def expected(function: Function) -> Iterator[str]:
    """What a test expects to be raised, through its table of cases too."""
    arguments = {argument.arg for argument in function.args.args}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.raises":
            asked = words(node.args[0])
            yield from asked
            if asked & arguments:
                yield from (word for decorator in function.decorator_list for word in words(decorator))


@pytest.fixture(scope="module")
def raised() -> set[str]:
    """The names of all errors that some test expects."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, Function)]
    return {word for function in functions for word in expected(function)}


@pytest.mark.parametrize("error", [name for name in ERRORS if name != "KoinonError"])
def test_every_error_is_raised_in_a_test(error: str, raised: set[str]):
    """An error without a test is a message that nobody has read."""
    assert error in raised, f"no test expects {error}"


def test_the_root_is_never_raised():
    """KoinonError is for catching: what is raised says more."""
    wrong = [
        module.at(node)
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Raise) and node.exc is not None and "KoinonError" in words(node.exc)
    ]
    assert not wrong, ", ".join(wrong)
