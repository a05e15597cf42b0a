"""The two servers between which the demonstration compares, as its children.

Of the registry the demonstration reads the counters behind its control port, of pullpool the status
page of its admin listener: what it shows is what anybody could ask them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from proxy.cli.demo.children import Child
from proxy.cli.demo.crowd import Image
from proxy.cli.demo.plan import Plan
from proxy.cli.demo.screen import Sight

_POLL = 0.02  # seconds between two looks at something that is about to change


@dataclass(frozen=True, slots=True)
class Counters:
    """The registry's: body bytes sent, most sockets open at once, sockets open now."""

    sent: int
    peak: int
    sockets: int


class Registry:
    """The bundled registry, with Harbor's limit: 401 for what comes beyond it."""

    def __init__(
        self, child: Child, http: aiohttp.ClientSession, url: str, control: str, images: list[Image]
    ) -> None:
        self.child = child
        self.url = url
        self.images: Sequence[Image] = images
        self._http = http
        self._control = control

    @classmethod
    async def start(
        cls,
        stack: contextlib.AsyncExitStack,
        http: aiohttp.ClientSession,
        plan: Plan,
        directory: Path,
    ) -> Registry:
        """Start it; it has made its images when this returns. Raises ChildFailed."""
        arguments = {
            "--limit": plan.limit,
            "--images": plan.images,
            "--layers": plan.layers,
            "--layer-size": plan.layer_size,
            "--rate": plan.rate,
        }
        child = await Child.start(
            "proxy.testing",
            ["registry", *(f"{flag}={value}" for flag, value in arguments.items())],
            name="the registry",
            log=directory / "registry.log",
        )
        await stack.enter_async_context(child)
        ready = json.loads(await child.line())
        images = [Image(image["name"], image["tag"]) for image in ready["images"]]
        return cls(child, http, ready["url"], ready["control"], images)

    async def reset(self) -> None:
        """Count anew, once nobody is connected any more."""
        while True:
            if not (await self.counters()).sockets:
                break
            await asyncio.sleep(_POLL)
        await _ask(self.child, self._http, "POST", f"{self._control}/_reset")

    async def counters(self) -> Counters:
        """What it has counted since the last reset."""
        totals = await _ask(self.child, self._http, "GET", f"{self._control}/_counters")
        return Counters(totals["bytes_sent"], totals["peak_sockets"], totals["sockets_now"])

    async def sight(self) -> Sight:
        """Its part of the screen."""
        return Sight((await self.counters()).sockets)


class Pullpool:
    """`pullpool serve` with a cache of its own, which holds nothing yet."""

    def __init__(self, child: Child, http: aiohttp.ClientSession, url: str, admin: str) -> None:
        self.child = child
        self.url = url
        self._http = http
        self._admin = admin

    @classmethod
    async def start(
        cls,
        stack: contextlib.AsyncExitStack,
        http: aiohttp.ClientSession,
        plan: Plan,
        upstream: str,
        directory: Path,
    ) -> Pullpool:
        """Start it; it is ready when this returns. Raises ChildFailed."""
        listen, admin = (f"127.0.0.1:{port}" for port in _free_ports(2))
        arguments = {
            "--listen": listen,
            "--admin": admin,
            "--cache-dir": directory / "cache",
            "--max-connections": plan.limit,
        }
        child = await Child.start(
            "proxy",
            ["serve", upstream, *(f"{flag}={value}" for flag, value in arguments.items())],
            name="pullpool",
            log=directory / "pullpool.log",
        )
        await stack.enter_async_context(child)
        pullpool = cls(child, http, f"http://{listen}", f"http://{admin}")
        await pullpool._ready()
        return pullpool

    async def _ready(self) -> None:
        """Wait until it would serve. Raises ChildFailed when it ends instead."""
        while True:
            if not self.child.is_running:
                await self.child.ended()
            with contextlib.suppress(aiohttp.ClientError):
                async with self._http.get(f"{self._admin}/readyz") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(_POLL)

    async def sight(self, registry: Sight) -> Sight:
        """Its part of the screen beside the registry's."""
        status = await _ask(self.child, self._http, "GET", f"{self._admin}/api/v1/status")
        active = sum(one["connections"]["active"] for one in status["upstreams"])
        queued = sum(sum(depth.values()) for depth in status["queue"].values())
        return replace(registry, active=active, queued=queued)


async def _ask(child: Child, http: aiohttp.ClientSession, method: str, url: str) -> Any:
    """The JSON that a page answers with, None for none. Raises ChildFailed when it fails."""
    try:
        async with http.request(method, url) as response:
            response.raise_for_status()
            return None if response.status == 204 else await response.json()
    except (aiohttp.ClientError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise await child.failure(f"does not answer ({reason})") from error


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are free now: different ones, as all are held while choosing."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
