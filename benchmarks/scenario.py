"""What a scenario is: a module of this package with one function, `measure`.

    def measure(options: Options) -> Findings

It starts every part itself on free ports, below a temporary directory, and leaves nothing behind.
`python -m benchmarks` finds it by its name in `benchmarks.__main__.SCENARIOS`, prints what it found
and puts it into the page of results. Findings are words and numbers, so that a page can be made
of them again without measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich.table import Table

from benchmarks.charts import Chart


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure: `rounds` of each subject (None: as many as the scenario means to), `fast` for
    small ones that show that all is right and not how quick it is, `only` some subjects (empty:
    all). `log` tells whoever waits how far it is."""

    rounds: int | None = None
    fast: bool = False
    only: frozenset[str] = frozenset()
    log: Callable[[str], None] = print


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def for_terminal(self) -> Table:
        table = Table(
            title=self.title, title_justify="left", title_style="bold", caption=self.caption or None
        )
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=not number)
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True, slots=True)
class Promise:
    """A figure that pullpool has to reach, and what was measured; `kept` says whether it does."""

    what: str
    wanted: str
    measured: str
    kept: bool


@dataclass(frozen=True, slots=True)
class Findings:
    """What a scenario found.

    `about`: what is measured and how, in Markdown. `configurations`: how each part was set up, as
    it was started, by the part's name. `figures`: everything in plain JSON types. `charts`: what
    the page shows as pictures.
    """

    about: str
    sheets: tuple[Sheet, ...]
    promises: tuple[Promise, ...]
    configurations: Mapping[str, str] = field(default_factory=dict)
    figures: object = None
    charts: tuple[Chart, ...] = ()
