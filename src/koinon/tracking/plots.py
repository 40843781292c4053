"""Pictures of a run: each function turns a Run into one matplotlib Figure, in one style, without pyplot's global state.

Colours are Okabe and Ito's (2008), which readers with colour-blindness tell apart; blue is the federation or a
gain, vermilion is what needs a look.  Every figure also draws for one site, one round or no metric at all.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from koinon.errors import SettingsError, extra, nearest
from koinon.tracking.events import FEDERATION, is_metric
from koinon.tracking.folder import lower_is_better, ranked, scored_by
from koinon.tracking.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAGE, MISSING = "#1f2933", "#66717e", "#dfe3e8", "#ffffff", "#bdc3c9"
BLUE, PALE, VERMILION = "#0072b2", "#56b4e9", "#d55e00"
PALETTE = {"ink": INK, "muted": MUTED, "grid": GRID, "page": PAGE, "blue": BLUE, "pale": PALE, "vermilion": VERMILION}
SERIES = (BLUE, VERMILION, "#009e73", "#cc79a7", "#e69f00", PALE, "#7a5195", "#4d4d4d")
SHADES = "YlGnBu"  # sequential, safe for the colour-blind, and without a grey that could be taken for MISSING
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a site may be called '$x$'
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.borderaxespad": 0,
    "legend.handlelength": 1.4,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "koinon",
}

COMMON = "the common model"
EXCHANGED = "exchanged by all sites"

Points: TypeAlias = Mapping[int, float]
"""{round: value}, in order of rounds."""


@contextmanager
def style() -> Iterator[None]:
    """The one style, for as long as a figure is drawn or written.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    matplotlib: Any = extra("matplotlib", "plot")
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A reader's browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


# ---------------------------------------------------------------------------------------- numbers of a run


def score(run: Run) -> str:
    """The metric that picked the best model; else the first that the federation measured; else "train_loss" or ""."""
    names = {row.name: row.value for row in run.rows if row.site == FEDERATION}
    picked = scored_by(str(run.info.get("score", "accuracy")), names)
    return picked or next(filter(is_metric, names), "train_loss" if "train_loss" in names else "")


def points(run: Run, name: str) -> dict[int, float]:
    """One number of the federation by round; a round that was done again counts as it was done last."""
    return {row.round: row.value for row in run.series(name)}


