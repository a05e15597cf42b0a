"""The servers that the demonstration starts, and ends by their ids.

Each is a leader of its own session: a Ctrl-C at the terminal reaches the demonstration only, which
lets its clients go first and then ends its children one by one. What they write on stderr goes to a
file, so that none of them can block on a pipe that nobody reads, and is shown when one fails.
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping, Sequence
from pathlib import Path

import proxy

#: Seconds a child has to end after SIGTERM, before SIGKILL.
GRACE = 5.0
#: Lines of a failed child's stderr that are shown.
_LAST_LINES = 20


class ChildFailed(Exception):
    """A child ended by itself or would not start; the text holds the last of its stderr."""


class Child:
    """One `python -m MODULE …`; `async with` ends it."""

    def __init__(self, name: str, process: Process, log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, module: str, arguments: Sequence[str], *, name: str, log: Path) -> Child:
        """Start it, with none of the variables that configure pullpool; stderr goes to `log`."""
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # this package, not a directory called "proxy" that happens to be here
                "-m",
                module,
                *arguments,
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=stderr,
                env=_environment(os.environ),
                start_new_session=True,
            )
        return cls(name, process, log)

    async def __aenter__(self) -> Child:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.returncode is None

    async def line(self) -> str:
        """The next line of its stdout. Raises ChildFailed when there is none."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            await self.ended()
        return line.decode()

    async def ended(self) -> None:
        """Wait for its end, which is a failure whatever its status. Always raises ChildFailed."""
        status = await self._process.wait()
        raise await self.failure(f"ended with status {status}")

    async def failure(self, what: str) -> ChildFailed:
        """The exception that says what it did, and the last that it wrote on stderr."""
        lines = (await asyncio.to_thread(self._log.read_text, errors="replace")).splitlines()
        words = "\n".join(lines[-_LAST_LINES:]) or "(it said nothing)"
        return ChildFailed(f"{self.name} {what}:\n{words}")

    async def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL when it takes longer than `GRACE`."""
        if not self.is_running:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), GRACE)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def __repr__(self) -> str:
        return f"<Child {self.name} {self._process.pid}>"


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    """What a child gets: nothing that configures pullpool, and the package where ours is."""
    env = {name: value for name, value in ours.items() if not name.startswith("PULLPOOL_")}
    path = [str(Path(proxy.__file__).parents[1]), *filter(None, [ours.get("PYTHONPATH")])]
    return {**env, "PYTHONPATH": os.pathsep.join(path)}
