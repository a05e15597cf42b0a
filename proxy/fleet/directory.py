"""The directory: a Redis or Valkey that all nodes of the fleet talk to, and only by scripts.

Theory of operation. ``run`` is the only question there is. Every call is a task of the directory's
own: a caller that is cancelled leaves it, and neither stops the command nor leaves a connection in
the middle of an answer. The task ends by itself within ``patience`` (longer in a large fleet,
``crowd.py``), whatever the server does, and nothing is ever tried twice that may have been done:
only what a server refused without doing it (NOSCRIPT, MOVED, ASK) goes on, within the same time.
All other failures are the caller's to know.

A server is *up* until a call finds otherwise: then it is *down*, its connections are ended, and
every further call fails at once (``DirectoryDown``), so that nobody waits for what is gone. One
task, the mender, brings it back: after a pause with full jitter, longer each time, it learns the
route anew and probes the servers that this names. A hundred nodes that lose a Redis together come
back one by one. A server that fails again right after it came back is not met with the first pause
again. Nothing is sent because a server came up: what there is to say is said at its own time.

    state of a server     moved by
    not known   -> up     the mender, or a MOVED that names it
    up          -> down   a call that is not answered, or by one that cannot (replica, full)
    down        -> up     the mender, after a probe
    up or down  -> gone   the mender, when the route names it no more

A call that began before a server went down and fails when it is up again says nothing of the
new connections: it is judged by the ``Server`` it used, and that is another object by then.

What a caller must bear: an answer that came too late, or to a caller that has left, may have been
given for something done. Scripts enter what expires, under names that the caller chose.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import TimeoutError as NotInTime

from proxy.fleet.crowd import slack
from proxy.fleet.link import Access
from proxy.fleet.place import Address, Place
from proxy.fleet.route import ClusterMap, route_to
from proxy.fleet.script import Argument, Script, slot_of
from proxy.fleet.server import Server
from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.oci.errors import DirectoryDown

#: Seconds that a call may take in all, the wait for a connection included.
PATIENCE = 3.0
#: Seconds: the mender's pauses are drawn from 0 to FIRST_PAUSE, then to twice that, up to this.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
#: Seconds that a directory has to stay up for its next fall to be a first one.
STEADY = 15.0
#: Servers that one call is sent on to.
HOPS = 3
#: What a server answers that cannot do its work; other refusals are about the script.
_UNABLE = (ReadOnlyError, OutOfMemoryError, NoPermissionError, ClusterDownError)


def pause_before(attempt: int, chance: float) -> float:
    """Seconds before the mender's ``attempt`` (from 0): full jitter, ``chance`` from 0 to 1."""
    return chance * min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempt, 16))


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a call ended, as a value: the error of a call that was left would go unheard."""

    reply: Any = None
    error: DirectoryDown | None = None


class Directory:
    """``async with Directory(…) as directory``: asks while the block lasts, be it up or down."""

    def __init__(
        self,
        place: Place,
        access: Access,
        *,
        metrics: Metrics,
        log: Logger,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.place = place
        self.nodes = 1  # that ask it, as far as this one knows
        self._access = access
        self._metrics = metrics.fleet
        self._log = log
        self._clock = clock
        self._chance = chance or random.Random()
        self._usual_patience = patience
        self._route = route_to(place, access, self._chance)
        self._servers: dict[Address, Server] = {}
        self._down: dict[Address | None, str] = {None: "it was not asked yet"}  # None: no route
        self._is_outdated = False  # the route, by what a server said
        self._trouble = asyncio.Event()
        self._came_up = asyncio.Event()
        self._attempts = 0
        self._up_since = 0.0
        self._calls: set[asyncio.Task[_Outcome]] = set()
        self._mender: asyncio.Task[None] | None = None
        self._is_closing = False

    def __repr__(self) -> str:
        state = "up" if self.is_up else f"down: {self.why_down}"
        return f"<Directory {self.place} calls={len(self._calls)} {state}>"

    @property
    def _slack(self) -> float:
        return slack(self.nodes)

    @property
    def _patience(self) -> float:
        return self._usual_patience * self._slack

    @property
    def is_up(self) -> bool:
        """Do all its servers answer, as far as is known?"""
        return not self._down

    @property
    def why_down(self) -> str | None:
        """What is wrong, in a line of text."""
        return next(iter(self._down.values()), None)

    async def wait_up(self) -> None:
        """Wait until all its servers answer."""
        while not self.is_up:
            self._came_up.clear()
            await self._came_up.wait()

    async def __aenter__(self) -> Self:
        """Begin to ask; that it is down is no error."""
        self._trouble.set()
        self._mender = asyncio.create_task(self._mend(), name="directory mender")
        self._metrics.observe_directory(lambda: self.is_up)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._is_closing = True
        tasks = [*self._calls, *([self._mender] if self._mender else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers.values():
            await server.close()

    async def run(self, script: Script, tag: str, args: Sequence[Argument] = ()) -> Any:
        """Run a script on the keys of a hash tag and return its answer (text as bytes).

        Raises ``DirectoryDown``. A caller that is cancelled does not stop the script.
        """
        call = self._call(script, tag, args)
        task = asyncio.create_task(call, name=f"directory {script.name}")
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        outcome = await asyncio.shield(task)
        if outcome.error is not None:
            raise outcome.error
        return outcome.reply

    async def _call(self, script: Script, tag: str, args: Sequence[Argument]) -> _Outcome:
        began = self._clock()
        result, outcome = "ok", _Outcome()
        try:
            async with asyncio.timeout(self._patience):
                result, outcome = await self._ask(script, tag, args)
        except TimeoutError:
            result, outcome = "late", self._tired(tag)
        except asyncio.CancelledError:
            if not self._is_closing:
                raise
            result, outcome = "refused", _failed("it is being closed")
        self._metrics.directory_operations.labels(script.name, result).inc()
        if result != "refused":
            self._metrics.directory_duration.labels(script.name).observe(self._clock() - began)
        return outcome

    def _tired(self, tag: str) -> _Outcome:
        """A call took too long in all: is it the server, or are there just many of us?"""
        words = f"it took longer than {self._patience:g} s"
        address = self._route.find(slot_of(tag))
        server = None if address is None else self._servers.get(address)
        if server is not None and self._clock() - server.answered > self._patience:
            self._fell(server.address, f"{server.address}: {words}")
        return _failed(words)

    async def _ask(
        self, script: Script, tag: str, args: Sequence[Argument]
    ) -> tuple[str, _Outcome]:
        """Follow the key to its server; the result's name, and the outcome."""
        slot, asking = slot_of(tag), False
        address = self._route.find(slot)
        for _ in range(HOPS):
            if self._is_closing or address is None or address in self._down:
                why = self._down.get(address) or self.why_down or "nobody holds this key"
                return "refused", _failed(why)
            server = self._server(address)
            try:
                reply = await server.call(script, tag, args, asking=asking, slack=self._slack)
            except AskError as error:  # MOVED is one, too
                address = Address(error.host or address.host, error.port)
                asking = True
                if isinstance(error, MovedError):
                    asking = False
                    self._moved(slot, address)
            except (RedisError, OSError) as error:
                return self._judge(error, server, script)
            else:
                return "ok", _Outcome(reply)
        return "failed", _failed(f"it sends {script.name} from server to server")

    def _judge(
        self, error: RedisError | OSError, server: Server, script: Script
    ) -> tuple[str, _Outcome]:
        """What a failure says of the server, and to the caller."""
        words = f"{server.address}: {_words(error)}"
        if isinstance(error, TryAgainError):
            return "failed", _failed(words)
        if isinstance(error, ResponseError) and not isinstance(error, _UNABLE):
            self._log.error("directory_script_failed", script=script.name, error=words)
            return "failed", _failed(words)
        if self._servers.get(server.address) is server:
            self._fell(server.address, words)
        return ("late" if isinstance(error, NotInTime) else "down"), _failed(words)

    def _server(self, address: Address) -> Server:
        if address not in self._servers:
            self._servers[address] = self._new_server(address)
        return self._servers[address]

    def _new_server(self, address: Address) -> Server:
        return Server(address, self._access, self.place.database, self._clock)

    def _moved(self, slot: int, address: Address) -> None:
        if isinstance(self._route, ClusterMap):
            self._route.move(slot, address)
        self._is_outdated = True
        self._trouble.set()

    def _fell(self, address: Address, words: str) -> None:
        was_up = self.is_up
        self._down[address] = words
        if was_up:
            if self._clock() - self._up_since > STEADY:
                self._attempts = 0
            self._log.warning("directory_down", error=words)
        self._trouble.set()

    async def _mend(self) -> None:
        """The mender: at the start, and whenever something is wrong, until nothing is."""
        await self._try_to_mend()
        while True:
            await self._trouble.wait()
            await asyncio.sleep(pause_before(self._attempts, self._chance.random()))
            self._attempts += 1
            await self._try_to_mend()

    async def _try_to_mend(self) -> None:
        was_up = self.is_up
        try:
            await self._route.learn()
        except (RedisError, OSError) as error:
            self._down[None] = str(error)
            if was_up or self._attempts == 0:
                self._log.warning("directory_down", error=str(error))
            return
        self._is_outdated = False
        self._down.pop(None, None)
        known = self._route.known()
        for address in (self._down.keys() | self._servers.keys()) - known:
            if address is not None:
                await self._forget(address)
        wanted = [one for one in known if one in self._down or one not in self._servers]
        await asyncio.gather(*map(self._probe, wanted))
        if self._down or self._is_outdated:
            return
        self._trouble.clear()
        if not was_up:
            self._up_since = self._clock()
            self._log.info("directory_up", servers=sorted(map(str, known)))
        self._came_up.set()

    async def _forget(self, address: Address) -> None:
        self._down.pop(address, None)
        server = self._servers.pop(address, None)
        if server is not None:
            await server.close()

    async def _probe(self, address: Address) -> None:
        """Replace what there is to this server, if that goes."""
        server = self._new_server(address)
        try:
            await server.probe()
        except (RedisError, OSError) as error:
            words = f"{address}: {_words(error)}"
            if address not in self._down and self.is_up:
                self._log.warning("directory_down", error=words)
            self._down[address] = words
            await server.close()
            return
        former = self._servers.get(address)
        self._servers[address] = server
        self._down.pop(address, None)
        if former is not None:
            await former.close()


def _failed(words: str) -> _Outcome:
    return _Outcome(error=DirectoryDown(f"{DirectoryDown.default_message}: {words}"))


def _words(error: BaseException) -> str:
    """What went wrong; redis-py does not always name the fault in a certificate."""
    words = str(error) or type(error).__name__
    cause = error.__context__
    if isinstance(cause, ssl.SSLError) and str(cause) not in words:
        return f"{words} {cause}"
    return words
