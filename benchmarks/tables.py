"""Rounds of one scenario summed up for a reader: rich tables, and the same figures for JSON.

What must never happen is shown from the worst round, times as medians over the timed rounds. A
round in which the clients hashed everything proves the bytes; its times count only when there is no
other.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.parts import MIB, TIMES
from benchmarks.rounds import Round

NONE = "-"


@dataclass(frozen=True, slots=True)
class Row:
    """All rounds of a subject in a scenario; `unique` are the bytes that one fetch of all takes."""

    title: str
    rounds: Sequence[Round]
    unique: int
    expected: int

    @property
    def timed(self) -> Sequence[Round]:
        return [played for played in self.rounds if not played.verified] or self.rounds

    def time(self, figure: Callable[[Round], float | None]) -> str:
        """A median time as text; none where the better part was turned away, and soon done."""
        return _seconds(self.middle(figure) if 2 * self.worst.served > self.expected else None)

    def middle(self, figure: Callable[[Round], float | None]) -> float | None:
        found = [value for played in self.timed if (value := figure(played)) is not None]
        return statistics.median(found) if found else None

    @property
    def worst(self) -> Round:
        return min(self.rounds, key=lambda played: played.served)

    @property
    def is_whole(self) -> bool:
        """Whether everything that should have been asked was answered well, in every round."""
        return self.worst.served == self.expected

    @property
    def upstream_ratio(self) -> float:
        return max(played.upstream.size for played in self.rounds) / self.unique

    @property
    def refusals(self) -> int:
        return max(played.upstream.refused for played in self.rounds)

    @property
    def peak(self) -> str:
        """Most sockets to the upstream: as accepted, where the upstream counts, and as sampled."""
        sampled = max(played.sampled_peak for played in self.rounds)
        accepted = [p.upstream.peak for p in self.rounds if p.upstream.peak is not None]
        return f"{max(accepted)} ({sampled})" if accepted else str(sampled)

    @property
    def resident(self) -> str:
        most = max(played.resident for played in self.rounds)
        return f"{most / MIB:.0f} MiB" if most else NONE

    def summary(self) -> Mapping[str, object]:
        """The row as it goes into the JSON file; seconds and bytes."""
        return {
            "subject": self.rounds[0].subject,
            "answers_expected": self.expected,
            "answers": len(self.worst.answers),
            "served": self.worst.served,
            "failures": dict(self.worst.failures),
            "refused_by_upstream": self.refusals,
            "upstream_ratio": self.upstream_ratio,
            "peak_accepted": max((p.upstream.peak or 0 for p in self.rounds), default=0) or None,
            "peak_sampled": max(played.sampled_peak for played in self.rounds),
            "first_byte_median": self.middle(lambda played: played.first_byte),
            "wall": self.middle(lambda played: played.wall),
            "p50": self.middle(lambda played: played.latency(50)),
            "p99": self.middle(lambda played: played.latency(99)),
            "resident": max(played.resident for played in self.rounds) or None,
        }


def herd_table(title: str, rows: Sequence[Row]) -> Table:
    """The table of the one blob that everybody wants."""
    table = _table(
        title,
        "clients served",
        "refused",
        "upstream / blob bytes",
        "first byte, median",
        "last client done",
        "peak connections",
        "RSS after",
    )
    for row in rows:
        table.add_row(
            row.title,
            f"{row.worst.served} of {row.expected}",
            _failures(row.worst.failures),
            f"{row.upstream_ratio:.2f}",
            row.time(lambda r: r.first_byte),
            row.time(lambda r: r.wall),
            row.peak,
            row.resident,
        )
    return table


def crowd_table(title: str, rows: Sequence[Row]) -> Table:
    """The table of many images at once."""
    table = _table(
        title,
        "answers",
        "failed answers",
        "refusals by the upstream",
        "peak sockets",
        "upstream / unique bytes",
        "wall",
        "request p50",
        "request p99",
        "RSS after",
    )
    for row in rows:
        failed = row.worst.failures
        table.add_row(
            row.title,
            f"{len(row.worst.answers)} of {row.expected}",
            _failures(failed) if failed else "0",
            str(row.refusals),
            row.peak,
            f"{row.upstream_ratio:.2f}",
            row.time(lambda r: r.wall),
            row.time(lambda r: r.latency(50)),
            row.time(lambda r: r.latency(99)),
            row.resident,
        )
    return table


def environment_table(environment: Mapping[str, str]) -> Table:
    """Where and with what the figures were measured."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in environment.items():
        table.add_row(name, value)
    return table


def ratio_to_rival(rows: Sequence[Row], subject: str, rival: str) -> float | None:
    """Median over the rounds of one's wall / the rival's; None unless both served everybody."""
    ours, theirs = (_row(rows, name) for name in (subject, rival))
    if ours is None or theirs is None or not (ours.is_whole and theirs.is_whole):
        return None
    pairs = zip(ours.timed, theirs.timed, strict=True)
    return statistics.median(mine.wall / other.wall for mine, other in pairs)


def _row(rows: Sequence[Row], subject: str) -> Row | None:
    return next((row for row in rows if row.rounds[0].subject == subject), None)


def _table(title: str, *columns: str) -> Table:
    caption = (
        "peak: most sockets to the upstream, as accepted by it (as sampled) where it counts them"
    )
    table = Table(title=title, title_justify="left", title_style="bold", caption=caption)
    table.add_column("in front", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _failures(failures: Counter[str]) -> str:
    return ", ".join(f"{count} {TIMES} {what}" for what, count in failures.most_common()) or NONE


def _seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.0f} ms"
