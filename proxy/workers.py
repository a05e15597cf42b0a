"""``--workers N``: a supervisor, and N processes that serve (DESIGN D15).

Theory of operation. The supervisor binds the sockets, makes the workers by ``fork`` and then only
waits: for signals, and for workers that end. It has no event loop, no thread and no cache, so that
a fork is a clean copy at any time, and little of it can fail. Each worker runs a whole ``Proxy`` on
the common cache directory; which of them leads is settled by ``proxy/team`` as between any other
processes, and the supervisor does not know.

*Sockets.* Each place has listening sockets of its own for the registry (SO_REUSEPORT: the kernel
spreads connections by a hash of their addresses), made once and kept open here. Measured, of 1,000
connections at once two workers got 466 to 505 and the rest; out of one common socket, where who is
awake takes all he can, 329 to 382. When a worker dies, what waits in its queue waits for the next
one in that place, and is not refused; at the end, when there is no next one, a place closes with
its worker, so that clients go to those which still drain and say so. The admin sockets are common
to all: whoever accepts speaks for all (``web/siblings.py``).

*Death.* A worker that dies is made anew at once, or after a pause that doubles while it does not
live for ``GROWN`` seconds. One that cannot start at the very beginning (exit code 1: the cache
directory, a certificate) ends everything, as it would end a single process; one that fails by a
defect (``CRASHED``) does not, whenever that is. When the supervisor dies its end of a pipe closes,
and the workers drain as after SIGTERM.

*Signals.* SIGTERM and SIGINT are passed on; the supervisor ends when all workers have. Another one
ends them at once: by SIGKILL, because a second SIGTERM to a worker may be the first one of a
terminal, or of systemd, that told the whole group. A worker is born with both blocked, and hears
what came meanwhile when it can drain (``process.ending``); when it has drained it hears neither.
One that dies by the SIGTERM that it was sent had drained already: its handlers were gone, and it
did not ignore it yet.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from proxy import app
from proxy.config import HostPort, Settings
from proxy.observe.logs import Logger, make_logger
from proxy.process import ENDING, begin_collecting
from proxy.seat import Seat
from proxy.web.descriptors import raise_limit
from proxy.web.listener import BACKLOG, bound_sockets

#: Seconds after which a worker that died is made anew: at first, and at most.
PAUSE = 0.1
LONGEST_PAUSE = 10.0
#: A worker that lived for so many seconds is made anew at once.
GROWN = 10.0
#: Exit code of a worker that ended by an exception.
CRASHED = os.EX_SOFTWARE

_WATCHED = frozenset({*ENDING, signal.SIGCHLD})


@dataclass(slots=True)
class Place:
    """One worker after the other. ``pause`` in seconds; times are monotonic."""

    seat: Seat
    pid: int | None = None
    began: float = 0.0
    pause: float = 0.0
    due: float | None = 0.0  # when the next one is made; None: one lives, or none is wanted
    deaths: int = 0

    def ended(self, now: float) -> None:
        """Its worker has ended: when the next one is due."""
        self.pid = None
        self.deaths += 1
        grown = now - self.began >= GROWN
        self.pause = PAUSE if grown else min(LONGEST_PAUSE, max(PAUSE, self.pause * 2))
        self.due = now if grown else now + self.pause


def run(settings: Settings) -> int:
    """Serve with these settings, by as many processes as they say; the exit code."""
    if settings.workers == 1:
        return app.run(settings)
    log = make_logger(settings.log_format, sys.stderr, settings.log_level)
    raise_limit()
    with ExitStack() as stack:
        try:
            seats = _seats(settings, stack)
        except OSError as error:
            log.error("cannot_start", error=str(error))
            return 1
        begin_collecting()  # what is loaded is not looked at, nor are its pages copied
        return Supervisor(seats, lambda seat: app.run(settings, seat), log).run()


class Supervisor:
    """Keeps a worker in each place. ``work`` is what a worker does; its exit code."""

    def __init__(
        self,
        seats: Sequence[Seat],
        work: Callable[[Seat], int],
        log: Logger,
        *,
        fork: Callable[[], int] = os.fork,
    ) -> None:
        self._places = [Place(seat) for seat in seats]
        self._work = work
        self._log = log
        self._make_process = fork
        self._is_ending = False
        self._code = 0

    def run(self) -> int:
        """Until all workers have ended; the exit code."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        try:
            while not self._is_ending or any(place.pid is not None for place in self._places):
                self._make_those_due(before)
                self._heed(signal.sigtimedwait(_WATCHED, self._patience()))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self._code

    def _patience(self) -> float:
        """Seconds until something is due, whatever happens."""
        dues = [place.due for place in self._places if place.due is not None]
        return 60.0 if self._is_ending or not dues else max(0.0, min(dues) - time.monotonic())

    def _make_those_due(self, mask: set[signal.Signals | int]) -> None:
        now = time.monotonic()
        for place in self._places:
            if not self._is_ending and place.due is not None and place.due <= now:
                place.due, place.began = None, now
                try:
                    place.pid = self._fork(place.seat, mask)
                except OSError as error:  # no memory, no process left: it may pass
                    place.ended(now)
                    self._log.error(
                        "worker_not_started", worker=place.seat.number, error=str(error)
                    )
                    continue
                self._log.info("worker_started", worker=place.seat.number, pid=place.pid)

    def _fork(self, seat: Seat, mask: set[signal.Signals | int]) -> int:
        """A worker in this place; the child never returns. Raises ``OSError``."""
        pid = self._make_process()
        if pid:
            return pid
        code = CRASHED
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, {*mask, *ENDING})  # until `ending`
            random.seed()  # else all would draw the same pauses
            for place in self._places:
                if place.seat is not seat:
                    _close(place.seat.registry)
            os.close(seat.lifeline[1])  # only the supervisor holds it
            code = self._work(seat)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _heed(self, found: signal.struct_siginfo | None) -> None:
        if found is None:
            return
        if found.si_signo in ENDING:
            self._end(signal.SIGKILL if self._is_ending else signal.SIGTERM)
        while (ended := _reaped()) is not None:
            self._bury(*ended)

    def _bury(self, pid: int, code: int) -> None:
        place = next((place for place in self._places if place.pid == pid), None)
        if place is None:
            return
        is_first = not place.deaths
        place.ended(time.monotonic())
        if self._is_ending:
            self._code = max(self._code, int(code not in (0, -signal.SIGTERM)))
            _close(place.seat.registry)
            self._log.info("worker_ended", worker=place.seat.number, pid=pid, code=code)
            return
        self._log.warning("worker_ended", worker=place.seat.number, pid=pid, code=code)
        if is_first and code == 1:
            self._code = 1
            self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        self._is_ending = True
        for place in self._places:
            if place.pid is not None:
                os.kill(place.pid, number)
            else:
                _close(place.seat.registry)
        self._log.info("workers_ending", signal=number.name)


def _reaped() -> tuple[int, int] | None:
    """A child that has ended, and its exit code; negative: by which signal."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def _seats(settings: Settings, stack: ExitStack) -> list[Seat]:
    """A place for each worker, with its sockets bound. Raises ``OSError``."""
    count = settings.workers
    registry: list[list[socket.socket]] = []
    address = settings.listen
    for _ in range(count):
        sockets = bound_sockets(address.host, address.port, shared=True)
        stack.callback(_close, sockets)
        registry.append(sockets)
        # The system chose the port for the first one.
        address = HostPort(address.host, int(sockets[0].getsockname()[1]))
    admin = bound_sockets(settings.admin.host, settings.admin.port)
    stack.callback(_close, admin)
    for sock in (*admin, *(sock for sockets in registry for sock in sockets)):
        sock.listen(BACKLOG)
    directory = Path(tempfile.mkdtemp(prefix="pullpool-"))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    lifeline = os.pipe()
    for fd in lifeline:
        stack.callback(os.close, fd)
    return [
        Seat(number, count, registry[number], admin, directory, lifeline) for number in range(count)
    ]


def _close(sockets: Sequence[socket.socket]) -> None:
    for sock in sockets:
        sock.close()
