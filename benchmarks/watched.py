"""A proxy whose loop is watched from inside: `python -m benchmarks.watched FILE CONFIGURATION`.

How long a question to `/livez` takes holds more than the loop's standing still: the two ends of its
connection wait for a core as well, and it takes a turn or two of the loop to be read, handled and
answered. So beside it a timer that is due every ``LOOK`` seconds tells how late it is, and how much
CPU the loop's thread has used meanwhile: of that much the loop is to blame, whoever shares the
machine. Each time that is worth it stands in FILE as a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from proxy import app
from proxy.cli.serve import start
from proxy.config import Settings
from proxy.loop import loop_factory
from proxy.process import hold_collecting
from proxy.web.descriptors import raise_limit

#: Seconds between two looks, and how late one has to be to be written down.
LOOK = 0.002
WORTH = 0.01


@dataclass(frozen=True, slots=True)
class Turn:
    """The loop stood still: since ``began`` (`time.monotonic`), for so many seconds ``late``, in
    which its thread used ``cpu`` seconds."""

    began: float
    late: float
    cpu: float


def read_turns(path: Path) -> list[Turn]:
    """What has been written so far."""
    return [Turn(**json.loads(line)) for line in path.read_text().splitlines()]


async def _watch(out: TextIO) -> None:
    while True:
        began, before = time.monotonic(), time.thread_time()
        await asyncio.sleep(LOOK)
        late = time.monotonic() - began - LOOK
        if late >= WORTH:
            turn = Turn(began, late, time.thread_time() - before)
            out.write(json.dumps(asdict(turn)) + "\n")
            out.flush()


async def _serve(settings: Settings, path: Path) -> int:
    with path.open("w") as out:
        watching = asyncio.create_task(_watch(out))
        try:
            return await app.serve(settings)
        finally:
            watching.cancel()
            await asyncio.wait([watching])


def _run(settings: Settings, path: Path) -> int:
    raise_limit()
    hold_collecting()
    factory = loop_factory(fast_transport=settings.fast_transport)
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_serve(settings, path))


def main(arguments: Sequence[str]) -> int:
    """The exit code of the proxy. ``arguments``: FILE and CONFIGURATION."""
    path, config = map(Path, arguments)
    return start(config, {}, lambda settings: _run(settings, path), os.environ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
