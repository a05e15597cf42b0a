"""Whole proxies in processes of their own, for what only processes can do: die, and be stopped."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from proxy.config import HostPort

ROOT = Path(__file__).parents[2]


class Child:
    """`pullpool serve` in a process of its own, and what it has logged."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._reader = asyncio.create_task(self._read(), name="log of a child")

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            with contextlib.suppress(ValueError):
                self.lines.append(json.loads(line))
            self._news.set()
        self._news.set()

    async def logged(self, event: str, count: int = 1) -> dict[str, Any]:
        """Wait for the `count`th line about `event`."""
        while len(found := self.events(event)) < count:
            assert not self._reader.done(), f"it ended after {self.lines[-3:]}"
            self._news.clear()
            await self._news.wait()
        return found[count - 1]

    def events(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("event") == event]

    @property
    def address(self) -> HostPort:
        host, _, port = self.events("serving")[0]["listen"].rpartition(":")
        return HostPort(host, int(port))

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def admin_url(self) -> str:
        return f"http://{self.events('serving')[0]['admin']}"

    async def status(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        """What its `/api/v1/status` says."""
        async with session.get(f"{self.admin_url}/api/v1/status") as answer:
            return dict(await answer.json())

    async def samples(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """Its metrics, summed over labels."""
        async with session.get(f"{self.admin_url}/metrics") as answer:
            text = await answer.text()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def end(self) -> None:
        """Kill it, if it still lives."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._reader


@contextlib.asynccontextmanager
async def child(
    directory: Path, upstream: str, *, workers: int = 1, queue: Mapping[str, str] = {}
) -> AsyncIterator[Child]:
    """A proxy process on this cache directory, perhaps a supervisor and its workers; `queue` are
    settings of that table."""
    lines = [f'{key} = "{value}"' for key, value in queue.items()]
    config = directory / f"config-{len(lines)}.toml"
    await asyncio.to_thread(config.write_text, "\n".join(["[queue]", *lines, ""]))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "proxy", "serve", upstream, "--config", str(config), "--log-format", "json"),
        *("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"),
        *("--cache-dir", str(directory / "cache"), "--workers", str(workers)),
        cwd=ROOT,
        env={key: text for key, text in os.environ.items() if not key.startswith("PULLPOOL_")},
        stderr=PIPE,
    )
    one = Child(process)
    try:
        await one.logged("serving", workers)
        yield one
    finally:
        await one.end()
