"""Tasks over HTTP: ``/api/v1/tasks`` and ``/api/v1/events`` of the admin listener (DESIGN D19, §6).

    POST   /api/v1/tasks             {"kind": "prefetch", "images": ["team/app:v1"],
                                     "platforms": ["linux/amd64"], "nodes": "all"}: 202, the task,
                                     its Location
    GET    /api/v1/tasks             the newest tasks; ?state=RUNNING&limit=50
    GET    /api/v1/tasks/ID          one, with what became of each image
    GET    /api/v1/tasks/ID/wait     the same when it is over, or after ?timeout=30 seconds
    DELETE /api/v1/tasks/ID          cancels it, unless it is over; answers how it ended
    GET    /api/v1/events            what becomes of all tasks, or of ?task=ID, as it happens

Events are those of the HTML standard (Server-Sent Events): ``event: task`` with the whole task as
one line of JSON. ``Last-Event-ID`` is heeded (``pull/task_news.py``). A comment after every
``KEEP_ALIVE`` seconds of silence keeps what is between from taking it for death. A listener that is
let go hears ``event: end`` with the reason, and the body ends as bodies do; one that takes no byte
for ``STUCK`` seconds cannot hear that: its connection ends in the middle of the body.

Names of images are nobody's business who cannot give orders, so all of it is answered only to those
who might (``orders.py``). In a worker that does not lead, the board is the leader's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from proxy.oci.errors import PullError, RequestInvalid
from proxy.pull.task import Document, Order, TaskState
from proxy.pull.task_news import News, Watch
from proxy.pull.tasks import MAX_LISTED, Board, new_id
from proxy.web.orders import Refused, check, order

#: Seconds of silence after which a comment is sent.
KEEP_ALIVE = 15.0
#: Seconds that a listener may take no byte.
STUCK = 30.0
#: Seconds that one question may wait, by default and at most.
WAIT, MAX_WAIT = 30.0, 300.0
#: What a browser is to wait, in milliseconds, before it comes back.
RETRY = 2000

_EVENT_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would gather events for their own good
}


class TaskPages:
    """The handlers. ``host`` is what the admin listener was told to be called."""

    def __init__(
        self,
        board: Board,
        *,
        host: str,
        keep_alive: float = KEEP_ALIVE,
        stuck: float = STUCK,
    ) -> None:
        self._board = board
        self._host = host
        self._keep_alive = keep_alive
        self._stuck = stuck

    def routes(self) -> list[web.RouteDef]:
        """What the admin listener serves of it."""
        one = "/api/v1/tasks/{id:[0-9a-f]{1,64}}"
        return [
            web.post("/api/v1/tasks", self._told(self._add)),
            web.get("/api/v1/tasks", self._told(self._list)),
            web.get(one, self._told(self._get)),
            web.get(f"{one}/wait", self._told(self._wait)),
            web.delete(one, self._told(self._cancel)),
            web.get("/api/v1/events", self._told(self._events)),
        ]

    def _told(
        self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """``handler``, for those who may ask; its errors are JSON."""

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                check(request, self._host)
                return await handler(request)
            except Refused as error:
                return error.answer()
            except PullError as error:
                body = {"error": error.message}
                return web.json_response(body, status=error.status, headers=error.headers)

        return handle

    async def _add(self, request: web.Request) -> web.Response:
        wanted = Order.parse(await order(request, self._host))
        task = await self._board.add(new_id(), wanted)
        place = {"Location": f"/api/v1/tasks/{task['id']}"}
        return web.json_response(task, status=202, headers=place)

    async def _list(self, request: web.Request) -> web.Response:
        state, most = _state(request.query), int(_number(request.query, "limit", 50, MAX_LISTED))
        return web.json_response(await self._board.newest(state, most))

    async def _get(self, request: web.Request) -> web.Response:
        return web.json_response(await self._board.get(request.match_info["id"]))

    async def _wait(self, request: web.Request) -> web.Response:
        seconds = _number(request.query, "timeout", WAIT, MAX_WAIT)
        return web.json_response(await self._board.wait(request.match_info["id"], seconds))

    async def _cancel(self, request: web.Request) -> web.Response:
        return web.json_response(await self._board.cancel(request.match_info["id"]))

    # -- events ----------------------------------------------------------------------------

    async def _events(self, request: web.Request) -> web.StreamResponse:
        last, only = request.headers.get("Last-Event-ID"), request.query.get("task")
        watch = await self._board.watch(last, only)
        with contextlib.closing(watch):
            response = web.StreamResponse(headers=_EVENT_HEADERS)
            await response.prepare(request)
            try:
                await self._send(response, f"retry: {RETRY}\n\n".encode())
                await self._pass_on(response, watch)
            except _Stuck:
                if request.transport is not None:
                    request.transport.abort()
        return response

    async def _pass_on(self, response: web.StreamResponse, watch: Watch) -> None:
        """Send what there is to say, to the last word."""
        while True:
            try:
                async with asyncio.timeout(self._keep_alive):
                    news = await watch.next()
            except TimeoutError:
                await self._send(response, b": nothing new\n\n")
                continue
            except PullError as error:  # nobody leads any more
                news = News("", "end", {"reason": error.message})
            if news is None:
                return
            await self._send(response, framed(news))
            if news.kind == "end":
                return

    async def _send(self, response: web.StreamResponse, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._stuck):
                await response.write(data)
        except TimeoutError:
            raise _Stuck from None


class _Stuck(Exception):
    """The listener takes nothing."""


def framed(news: News) -> bytes:
    """One event, as the HTML standard frames it; JSON has no line break in it."""
    lines = [f"id: {news.id}"] if news.id else []
    lines += [f"event: {news.kind}", f"data: {_compact(news.document)}", "", ""]
    return "\n".join(lines).encode()


def _compact(document: Document) -> str:
    return json.dumps(document, separators=(",", ":"))


def _state(query: Mapping[str, str]) -> TaskState | None:
    text = query.get("state")
    if text is None:
        return None
    try:
        return TaskState(text.upper())
    except ValueError:
        names = ", ".join(TaskState)
        raise RequestInvalid(f"the state of a task is one of {names}") from None


def _number(query: Mapping[str, str], key: str, usual: float, most: float) -> float:
    text = query.get(key)
    if text is None:
        return usual
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise RequestInvalid(f"{key} is a number from 0 to {most:g}")
    return min(number, most)
