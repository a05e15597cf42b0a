"""What a person sees while the crowds are at work.

On a terminal two progress bars and one line about connections, drawn again a few times a second by
whoever watches the servers (no thread of its own: the clients' loop has the processor to itself).
Elsewhere only what stays: a line when a crowd begins, and one when it is done.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from proxy.cli.demo.crowd import Tally


@dataclass(frozen=True, slots=True)
class Sight:
    """The servers at one moment: sockets open at the registry; pullpool's slots and its queue."""

    sockets: int
    active: int | None = None
    queued: int | None = None


class OutputClosed(Exception):
    """Nobody reads what is printed any more."""


class PipeConsole(Console):
    """A console that raises OutputClosed when its reader is gone.

    rich ends the process there, which inside a task would skip the unwinding of all others.
    """

    def on_broken_pipe(self) -> None:
        """Send the rest nowhere, as the interpreter still flushes stdout at its end."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise OutputClosed


class Screen:
    """Shows the crowds named by `titles`, one after another; `limit` is the registry's."""

    def __init__(self, console: Console, titles: tuple[str, ...], limit: int) -> None:
        self.console = console
        self.is_live = console.is_terminal and not console.is_dumb_terminal
        self._limit = limit
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("[green]{task.fields[served]:>4} served"),
            TextColumn("[red]{task.fields[refused]:>4} refused"),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._bars = {
            title: self._progress.add_task(title, total=1, start=False, served=0, refused=0)
            for title in titles
        }
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> Self:
        if self.is_live:
            self._live.start()
            self._draw(Text("the registry and pullpool start", "dim"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.is_live:
            self._draw(Text())
            self._live.stop()

    def begin(self, title: str, total: int) -> None:
        """A crowd goes; `total` are the bytes that it wants."""
        if not self.is_live:
            self.console.print(f"{title}: begins")
        self._progress.update(self._bars[title], total=total)
        self._progress.start_task(self._bars[title])

    def show(self, title: str, tally: Tally, sight: Sight) -> None:
        """How far the crowd is."""
        self._update(self._bars[title], tally)
        self._draw(self._line(sight))

    def end(self, title: str, tally: Tally) -> None:
        """The crowd is done."""
        bar = self._bars[title]
        self._update(bar, tally)
        self._progress.stop_task(bar)
        self._draw(Text())
        if not self.is_live:
            self.console.print(
                f"{title}: {tally.served} of {tally.pulls} served, "
                f"{tally.refused.total()} answers refused"
            )

    def _update(self, bar: TaskID, tally: Tally) -> None:
        self._progress.update(
            bar, completed=tally.bytes, served=tally.served, refused=tally.refused.total()
        )

    def _draw(self, below: Text) -> None:
        if self.is_live:
            self._live.update(Group(self._progress, below), refresh=True)

    def _line(self, sight: Sight) -> Text:
        style = "green" if sight.sockets <= self._limit else "red"
        line = Text.assemble(
            "connections at the registry ", (f"{sight.sockets:>3}", style), f" of {self._limit}"
        )
        if sight.active is not None:
            line.append(f"   pullpool uses {sight.active}, {sight.queued} turns wait")
        return line
