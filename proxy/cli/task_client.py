"""What the commands about tasks ask of a running server: questions, and its events.

By the standard library alone, as for every command that asks a server (``health.py``). Events are
read as the HTML standard frames them. A server that is restarted while a task is waited for is
asked again for a while: the task goes on there.
"""

import http.client
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from proxy.cli.health import reachable
from proxy.settings.values import HostPort

Document = dict[str, Any]

OVER = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})
#: Seconds without a byte after which a stream of events counts as dead; a live one says something
#: every fifteen.
SILENCE = 60.0
#: Seconds between two tries to reach a server again.
PAUSE = 1.0
#: Bytes of an answer, and of a line of events, that are read at most.
_MAX_ANSWER, _MAX_LINE = 32 << 20, 4 << 20


class Refused(Exception):
    """The server answers, and says no; its words."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream; ``id`` is the last one that was given."""

    kind: str
    data: str
    id: str = ""


def events(lines: Iterable[bytes]) -> Iterator[Event]:
    """The events in the lines of a stream. One that is cut off is none."""
    kind, data, last = "", list[str](), ""
    for raw in lines:
        line = raw.decode(errors="replace").rstrip("\r\n")
        if not line:
            if data:
                yield Event(kind or "message", "\n".join(data), last)
            kind, data = "", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            kind = value
        elif name == "data":
            data.append(value)
        elif name == "id":
            last = value


class TaskServer:
    """A server's tasks. Raises ``OSError``, ``HTTPException``, ``Refused`` and ``ValueError``."""

    def __init__(self, address: HostPort, timeout: float) -> None:
        self._address = address
        self._timeout = timeout

    def add(
        self, images: Iterable[str], platforms: Iterable[str], nodes: str | None = None
    ) -> Document:
        """Order these images, on these nodes of a fleet."""
        order: Document = {
            "kind": "prefetch",
            "images": list(images),
            "platforms": list(platforms),
        }
        if nodes is not None:
            order["nodes"] = nodes
        return self._ask("POST", "", order)

    def newest(self, count: int) -> Document:
        return self._ask("GET", f"?limit={count}")

    def cancel(self, task: str) -> Document:
        return self._ask("DELETE", f"/{task}")

    def follow(
        self,
        task: str,
        *,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> Iterator[Document]:
        """The task as it is, again and again until it is over. A server that does not answer is
        tried again until ``timeout`` seconds after it last did."""
        last, heard = "", clock()
        while True:
            try:
                for event in self._events(task, last):
                    last, heard = event.id or last, clock()
                    if event.kind == "task":
                        document = _document(event.data)
                        yield document
                        if document["state"] in OVER:
                            return
            except (OSError, http.client.HTTPException):
                if clock() - heard >= self._timeout:
                    raise
            sleep(PAUSE)

    def _events(self, task: str, last: str) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream"}
        if last:
            headers["Last-Event-ID"] = last
        connection = self._connection(max(SILENCE, self._timeout))
        try:
            connection.request("GET", f"/api/v1/events?task={task}", headers=headers)
            response = connection.getresponse()
            if response.status >= http.client.INTERNAL_SERVER_ERROR:
                raise http.client.HTTPException(f"the server answered {response.status}")
            if response.status != http.client.OK:
                raise _refused(response)
            yield from events(iter(lambda: response.readline(_MAX_LINE), b""))
        finally:
            connection.close()

    def _ask(self, method: str, path: str, body: object = None) -> Document:
        headers = {} if body is None else {"Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        connection = self._connection(self._timeout)
        try:
            connection.request(method, f"/api/v1/tasks{path}", data, headers)
            response = connection.getresponse()
            if response.status not in (http.client.OK, http.client.ACCEPTED):
                raise _refused(response)
            return _document(response.read(_MAX_ANSWER))
        finally:
            connection.close()

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        host = reachable(self._address.host)
        return http.client.HTTPConnection(host, self._address.port, timeout=timeout)


def _refused(response: http.client.HTTPResponse) -> Refused:
    text = response.read(_MAX_ANSWER)
    try:
        words = str(_document(text)["error"])
    except (ValueError, KeyError):
        words = "that is no answer of pullpool's admin listener"
    return Refused(f"the server answered {response.status}: {words}")


def _document(text: str | bytes) -> Document:
    document = json.loads(text)
    if not isinstance(document, dict):
        raise ValueError("the server's answer is no JSON object")
    return document
