"""A run on one page: a single HTML file that needs no network, for readers who were not there."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from koinon.tracking import plots
from koinon.tracking.folder import state_of
from koinon.tracking.live import size, took
from koinon.tracking.run import Run

CSS = """
:root { color-scheme: light dark; --page: #fff; --soft: #f5f7f9; --ink: #1f2933; --muted: #66717e; --grid: #dfe3e8;
  --blue: #0072b2; --pale: #56b4e9; --vermilion: #c25400; }
@media (prefers-color-scheme: dark) { :root { --page: #15191e; --soft: #1e242b; --ink: #e6e9ed; --muted: #98a3af;
  --grid: #343c46; --blue: #56b4e9; --pale: #2b6f9c; --vermilion: #f08a3c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 4.5rem 1.5rem 6rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", "Noto Sans", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 2.1rem; font-weight: 600; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 4.5rem 0 .3rem; font-size: 1.25rem; font-weight: 600; }
p { margin: .3rem 0 1.2rem; max-width: 46rem; }
.quiet, th, td small, dt { color: var(--muted); }
.lead { margin: 1.6rem 0 2.2rem; font-size: 1.2rem; overflow-wrap: anywhere; }
.notice { padding: .8rem 1.1rem; border-left: 3px solid var(--vermilion); background: var(--soft);
  overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: 1.6rem 3.2rem; margin: 0; padding: 1.5rem 0;
  border: solid var(--grid); border-width: 1px 0; }
.facts div { display: flex; flex-direction: column-reverse; }
.facts dt { font-size: .85rem; }
.facts dd { margin: 0; font-size: 1.5rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; }
input[name="by"] { position: absolute; opacity: 0; }
input[name="by"] + label { display: inline-block; margin: .4rem .9rem .8rem 0; padding: .1rem 0; cursor: pointer;
  color: var(--muted); border-bottom: 2px solid transparent; }
input[name="by"]:checked + label { color: var(--ink); border-color: var(--blue); }
input[name="by"]:focus-visible + label { outline: 2px solid var(--blue); outline-offset: 3px; }
.by { display: none; }
#by-round:checked ~ .by-round, #by-bytes:checked ~ .by-bytes, #by-seconds:checked ~ .by-seconds { display: block; }
.scroll { max-height: 34rem; overflow: auto; border-bottom: 1px solid var(--grid); }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem 1.2rem .42rem 0; text-align: right; border-bottom: 1px solid var(--grid); }
tr:last-child td { border-bottom: 0; }
th { position: sticky; top: 0; font-size: .85rem; font-weight: 400; background: var(--page); }
th:first-child, td:first-child { min-width: 8rem; text-align: left; overflow-wrap: anywhere; }
tr.worst td:first-child { color: var(--vermilion); }
summary { cursor: pointer; }
.settings { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .15rem 2rem; font-size: .9rem; }
.settings dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, Menlo, "DejaVu Sans Mono", monospace; }
@media print { .scroll { max-height: none; } .by { display: block; } input + label { display: none !important; } }
"""
# The page may load nothing at all, whatever a site has put into its name.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

READABLE = 12
"""Columns that fit a page; what has more is in a file beside it."""


def write(run: Run) -> Path:
    """Write `report.html` into the run's folder, whole or not at all, and return its path.

    Of a run of `CrossSite` it writes `cross-site.csv` too: whose model, and its score at each site.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    path, part = run.path / "report.html", run.path / ".report.html.part"
    part.write_text(page(run), encoding="utf-8")
    if crossed := plots.crossed(run):
        lines = [[owner, *row.values()] for owner, row in crossed.items()]
        with (run.path / "cross-site.csv").open("w", newline="", encoding="utf-8") as table:
            csv.writer(table).writerows([["model", *next(iter(crossed.values()))], *lines])
    return part.replace(path)


def page(run: Run) -> str:
    """The report as HTML.  Every word that comes from the run is escaped."""
    name = escape(str(run.info.get("name") or run.name))
    if plots.crossed(run):
        parts = [_head(run, name), _crossed(run), _partition(run), _settings(run)]
    else:
        parts = [_head(run, name), _by(run), _sites(run), _gains(run), _partition(run), _timeline(run), _settings(run)]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------------------------------- sections


def _head(run: Run, name: str) -> str:
    """What was done and what came of it: a sentence for everybody, then the figures."""
    info, metric = run.info, _words(plots.score(run))
    state = str(info["state"]) if info.get("pid") == os.getpid() else state_of(info)
    about = [info.get("job"), state, _date(info.get("began")), f"seed {info['seed']}" if "seed" in info else None]
    html = f'<h1>{name}</h1>\n<p class="quiet">{escape("  ·  ".join(str(part) for part in about if part))}</p>'
    if info.get("reason"):
        html += f'\n<p class="notice">{escape(str(info["reason"]))}</p>'
    scores, best = plots.points(run, plots.score(run)), plots.best(run)
    facts: list[tuple[str, str]] = []
    if best and not plots.crossed(run):
        last = max(scores)
        sentence = f"In round {last}, the last that was measured, the common model reached {metric} {scores[last]:.3f}"
        sentence += (
            "; no round was better." if best[0] == last else f"; its best, {best[1]:.3f}, came in round {best[0]}."
        )
        html += f'\n<p class="lead">{sentence}</p>'
        facts = [(f"{metric}, last (round {last})", f"{scores[last]:.3f}")] if best[0] != last else []
        facts += [(f"{metric}, best{' and last' if best[0] == last else ''} (round {best[0]})", f"{best[1]:.3f}")]
    facts += _work(run)
    cells = "".join(f"<div><dt>{label}</dt><dd>{escape(value)}</dd></div>" for label, value in facts)
    return f'{html}\n<dl class="facts">{cells}</dl>'


def _work(run: Run) -> Iterator[tuple[str, str]]:
    """The figures of the work: rounds, sites, samples, traffic, time."""
    done, planned = max((row.round for row in run.rows), default=0), run.info.get("rounds")
    yield "rounds", f"{done}" if planned in (None, 0, done) else f"{done} of {planned}"
    yield "sites", f"{run.info.get('sites') or len(plots.final(run, 'seconds')):,}"
    for label, name in (("training samples", "train_samples"), ("held-out samples", "samples")):
        counts = plots.final(run, name)
        if counts:
            yield label, f"{sum(counts.values()):,.0f}"
    for label, name in (("sent by the sites", "bytes_up"), ("sent to the sites", "bytes_down")):
        total = sum(plots.points(run, name).values())
        if total:
            yield label, size(total)
    seconds = sum(plots.points(run, "seconds").values())
    if seconds:
        yield "time of all rounds", took(seconds)


def _by(run: Run) -> str:
    """The score, behind a switch: by rounds, by bytes, by seconds."""
    metric = plots.score(run)
    if not metric:
        return _section("How the model became better", "No metric was measured in this run.")
    names = {"round": "by rounds", "bytes": "by bytes", "seconds": "by seconds"}
    kept = ["round"] + [by for by, name in (("bytes", "bytes_up"), ("seconds", "seconds")) if plots.points(run, name)]
    switch = "".join(
        f'<input type="radio" name="by" id="by-{by}"{" checked" if by == "round" else ""}>'
        f'<label for="by-{by}">{names[by]}</label>\n'
        for by in kept
    )
    drawn = {by: plots.curves(run) if by == "round" else plots.against(run, by) for by in kept}
    figures = "\n".join(
        f'<div class="by by-{by}">{plots.svg(figure, f"the score {names[by]}")}</div>' for by, figure in drawn.items()
    )
    return _section("How the model became better", "", f"{switch}{figures}")


def _sites(run: Run) -> str:
    """The last score of every site as a table, and of every round as a heat map."""
    metric = plots.score(run)
    score, loss, samples = (plots.final(run, name) for name in (metric, "loss", "samples"))
    if not score:
        return ""
    worst, joined = set(plots.worst(run)), plots.joined(run)
    columns = ["site", "held-out samples", metric] + (["loss"] if loss and metric != "loss" else [])
    columns += ["own model"] if (own := plots.final(run, f"personal_{metric}")) else []
    columns += ["alone", "gain by joining"] if joined else []
    rows = []
    for site, value in score.items():
        mark = " <small>(worst 10 %)</small>" if site in worst else ""
        cells = [escape(site) + mark, f"{samples[site]:,.0f}" if site in samples else "–", f"{value:.3f}"]
        cells += [_number(loss.get(site))] if "loss" in columns[3:] else []
        cells += [_number(own.get(site))] if own else []
        if joined:
            alone, _, gain = joined.get(site, (None, None, None))
            cells += [_number(alone), _number(gain, "+")]
        rows.append((" class=worst" if site in worst else "", cells))
    says = f"The common model's {_words(metric)} on each site's own held-out data."
    if worst:
        lowest = [f"{site} ({score[site]:.3f})" for site in plots.worst(run)]
        says += escape(f" The worst tenth: {', '.join(lowest[:5])}{', …' if len(lowest) > 5 else '.'}")
    table = f'{_fairness(run)}<div class="scroll">{_table(columns, rows)}</div>'
    how = "Rows are sites, the best on top; columns are rounds; grey means that the site was not measured."
    picture = plots.svg(plots.heat_map(run), "the score of every site in every round")
    mark = " The bar on the right marks the worst tenth." if worst else ""
    return _section("How well it works at each site", says, table) + _section(
        "Site by site, round by round", how + mark, picture
    )


def _fairness(run: Run) -> str:
    """How evenly the sites are served, each counting the same: by the common model, and by their own if they have."""
    metric = plots.score(run)
    models = {"common model": metric, "own models": f"personal_{metric}"}
    found = {title: even for title, name in models.items() if (even := plots.fairness(run, name))}
    columns = ["over the sites", "mean", "mean of the worst 10 %", "variance"]
    rows = [
        ("", [title, *(_number(even[key]) for key in ("mean", "worst")), f"{even['variance']:.2g}"])
        for title, even in found.items()
    ]
    return _table(columns, rows) if rows else ""


def _crossed(run: Run) -> str:
    """Whose model is how good at which site: a picture, and where it can be read, a table."""
    crossed, metric = plots.crossed(run), _words(plots.score(run))
    judges = list(next(iter(crossed.values())))
    says = f"The {metric} of each site's model (rows) on each site's held-out data (columns)."
    html = plots.svg(plots.cross_site(run), "the score of each site's model at each site")
    if len(judges) <= READABLE:
        rows = [("", [escape(owner), *map(_number, row.values())]) for owner, row in crossed.items()]
        html += f'<div class="scroll">{_table(["model of", *judges], rows)}</div>'
    return _section("Every site's model at every site", says, html)


def _gains(run: Run) -> str:
    """Who gains and who loses by joining, or how to find out."""
    title, metric, joined = "Who gains by joining", plots.score(run), plots.joined(run)
    figure = plots.gains(run)
    if len(plots.final(run, metric)) < 2:
        return ""
    if figure is None:
        how = "<code>koinon run … --alone</code> also trains every site alone, with the same budget."
        return _section(title, f"This was not measured. {how}")
    gains = [gain for _, _, gain in joined.values()]
    losers = sum(gain < 0 for gain in gains)
    says = (
        f"Against a model trained alone with the same budget, {len(gains) - losers} of {len(gains)} sites do at least "
    )
    says += f"as well together; the median gain in {_words(metric)} is {median(gains):+.3f}."
    return _section(title, says, plots.svg(figure, "the score of each site alone and together"))


def _partition(run: Run) -> str:
    part = run.info.get("partition") or {}
    if not part.get("table"):
        return ""
    plain = [f"{name}: {part[name]}" for name in part if isinstance(part[name], str | int | float)]
    names, labels = ([str(name) for name in part.get(key, [])] for key in ("names", "labels"))
    picture = plots.partition(part["table"], names, labels)
    total = run.info.get("sites") or 0
    first = f" Shown are the first {len(part['table'])} of {total} sites." if total > len(part["table"]) else ""
    says = f"Samples of each class at each site; the bars above are the sites' totals.{first}"
    says += f"<br>{escape('  ·  '.join(plain))}" if plain else ""
    return _section("Who holds which data", says, plots.svg(picture, "samples of each class at each site"))


def _timeline(run: Run) -> str:
    if not plots.final(run, "seconds"):
        return ""
    says = "A bar is a site's training in one round, in two shades in turn. The others wait for the longest."
    return _section("Who worked when", says, plots.svg(plots.timeline(run), "when each site worked"))


def _settings(run: Run) -> str:
    """Everything needed to repeat the run."""
    entries = [*_flat(run.info.get("settings") or {}), *_flat(run.info.get("versions") or {})]
    if not entries:
        return ""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries)
    return _section(
        "Settings and versions", "", f'<details><summary>show</summary><dl class="settings">{rows}</dl></details>'
    )


# ---------------------------------------------------------------------------------------- pieces


def _section(title: str, says: str, html: str = "") -> str:
    """A heading, a sentence (HTML), and what it is about."""
    return (
        f"<section>\n<h2>{title}</h2>\n" + (f'<p class="quiet">{says}</p>\n' if says else "") + f"{html}\n</section>\n"
    )


def _table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{_words(column)}</th>" for column in columns)
    body = "\n".join(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for mark, cells in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else format(value, f"{sign}.3f").replace("-", "−")


def _words(metric: str) -> str:
    return escape(metric.replace("_", " "))


def _date(began: Any) -> str | None:
    """2026-11-21T10:33:05+00:00 -> 2026-11-21 10:33."""
    return str(began)[:16].replace("T", " ") if began else None


def _flat(settings: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, value)."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{under}{name}.")
        else:
            yield f"{under}{name}", str(value)
