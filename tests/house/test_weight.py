"""How much may stand in one place: the budgets of DESIGN's house, each with the number and the place."""

from __future__ import annotations

import ast
from statistics import mean

from house.source import PACKAGE, ROOT, Function, Module, body_lines, modules

FILE_LINES = 500
FOLDER_DEPTH = 2
FUNCTION_LINES = 60
FUNCTION_LINES_MEAN = 12
PARAMETERS = 8
POSITIONAL = 2
FEW_PARAMETERS = 4
"""So many may all be positional: the order of four is remembered."""

EXAMPLE_LINES = 60


def parameters(function: Function) -> tuple[list[str], list[str]]:
    """A function's positional parameters and all others, `self` and `cls` left out."""
    given = function.args
    positional = [argument.arg for argument in given.posonlyargs + given.args]
    if positional and positional[0] in ("self", "cls"):
        positional = positional[1:]
    rest = [argument.arg for argument in (given.vararg, given.kwarg) if argument]
    return positional, [argument.arg for argument in given.kwonlyargs] + rest


def listed(module: Module) -> set[str]:
    """The names that a module's room gives out in its `__all__`."""
    room = modules().get(".".join(module.name.split(".")[:2]), module)
    found = [s for s in room.tree.body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "__all__"]
    return {name for s in found if isinstance(s.value, ast.List) for name in ast.literal_eval(s.value)}


def settings(module: Module, node: ast.ClassDef) -> list[str]:
    """What the constructor of a public dataclass takes; nothing for another class."""
    if node.name not in listed(module) or not any("dataclass" in ast.unparse(one) for one in node.decorator_list):
        return []
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    return [ast.unparse(field.target) for field in fields if "init=False" not in ast.unparse(field)]


def test_a_file_has_at_most_500_lines():
    """A longer file is two ideas."""
    counts = {str(module.path.relative_to(ROOT)): len(module.text.splitlines()) for module in modules().values()}
    long = [f"{path} has {count} lines" for path, count in counts.items() if count > FILE_LINES]
    assert not long, "\n".join(long)


def test_folders_are_at_most_two_deep():
    """koinon/<room>/<file>.py and no further."""
    deep = [str(m.path.relative_to(ROOT)) for m in modules().values() if len(m.path.relative_to(PACKAGE).parts) > 2]
    assert not deep, f"deeper than {FOLDER_DEPTH}: {', '.join(deep)}"


def test_a_function_has_at_most_60_lines():
    """The docstring is not counted."""
    counts = [(f"{m.at(f)} {f.name}", body_lines(f)) for m in modules().values() for f in m.functions()]
    long = [f"{place} has {count} lines" for place, count in counts if count > FUNCTION_LINES]
    assert not long, "\n".join(long)


def test_a_function_has_12_lines_on_the_mean():
    """Over the whole package."""
    counts = [body_lines(function) for module in modules().values() for function in module.functions()]
    assert mean(counts) <= FUNCTION_LINES_MEAN, f"the mean body of {len(counts)} functions has {mean(counts):.1f} lines"


def test_a_function_takes_at_most_8_parameters():
    """`self` is not counted; a public dataclass takes its fields.  The options of a command are given by name, and each
    has its own line of help: they are not counted."""
    counts: list[tuple[str, int]] = []
    for module in modules().values():
        functions = [f for f in module.functions() if not any(".command(" in ast.unparse(d) for d in f.decorator_list)]
        counts += [(f"{module.at(f)} {f.name}", sum(map(len, parameters(f)))) for f in functions]
        counts += [(f"{module.at(node)} {node.name}", len(settings(module, node))) for node in module.classes()]
    many = [f"{place} takes {count} parameters" for place, count in counts if count > PARAMETERS]
    assert not many, "\n".join(many)


def test_many_parameters_are_given_by_keyword():
    """A public function of more than four parameters takes all after the second by keyword only."""
    wrong = []
    for module in modules().values():
        for function in module.functions():
            positional, others = parameters(function)
            private = function.name.startswith("_") and function.name != "__init__"
            many = len(positional) + len(others) > FEW_PARAMETERS
            if many and len(positional) > POSITIONAL and not private:
                after = ", ".join(positional[POSITIONAL:])
                wrong.append(f"{module.at(function)} {function.name} takes by position: {after}")
    assert not wrong, "\n".join(wrong)


def test_an_example_has_at_most_60_lines():
    """An example is read on one screen."""
    counts = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in (ROOT / "examples").rglob("*.py")}
    long = [f"{path} has {count} lines" for path, count in counts.items() if count > EXAMPLE_LINES]
    assert not long, "\n".join(long)
