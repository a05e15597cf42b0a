"""Charts: well-formed, to scale, and on the page."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks.charts import BEYOND, ROOM, Bar, Chart, draw, scale_end
from benchmarks.results import entry, read_document, write
from benchmarks.scenario import Findings

SVG = "{http://www.w3.org/2000/svg}"
BARS = (
    Bar("nginx <tuned>", 50.0, "50 ms", 40.0, 100.0),
    Bar("pullpool", 25.0, "25 ms", 25.0, 25.0, ours=True),
    Bar("nobody", 0.0, "0 ms", 0.0, 0.0),
)
CHART = Chart("herd", 'Last "one" done & gone', "ms", "less", BARS)


def bars(svg: str) -> list[float]:
    """The widths of the bars; the first rectangle is the ground."""
    return [float(found.attrib["width"]) for found in ET.fromstring(svg).iter(f"{SVG}rect")][1:]


def test_bars_are_as_long_as_their_numbers_beside_the_most_of_all_rounds() -> None:
    assert bars(draw(CHART)) == [ROOM / 2, ROOM / 4, 1.0]


def test_texts_are_there_and_escaped() -> None:
    texts = [found.text for found in ET.fromstring(draw(CHART)).iter(f"{SVG}text")]
    assert texts[:4] == [CHART.title, "ms, less is better", "nginx <tuned>", "50 ms"]


def test_only_rounds_that_differ_have_a_spread() -> None:
    assert len(list(ET.fromstring(draw(CHART)).iter(f"{SVG}path"))) == 1


def test_a_bar_beside_which_the_others_would_be_nothing_is_broken() -> None:
    huge = Bar("registry", 2000.0, "2,000 ms", 1000.0, 3000.0)
    widths = bars(draw(Chart("herd", "", "ms", "less", (huge, *BARS))))
    assert widths[0] == ROOM
    assert widths[1] == pytest.approx(ROOM / 2 / BEYOND, abs=0.1)
    # Two are compared as they are, and so are those that differ less.
    assert scale_end([100.0, 1.0], [100.0, 1.0]) == 100.0
    assert scale_end([40.0, 10.0, 1.0], [50.0, 10.0, 1.0]) == 50.0


def test_a_chart_without_bars_is_still_a_picture() -> None:
    assert bars(draw(Chart("none", "Nothing", "", "more", ()))) == []


def test_the_page_shows_the_pictures_that_lie_beside_it(tmp_path: Path) -> None:
    found = Findings("About.", (), (), charts=(CHART,))
    write(tmp_path, {"one": entry(found, {}, "command")}, ["one"])
    assert f"![{CHART.title}](results/herd.svg)" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results" / "herd.svg").read_text() == draw(CHART)
    # Drawn again of the document alone, it is the same.
    write(tmp_path, read_document(tmp_path), ["one"])
    assert (tmp_path / "results" / "herd.svg").read_text() == draw(CHART)
