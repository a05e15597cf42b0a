"""Bar charts as SVG, drawn by hand: a page of results needs no more, and nothing to install.

One chart compares one number: a bar for each subject from zero on, a thin line from the least to
the most of its rounds, the number behind it. The same numbers always give the same bytes. Colours
are legible on white and on dark pages, since the chart brings its own ground.
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, ROW, BAR = 720, 30, 18
LABELS, NUMBERS, MARGIN, TOP = 200, 110, 16, 58
_OURS, _THEIRS, _INK, _FAINT, _SPREAD = "#1f6feb", "#9aa4b2", "#1c2128", "#667080", "#3a424d"
_FONT = "font-family=\"system-ui, 'DejaVu Sans', sans-serif\""


@dataclass(frozen=True, slots=True)
class Bar:
    """A median, its text, the least and the most of the rounds; `ours` stands out."""

    label: str
    value: float
    text: str
    least: float
    most: float
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """`name` is the file's, unique on the page; `better` is "less" or "more"."""

    name: str
    title: str
    unit: str
    better: str
    bars: tuple[Bar, ...]


def draw(chart: Chart) -> str:
    """The SVG document."""
    height = TOP + ROW * len(chart.bars) + MARGIN
    room = WIDTH - LABELS - NUMBERS - 2 * MARGIN
    most = max((max(bar.most, bar.value) for bar in chart.bars), default=0.0) or 1.0
    unit = f"{chart.unit}, " if chart.unit else ""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_attribute(chart.title)}">',
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#ffffff"/>',
        _text(MARGIN, 26, chart.title, size=15, weight=600),
        _text(MARGIN, 45, f"{unit}{chart.better} is better", size=12, colour=_FAINT),
    ]
    for number, bar in enumerate(chart.bars):
        parts += _row(bar, TOP + ROW * number, room / most)
    return "\n".join((*parts, "</svg>", ""))


def _row(bar: Bar, top: float, scale: float) -> list[str]:
    left, middle = MARGIN + LABELS, top + BAR / 2
    end = left + bar.value * scale
    width = max(1.0, bar.value * scale)
    parts = [
        _text(left - 10, middle + 4.5, bar.label, anchor="end", weight=600 if bar.ours else 400),
        f'<rect x="{left}" y="{top:.1f}" width="{width:.1f}" height="{BAR}" rx="2" '
        f'fill="{_OURS if bar.ours else _THEIRS}"/>',
    ]
    if bar.most > bar.least:
        low, high = left + bar.least * scale, left + bar.most * scale
        end = max(end, high)
        parts.append(
            f'<path d="M{low:.1f} {middle - 4:.1f}v8m0 -4H{high:.1f}m0 -4v8" fill="none" '
            f'stroke="{_SPREAD}" stroke-width="1.2"/>'
        )
    parts.append(_text(end + 8, middle + 4.5, bar.text, weight=600 if bar.ours else 400))
    return parts


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    weight: int = 400,
    colour: str = _INK,
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" {_FONT} font-size="{size}" font-weight="{weight}" '
        f'fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _attribute(text: str) -> str:
    return escape(text, {'"': "&quot;"})