def sites(run: Run, name: str) -> dict[str, dict[int, float]]:
    """One number as {site: {round: value}}: sites in the order of their names, rounds in order, finite values only."""
    table = run.by_site(name)

    def natural(site: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", site)]

    order = sorted(table, key=natural)
    return {site: {r: table[site][r] for r in sorted(table[site]) if math.isfinite(table[site][r])} for site in order}


def final(run: Run, name: str) -> dict[str, float]:
    """Each site's last value of one number."""
    return {site: list(rounds.values())[-1] for site, rounds in sites(run, name).items() if rounds}


def worst(run: Run, name: str = "") -> list[str]:
    """The tenth of the sites (at least one of two) with the worst last score, or other metric, worst first."""
    name = name or score(run)
    last = final(run, name)
    return ranked(last, name)[::-1][: math.ceil(len(last) / 10) if len(last) > 1 else 0]


def fairness(run: Run, name: str = "") -> dict[str, float]:
    """How evenly a model serves the sites, by each site's last score (or other metric); {} of fewer than two sites.

    Every site counts the same: their `mean`, that of the `worst` tenth, and their `variance` (of the population), as
    papers on fairness report them (Li et al., 2020).
    """
    last = final(run, name or score(run))
    values, lowest = list(last.values()), [last[site] for site in worst(run, name)]
    if not lowest:
        return {}
    return {"mean": float(np.mean(values)), "worst": float(np.mean(lowest)), "variance": float(np.var(values))}


def crossed(run: Run) -> dict[str, dict[str, float]]:
    """{whose model: {at which site: score}}, of a run of `CrossSite`; the model of all comes last.  {} of another."""
    if run.info.get("job") != "CrossSite":
        return {}
    owners = {round: site for site, rounds in sites(run, "train_samples").items() for round in rounds}
    table = sites(run, score(run))
    judged = sorted({round for rounds in table.values() for round in rounds})
    return {owners.get(n, COMMON): {site: table[site].get(n, math.nan) for site in table} for n in judged}


def best(run: Run) -> tuple[int, float] | None:
    """The round with the best score, the earliest of equals, and that score."""
    scores = {round: value for round, value in points(run, score(run)).items() if math.isfinite(value)}
    if not scores:
        return None
    round = ranked(scores, score(run))[0]
    return round, scores[round]


def joined(run: Run) -> dict[str, tuple[float, float, float]]:
    """{site: (score alone, score together, gain)}, the greatest gain first; {} unless the user asked to measure it."""
    metric = score(run)
    alone, together = final(run, f"alone_{metric}"), final(run, metric)
    sign = -1 if lower_is_better(metric) else 1
    both = {site: (alone[site], together[site]) for site in alone if site in together}
    gained = {site: (before, after, sign * (after - before)) for site, (before, after) in both.items()}
    return dict(sorted(gained.items(), key=lambda item: -item[1][2]))


# ---------------------------------------------------------------------------------------- figures


@style()
def curves(run: Run) -> Figure:
    """The score and the loss by round, with the spread between the sites."""
    metric = score(run)
    panels = [[metric]] if metric and metric not in ("loss", "train_loss") else []
    losses = [name for name in ("loss", "train_loss") if points(run, name)]
    panels += [losses] if losses else []
    if not panels:
        return _nothing("no metric was measured")
    figure = _figure(4.9 * len(panels) if len(panels) > 1 else 6.4, 3.3)
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _spread(axes, sites(run, names[0]))
        for colour, name in zip((BLUE, VERMILION), names, strict=False):
            _line(axes, points(run, name), "federation" if name != "train_loss" else "in training", colour)
        top = best(run)
        if top and names[0] == metric:
            axes.plot(*top, "o", color=INK, markersize=5, zorder=4, label=f"best: {top[1]:.3f} in round {top[0]}")
        _finish(axes, "round", names[0])
    return figure


@style()
def partition(table: Sequence[Sequence[float]], names: Sequence[str], labels: Sequence[str]) -> Figure:
    """Who holds which data: samples of each class (rows) at each site (columns), and each site's total above.

    Args:
        table: sites x classes, in samples.
        names: the sites' names.
        labels: the classes' names.
    """
    counts = np.asarray(table, dtype=float)
    if counts.ndim != 2 or not counts.size:
        return _nothing("no partition was recorded")
    many, classes = counts.shape
    figure = _figure(9.2, min(1.7 + 0.3 * classes, 6.5))
    top, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, max(0.45 * classes, 1.5)])
    top.bar(range(many), counts.sum(axis=1), width=min(0.12 * many, 0.7) if many <= 60 else 1.0, color=BLUE)
    top.set_ylabel("samples")
    top.grid(axis="x", visible=False)
    if many <= 40 and classes <= 30:
        x, y = np.nonzero(counts)
        # The largest bubble just fits its cell; 560 and 330 are the panel's sides in points.
        largest = min(560 / many, 330 / classes, 19) ** 2
        axes.scatter(x, y, s=largest * counts[x, y] / counts.max(), color=BLUE, linewidths=0)
        axes.set_xlim(-0.6, many - 0.4)
    else:
        image = axes.imshow(np.where(counts > 0, counts, np.nan).T, aspect="auto", cmap=SHADES, interpolation="none")
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label="samples", pad=0.01).outline.set_visible(False)
    axes.set_ylim(classes - 0.4, -0.6)
    axes.set_ylabel("class")
    _names(axes.xaxis, names[:many], 24, "site")
    _names(axes.yaxis, labels[:classes], 20)
    return figure


