"""A directory on a real server, for tests: quick to come back, with metrics and a log to read."""

import contextlib
import io
import json
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from proxy.fleet.directory import Directory
from proxy.fleet.link import Access
from proxy.fleet.place import Place
from proxy.fleet.script import Argument, Script
from proxy.observe.logs import make_logger
from proxy.observe.metrics import Metrics
from proxy.oci.errors import DirectoryDown
from tests.unit.redis_kit import until

ECHO = Script("echo", "return ARGV")
WRITE = Script("write", "return redis.call('INCR', KEYS[1] .. ':n')")
WHO = Script("who", "return ARGV[#ARGV]", wants_run_id=True)
#: Seconds that an answer may take where a test waits for one that does not come.
SHORT = 0.3


class Quick(random.Random):
    """Chance that draws short pauses."""

    def random(self) -> float:
        return 0.05


class Asking:
    """A directory, seen from outside."""

    def __init__(self, directory: Directory, metrics: Metrics, log: io.StringIO) -> None:
        self.directory = directory
        self._metrics = metrics
        self._log = log

    async def run(self, script: Script, tag: str = "x", args: Sequence[Argument] = ()) -> Any:
        return await self.directory.run(script, tag, args)

    async def answers(self) -> bool:
        """Does a call succeed now?"""
        try:
            await self.run(ECHO)
        except DirectoryDown:
            return False
        return True

    async def healed(self) -> None:
        await until(self.answers)

    async def fails(self, script: Script = ECHO) -> DirectoryDown:
        """Ask until it fails, and return how."""
        found: list[DirectoryDown] = []

        async def failed() -> bool:
            try:
                await self.run(script)
            except DirectoryDown as error:
                found.append(error)
            return bool(found)

        await until(failed)
        return found[0]

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = map(json.loads, self._log.getvalue().splitlines())
        return [line for line in lines if line["event"] == name]

    def count(self, sample: str, **labels: str) -> float:
        return self._metrics.registry.get_sample_value(f"pullpool_fleet_{sample}", labels) or 0.0


@contextlib.asynccontextmanager
async def asking(
    url: str,
    *,
    ca_file: Path | None = None,
    cert_file: Path | None = None,
    key_file: Path | None = None,
    chance: random.Random | None = None,
    patience: float = 3.0,
    wait: bool = True,
    **access: Any,
) -> AsyncIterator[Asking]:
    """Ask the directory at `url`; `access` are fields of `Access`."""
    place, metrics, log = Place.parse(url), Metrics(), io.StringIO()
    reach = Access(tls=place.tls, ca_file=ca_file, cert_file=cert_file, key_file=key_file, **access)
    directory = Directory(
        place,
        reach,
        metrics=metrics,
        log=make_logger("json", log, "debug"),
        chance=chance or Quick(1),
        patience=patience,
    )
    async with directory:
        if wait:
            await directory.wait_up()
        yield Asking(directory, metrics, log)
