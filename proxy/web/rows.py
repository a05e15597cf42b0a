"""The log lines of hot answers: the same lines as everybody's, many at a time.

A line is what the log would have written (``Lines``) with the few values filled in that differ from
one request to the next. The log is asked once for an answer's *shape*, and once for each client and
agent; a *row* is a shape with these two, and a line a row with its id and its times. A row is for
those who get the same answer again: to make one costs more than a line does. Lines are written at
the end of the loop's turn, with all others of that turn: one write instead of one each. So nobody
waits for a line longer than for the next turn, and what is noted is lost only when the process is
ended without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from logging import INFO

from proxy.observe.logs import Lines, Logger

#: Lines that are held at most, and texts of clients and agents that are remembered.
MAX_LINES, MAX_TEXTS = 256, 4096
#: The pieces of an answer's line around what its clients differ in, and what belongs in between.
Shape = tuple[tuple[str, ...], tuple[str, ...]]
#: What mostly belongs there, in this order.
_USUAL = ("request_id", "client", "ms", "agent", "first_byte_ms", "timestamp")
#: Seconds below which a duration is written as 0.0 ms, as that of most is.
_NOTHING = 0.00005


class Row:
    """The pieces of a line around the request's id, its two durations and when it was: in this
    order, or backwards where that is not ``usual``. ``brief`` are those of one that took no time:
    around the id and when it was."""

    __slots__ = ("_pieces", "brief", "is_usual")

    def __init__(self, pieces: tuple[str, ...], order: tuple[str, ...]) -> None:
        ends = order[0], order[-1]
        self.is_usual = ends == ("request_id", "timestamp")
        if not self.is_usual and ends != ("timestamp", "request_id"):
            raise ValueError(f"a log line with its values in another order: {order}")
        self._pieces = pieces
        self.brief = pieces[0], "0.0".join(pieces[1:4]), pieces[4]

    def line(self, request_id: str, seconds: float, time: str) -> str:
        """The line of a request that took so many ``seconds``, to its first byte and its last."""
        first, last = (request_id, time) if self.is_usual else (time, request_id)
        if seconds < _NOTHING:
            start, middle, end = self.brief
            return f"{start}{first}{middle}{last}{end}"
        took, pieces = str(round(seconds * 1000, 1)), self._pieces
        return f"{pieces[0]}{first}{took.join(pieces[1:4])}{last}{pieces[4]}"


class Rows:
    """Makes rows, notes requests, and writes lines."""

    def __init__(self, log: Logger, lines: Lines) -> None:
        self._lines = lines
        self.is_on = log.is_enabled_for(INFO)
        self._made: list[str] = []
        self._clients: dict[str, str] = {}  # as they stand in a line
        self._agents: dict[str, str] = {}
        self._users: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<Rows {len(self._made)} to be written>"

    def shape(self, fields: Mapping[str, object], *, named: bool) -> Shape:
        """The line of an answer with these ``fields``, for clients with a name or without."""
        known: dict[str, object] = {}
        for name, value in fields.items():
            known[name] = value
            if named and name == "agent":
                known["user"] = ""
        values = ("client", "ms", "agent", "first_byte_ms", *(("user",) if named else ()))
        pieces, order = self._lines.around("request", known, texts=("request_id",), values=values)
        return pieces, _USUAL if order == _USUAL else order

    def row(self, shape: Shape, client: str, agent: str, user: str | None) -> Row:
        """The line of an answer to this client."""
        given = {"client": self._client(client), "agent": self._agent(agent)}
        if user is not None:
            given["user"] = self._known(self._users, "user", user)
        pieces, order = [shape[0][0]], []
        for name, piece in zip(shape[1], shape[0][1:], strict=True):
            if name in given:
                pieces[-1] += given[name] + piece
            else:
                pieces.append(piece)
                order.append(name)
        return Row(tuple(pieces), tuple(order))

    def _client(self, client: str) -> str:
        return self._clients.get(client) or self._known(self._clients, "client", client)

    def _agent(self, agent: str) -> str:
        return self._agents.get(agent) or self._known(self._agents, "agent", agent)

    def _known(self, texts: dict[str, str], name: str, value: str) -> str:
        text = texts.get(value)
        if text is None:
            if len(texts) >= MAX_TEXTS:
                texts.clear()
            text = texts[value] = self._lines.value(name, value)
        return text

    def note(self, row: Row, request_id: str, seconds: float, time: str) -> None:
        """Have a line about a request written at the next ``flush``, or before."""
        made = self._made
        if seconds < _NOTHING and row.is_usual:  # as ``Row.line``, for half of what a call takes
            start, middle, end = row.brief
            made.append(f"{start}{request_id}{middle}{time}{end}")
        else:
            made.append(row.line(request_id, seconds, time))
        if len(made) >= MAX_LINES:
            self.flush()

    def note_once(
        self,
        shape: Shape,
        client: str,
        agent: str,
        user: str | None,
        request_id: str,
        seconds: float,
        time: str,
    ) -> None:
        """As ``note``, of a request whose answer mostly is not the next one, too."""
        pieces, order = shape
        if order is not _USUAL or seconds >= _NOTHING:
            self.note(self.row(shape, client, agent, user), request_id, seconds, time)
            return
        start, b, c, d, e, f, end = pieces
        client, agent = self._client(client), self._agent(agent)
        self._made.append(f"{start}{request_id}{b}{client}{c}0.0{d}{agent}{e}0.0{f}{time}{end}")
        if len(self._made) >= MAX_LINES:
            self.flush()

    def flush(self) -> None:
        """Write what was noted."""
        if self._made:
            made, self._made = self._made, []
            self._lines.write(made)