@style()
def heat_map(run: Run) -> Figure:
    """The score of every site (rows, the best on top) in every round (columns); grey where a site has none."""
    metric = score(run)
    table, last = sites(run, metric), final(run, metric)
    order = ranked(last, metric)
    rounds = sorted({round for site in order for round in table[site]})
    if not order:
        return _nothing("no site's model was evaluated")
    cells = np.array([[table[site].get(round, np.nan) for round in rounds] for site in order])
    # The first rounds are far from all others: a scale that spans them would hide how sites differ later.
    end, clipped = ("vmax", "max") if lower_is_better(metric) else ("vmin", "min")
    limit: dict[str, Any] = {end: np.nanpercentile(cells, 75 if end == "vmax" else 25)} if len(rounds) > 4 else {}
    figure = _figure(9.2, min(1.2 + 0.24 * len(order), 6.5))
    axes, lowest = _cells(figure, cells, metric, clipped if limit else "neither", **limit), len(worst(run))
    if lowest:
        # Just outside the cells, in units of the axes along x and of the rows along y.
        edge: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False, "color": VERMILION}
        axes.plot([1.008, 1.008], [len(order) - lowest - 0.4, len(order) - 0.6], linewidth=3, **edge)
    _names(axes.xaxis, [str(round) for round in rounds], 20, "round")
    _names(axes.yaxis, order, 30)
    for label in axes.get_yticklabels():
        if label.get_position()[1] >= len(order) - lowest:
            label.set_color(VERMILION)
    return figure


@style()
def cross_site(run: Run) -> Figure:
    """The score of each site's model (rows) at each site (columns); grey where there is none."""
    if not (table := crossed(run)):
        return _nothing("no site's model was judged by the sites")
    cells = np.array([list(row.values()) for row in table.values()])
    figure = _figure(9.2, min(1.4 + 0.32 * len(table), 8))
    axes = _cells(figure, cells, score(run))
    _names(axes.xaxis, list(next(iter(table.values()))), 24, "at")
    _names(axes.yaxis, list(table), 30, "model of")
    return figure


@style()
def gains(run: Run, most: int = 100) -> Figure | None:
    """What each site reaches alone and together, the greatest gain on top; None if it was not measured.

    Of more than `most` sites it shows so many, evenly from the greatest gain to the greatest loss.
    """
    measured = joined(run)
    if not measured:
        return None
    kept = np.linspace(0, len(measured) - 1, min(len(measured), most)).round().astype(int)
    pairs = {site: measured[site] for site in np.array(list(measured), dtype=object)[kept]}
    alone, together, gained = np.transpose(list(pairs.values()))
    colours = np.where(gained >= 0, BLUE, VERMILION)
    rows, dot = np.arange(len(pairs)), 30 if len(pairs) <= 40 else 6
    figure = _figure(9.2, min(1.2 + 0.26 * len(pairs), 7.5))
    axes = figure.subplots()
    axes.hlines(rows, alone, together, colors=list(colours), linewidth=2 if len(pairs) <= 40 else 0.8)
    axes.scatter(alone, rows, s=dot, facecolors=PAGE, edgecolors=list(colours), linewidths=1.2, zorder=3)
    axes.scatter(together, rows, s=dot, color=list(colours), zorder=3)
    hollow = axes.scatter([], [], s=30, facecolors=PAGE, edgecolors=MUTED, label="alone")
    full = axes.scatter([], [], s=30, color=MUTED, label="together")
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.legend(handles=[hollow, full], loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2)
    axes.set_xlabel(_words(score(run)))
    axes.grid(axis="y", visible=False)
    thinned = f"{len(pairs)} of {len(measured)} sites, evenly by gain" if len(pairs) < len(measured) else ""
    _names(axes.yaxis, list(pairs), 40, thinned)
    return figure


