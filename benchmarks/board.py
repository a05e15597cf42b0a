"""Subjects side by side: the same play for each in turn, then medians and ratios.

A play gives numbers by name. A ratio is the median of the rounds' own ratios, so that a slow minute
of the machine, which falls on neighbours alike, falls out of it.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.charts import Bar, Chart
from benchmarks.parts import KIB, MIB, TIMES, PartFailed, prime_pages
from benchmarks.scenario import Options, Promise, Sheet
from benchmarks.subjects import Subject, chosen

NONE = "-"
RIVAL = "nginx"
GIGABYTE = 1e9
ROUNDS = 3

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Measure:
    """A number of a play: its name, the column's title, the unit's factor and name, and digits.

    `ratio`: whether a column beside it compares with the rival. `worst`: whether the table shows
    the most of all rounds instead of the median, as for what must not happen.
    """

    key: str
    title: str
    unit: str
    factor: float = 1.0
    digits: int = 2
    ratio: bool = True
    worst: bool = False

    def text(self, value: float | None) -> str:
        if value is None:
            return NONE
        return f"{value / self.factor:,.{self.digits}f} {self.unit}".strip()


def seconds(key: str, title: str, *, ratio: bool = True) -> Measure:
    return Measure(key, title, "s", ratio=ratio)


def micros(key: str, title: str, *, ratio: bool = True) -> Measure:
    return Measure(key, title, "\N{MICRO SIGN}s", 1e-6, 1, ratio)


def milliseconds(key: str, title: str, *, ratio: bool = False) -> Measure:
    return Measure(key, title, "ms", 1e-3, 0, ratio)


def per_second(key: str, title: str, *, ratio: bool = True) -> Measure:
    return Measure(key, title, "/s", 1.0, 0, ratio)


def megabytes(key: str, title: str, *, ratio: bool = True) -> Measure:
    """Bytes a second, shown in the megabytes (10^6) that networks count."""
    return Measure(key, title, "MB/s", 1e6, 0, ratio)


def cpu_per_gigabyte(key: str, title: str, *, ratio: bool = True) -> Measure:
    return Measure(key, title, "s/GB", 1.0, 3, ratio)


def kibibytes(key: str, title: str, *, ratio: bool = False) -> Measure:
    return Measure(key, title, "KiB", KIB, 1, ratio)


def mebibytes(key: str, title: str, *, ratio: bool = False) -> Measure:
    return Measure(key, title, "MiB", MIB, 0, ratio)


def count(key: str, title: str) -> Measure:
    """Of what must not happen."""
    return Measure(key, title, "", 1.0, 0, ratio=False, worst=True)


@dataclass(frozen=True, slots=True)
class Played:
    """One play of a subject: its numbers, and how it was set up."""

    values: Values
    configuration: str = ""


@dataclass(frozen=True, slots=True)
class Board:
    """All plays, by the subject's name in the order of the rows; `titles` name those that are not
    installed as well."""

    titles: Mapping[str, str]
    plays: Mapping[str, Sequence[Played]] = field(default_factory=dict)

    def all(self, subject: str, key: str) -> list[float]:
        """What each round that has it measured."""
        return [
            played.values[key] for played in self.plays.get(subject, ()) if key in played.values
        ]

    def median(self, subject: str, key: str) -> float | None:
        found = self.all(subject, key)
        return statistics.median(found) if found else None

    def ratio(self, subject: str, key: str, rival: str = RIVAL) -> float | None:
        """How many times the rival's."""
        pairs = zip(self.plays.get(subject, ()), self.plays.get(rival, ()), strict=False)
        found = [
            ours.values[key] / theirs.values[key]
            for ours, theirs in pairs
            if key in ours.values and theirs.values.get(key)
        ]
        return statistics.median(found) if found else None

    def sheet(
        self, title: str, measures: Sequence[Measure], caption: str = "", rival: str = RIVAL
    ) -> Sheet:
        """One row for each subject; those that did not run say why."""
        columns = ["in front"]
        for measure in measures:
            columns += [measure.title, f"{TIMES} {rival}"] if measure.ratio else [measure.title]
        rows = [(name, self._cells(key, measures, rival)) for key, name in self.titles.items()]
        return Sheet(
            title, tuple(columns), tuple((name, *cells) for name, cells in rows), caption=caption
        )

    def _cells(self, subject: str, measures: Sequence[Measure], rival: str) -> Iterator[str]:
        for number, measure in enumerate(measures):
            found = self.all(subject, measure.key)
            worst = max(found) if found else None
            value = worst if measure.worst else self.median(subject, measure.key)
            yield measure.text(value) if number else self._first_cell(subject, measure, value)
            if measure.ratio:
                yield times(self.ratio(subject, measure.key, rival))

    def _first_cell(self, subject: str, measure: Measure, value: float | None) -> str:
        """The number, or why there is none."""
        if subject not in self.plays:
            return "not installed"
        return measure.text(value) if any(p.values for p in self.plays[subject]) else "failed"

    def promise(
        self,
        what: str,
        key: str,
        sign: str,
        limit: float,
        rival: str = RIVAL,
        subject: str = "pullpool",
    ) -> Iterator[Promise]:
        """The subject's ratio to a rival has to be `sign` ("≤", "≥") `limit`; nothing when one of
        them did not run."""
        ratio = self.ratio(subject, key, rival)
        if ratio is not None:
            kept = ratio <= limit if sign == "≤" else ratio >= limit
            yield Promise(
                f"{what}, beside {rival}", f"{sign} {limit:g} {TIMES}", times(ratio), kept
            )

    def bound(self, measure: Measure, what: str, most: float) -> Iterator[Promise]:
        """pullpool's number has to be at most so much, in the worst round."""
        found = self.all("pullpool", measure.key)
        if found:
            worst = max(found)
            wanted = f"≤ {measure.text(most)}" if most else measure.text(most)
            yield Promise(what, wanted, measure.text(worst), worst <= most)

    def chart(self, name: str, title: str, measure: Measure, *, better: str) -> Chart:
        """The medians as bars, with the least and the most of all rounds."""
        bars = [
            Bar(
                self.titles[subject],
                value / measure.factor,
                measure.text(value),
                min(self.all(subject, measure.key)) / measure.factor,
                max(self.all(subject, measure.key)) / measure.factor,
                subject == "pullpool",
            )
            for subject in self.titles
            if (value := self.median(subject, measure.key)) is not None
        ]
        return Chart(name, title, measure.unit, better, tuple(bars))

    def configurations(self) -> dict[str, str]:
        """How each subject was set up in its last play."""
        return {
            self.titles[subject]: plays[-1].configuration
            for subject, plays in self.plays.items()
            if plays and plays[-1].configuration
        }

    def figures(self) -> dict[str, object]:
        """Every round's numbers in plain JSON types."""
        return {
            subject: [dict(played.values) for played in plays]
            for subject, plays in self.plays.items()
        }


