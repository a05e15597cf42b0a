"""The admin listener: health, metrics, status, refresh, tasks (DESIGN §6); loopback by default.

``/livez`` says that the process and its loop work, and never depends on an upstream: a restart
would not mend one. ``/readyz`` says that requests are welcome: it turns to 503 while draining.
``/startupz`` says that the start is over, and stays so.

Whatever is wrong with a request, or with us, its answer is JSON with an ``error`` and the log has
one line at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.oci.errors import PullError
from proxy.web.siblings import Siblings

#: Seconds the loop may lag before the process counts as dead.
MAX_LAG = 30.0
#: Characters of the parser's words about a malformed request that are said back.
MAX_WORDS = 200


class Admin:
    """The routes of the admin listener."""

    def __init__(
        self,
        *,
        metrics: Metrics,
        is_started: Callable[[], bool],
        is_draining: Callable[[], bool],
        loop_lag: Callable[[], float],
        status: Callable[[], Awaitable[Mapping[str, Any]]],
        log: Logger,
        refresh: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None,
        siblings: Siblings | None = None,
        pages: Iterable[web.RouteDef] = (),
    ) -> None:
        """``pages`` are what else is served; ``siblings`` are the other workers, for which this
        process speaks too."""
        self._metrics = metrics
        self._is_started = is_started
        self._is_draining = is_draining
        self._loop_lag = loop_lag
        self._status = status
        self._log = log
        self._refresh = refresh
        self._siblings = siblings
        self._pages = tuple(pages)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._answer_defects])
        app.add_routes(
            [
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
                web.get("/startupz", self._startupz),
                web.get("/metrics", self._render_metrics),
                web.get("/api/v1/status", self._render_status),
                *self._pages,
            ]
        )
        if self._refresh is not None:
            app.router.add_post("/api/v1/refresh", self._refresh)
        return app

    def malformed(self, request: web.BaseRequest, words: str) -> web.Response:
        """Answer what could not be parsed as HTTP."""
        said = " ".join(words.split())[:MAX_WORDS]
        self._log.info("admin_malformed", client=request.remote, error=said)
        return _refusal(400, f"the request is not valid HTTP: {said}")

    @web.middleware
    async def _answer_defects(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """A defect of ours is a 500 for who asks; the log gets the trace."""
        try:
            return await handler(request)
        except (web.HTTPException, ConnectionError):
            raise
        except Exception as error:
            self._log.error("admin_failed", path=request.path, exc_info=error)
            return _refusal(500, "internal error")

    async def _livez(self, _request: web.Request) -> web.Response:
        lag = self._loop_lag()
        if lag > MAX_LAG:
            return web.Response(status=503, text=f"the event loop lags {lag:.1f} s\n")
        return web.Response(text="ok\n")

    async def _startupz(self, _request: web.Request) -> web.Response:
        if not self._is_started():
            return web.Response(status=503, text="starting\n")
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        if self._is_draining():
            return web.Response(status=503, text="draining\n")
        if self._siblings is not None and not await self._siblings.are_ready():
            return web.Response(status=503, text="not all workers serve\n")
        return await self._startupz(request)

    async def _render_metrics(self, _request: web.Request) -> web.Response:
        headers = {"Content-Type": self._metrics.content_type}
        if self._siblings is not None:
            return web.Response(body=await self._siblings.metrics(), headers=headers)
        return web.Response(body=await all_metrics(self._metrics), headers=headers)

    async def _render_status(self, _request: web.Request) -> web.Response:
        try:
            return web.json_response(await self._status())
        except PullError as error:
            return _refusal(error.status, error.message)


def _refusal(status: int, words: str) -> web.Response:
    response = web.json_response({"error": words}, status=status)
    response.force_close()
    return response


async def all_metrics(metrics: Metrics) -> bytes:
    """The exposition of this process."""
    # The process's figures come from files below /proc, ours from objects of this loop.
    process = await asyncio.to_thread(process_metrics)
    return metrics.render() + process


def process_metrics() -> bytes:
    """``process_open_fds`` and the like, in the exposition format. Reads files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return generate_latest(registry)
