"""The log lines of hot answers: the same lines as everybody's, many at a time.

A line is what the log would have written (``Lines``) with the few values filled in that differ from
one request to the next. The log is asked once for an answer's *shape*, and once for each client and
agent; a *row* is a shape with these two, and a line a row with its id and its times. What is noted
becomes lines at the end of the loop's turn, with all others of that turn: one write instead of one
each. So nobody waits for a line longer than for the next turn, and what is noted is lost only when
the process is ended without one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from logging import INFO

from proxy.observe.logs import Lines, Logger

#: Notes that are held at most, and texts of clients and agents that are remembered.
MAX_NOTES, MAX_TEXTS = 256, 4096
#: The pieces of an answer's line around what its clients differ in, and what belongs in between.
Shape = tuple[tuple[str, ...], tuple[str, ...]]
#: Seconds below which a duration is written as 0.0 ms.
_NOTHING = 0.00005


class Row:
    """The pieces of a line around the request's id, its two times and when it was: in this order,
    or backwards where that is not ``usual``."""

    __slots__ = ("is_usual", "template")

    def __init__(self, pieces: tuple[str, ...], order: tuple[str, ...]) -> None:
        ends = order[0], order[-1]
        self.is_usual = ends == ("request_id", "timestamp")
        if not self.is_usual and ends != ("timestamp", "request_id"):
            raise ValueError(f"a log line with its values in another order: {order}")
        self.template = "%s".join(piece.replace("%", "%%") for piece in pieces)

    def line(self, request_id: str, took: str, time: str) -> str:
        """The line; ``took`` stands for both times."""
        if self.is_usual:
            return self.template % (request_id, took, took, time)
        return self.template % (time, took, took, request_id)


class Rows:
    """Makes rows, notes requests, and writes lines."""

    def __init__(self, log: Logger, lines: Lines) -> None:
        self._lines = lines
        self.is_on = log.is_enabled_for(INFO)
        self._loop = asyncio.get_running_loop()
        self._notes: list[tuple[Row, str, float, float]] = []
        self._texts: dict[tuple[str, str], str] = {}
        self._second = -1
        self._stamp = ""

    def __repr__(self) -> str:
        return f"<Rows {len(self._notes)} to be written>"

    def shape(self, fields: Mapping[str, object], *, named: bool) -> Shape:
        """The line of an answer with these ``fields``, for clients with a name or without."""
        known: dict[str, object] = {}
        for name, value in fields.items():
            known[name] = value
            if named and name == "agent":
                known["user"] = ""
        values = ("client", "ms", "agent", "first_byte_ms", *(("user",) if named else ()))
        return self._lines.around("request", known, texts=("request_id",), values=values)

    def row(self, shape: Shape, client: str, agent: str, user: str | None) -> Row:
        """The line of an answer to this client."""
        given = {"client": self._text("client", client), "agent": self._text("agent", agent)}
        if user is not None:
            given["user"] = self._text("user", user)
        pieces, order = [shape[0][0]], []
        for name, piece in zip(shape[1], shape[0][1:], strict=True):
            if name in given:
                pieces[-1] += given[name] + piece
            else:
                pieces.append(piece)
                order.append(name)
        return Row(tuple(pieces), tuple(order))

    def _text(self, name: str, value: str) -> str:
        text = self._texts.get((name, value))
        if text is None:
            if len(self._texts) >= MAX_TEXTS:
                self._texts.clear()
            text = self._texts[name, value] = self._lines.value(name, value)
        return text

    def note(self, row: Row, request_id: str, wall: float, seconds: float) -> None:
        """Write a line soon about a request that came at ``wall`` and took ``seconds``."""
        notes = self._notes
        if not notes:
            self._loop.call_soon(self.flush)
        notes.append((row, request_id, wall, seconds))
        if len(notes) >= MAX_NOTES:
            self.flush()

    def flush(self) -> None:
        """Write what was noted."""
        if self._notes:
            notes, self._notes = self._notes, []
            self._lines.write([self._line(*note) for note in notes])

    def _line(self, row: Row, request_id: str, wall: float, seconds: float) -> str:
        took = "0.0" if seconds < _NOTHING else str(round(seconds * 1000, 1))
        micros = int((wall - self._second) * 1_000_000)
        if not 0 <= micros < 1_000_000:
            self._second = int(wall)
            self._stamp = (
                datetime.fromtimestamp(self._second, UTC).isoformat().removesuffix("+00:00")
            )
            micros = int((wall - self._second) * 1_000_000)
        # As isoformat has it: without a fraction when that is zero.
        time = f"{self._stamp}.{micros:06d}Z" if micros else f"{self._stamp}Z"
        return row.line(request_id, took, time)
