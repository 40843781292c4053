"""The command line of a real federation: provision it, start its parts, see how they are."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from koinon import provision as trust
from koinon.data.names import Names
from koinon.errors import KitError, RunError, SettingsError
from koinon.operate import afar
from koinon.operate.words import AsJson, show
from koinon.provision import poc as proof
from koinon.site import certificates
from koinon.site.kit import open_kit
from koinon.transport import check

app = typer.Typer()
kit_app = typer.Typer(help="Make a request for a kit with a key of one's own.", no_args_is_help=True)
app.add_typer(kit_app, name="kit")

KitFolder = Annotated[Path, typer.Option("--kit", metavar="DIR", help="the unpacked kit")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="as `koinon jobs` lists it")]
Log = Annotated[str, typer.Option(metavar="text|json", help="lines for people, or for machines")]
Status = Annotated[int | None, typer.Option(min=1, max=65535, help="a port of 127.0.0.1 for /healthz and /metrics")]
PROJECT = Annotated[Path, typer.Argument(metavar="PROJECT.toml")]


@app.command()
def provision(
    project: PROJECT,
    *,
    out: Annotated[Path | None, typer.Option(help="the project's folder; by default beside PROJECT.toml")] = None,
    add_site: Annotated[list[str] | None, typer.Option(metavar="NAME[:ORG]")] = None,
    add_admin: Annotated[list[str] | None, typer.Option(metavar="NAME:ROLE[:ORG]")] = None,
    sign: Annotated[Path | None, typer.Option(metavar="REQUEST", help="make the kit that a request asks for")] = None,
    renew: Annotated[str, typer.Option(metavar="NAME", help="make a participant's certificate anew")] = "",
    revoke: Annotated[str, typer.Option(metavar="NAME", help="shut a participant out")] = "",
) -> None:
    """Make the kits of a federation: for whoever has none yet, and nobody else's is touched."""
    acts = [option for option, value in {"--sign": sign, "--renew": renew, "--revoke": revoke}.items() if value]
    adds = [option for option, value in {"--add-site": add_site, "--add-admin": add_admin}.items() if value]
    if len(acts) > 1 or (adds and acts not in ([], ["--sign"])):
        raise SettingsError(
            f"{' and '.join(acts + adds)} are not done at once: do it in two steps, each its own command"
        )
    before = trust.read(project)
    wanted = trust.added(before, add_site or [], add_admin or [])
    folder = out or project.parent / wanted.name
    if sign and not sign.is_file():
        raise KitError(f"there is no request '{sign}': `koinon kit request` makes one, where the key is to be")
    if sign:
        made = [trust.sign(wanted, folder, sign)]
        who = certificates.identified(certificates.load(made[0] / "certificate.pem")[0])
        of = f" of '{who.organisation}'" if who.organisation else ""
        typer.echo(f"{who.role} '{who.name}'{of}, key {trust.fingerprint(sign)}: compare it by telephone")
    elif renew:
        made = [trust.renew(wanted, folder, renew)]
    elif revoke:
        typer.echo(f"{trust.revoke(wanted, folder, revoke)}: put it into the server's kit, where it runs")
        return
    else:
        made = trust.provision(wanted, folder)
    for path in made:
        typer.echo(path)
    if not renew:
        _rest(before, wanted, folder, made)


def _rest(before: trust.Project, wanted: trust.Project, folder: Path, made: list[Path]) -> None:
    """Say who of those that were named got no kit now, and why."""
    there = {path.parent.name for path in (folder / "kits").glob("*/kit.json")}
    added = wanted.participants().keys() - before.participants().keys() - {path.name for path in made}
    for name in sorted(added):
        typer.echo(f"'{name}' has a kit already" if name in there else f"'{name}' has no kit: add it without --sign")
    waiting = [name for name in wanted.own_keys if name not in there]
    for name in waiting:
        typer.echo(f"'{name}' makes its own key: --sign its request")
    if not made and not added and not waiting:
        typer.echo("everybody has a kit already")


@kit_app.command("request")
def request(
    name: Annotated[str, typer.Argument(help="who asks, as the project knows it")],
    out: Annotated[Path, typer.Option(help="where the key stays")] = Path("kit"),
) -> None:
    """Make a key that never leaves this machine, and the request for its kit."""
    made = trust.request(name, out)
    typer.echo(f"{made}: send it to the operator; put key.pem into the kit that comes back")
    typer.echo(f"'{name}', key {trust.fingerprint(made)}: the operator asks for it by telephone")