@style()
def timeline(run: Run, most: int = 40) -> Figure:
    """When each site worked, a bar a round; of more than `most` sites those that worked longest."""
    lasted = {site: rounds for site, rounds in sites(run, "seconds").items() if rounds}
    ended = {(row.site, row.round): row.time for row in run.rows if row.name == "seconds"}
    longest = set(sorted(lasted, key=lambda site: -sum(lasted[site].values()))[:most])
    shown = [site for site in lasted if site in longest]
    if not shown:
        return _nothing("no site's work was timed")
    rounds = sorted({round for site in shown for round in lasted[site]})[-max(1200 // len(shown), 1) :]
    figure = _figure(9.2, min(1.1 + 0.24 * len(shown), 8))
    axes = figure.subplots()
    for row, site in enumerate(shown):
        kept = [round for round in lasted[site] if round >= rounds[0]]
        spans = [(ended[site, round] - lasted[site][round], lasted[site][round]) for round in kept]
        # Two shades in turn tell one round from the next.
        shades = [BLUE if round % 2 else PALE for round in kept]
        axes.broken_barh(spans, (row - 0.32, 0.64), facecolors=shades, linewidth=0)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(left=0 if rounds[0] <= 1 else None)
    axes.grid(axis="y", visible=False)
    last = "" if rounds[0] <= 1 else f", from round {rounds[0]}"
    axes.set_xlabel(f"seconds since the run began{last}")
    thinned = f"the {most} of {len(lasted)} sites that worked longest" if len(lasted) > most else ""
    _names(axes.yaxis, shown, 40, thinned)
    return figure


@style()
def against(run: Run, by: str = "round") -> Figure:
    """The federation's score against what it cost so far.

    Args:
        by: "round", "bytes" (up and down, all sites) or "seconds" (of the rounds).

    Raises:
        SettingsError: `by` is something else.
    """
    (scores,), label = _costs([run], by)
    if not scores:
        return _nothing("no metric was measured")
    figure = _figure(9.2, 3.4)
    axes = figure.subplots()
    _line(axes, scores, "", BLUE)
    _finish(axes, label, score(run), legend=False)
    return figure


@style()
def compare(runs: Sequence[Run], by: str = "round") -> Figure:
    """The score of several runs by what it cost, as in `against`: a colour each, and other dashes after eight."""
    drawn = [run for run in runs if score(run)]
    series, label = _costs(drawn, by)
    if not drawn:
        return _nothing("no metric was measured")
    figure = _figure(7.2, 3.8)
    axes, metric = figure.subplots(), score(drawn[0])
    for number, run in enumerate(drawn):
        dashes = ("-", "--", ":", "-.")[number // len(SERIES) % 4]
        own = "" if score(run) == metric else f" ({_words(score(run))})"
        _line(axes, series[number], _short(run.name) + own, SERIES[number % len(SERIES)], dashes)
    _finish(axes, label, metric, legend=False)
    figure.legend(loc="outside right upper")
    return figure


# ---------------------------------------------------------------------------------------- writing


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure in the format that its name ends with, whole or not at all."""
    path = Path(path)
    part = path.with_name(f".part-{path.name}")
    with style():
        figure.savefig(part, dpi=200)
    return part.replace(path)


def svg(figure: Figure, says: str) -> str:
    """A figure as an inline SVG element that takes its font and its colours from the page (PALETTE)."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", transparent=True)
    drawn = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue()[text.getvalue().index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)  # several figures share a page, and its identifiers
    # Depending on its version, matplotlib writes one "font", or "font-size" and "font-family".
    drawn = re.sub(r"font: (?:\w+ )?([\d.]+px) [^;\"]*", r"font-size: \1", drawn)
    drawn = re.sub(r"font-family: [^;\"]*;? ?", "", drawn)
    for name, colour in PALETTE.items():
        drawn = drawn.replace(f": {colour}", f": var(--{name})")
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{escape(says)}" ', 1)


# ---------------------------------------------------------------------------------------- strokes


def _figure(width: float, height: float) -> Figure:
    drawn: Figure = extra("matplotlib.figure", "plot").Figure(figsize=(width, height))
    return drawn


def _nothing(why: str) -> Figure:
    """A figure that says why there is nothing to see."""
    figure = _figure(6.4, 1.2)
    figure.text(0.5, 0.5, why, ha="center", va="center", color=MUTED)
    return figure


def _cells(figure: Figure, cells: np.ndarray, metric: str, extend: str = "neither", **limit: Any) -> Axes:
    """A matrix as shades, grey where there is no number, with what they mean beside it."""
    axes, colours = figure.subplots(), extra("matplotlib", "plot").colormaps[SHADES].with_extremes(bad=MISSING)
    image = axes.imshow(cells, aspect="auto", cmap=colours, interpolation="none", **limit)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=_words(metric), pad=0.03, extend=extend).outline.set_visible(False)
    return axes


def _costs(runs: Sequence[Run], by: str) -> tuple[list[dict[float, float]], str]:
    """Each run's {cost until then: score}, and what a cost is."""
    if by not in ("round", "bytes", "seconds"):
        raise SettingsError(f"a score cannot be drawn against {by!r}: {nearest(by, ['round', 'bytes', 'seconds'])}")
    scores = [points(run, score(run)) for run in runs]
    if by == "round":
        return [{float(round): value for round, value in each.items()} for each in scores], by
    names = ("bytes_up", "bytes_down") if by == "bytes" else ("seconds",)
    series = []
    for run, each in zip(runs, scores, strict=True):
        spent = [point for name in names for point in points(run, name).items()]
        series.append({sum(cost for at, cost in spent if at <= round): value for round, value in each.items()})
    return series, by if by == "seconds" else EXCHANGED


def _line(
    axes: Axes, series: Mapping[int, float] | Mapping[float, float], label: str, colour: str, dashes: str = "-"
) -> None:
    mark = "o" if len(series) <= 30 else ""
    axes.plot(
        list(series), list(series.values()), dashes, color=colour, label=label, marker=mark, markersize=3, zorder=3
    )


def _spread(axes: Axes, table: Mapping[str, Points]) -> None:
    """A band between the sites: all of them, or the middle 80 % where ten or more can be ranked."""
    rounds = sorted({round for series in table.values() for round in series})
    if len(table) < 2 or len(rounds) < 2:
        return
    ends = (10, 90) if len(table) >= 10 else (0, 100)
    found = [np.percentile([series[round] for series in table.values() if round in series], ends) for round in rounds]
    low, high = np.transpose(found)
    label = "middle 80 % of the sites" if len(table) >= 10 else "all sites"
    axes.fill_between(rounds, low, high, color=BLUE, alpha=0.14, linewidth=0, label=label)


def _finish(axes: Axes, x: str, y: str, legend: bool = True) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(_words(y))
    axes.margins(x=0.02)
    if x == "round":
        axes.locator_params(axis="x", integer=True)
    if x == EXCHANGED:
        axes.xaxis.set_major_formatter(extra("matplotlib.ticker", "plot").EngFormatter("B"))
    if legend:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3, fontsize=8, columnspacing=1.2)


def _names(axis: Axis, names: Sequence[str], most: int, title: str = "") -> None:
    """Label rows or columns: every one, or each n-th where there are more than fit."""
    step = math.ceil(len(names) / most)
    at = range(0, len(names), step)
    axis.set_ticks(list(at), [_short(names[i]) for i in at])
    if axis is axis.axes.xaxis and sum(len(names[i]) + 2 for i in at) > 110:  # more than fit side by side
        for label in axis.get_ticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    if title:
        axis.set_label_text(title)


def _short(name: str) -> str:
    """A name that fits a picture; a space before it, lest matplotlib takes '_x' for a name to hide."""
    plain = "".join(letter if letter.isprintable() else " " for letter in str(name))
    plain = plain if len(plain) <= 24 else f"{plain[:23]}…"
    return f" {plain}" if plain.startswith("_") else plain


def _words(metric: str) -> str:
    return _short(metric.replace("_", " "))
