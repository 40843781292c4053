"""What the commands take and say alike."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from koinon.errors import SettingsError
from koinon.tracking import Run

JobFile = Annotated[Path, typer.Argument(metavar="JOB.py", help="a file with `job = koinon.Job(…)` or `def job(…)`")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a setting of the job; repeatable")
]
Rounds = Annotated[int | None, typer.Option(min=1, help="instead of the job's own")]
Seed = Annotated[int, typer.Option(help="of every random stream")]
Out = Annotated[Path | None, typer.Option(help="the run folder to make; by default the next free one in runs/")]
Fast = Annotated[bool, typer.Option("--fast", help="one round of a few batches, to see that everything fits")]
Reproducible = Annotated[bool, typer.Option("--reproducible", help="to the bits of a real federation; slower")]
Alone = Annotated[bool, typer.Option("--alone", help="also train every site alone: who gains by joining?")]
AsJson = Annotated[bool, typer.Option("--json", help="for machines")]
On = Annotated[
    str, typer.Option(help="where: a number of processes, ray, ray://HOST:PORT, poc, or a kit; by default as needed")
]
SiteCount = Annotated[int | None, typer.Option("--sites", min=1, help="how many, of a federation made for this run")]


def finish(work: Callable[[], Run]) -> None:
    """Every run ends with the place where one can look at it."""
    try:
        run = work()
    except KeyboardInterrupt as stopped:
        typer.echo(str(stopped) or "stopped", err=True)
        raise typer.Exit(130) from None
    page = run.path / "report.html"
    typer.echo(page if page.exists() else run.path)


def pairs(settings: list[str] | None) -> dict[str, str]:
    """key=value … as a dict."""
    pairs = {}
    for entry in settings or []:
        key, equals, value = entry.partition("=")
        if not equals:
            raise SettingsError(f"--set {entry}: write --set {entry}=VALUE")
        pairs[key.strip()] = value
    return pairs


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows of the same keys as a table, or as JSON."""
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False)
    for key, value in rows[0].items():
        table.add_column(key.replace("_", " "), justify="left" if isinstance(value, str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(words(value)) for value in row.values()))  # what a stranger wrote is no markup
    # Where nobody watches, a table is as wide as it needs to be.
    console = Console() if sys.stdout.isatty() else Console(width=400)
    console.print(table)


def listed(key: str, value: Any, depth: int = 1) -> None:
    """One setting a line, with what belongs to it indented beneath."""
    entries = value if isinstance(value, dict) else {}
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        entries = {str(entry.get("type", number)): entry for number, entry in enumerate(value, 1)}
    label = f"{'  ' * depth}{key.replace('_', ' ')}"
    typer.echo(label if entries else f"{label:24} {words(value)}")
    for name, entry in entries.items():
        listed(name, entry, depth + 1)


def words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {words(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return " ".join(words(entry) for entry in value) if value else "none"
    return "–" if value is None else str(value)
