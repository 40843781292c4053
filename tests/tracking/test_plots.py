"""Pictures of a run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from koinon.errors import SettingsError
from koinon.tracking import plots
from koinon.tracking.events import FEDERATION
from koinon.tracking.run import Row, Run
from tracking.synthetic import synthetic

FIGURES = {
    "curves": plots.curves,
    "heat_map": plots.heat_map,
    "gains": plots.gains,
    "cross_site": lambda run: plots.cross_site(replace(run, info={**run.info, "job": "CrossSite"})),
    "timeline": plots.timeline,
    "by_round": plots.against,
    "by_bytes": lambda run: plots.against(run, "bytes"),
    "by_seconds": lambda run: plots.against(run, "seconds"),
    "compare": lambda run: plots.compare([run, run]),
    "compare_by_bytes": lambda run: plots.compare([run, run], "bytes"),
    "partition": lambda run: plots.partition(*(run.info["partition"][key] for key in ("table", "names", "labels"))),
}


def federation(tmp_path: Path, info: dict[str, object] | None = None, **series: list[float]) -> Run:
    """A run of the federation's numbers alone."""
    rows = [
        Row("r", n, FEDERATION, name, value, n) for name, values in series.items() for n, value in enumerate(values, 1)
    ]
    return Run(tmp_path, info or {}, rows)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (8, 20), (150, 3)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_draws_for_every_shape_of_run(figure: str, shape: tuple[int, int], tmp_path: Path):
    """From one site and one round to many."""
    run = synthetic(tmp_path, *shape, alone=True, missing=0.2 if shape[1] > 2 else 0.0)
    path = plots.save(FIGURES[figure](run), tmp_path / "figure.png")
    with Image.open(path) as image:
        assert image.width > 1000 and len(image.getcolors(2**24) or []) > 10
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize("figure", sorted(set(FIGURES) - {"gains", "partition"}))
def test_a_run_without_numbers_says_so(figure: str, tmp_path: Path):
    """A picture with one sentence, not an exception."""
    drawn = FIGURES[figure](Run(tmp_path, {}, []))
    assert "no" in drawn.texts[0].get_text()


def test_the_style_stays_inside(tmp_path: Path):
    """Neither pyplot nor the user's own settings are touched."""
    before = dict(matplotlib.rcParams)
    plots.save(plots.curves(synthetic(tmp_path, 2, 2)), tmp_path / "c.svg")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("info", "series", "metric"),
    [
        ({"score": "c_index"}, {"loss": [1.0], "c_index": [0.5]}, "c_index"),
        ({}, {"loss": [1.0], "accuracy": [0.5]}, "accuracy"),
        ({}, {"c_index": [0.5], "loss": [1.0]}, "loss"),
        ({}, {"seconds": [1.0], "train_loss": [1.0], "c_index": [0.5]}, "c_index"),
        ({}, {"seconds": [1.0], "train_loss": [1.0]}, "train_loss"),
        ({}, {"seconds": [1.0]}, ""),
    ],
)
def test_the_score_is_what_picked_the_best_model(
    info: dict[str, object], series: dict[str, list[float]], metric: str, tmp_path: Path
):
    """The metric asked for, else the loss, as the run folder does; else whatever there is."""
    assert plots.score(federation(tmp_path, info, **series)) == metric


@pytest.mark.parametrize(
    ("series", "best"),
    [
        ({"accuracy": [0.1, 0.9, 0.9, 0.5]}, (2, 0.9)),
        ({"loss": [3.0, 1.0, 2.0]}, (2, 1.0)),
        ({"accuracy": [float("nan"), 0.2]}, (2, 0.2)),
        ({"seconds": [1.0]}, None),
    ],
)
def test_the_best_round(series: dict[str, list[float]], best: tuple[int, float] | None, tmp_path: Path):
    """The earliest of equals; a loss is best lowest; what is not a number is not best."""
    assert plots.best(federation(tmp_path, **series)) == best


@pytest.mark.parametrize(("count", "marked"), [(1, 0), (2, 1), (10, 1), (11, 2), (100, 10)])
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_worst_tenth(count: int, marked: int, metric: str, tmp_path: Path):
    """A tenth rounded up, none of one; the highest where lower is better; the server is no site."""
    rows = [Row("r", 1, f"s{n}", metric, float(n), 0.0) for n in range(count)]
    rows += [Row("r", 1, FEDERATION, metric, 1.0, 0.0), Row("r", 1, "server", metric, -9.0, 0.0)]
    order = [f"s{n}" for n in range(count)]
    assert plots.worst(Run(tmp_path, {}, rows)) == (order if metric == "accuracy" else order[::-1])[:marked]


def test_sites_come_in_the_order_of_their_numbers(tmp_path: Path):
    """site-2 before site-10."""
    run = synthetic(tmp_path, 11, 1)
    assert list(plots.final(run, "accuracy"))[:3] == ["site-1", "site-2", "site-3"]


def test_gains_are_none_where_nobody_measured_alone(tmp_path: Path):
    """Nothing is made up."""
    assert plots.gains(synthetic(tmp_path, 3, 2)) is None