@app.command()
def server(kit: KitFolder, store: str = "", log: Log = "text", status_port: Status = None) -> None:
    """Run a federation's server until it is told to stop."""
    _become("server", kit, store=store, log=log, status_port=status_port)


@app.command()
def site(
    what: Annotated[str, typer.Argument(metavar="[check]", help="look whether everything is as it must be")] = "",
    *,
    kit: KitFolder,
    relay: Annotated[Path | None, typer.Option(metavar="DIR", help="fold for a group: the kit NAME.server")] = None,
    log: Log = "text",
    status_port: Status = None,
    as_json: AsJson = False,
) -> None:
    """Run a site until it is told to stop; or check what it needs."""
    if what not in ("", "check"):
        raise SettingsError(f"koinon site {what}: write `koinon site --kit DIR`, or `koinon site check --kit DIR`")
    if not what:
        _become("site", kit, relay=relay, log=log, status_port=status_port)
    found = check.check(kit)
    rows = [{"what": row.name, "": "ok" if row.ok else "NO", "said": row.said} for row in found]
    show(rows, as_json)
    if not all(row.ok for row in found):
        raise KitError("this site cannot take part yet: see the lines that say NO")


@app.command()
def jobs(kit: KitFolder, as_json: AsJson = False) -> None:
    """List a federation's jobs."""
    with closing(afar.linked(kit)) as link:
        rows = link.jobs()
    if not rows and not as_json:
        raise RunError("there are no jobs yet: `koinon run JOB.py --on KIT` submits one")
    short = [{**row, "reason": row["reason"].partition("\n")[0]} for row in rows]
    show(rows if as_json else _dated(short, "submitted"), as_json)


@app.command()
def sites(kit: KitFolder, as_json: AsJson = False) -> None:
    """List a federation's sites, and who is there."""
    with closing(afar.linked(kit)) as link:
        rows = link.sites()
    if not rows and not as_json:
        raise RunError("no site has been heard of yet: `koinon site --kit DIR` starts one, where its kit is")
    show(rows if as_json else _dated(rows, "last_seen"), as_json)


@app.command()
def stop(job: JobId, kit: KitFolder) -> None:
    """Stop a job; what it has committed stays."""
    with closing(afar.linked(kit)) as link:
        if (state := link.job(job)["state"]) in afar.OVER:
            raise RunError(f"job '{job}' is {state} already")
        link.stop(job)
    typer.echo(f"job '{job}' stops; `koinon fetch {job} --kit {kit}` brings what it has committed")


@app.command()
def fetch(
    job: JobId, kit: KitFolder, out: Annotated[Path | None, typer.Option(help="by default runs/JOB")] = None
) -> None:
    """Fetch a job's run folder."""
    path = out or Path("runs") / job
    if path.exists():
        raise RunError(f"'{path}' exists: name another with --out")
    with closing(afar.linked(kit)) as link:
        state = link.job(job)["state"]
        afar.fetch(link, job, path)
    if not path.exists():
        raise RunError(f"job '{job}' has left nothing yet: `koinon jobs --kit {kit}` says how it is")
    if state == "running":
        typer.echo(f"job '{job}' goes on: this is what it has committed so far", err=True)
    typer.echo(path)


def _become(role: str, kit: Path, *, relay: Path | None = None, **options: str | int | None) -> None:
    """This process becomes the server or the site, which need nothing of what the command line has loaded."""
    opened = open_kit(kit)  # what is wrong is said here, in one line
    if opened.role != role:
        raise KitError(f"'{kit}' is the kit of {opened.role} '{opened.name}', not of a {role}")
    module, more = ("koinon.server.relay", {"relay": str(relay)}) if relay else (proof.MODULES[role], {})
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (more | options).items() if value]
    sys.stdout.flush()
    # -P: nothing is imported from the folder where this is called, which may be the kit.
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, "--kit", str(kit), *words])


def poc(what: str, sites: int, as_json: bool) -> None:
    """Start a proof of concept that stays, look at it, or stop it."""
    if what == "start":
        proof.start(afar.POC, Names(sites))
        typer.echo(f"a server and {sites} sites run, with kits and logs in {afar.POC}: `koinon run JOB.py --on poc`")
    elif what == "status":
        show(proof.status(afar.POC), as_json)
    else:
        proof.admin(afar.POC)
        proof.stop(afar.POC)
        shutil.rmtree(afar.POC, ignore_errors=True)


def _dated(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """Unix time as this machine's clock shows it, with its zone."""
    return [{**row, column: f"{datetime.fromtimestamp(row[column]).astimezone():%Y-%m-%d %H:%M:%S %Z}"} for row in rows]
