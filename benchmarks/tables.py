"""Rounds of one scenario summed up for a reader: tables, and the same figures for JSON.

What must never happen is shown from the worst round, times as medians over the timed rounds. A
round in which the clients hashed everything proves the bytes; its times count only when there is no
other.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.parts import MIB, TIMES
from benchmarks.rounds import Round
from benchmarks.scenario import Sheet

NONE = "-"
_PEAK = "peak: most sockets to the upstream, as accepted by it (as sampled) where it counts them"


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
    def configuration(self) -> str:
        return self.rounds[-1].configuration

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


def herd_table(title: str, rows: Sequence[Row]) -> Sheet:
    """The table of the one blob that everybody wants."""
    columns = (
        "in front",
        "clients served",
        "refused",
        "upstream / blob bytes",
        "first byte, median",
        "last client done",
        "peak connections",
        "RSS after",
    )
    found = [
        (
            row.title,
            f"{row.worst.served} of {row.expected}",
            failures_text(row.worst.failures) or NONE,
            f"{row.upstream_ratio:.2f}",
            row.time(lambda r: r.first_byte),
            row.time(lambda r: r.wall),
            row.peak,
            row.resident,
        )
        for row in rows
    ]
    return Sheet(title, columns, tuple(found), _PEAK)


def crowd_table(title: str, rows: Sequence[Row]) -> Sheet:
    """The table of many images at once."""
    columns = (
        "in front",
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
    found = [
        (
            row.title,
            f"{len(row.worst.answers)} of {row.expected}",
            failures_text(row.worst.failures) or "0",
            str(row.refusals),
            row.peak,
            f"{row.upstream_ratio:.2f}",
            row.time(lambda r: r.wall),
            row.time(lambda r: r.latency(50)),
            row.time(lambda r: r.latency(99)),
            row.resident,
        )
        for row in rows
    ]
    return Sheet(title, columns, tuple(found), _PEAK)


def ratio_to_rival(rows: Sequence[Row], subject: str, rival: str) -> float | None:
    """Median over the rounds of one's wall / the rival's; None unless both served everybody."""
    ours, theirs = (row_of(rows, name) for name in (subject, rival))
    if ours is None or theirs is None or not (ours.is_whole and theirs.is_whole):
        return None
    pairs = zip(ours.timed, theirs.timed, strict=True)
    return statistics.median(mine.wall / other.wall for mine, other in pairs)


def row_of(rows: Sequence[Row], subject: str) -> Row | None:
    """A subject's row; None when it did not run."""
    return next((row for row in rows if row.rounds[0].subject == subject), None)


def failures_text(failures: Counter[str]) -> str:
    """How many of each, the most frequent first; empty when there are none."""
    return ", ".join(f"{count} {TIMES} {what}" for what, count in failures.most_common())


def _seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.0f} ms"
