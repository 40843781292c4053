"""Writes docs/reference/api.md from the docstrings: `make docs`.

The source is parsed, never imported: the page is the same whatever is installed.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "api.md"
HEAD = """# Reference

Every public name, from its docstring.  Written by `make docs`: mend the docstring, not this page.
"""
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Attributes):$")
WIDTH = 100


@dataclass(frozen=True)
class Entry:
    """A public name: the module that defines it, its node (None for a module) and its docstring."""

    module: str
    name: str
    node: ast.stmt | None
    text: str

    @property
    def anchor(self) -> str:
        """Where on the page it is explained."""
        return f"{self.module}.{self.name}" if self.node else self.module


# -- what there is -----------------------------------------------------------------------------------------------


@cache
def trees() -> dict[str, ast.Module]:
    """Every module of the package, parsed, under its dotted name."""
    found = {}
    for path in sorted((ROOT / "src" / "koinon").rglob("*.py")):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def definitions(module: str) -> dict[str, tuple[ast.stmt, str]]:
    """The functions, classes and constants that a module defines, each with its docstring."""
    body, found = trees()[module].body, {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = (node, ast.get_docstring(node) or "")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            stated = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found[ast.unparse(target)] = (node, inspect.cleandoc(str(after.value.value)) if stated else "")
    return found


def imported(module: str) -> dict[str, str]:
    """The names that a module imports from elsewhere in the package, and from which module."""
    nodes = [node for node in ast.walk(trees()[module]) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: node.module or "" for node in nodes for alias in node.names}


def entry(module: str, name: str) -> Entry:
    """A name as seen from a module, followed to where it is defined."""
    inner, defined, home = f"{module}.{name}", definitions(module), imported(module).get(name, module)
    if name in defined:
        return Entry(module, name, *defined[name])
    if home != module and home in trees():
        return entry(home, name)
    if inner in trees():
        return Entry(inner, name, None, ast.get_docstring(trees()[inner]) or "")
    raise LookupError(f"{module} gives out '{name}', which is defined nowhere in the package")


def given_out(module: str) -> list[str]:
    """What a module gives out.

    That is its `__all__`; for the package, what it imports for type checkers; for a module without either, its
    public functions and classes, and the constants that it explains.
    """
    if module == "koinon":
        return sorted(name for name, home in imported(module).items() if home.startswith("koinon"))
    defined = definitions(module)
    if "__all__" in defined:
        return sorted(ast.literal_eval(defined["__all__"][0].value))
    constants = (ast.Assign, ast.AnnAssign)
    open_names = {name: node for name, node in defined.items() if not name.startswith("_")}
    return [name for name, (node, text) in open_names.items() if text or not isinstance(node, constants)]


def public_modules() -> list[str]:
    """The rooms, and the modules that the package or a room gives out by name."""
    rooms = [name for name in trees() if name.count(".") == 1 and "__all__" in definitions(name)]
    named = [
        found.module
        for room in ["koinon", *rooms]
        for name in given_out(room)
        if (found := entry(room, name)).node is None
    ]
    return sorted({*rooms, *named})


def public_names() -> Iterator[tuple[str, str, str]]:
    """Every public name with the module that gives it out and its docstring, the modules themselves included."""
    for module in ["koinon", *public_modules()]:
        yield module.rpartition(".")[0], module.rpartition(".")[2], ast.get_docstring(trees()[module]) or ""
        for name in given_out(module):
            yield module, name, entry(module, name).text


# -- how it looks ------------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """A docstring as Markdown: sections as lists, examples and drawings as blocks."""
    parts = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.strip("\n").split("\n")
        if SECTION.match(lines[0]):
            parts.append(f"**{lines[0][:-1]}**\n\n{items(lines[1:])}")
        elif lines[0].startswith(">>> "):
            parts.append(fenced("pycon", "\n".join(lines)))
        elif any(line.startswith(" ") or "   " in line for line in lines):
            parts.append(fenced("text", "\n".join(lines)))
        else:
            parts.append("\n".join(lines))
    return "\n\n".join(part for part in parts if part)


def items(lines: list[str]) -> str:
    """The entries of an Args or Raises section as a list; a line indented further belongs to the entry above."""
    plain = inspect.cleandoc("\n" + "\n".join(lines)).split("\n")
    joined = re.sub(r"\n +", " ", "\n".join(plain)).split("\n")
    return "\n".join(re.sub(r"^(\*{0,2}\w+): ", r"- `\1`: ", line) for line in joined)


def fenced(language: str, text: str) -> str:
    """A code block."""
    return f"```{language}\n{text}\n```"


def signature(name: str, node: ast.stmt) -> str:
    """How a function or class is called, or what a constant is."""
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return ast.unparse(node)
    if isinstance(node, ast.FunctionDef):
        return call(name, arguments(node.args), f" -> {ast.unparse(node.returns)}" if node.returns else "")
    assert isinstance(node, ast.ClassDef)
    makers = [inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name == "__init__"]
    if makers:
        return call(f"class {name}", arguments(makers[0].args))
    bases = [ast.unparse(base) for base in node.bases]
    if "NamedTuple" in bases or any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return call(f"class {name}", fields(node))
    return call(f"class {name}", bases) if bases else f"class {name}"


def call(name: str, parts: list[str], after: str = "") -> str:
    """`name(parts)`, on one line if it fits."""
    line = f"{name}({', '.join(parts)}){after}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){after}"


def arguments(given: ast.arguments) -> list[str]:
    """The parameters of a function one by one, without `self`."""
    positional = given.posonlyargs + given.args
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    parts = [parameter(one, default) for one, default in zip(positional, defaults, strict=True)]
    if positional and positional[0].arg in ("self", "cls"):
        parts = parts[1:]
    if given.vararg:
        parts.append("*" + parameter(given.vararg, None))
    elif given.kwonlyargs:
        parts.append("*")
    parts += [parameter(one, default) for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return parts + (["**" + parameter(given.kwarg, None)] if given.kwarg else [])


def parameter(given: ast.arg, default: ast.expr | None) -> str:
    """One parameter with its type and default."""
    annotation = f": {ast.unparse(given.annotation)}" if given.annotation else ""
    equals = " = " if annotation else "="
    return given.arg + annotation + (f"{equals}{ast.unparse(default)}" if default else "")


def fields(node: ast.ClassDef) -> list[str]:
    """What the constructor of a dataclass takes."""
    stated = [
        field for field in node.body if isinstance(field, ast.AnnAssign) and "init=False" not in ast.unparse(field)
    ]
    factory = re.compile(r"field\(default_factory=(\w+)\)$")
    return [factory.sub(r"\1()", ast.unparse(field)) for field in stated]


def explained(found: Entry) -> str:
    """One public name: anchor, heading, signature, docstring; then the methods of a class."""
    assert found.node is not None
    parts = [f'<a id="{found.anchor}"></a>\n\n### {found.name}']
    parts += [fenced("python no-run: a signature", signature(found.name, found.node)), prose(found.text)]
    for method in found.node.body if isinstance(found.node, ast.ClassDef) else ():
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            shown = signature(f"{found.name}.{method.name}", method)
            if any(ast.unparse(decorator) == "property" for decorator in method.decorator_list):
                shown = shown.replace("()", "", 1)
            parts += [fenced("python no-run: a signature", shown), prose(ast.get_docstring(method) or "")]
    return "\n\n".join(part for part in parts if part)


def index(module: str) -> str:
    """The names of the package as a table, each leading to where it is explained."""
    found = [(name, entry(module, name)) for name in given_out(module)]
    rows = [f"| [`{module}.{name}`](#{one.anchor}) | {summary(one.text)} |" for name, one in found]
    return "| name | |\n|---|---|\n" + "\n".join(rows)


def summary(text: str) -> str:
    """The first paragraph on one line, fit for a table."""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def section(module: str) -> str:
    """One module: what it is for, and every name it gives out that it or its room defines."""
    own = [entry(module, name) for name in given_out(module)]
    parts = [f'<a id="{module}"></a>\n\n## {module}', prose(ast.get_docstring(trees()[module]) or "")]
    return "\n\n".join([*parts, *(explained(one) for one in own if one.node is not None)])


def render() -> str:
    """The page."""
    parts = [HEAD, "## koinon", prose(ast.get_docstring(trees()["koinon"]) or ""), index("koinon")]
    return "\n\n".join(part.strip("\n") for part in [*parts, *(section(module) for module in public_modules())]) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(render())
    print(f"{PAGE.relative_to(ROOT)}: {len(list(public_names()))} names")
