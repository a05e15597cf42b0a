"""What a crowd met, as figures, and how they read in the table at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from proxy.cli.demo.crowd import Tally

_NONE = "-"
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """One crowd's figures.

    Bytes: `delivered` are those of blobs that clients got, `unique` those of all that served pulls
    consist of, each thing once, `sent` those that the registry sent. `peak` are the most sockets
    open at the registry at once. `times` are seconds per served pull, sorted; `wall` is the seconds
    of the whole crowd.
    """

    title: str
    pulls: int
    served: int
    refused: Mapping[int, int]
    broken: Mapping[str, int]
    delivered: int
    unique: int
    sent: int
    peak: int
    times: tuple[float, ...]
    wall: float

    @classmethod
    def of(cls, title: str, tally: Tally, *, sent: int, peak: int, wall: float) -> Outcome:
        """The figures of a crowd that is done."""
        return cls(
            title=title,
            pulls=tally.pulls,
            served=tally.served,
            refused=dict(tally.refused),
            broken=dict(tally.broken),
            delivered=tally.bytes,
            unique=sum(tally.sizes.values()),
            sent=sent,
            peak=peak,
            times=tuple(sorted(tally.times)),
            wall=wall,
        )

    @property
    def is_whole(self) -> bool:
        """Whether every pull was served."""
        return self.served == self.pulls

    @property
    def upstream_ratio(self) -> float | None:
        """Bytes sent by the registry per byte of the images that were pulled."""
        return self.sent / self.unique if self.unique else None

    def percentile(self, percent: float) -> float | None:
        """The time (s) within which so many of the served pulls were done (nearest rank)."""
        if not self.times:
            return None
        return self.times[max(0, math.ceil(percent / 100 * len(self.times)) - 1)]


def outcome_table(outcomes: Sequence[Outcome], limit: int) -> Table:
    """A column for each outcome; fits into 80 columns with two of them."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for outcome in outcomes:
        table.add_column(outcome.title, justify="right")
    for title, cell in _rows(outcomes, limit):
        table.add_row(title, *(cell(outcome) for outcome in outcomes))
    return table


_Cell = Callable[[Outcome], Text]


def _rows(outcomes: Sequence[Outcome], limit: int) -> list[tuple[str, _Cell]]:
    rows: list[tuple[str, _Cell]] = [
        ("pulls served", _served),
        ("answers refused", _refused),
        (f"peak connections at the registry (limit {limit})", lambda one: _peak(one, limit)),
        ("image bytes that clients got", lambda one: Text(f"{one.delivered / _MIB:.0f} MiB")),
        ("bytes that the registry sent", lambda one: Text(f"{one.sent / _MIB:.0f} MiB")),
        ("upstream bytes per image byte", lambda one: _number(one.upstream_ratio, "")),
        ("a whole pull, p50", lambda one: _number(one.percentile(50), " s")),
        ("a whole pull, p99", lambda one: _number(one.percentile(99), " s")),
        ("wall time", lambda one: _number(one.wall, " s")),
    ]
    if any(outcome.broken for outcome in outcomes):
        rows.insert(2, ("transfers that broke", _broken))
    return rows


def _served(outcome: Outcome) -> Text:
    style = "bold green" if outcome.is_whole else "bold red"
    return Text(f"{outcome.served} of {outcome.pulls}", style)


def _refused(outcome: Outcome) -> Text:
    if not outcome.refused:
        return Text("none", "green")
    parts = (f"{count} x {status}" for status, count in sorted(outcome.refused.items()))
    return Text("\n".join(parts), "red")


def _broken(outcome: Outcome) -> Text:
    if not outcome.broken:
        return Text("none", "green")
    parts = (f"{count} x {word}" for word, count in sorted(outcome.broken.items()))
    return Text("\n".join(parts), "red")


def _peak(outcome: Outcome, limit: int) -> Text:
    return Text(str(outcome.peak), "green" if outcome.peak <= limit else "red")


def _number(value: float | None, unit: str) -> Text:
    return Text(_NONE if value is None else f"{value:.2f}{unit}")
