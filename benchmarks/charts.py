"""Bar charts as SVG, drawn by hand: a page of results needs no more, and nothing to install.

One chart compares one number: a bar for each subject from zero on, a thin line from the least to
the most of its rounds, the number behind it. The same numbers always give the same bytes. Colours
are legible on white and on dark pages, since the chart brings its own ground. A number beside which
the others would be nothing is shown by a bar that is broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, ROW, BAR = 720, 30, 18
LABELS, NUMBERS, MARGIN, TOP = 200, 110, 16, 58
ROOM = WIDTH - LABELS - NUMBERS - 2 * MARGIN
#: A bar is broken that is so many times as long as the next; the others leave room for it.
OUTLIER, BEYOND = 5.0, 1.4
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
    most = scale_end([bar.value for bar in chart.bars], [bar.most for bar in chart.bars])
    unit = f"{chart.unit}, " if chart.unit else ""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_attribute(chart.title)}">',
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#ffffff"/>',
        _text(MARGIN, 26, chart.title, size=15, weight=600),
        _text(MARGIN, 45, f"{unit}{chart.better} is better", size=12, colour=_FAINT),
    ]
    for number, bar in enumerate(chart.bars):
        parts += _row(bar, TOP + ROW * number, most)
    return "\n".join((*parts, "</svg>", ""))


def scale_end(values: Sequence[float], most: Sequence[float]) -> float:
    """What the longest whole bar may stand for: bars of more are broken."""
    ranked = sorted(zip(values, most, strict=True), reverse=True)
    while len(ranked) > 2 and ranked[0][0] > OUTLIER * ranked[1][0] > 0:
        del ranked[0]
    end = max((max(pair) for pair in ranked), default=0.0) or 1.0
    return end if len(ranked) == len(values) else BEYOND * end


def _row(bar: Bar, top: float, most: float) -> list[str]:
    left, middle = MARGIN + LABELS, top + BAR / 2
    is_broken = bar.value > most
    scale = ROOM / most
    width = ROOM if is_broken else max(1.0, bar.value * scale)
    end = left + width
    parts = [
        _text(left - 10, middle + 4.5, bar.label, anchor="end", weight=600 if bar.ours else 400),
        f'<rect x="{left}" y="{top:.1f}" width="{width:.1f}" height="{BAR}" rx="2" '
        f'fill="{_OURS if bar.ours else _THEIRS}"/>',
    ]
    if is_broken:
        at = left + ROOM * 0.8
        parts.append(
            f'<path d="M{at:.1f} {top + BAR + 1:.1f}l8 -{BAR + 2}h6l-8 {BAR + 2}z" fill="#ffffff"/>'
        )
    elif bar.most > bar.least:
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