def times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f} {TIMES}"


def play_in_turn(
    what: str,
    subjects: Sequence[Subject],
    options: Options,
    play: Callable[[Subject, Path], Played],
    *,
    rounds: int = ROUNDS,
) -> Board:
    """Plays `rounds` times, the subjects in turn, each in an empty directory of its own.

    A rival that fails loses its round and is told of; when pullpool does, PartFailed is raised.
    """
    present = chosen(subjects, options)
    number = 1 if options.fast else options.rounds or rounds
    asked = [each for each in subjects if not options.only or each.name in options.only]
    plays: dict[str, list[Played]] = {subject.name: [] for subject in asked if subject in present}
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        for turn in range(number):
            shift = turn % len(present)
            for subject in (*present[shift:], *present[:shift]):
                options.log(f"{what} {turn + 1}/{number}: {subject.title}")
                plays[subject.name].append(_play(subject, options, play, Path(name)))
    return Board({subject.name: subject.title for subject in asked}, plays)


def _play(
    subject: Subject, options: Options, play: Callable[[Subject, Path], Played], directory: Path
) -> Played:
    if not options.fast:
        prime_pages(directory)
    with tempfile.TemporaryDirectory(
        prefix=f"{subject.name}-", dir=directory, ignore_cleanup_errors=True
    ) as own:
        try:
            return play(subject, Path(own))
        except PartFailed as error:
            if subject.name == "pullpool":
                raise
            options.log(f"{subject.title} failed: {error}")
            return Played({})
