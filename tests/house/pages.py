"""The pages of the documentation as programs: what they show is what is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from house.source import ROOT

FENCE = re.compile(r"^(?P<indent> *)(?P<mark>`{3,}|~{3,}) *(?P<info>.*)$")
PROMPT = "$ koinon "


@dataclass(frozen=True)
class Block:
    """One fenced block: what its fence says, and its lines with the number of the first."""

    info: str
    first: int
    lines: tuple[str, ...]

    @property
    def language(self) -> str:
        """The first word of the fence."""
        return self.info.split(" ")[0]

    @property
    def is_run(self) -> bool:
        """Whether it is run: `no-run: reason` after the language takes it out."""
        return "no-run" not in self.info


def pages() -> list[Path]:
    """Every page that people read."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    opened: tuple[str, int, str, list[str]] | None = None
    for number, line in enumerate(page.splitlines(), start=1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened = (fence["mark"], number + 1, fence["info"].strip(), [])
            indent = len(fence["indent"])
        elif opened and fence and fence["mark"].startswith(opened[0]) and not fence["info"]:
            yield Block(opened[2], opened[1], tuple(opened[3]))
            opened = None
        elif opened:
            opened[3].append(line[indent:] if not line[:indent].strip() else line)


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """The commands of a console block that begin with `$ koinon`, each with its line; a backslash joins lines."""
    lines = iter(enumerate(block.lines, start=block.first))
    for number, line in lines:
        while line.startswith("$ ") and line.endswith("\\"):
            line = line[:-1] + next(lines)[1].lstrip("> ")
        if line.startswith(PROMPT):
            yield number, line[2:]


def program(page: str, koinon: str) -> str:
    """A page as one Python program: its python blocks and its commands, in order, each on the line where it stands.

    Blocks share a namespace; a command is one statement that fails if the command does.  An error therefore
    names the line of the page.
    """
    script = [""] * (len(page.splitlines()) + 1)
    for block in blocks(page):
        if block.language == "python" and block.is_run:
            script[block.first - 1 : block.first - 1 + len(block.lines)] = block.lines
        if block.language == "console" and block.is_run:
            for number, command in commands(block):
                words = [koinon, *shlex.split(command, comments=True)[1:]]
                script[number - 1] = f"if __name__ == '__main__': __import__('subprocess').run({words!r}, check=True)"
    return "\n".join(script)
