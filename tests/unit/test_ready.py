"""Sockets that can be written to again: everybody gets his turn, and so does everything else."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from proxy.loop import loop_factory
from proxy.ready import LOT, Writers
from proxy.testing.clock import FakeClock
from tests.unit.upstream_kit import run_on, until

WHO: ContextVar[str] = ContextVar("who")


@contextmanager
def pairs(count: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    made = [socket.socketpair() for _ in range(count)]
    for sock, _ in made:
        sock.setblocking(False)
    try:
        yield made
    finally:
        for pair in made:
            for sock in pair:
                sock.close()


@asynccontextmanager
async def writers(clock: FakeClock | None = None) -> AsyncIterator[Writers]:
    made = Writers(asyncio.get_running_loop(), clock=clock or FakeClock())
    try:
        yield made
    finally:
        made.close()


async def test_whoever_waits_is_called_back_until_he_waits_no_more() -> None:
    async with writers() as waiting:
        with pairs(1) as [(sock, _)]:
            calls: list[str] = []
            waiting.add_writer(sock, calls.append, "first")
            await until(lambda: len(calls) >= 3)  # as long as it takes bytes
            assert waiting.remove_writer(sock)
            assert not waiting.remove_writer(sock)
            seen = len(calls)
            for _ in range(20):
                await asyncio.sleep(0)
            assert calls == ["first"] * seen


async def test_nobody_is_called_back_while_his_socket_is_full() -> None:
    async with writers() as waiting:
        with pairs(2) as [(full, peer), (free, _)]:
            with suppress(BlockingIOError):
                while True:
                    full.send(bytes(65536))
            calls: list[str] = []
            waiting.add_writer(full.fileno(), calls.append, "full")
            waiting.add_writer(free.fileno(), calls.append, "free")
            await until(lambda: len(calls) >= 10)
            assert set(calls) == {"free"}
            peer.setblocking(False)
            with suppress(BlockingIOError):
                while peer.recv(65536):
                    pass
            await until(lambda: "full" in calls)


async def test_the_last_callback_counts_and_runs_in_the_context_of_its_waiting() -> None:
    async with writers() as waiting:
        with pairs(1) as [(sock, _)]:
            calls: list[tuple[str, str]] = []
            WHO.set("first")
            waiting.add_writer(sock, lambda: calls.append(("one", WHO.get())))
            WHO.set("second")
            waiting.add_writer(sock, lambda: calls.append(("two", WHO.get())))
            WHO.set("nobody")
            await until(lambda: bool(calls))
            assert set(calls) == {("two", "second")}


async def test_a_crowd_is_run_in_slices_and_everybody_comes_before_anybody_comes_again() -> None:
    clock = FakeClock()
    async with writers(clock) as waiting:
        with pairs(10 * LOT) as made:
            calls: list[int] = []
            turns: list[int] = []  # how many had been called at each turn of the loop

            def run(number: int) -> None:
                clock.advance(0.001)
                calls.append(number)

            for number, (sock, _) in enumerate(made):
                waiting.add_writer(sock, run, number)
            while len(calls) < len(made):
                turns.append(len(calls))
                await asyncio.sleep(0)
            assert sorted(calls[: len(made)]) == list(range(len(made)))
            assert len({*turns}) >= 5  # others had their turns in between


async def test_who_is_taken_away_by_another_in_the_same_lot_is_not_called() -> None:
    async with writers() as waiting:
        with pairs(2) as [(first, _), (second, _)]:
            calls: list[str] = []

            def only(name: str, other: socket.socket) -> None:
                calls.append(name)
                waiting.remove_writer(other)

            waiting.add_writer(first, only, "first", second)
            waiting.add_writer(second, only, "second", first)
            await until(lambda: len(calls) >= 3)
            assert len(set(calls)) == 1


async def test_a_callback_that_fails_is_told_of_and_stops_nobody() -> None:
    loop = asyncio.get_running_loop()
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))
    async with writers() as waiting:
        with pairs(2) as [(bad, _), (good, _)]:
            calls: list[str] = []

            def fail() -> None:
                waiting.remove_writer(bad)
                raise ValueError("broken")

            waiting.add_writer(bad, fail)
            waiting.add_writer(good, calls.append, "good")
            await until(lambda: bool(calls and told))
            assert str(told[0]["exception"]) == "broken"
    loop.set_exception_handler(None)


async def test_a_socket_that_was_closed_without_a_word_gives_its_number_to_another() -> None:
    async with writers() as waiting:
        calls: list[str] = []
        with pairs(1) as [(sock, _)]:
            waiting.add_writer(sock, calls.append, "old")
            number = sock.fileno()
        with pairs(1) as [(sock, other)]:
            if sock.fileno() != number:
                sock, other = other, sock
            assert sock.fileno() == number
            waiting.add_writer(sock, calls.append, "new")
            await until(lambda: bool(calls))
            assert set(calls) == {"new"}
            assert waiting.remove_writer(number)


async def test_what_cannot_be_waited_for_is_refused(tmp_path: Path) -> None:
    async with writers() as waiting:
        fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(PermissionError):
            waiting.add_writer(fd, print)
        os.close(fd)
        assert "0 waiting" in repr(waiting)


def test_a_loop_that_is_closed_leaves_no_descriptor() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        loop = loop_factory(fast_transport=True)()
        loop.close()
        loop.close()  # as a runner may
    asyncio.set_event_loop(None)
    assert set(os.listdir("/proc/self/fd")) == before


def test_what_the_fast_transports_wait_for_arrives_whole(tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    (tmp_path / "file").write_bytes(content)

    async def play() -> bytes:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        transport.write(bytes(1 << 20))
        received = b""
        with (tmp_path / "file").open("rb") as file, theirs:
            sending = asyncio.create_task(loop.sendfile(transport, file, fallback=False))
            while len(received) < 2 << 20:
                received += await loop.sock_recv(theirs, 100_000)
            await sending
            transport.close()
            await asyncio.sleep(0)
        return received

    assert run_on("aiofastnet", play()) == bytes(1 << 20) + content
