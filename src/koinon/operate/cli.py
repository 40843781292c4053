"""The command line: a thin skin over `session`, with one place where errors become words."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from koinon import tracking
from koinon.errors import KoinonError, MissingExtra, QuorumNotReached, RunError, in_a_line
from koinon.operate import afar, federate, session
from koinon.operate import doctor as health
from koinon.operate import sweep as sweeping
from koinon.operate.words import (
    Alone,
    AsJson,
    Fast,
    JobFile,
    On,
    Out,
    Reproducible,
    Rounds,
    Seed,
    Settings,
    SiteCount,
    finish,
    listed,
    pairs,
    show,
    words,
)
from koinon.simulate.simulate import dealt
from koinon.tracking import live, plots
from koinon.tracking.live import counted, size

app = typer.Typer(
    help="Federated learning: one program, unchanged, from a laptop to a consortium.",
    epilog="--debug, with any command, shows where an error comes from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Look at data before training on them.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(federate.app)


@app.command()
def demo(out: Out = None, seed: Seed = 0) -> None:
    """Eight sites that hold different digits learn to read them together."""
    order = session.Order(file=str(session.demo_file()), settings={}, seed=seed, alone=True)
    try:
        finish(lambda: session.run(order, out, [live()]))
    except MissingExtra as missing:
        raise MissingExtra("the demo needs a few libraries more: pip install 'koinon[demo]'") from missing


@app.command()
def run(
    job: JobFile,
    *,
    settings: Settings = None,
    rounds: Rounds = None,
    seed: Seed = 0,
    fast: Fast = False,
    alone: Alone = False,
    reproducible: Reproducible = False,
    on: On = "",
    sites: SiteCount = None,
    out: Out = None,
) -> None:
    """Run a job: over virtual sites, on this machine or a cluster; or in a federation."""
    shape: dict[str, Any] = {"rounds": rounds, "fast": fast, "alone": alone, "reproducible": reproducible, "on": on}
    order = session.Order(file=str(job), settings=pairs(settings), seed=seed, **shape)
    finish(lambda: afar.anywhere(order, out, [live()], sites=sites))


@app.command()
def poc(
    what: Annotated[str, typer.Argument(metavar="JOB.py|start|status|stop")],
    *,
    sites: SiteCount = None,
    settings: Settings = None,
    rounds: Rounds = None,
    seed: Seed = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """A whole federation on this machine, with kits, TLS and processes: run a job in it, or start and stop it."""
    if what in ("start", "status", "stop"):
        federate.poc(what, sites or 4, as_json)
        return
    order = session.Order(file=what, settings=pairs(settings), seed=seed, rounds=rounds, on="poc")
    finish(lambda: afar.run(order, out, [live()], sites=sites))


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    rounds: Rounds = None,
) -> None:
    """Go on with a stopped run after its last commit, to the same bits."""
    finish(lambda: session.resume(run, rounds, [live()]))


@app.command()
def runs(
    root: Annotated[Path, typer.Argument(help="the folder of run folders")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs, oldest first."""
    rows = [session.summary(tracking.read(path)) for path in tracking.folders(root)]
    if not rows and not as_json:
        raise RunError(f"there are no runs in '{root}': make one with `koinon demo`")
    show(rows, as_json)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="run folders")],
    by: Annotated[str, typer.Option(help="round, bytes or seconds")] = "round",
    out: Annotated[Path, typer.Option(help="where the plot goes")] = Path("compare.png"),
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: one table, one plot."""
    read = [tracking.read(path) for path in runs]
    show([session.summary(one) for one in read], as_json)
    path = plots.save(plots.compare(read, by), out)
    if not as_json:
        typer.echo(path)


@app.command()
def sweep(
    job: JobFile,
    *,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="a setting and its values; repeatable; by default the file's GRID"),
    ] = None,
    settings: Settings = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each combination: seeds 0, 1, …")] = 3,
    fast: Fast = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="runs at a time; by default one a core")] = None,
    out: Annotated[Path | None, typer.Option(help="the sweep's folder; by default runs/JOB-sweep")] = None,
    as_json: AsJson = False,
) -> None:
    """Run every combination of settings over several seeds: one table, one plot. The same command again goes on."""
    console, folder = Console(stderr=as_json), out or Path("runs") / f"{job.stem}-sweep"
    try:
        chosen = sweeping.plan(str(job), grid or [], settings=pairs(settings), seeds=seeds, fast=fast)
        failed = sweeping.run(chosen, folder, jobs=jobs or health.machine()["cores"], console=console)
    except KeyboardInterrupt:
        typer.echo("stopped: the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    rows = sweeping.rows(chosen, folder)
    sweeping.write(rows, folder)
    show(rows if as_json else [_compact(row) for row in rows], as_json)
    try:
        picture = sweeping.draw(chosen, folder)
    except MissingExtra as missing:
        typer.echo(f"no plot: {missing}", err=True)
        picture = folder / "sweep.csv"
    if failed:
        why = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise RunError(
            f"{len(failed)} of {counted(len(chosen.words()), 'run')} failed; the same command tries them again{why}"
        )
    if not as_json:
        typer.echo(picture)


@data_app.command("show")
def show_data(
    job: Annotated[Path | None, typer.Argument(metavar="[JOB.py]", help="by default the demo's")] = None,
    *,
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="where the picture goes")] = Path("partition.png"),
    as_json: AsJson = False,
) -> None:
    """Draw who holds what: sites x classes."""
    file = job or session.demo_file()
    split = dealt(session.Order(file=str(file), settings=pairs(settings)).job().data, None)
    labels, table = [str(label) for label in split.labels], split.table()
    if as_json:
        typer.echo(json.dumps({**split.describe(), "labels": labels, "table": table.tolist()}))
        return
    rows = [
        {"site": name, **dict(zip(labels, held, strict=True)), "all": sum(held)}
        for name, held in zip(split.names[:40], table[:40].tolist(), strict=True)
    ]
    show(rows, as_json)
    if more := split.sites - len(rows):
        typer.echo(f"… and {more} more sites")
    typer.echo(plots.save(plots.partition(table[:200].tolist(), list(split.names[:200]), labels), out))


@app.command()
def doctor(
    job: Annotated[Path | None, typer.Argument(metavar="[JOB.py]")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and what a job would do on it: shapes, buffers, filters, what leaves a site."""
    found: dict[str, Any] = {"machine": health.machine()}
    if job is not None:
        found["job"] = health.job(session.Order(file=str(job), settings=pairs(settings)).job())
    if as_json:
        typer.echo(json.dumps(found))
        return
    for title, part in found.items():
        typer.echo(title)
        for key, value in part.items():
            if key == "arrays":
                show(value, False)
            else:
                listed(key, value)


def main() -> None:
    """Run the command line; every error ends in words and an exit code that is not 0."""
    debug = "--debug" in sys.argv
    try:
        app([word for word in sys.argv[1:] if word != "--debug"])
    except KoinonError as error:
        site = error.traceback if isinstance(error, QuorumNotReached) else ""
        _stop(f"{site}error: {error}", debug)
    except Exception as error:
        _stop(f"error: {in_a_line(error)} (--debug shows where)", debug)


def _stop(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    typer.echo(message, err=True)
    sys.exit(1)


def _compact(row: dict[str, Any]) -> dict[str, Any]:
    """A combination's row as one reads it: mean ± standard deviation."""
    spread = {
        name: words(row[name]) + (f" ± {row[f'{name}_sd']:.2g}" if row[f"{name}_sd"] is not None else "")
        for name in ("last", "best")
    }
    sent = size(row["bytes_up"]) if row["bytes_up"] is not None else None
    return {
        **row["settings"],
        "runs": row["runs"],
        "score": row["score"],
        **spread,
        "rounds": row["rounds"],
        "up": sent,
    }


if __name__ == "__main__":
    main()
