"""The source of Koinon as the budgets see it: parsed, never imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "koinon"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file: its dotted name, where it is, and what it says."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    def at(self, node: ast.stmt | ast.expr) -> str:
        """The place of a node, in the form that editors jump to."""
        return f"{self.path.relative_to(ROOT)}:{node.lineno}"

    def functions(self) -> Iterator[Function]:
        """Every function and method, the nested ones too."""
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def classes(self) -> Iterator[ast.ClassDef]:
        """Every class, the nested ones too."""
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef))

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        """Every call, under the text of what is called."""
        return ((ast.unparse(node.func), node) for node in ast.walk(self.tree) if isinstance(node, ast.Call))

    def imports(self) -> Iterator[tuple[ast.stmt, str]]:
        """Every import statement anywhere in the file, with each dotted name that it asks for."""
        for node in ast.walk(self.tree):
            yield from ((node, name) for name in imported(node))


@cache
def modules(root: Path = PACKAGE) -> dict[str, Module]:
    """Every module of a package under its dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text()
        found[name] = Module(name, path, text, ast.parse(text))
    return found


def imported(node: ast.AST) -> list[str]:
    """The dotted names that an import statement asks for: `from a import b` asks for `a.b`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def resolved(name: str, known: dict[str, Module]) -> str | None:
    """The module that a dotted name is in: itself, or the nearest parent; None outside the package."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def without_docstring(function: Function) -> list[ast.stmt]:
    """A function's statements, its docstring left out."""
    return function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body


def body_lines(function: Function) -> int:
    """Lines from the first statement to the last, the docstring left out."""
    body = without_docstring(function)
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