@pytest.mark.parametrize(("metric", "first"), [("accuracy", "a"), ("loss", "b")])
def test_the_greatest_gain_comes_first(metric: str, first: str, tmp_path: Path):
    """A rise of the accuracy or a fall of the loss."""
    values = {"a": (0.2, 0.9), "b": (0.9, 0.2)}
    rows = [Row("r", 1, FEDERATION, metric, 0.5, 0.0)]
    rows += [Row("r", 1, site, f"alone_{metric}", alone, 0.0) for site, (alone, _) in values.items()]
    rows += [Row("r", 1, site, metric, together, 0.0) for site, (_, together) in values.items()]
    site, (alone, together, gain) = next(iter(plots.joined(Run(tmp_path, {}, rows)).items()))
    assert (site, (alone, together), gain) == (first, values[first], pytest.approx(0.7))


def test_costs_add_up_over_all_rounds_even_those_without_a_score(tmp_path: Path):
    """Against bytes a score stands at what was sent until then, up and down."""
    rows = [Row("r", n, FEDERATION, name, 2e6, 0.0) for n in (1, 2, 3) for name in ("bytes_up", "bytes_down")]
    rows += [Row("r", n, FEDERATION, "accuracy", 0.5, 0.0) for n in (1, 3)]
    axes = plots.against(Run(tmp_path, {}, rows), "bytes").axes[0]
    assert list(axes.lines[0].get_xdata()) == [4e6, 12e6]
    assert (axes.xaxis.get_major_formatter()(4e6), axes.get_xlabel()) == ("4 MB", "exchanged by all sites")


def test_runs_are_compared_by_bytes_on_one_scale(tmp_path: Path):
    """Each at what it has sent until then."""
    runs = [federation(tmp_path, bytes_up=[size, size], accuracy=[0.1, 0.2]) for size in (3e3, 2e6)]
    axes = plots.compare(runs, "bytes").axes[0]
    assert [list(line.get_xdata()) for line in axes.lines] == [[3e3, 6e3], [2e6, 4e6]]


def test_fairness_counts_each_site_the_same(tmp_path: Path):
    """Of 0, 1 … 19: the mean, that of the worst two, the variance; of a loss the worst are the highest."""
    for metric, worst in (("accuracy", 0.5), ("loss", 18.5)):
        rows = [Row("r", round, f"s{n}", metric, float(n * round), 0.0) for round in (2, 1) for n in range(20)]
        found = plots.fairness(Run(tmp_path, {}, [*rows, Row("r", 1, FEDERATION, metric, 1.0, 0.0)]))
        assert found == pytest.approx({"mean": 19.0, "worst": 2 * worst, "variance": 4 * (20**2 - 1) / 12})
    assert plots.fairness(synthetic(tmp_path, 1, 1)) == {}


def test_against_knows_three_costs(tmp_path: Path):
    """The nearest is named."""
    with pytest.raises(SettingsError, match="did you mean 'seconds'"):
        plots.against(synthetic(tmp_path, 1, 1), "second")


def test_large_runs_thin_out(tmp_path: Path):
    """A thousand sites keep at most a readable number of names, bars and lines, and the figure says so."""
    run = synthetic(tmp_path, 1000, 3, alone=True)
    heat, gained, timed = plots.heat_map(run), plots.gains(run), plots.timeline(run)
    assert gained is not None
    assert all(len(figure.axes[0].get_yticklabels()) <= 40 for figure in (heat, gained, timed))
    assert gained.axes[0].get_ylabel() == "100 of 1000 sites, evenly by gain"
    assert timed.axes[0].get_ylabel() == "the 40 of 1000 sites that worked longest"


def test_a_bar_ends_when_the_answer_came(tmp_path: Path):
    """It is as long as the site worked."""
    rows = [Row("r", round, "a", "seconds", 0.5, 2.0 * round) for round in (1, 2)]
    bars = plots.timeline(Run(tmp_path, {}, rows)).axes[0].collections[0].get_paths()
    assert [(bar.vertices[:, 0].min(), bar.vertices[:, 0].max()) for bar in bars] == [(1.5, 2.0), (3.5, 4.0)]


def test_inline_svg_takes_its_colours_and_font_from_the_page(tmp_path: Path):
    """So one page serves light and dark; no identifier of a group is left to clash."""
    drawn = plots.svg(plots.curves(synthetic(tmp_path, 8, 5)), 'a "picture"')
    assert drawn.startswith('<svg role="img" aria-label="a &quot;picture&quot;"')
    assert "var(--blue)" in drawn and plots.BLUE not in drawn and "DejaVu" not in drawn
    assert not re.search(r'<g id="', drawn)


@pytest.mark.parametrize("name", ["$x$", "$\\frac{", "_hidden", "<b>&", "병원", "a\nb", "x" * 300])
def test_any_name_can_be_drawn(name: str, tmp_path: Path):
    """Names are text: never mathematics, markup or a reason to fail."""
    drawn = plots.svg(plots.partition([[1, 2], [3, 4]], [name, "b"], ["0", name]), "names")
    assert "<b>" not in drawn
    assert len(plots.compare([synthetic(tmp_path / (name[:9] or "x"), 2, 2)]).legends[0].get_texts()) == 1
