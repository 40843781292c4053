"""What the docs say is run, and every public name is in them."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import koinon
from house.pages import Block, blocks, pages, program
from house.source import ROOT, modules

KOINON = str(Path(sys.executable).with_name("koinon"))

EXAMPLES = sorted(name for name, module in modules().items() if ">>> " in module.text)


def shown(path: Path) -> str:
    """A page's place in the repository."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_give_what_they_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every `>>>` in the package is run."""
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS, verbose=False)
    assert result.attempted, f"{name} shows an example where doctest does not find it"
    assert not result.failed, f"{name}: {result.failed} of {result.attempted} examples give something else (see above)"


PROGRAMS = [page for page in pages() if program(page.read_text(), KOINON).strip()]


@pytest.mark.parametrize("page", PROGRAMS, ids=shown)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path):
    """A page's python blocks and `$ koinon` commands run in order, in an empty folder with the examples beside."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    script = tmp_path / f"{page.stem.replace('-', '_')}.py"
    script.write_text(program(page.read_text(), KOINON))
    run = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, f"{shown(page)} (its lines are the program's lines)\n{run.stdout[-3000:]}"


@pytest.mark.parametrize("page", pages(), ids=shown)
def test_a_block_that_is_not_run_says_why(page: Path):
    """`no-run: reason`, and no other word for Python, takes a block out."""
    for block in blocks(page.read_text()):
        place = f"{shown(page)}:{block.first}"
        reason = block.info.partition("no-run")[2].lstrip(": ")
        assert block.is_run or reason, f"{place} is not run and does not say why"
        other = ("py", "python3", "pycon") if page.parent.name != "reference" else ()
        assert block.language not in other, f"{place} is not run: write ```python"


PAGE = """# A page
```python
a = 1
```
Words.
   ```console
   $ koinon demo --seed \\
     7  # why not
   $ ls
   ```
```python no-run: it would take a week
b = 2
```
```python
a += 1
```
"""


def test_a_page_becomes_a_program_line_by_line():
    """Blocks and commands keep their lines; what is not run and what is not ours is left out."""
    lines = program(PAGE, "koinon").splitlines()
    command = "if __name__ == '__main__': __import__('subprocess').run(['koinon', 'demo', '--seed', '7'], check=True)"
    assert {number: line for number, line in enumerate(lines, start=1) if line} == {
        3: "a = 1",
        7: command,
        15: "a += 1",
    }


def test_blocks_are_found_with_their_fences():
    """The info string and the first line of each block are kept."""
    found = list(blocks(PAGE))
    assert found[0] == Block("python", 3, ("a = 1",))
    assert [block.is_run for block in found] == [True, True, False, True]


@pytest.fixture(scope="module")
def reference():
    """The generator of the reference, which is a script beside it and no part of the package."""
    path = ROOT / "docs" / "generate_reference.py"
    specification = importlib.util.spec_from_file_location("generate_reference", path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date(reference):
    """The committed page is what `make docs` writes."""
    page = ROOT / "docs" / "reference" / "api.md"
    assert page.read_text() == reference.render(), f"{shown(page)} is out of date: make docs"


def test_every_public_name_has_a_docstring(reference):
    """What is given out is explained: in its docstring, or under it where it is a constant."""
    bare = [f"{room}.{name}" for room, name, text in reference.public_names() if not text]
    assert not bare, f"without a docstring: {', '.join(bare)}"


def test_type_checkers_see_what_is_there(reference):
    """The names that the package loads lazily are those that it imports for type checkers."""
    assert sorted(koinon.__all__) == reference.given_out("koinon")
