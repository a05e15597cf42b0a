"""A rig holds what one test starts: a directory, free ports, and processes that end with it.

Real registries and real clients are only worth having in a suite if none of them outlives its test
and each can be asked what it said when something failed. So every process here has its own
directory, writes to its own log, is stopped by its own id (asked first, killed after a while), and
is stopped in the reverse order of starting, whatever happened in between.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

import pytest

P = ParamSpec("P")
T = TypeVar("T")

READY_WITHIN = 60.0
"""Seconds that a process has to become ready; a bound on a broken start, not on a test."""

STOP_WITHIN = 20.0
"""Seconds between asking a process to stop and killing it."""

_LOG_TAIL = 8_000


class PartFailed(AssertionError):
    """A part did not start, or a client that should have pulled did not; carries the output."""


def debian(command: str) -> str:
    """The path of a command, as the distribution installs it before anything put there by hand.

    Raises PartFailed when it is not installed.
    """
    found = shutil.which(command, path=f"/usr/bin:/usr/sbin:{os.environ['PATH']}")
    if found is None:
        raise PartFailed(f"{command} is not installed")
    return found


def has(*commands: str) -> bool:
    """Whether all these commands are installed."""
    search = f"/usr/bin:/usr/sbin:{os.environ['PATH']}"
    return all(shutil.which(command, path=search) for command in commands)


def wait_until(ready: Callable[[], T], what: str, within: float = READY_WITHIN) -> T:
    """Ask until the answer is true, and return it; PartFailed when it never is."""
    deadline = time.monotonic() + within
    while not (answer := ready()):
        if time.monotonic() > deadline:
            raise PartFailed(f"waited {within:.0f} s in vain: {what}")
        time.sleep(0.02)
    return answer


def listens(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody accepts connections on that port."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a command to its end and return what it wrote to stdout; PartFailed when it fails."""
    ended = subprocess.run(
        [str(word) for word in argv],
        env=None if env is None else {**os.environ, **env},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        words = " ".join(str(word) for word in argv)
        raise PartFailed(f"{words}: exit {ended.returncode}\n{ended.stdout}\n{ended.stderr}")
    return ended.stdout


class Daemon:
    """One process that runs until it is stopped. Starting it waits until it is ready."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        directory: Path,
        ready: Callable[[], object],
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self._argv = [str(word) for word in argv]
        self._directory = directory
        self._ready = ready
        self._env = env
        self._child: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        state = f"pid {self._child.pid}" if self._child else "stopped"
        return f"<Daemon {self.name} {state}>"

    def start(self) -> None:
        """Start the process and wait until it is ready; PartFailed with its log when it is not."""
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self._argv,
                cwd=self._directory,
                env=None if self._env is None else {**os.environ, **self._env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(self._ready_or_dead, f"{self.name} ready")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> int | None:
        """Ask the process to end, kill it when it does not, and return its exit status."""
        child, self._child = self._child, None
        if child is None:
            return None
        child.terminate()
        try:
            return child.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self._child is None:
            raise PartFailed(f"{self.name} does not run")
        self._child.send_signal(number)

    def tail(self) -> str:
        """The end of what the process wrote."""
        if not self.log.exists():
            return ""
        return self.log.read_text(errors="replace")[-_LOG_TAIL:]

    def _ready_or_dead(self) -> bool:
        if self._child is not None and self._child.poll() is not None:
            raise PartFailed(f"{self.name} ended at once: {self._child.returncode}\n{self.tail()}")
        return bool(self._ready())


class Rig:
    """A directory and the processes started in it; both go when the rig closes, the last first."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.daemons: list[Daemon] = []
        self._end = contextlib.ExitStack()
        # Images are large, and pytest would keep those of the last three runs.
        self.at_end(shutil.rmtree, directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.close()

    def at_end(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call this when the rig closes, after what will be started and before what was."""
        self._end.callback(call, *args, **kwargs)

    def place(self, name: str) -> Path:
        """A new, empty directory of this rig; its name starts with the one given."""
        for number in range(1000):
            path = self.directory / f"{name}{number or ''}"
            with contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
                return path
        raise PartFailed(f"a thousand directories called {name}")

    def start(self, daemon: Daemon) -> Daemon:
        """Start a process that ends with this rig."""
        self.daemons.append(daemon)
        self.at_end(daemon.stop)
        daemon.start()
        return daemon

    def logs(self) -> list[tuple[str, str]]:
        """What each process of this rig said last: (name, text)."""
        return [(daemon.name, daemon.tail()) for daemon in self.daemons]


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it makes namespaces and mounts")


def needs(*commands: str) -> pytest.MarkDecorator:
    """Skip the test where one of these commands is not installed, and say which."""
    missing = [command for command in commands if not has(command)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
