"""A run on one page."""

from __future__ import annotations

import csv
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from koinon.errors import MissingExtra
from koinon.tracking import plots, report
from koinon.tracking.run import Run
from tracking.synthetic import synthetic

EVIL = "<script>alert('1')</script>\"><img src=x onerror=alert(2)>"
VOID = {"meta", "input", "br", "img", "link"}


class Reading(HTMLParser):
    """The elements, attributes and text of a page, and whether every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but not rendered, for tests of the words between them."""
    monkeypatch.setattr(plots, "svg", lambda figure, says: f"<svg aria-label={says!r}></svg>")


def renamed(run: Run, old: str, new: str) -> Run:
    """A run in which a site has another name."""
    names = [new if site == old else site for site in run.info["partition"]["names"]]
    info = {**run.info, "partition": {**run.info["partition"], "names": names}}
    return replace(run, info=info, known=[row._replace(site=new) if row.site == old else row for row in run.rows])


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (8, 20), (100, 5)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_the_page_is_whole_and_stands_alone(shape: tuple[int, int], tmp_path: Path):
    """One well-formed file that loads nothing and runs nothing; no temporary file stays."""
    path = report.write(synthetic(tmp_path, *shape, alone=True))
    page = Reading(path.read_text())
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    loaded = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith(("data:image/png", "#")) for value in loaded)
    assert "@import" not in path.read_text() and "url(http" not in path.read_text()


def test_nothing_that_comes_from_the_run_is_markup(tmp_path: Path):
    """Names, reasons, settings, versions, metrics and labels are text, wherever they stand."""
    run = renamed(synthetic(tmp_path, 3, 2, metric="x<script>", alone=True), "site-2", EVIL)
    partition = {**run.info["partition"], "how": EVIL, EVIL: 1, "labels": [EVIL] * 10}
    info = {**run.info, "name": EVIL, "job": EVIL, "state": EVIL, "reason": EVIL, "began": EVIL, "seed": EVIL}
    info |= {"partition": partition, "settings": {EVIL: {EVIL: [EVIL]}}, "versions": {EVIL: EVIL}}
    page = Reading(report.write(replace(run, info=info)).read_text())
    assert page.open == []
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert('1')") > 8


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            [0.2, 0.9, 0.8],
            "the common model reached accuracy 0.800; its best, 0.900, came in round 2.",
        ),
        (
            [0.2, 0.8, 0.9],
            "the common model reached accuracy 0.900; no round was better.",
        ),
    ],
)
def test_the_headline_names_the_round_of_each_score(values: list[float], sentence: str, tmp_path: Path, undrawn: None):
    """The last and the best score are not confused."""
    run = synthetic(tmp_path, 2, 3)
    scores = dict(enumerate(values, 1))
    rows = [
        r._replace(value=scores[r.round]) if (r.site, r.name) == ("federation", "accuracy") else r for r in run.rows
    ]
    assert sentence in Reading(report.page(replace(run, known=rows))).text


def test_the_table_gives_each_site_and_marks_the_worst(tmp_path: Path, undrawn: None):
    """Samples, score, loss, and the gain where it was measured."""
    run = synthetic(tmp_path, 8, 4, alone=True)
    html = report.page(run)
    _, table = re.findall(r"<table>.*?</table>", html, re.DOTALL)
    assert re.findall(r"<th>(.*?)</th>", table) == [
        "site",
        "held-out samples",
        "accuracy",
        "loss",
        "alone",
        "gain by joining",
    ]
    assert table.count("<tr") == 9 and table.count("class=worst") == 1
    scores = {site: rounds[4] for site, rounds in run.by_site("accuracy").items()}
    lowest = min(scores, key=scores.__getitem__)
    assert f"class=worst><td>{lowest} <small>(worst 10 %)</small></td>" in table
    assert f"The worst tenth: {lowest} ({scores[lowest]:.3f})." in html


def test_the_page_says_how_evenly_sites_are_served(tmp_path: Path, undrawn: None):
    """By the common model and by their own, each site counting the same; a site's own model has a column."""
    run = synthetic(tmp_path, 20, 2)
    scores = [rounds[2] for rounds in run.by_site("accuracy").values()]
    own = [row._replace(name="personal_accuracy", value=row.value / 2) for row in run.rows if row.name == "accuracy"]
    html = report.page(replace(run, known=[*run.rows, *own]))
    fairness, table = re.findall(r"<table>.*?</table>", html, re.DOTALL)
    for title, values in (("common model", np.array(scores)), ("own models", np.array(scores) / 2)):
        cells = f"{values.mean():.3f}</td><td>{np.sort(values)[:2].mean():.3f}</td><td>{values.var():.2g}"
        assert f"<td>{title}</td><td>{cells}</td>" in fairness
    assert "<th>own model</th>" in table
    assert "over the sites" not in report.page(synthetic(tmp_path, 1, 2))


def crossed(run: Run, sites: int) -> Run:
    """As if of `CrossSite`: in round i site i trains, in the last nobody does."""
    rows = [row for row in run.rows if row.name != "train_samples" or row.site == f"site-{row.round}"]
    return replace(run, info={**run.info, "job": "CrossSite", "rounds": 0}, known=rows)


@pytest.mark.parametrize("sites", [3, 20])
def test_the_page_of_a_cross_site_evaluation(sites: int, tmp_path: Path):
    """Its matrix as a picture, as a file and, where it can be read, as a table; nothing about how rounds went."""
    run = crossed(synthetic(tmp_path, sites, sites + 1), sites)
    page = report.write(run).read_text()
    lines = list(csv.reader((tmp_path / "cross-site.csv").open()))
    assert lines[0] == ["model", *(f"site-{n}" for n in range(1, sites + 1))]
    assert [line[0] for line in lines[1:]] == [*lines[0][1:], "the common model"]
    assert float(lines[2][3]) == run.by_site("accuracy")["site-3"][2]
    assert Reading(page).open == []
    assert "How the model became better" not in page and " of 0" not in page
    assert page.count("<table>") == (sites == 3)
    assert sites != 3 or f"<td>{float(lines[2][3]):.3f}</td>" in page


def test_a_gain_that_was_not_measured_is_not_shown(tmp_path: Path, undrawn: None):
    """One sentence says how to measure it."""
    html = report.page(synthetic(tmp_path, 3, 2))
    assert "koinon run … --alone" in html and "gain by joining" not in html


def test_a_failed_run_says_why(tmp_path: Path, undrawn: None):
    """Even one that ended before its first commit."""
    info = {"name": "r", "state": "failed", "reason": "2 of 8 sites answered; the quorum is 5", "rounds": 20}
    text = Reading(report.write(Run(tmp_path, info, [])).read_text()).text
    assert "2 of 8 sites answered; the quorum is 5" in text and "0 of 20" in text
    assert "No metric was measured in this run." in text


def test_a_run_whose_process_is_gone_does_not_claim_to_run(tmp_path: Path, undrawn: None):
    """run.json of a killed process still says 'running'."""
    run = synthetic(tmp_path, 2, 2)
    info = {**run.info, "state": "running", "pid": 2**22 + 1}  # above any process's number on Linux
    assert "killed" in Reading(report.page(replace(run, info=info))).text


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And no half-written page is left behind."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'koinon\[plot\]'"):
        report.write(synthetic(tmp_path, 2, 2))
    assert list(tmp_path.iterdir()) == []
