"""Workers as a benchmark sees them: their rate, whose a connection is, the death of a leader."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.board import Board, Played
from benchmarks.load import Answer
from benchmarks.takeover import CONNECTIONS, FAST, Log, Pulled, Scene, figures_of, holder, promises
from benchmarks.takeover import pull as pull_over
from benchmarks.upstreams import Tally
from benchmarks.workers import steady_rate
from proxy.testing import Cut, FakeRegistry, Fault
from tests.unit.fake_kit import IMAGE, LAYER

PATH = f"/v2/{IMAGE.name}/blobs/{LAYER.digest}"


def answer(client: int, ended: float, size: int) -> Answer:
    return Answer(client, "blob", 200, "", size, 0.0, 0.0, ended)


def test_a_rate_is_that_until_the_first_client_has_had_all_it_wants() -> None:
    # The second client is alone from 2 s on; what it has begun by then is not counted either.
    quick = [answer(0, 1.0, 100), answer(0, 2.0, 100)]
    slow = [answer(1, 1.5, 100), answer(1, 3.0, 100)]
    assert steady_rate([*quick, *slow]) == 150


@contextmanager
def listening() -> Iterator[tuple[socket.socket, http.client.HTTPConnection]]:
    """A listener on loopback, and a connection to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1])
        with closing(connection):
            connection.connect()
            yield listener, connection


def test_a_connection_is_at_the_process_that_has_accepted_it() -> None:
    with listening() as (listener, connection):
        assert holder(connection, os.getpid()) is None  # it waits in the queue
        accepted, _ = listener.accept()
        with accepted:
            assert holder(connection, os.getpid()) == os.getpid()


def test_a_connection_may_be_at_a_child_of_the_process() -> None:
    wait = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with listening() as (listener, connection):
        accepted, _ = listener.accept()
        with accepted, subprocess.Popen(wait, stdin=accepted.fileno()) as child:
            accepted.close()
            found = holder(connection, os.getpid())
            connection.sock.shutdown(socket.SHUT_WR)  # it ends, whatever was found
            assert found == child.pid


async def pull(registry: FakeRegistry) -> Pulled:
    connection = http.client.HTTPConnection(registry.host, registry.port)
    with closing(connection):
        return await asyncio.to_thread(pull_over, connection, PATH)


async def test_a_client_tells_what_came_and_when() -> None:
    async with FakeRegistry() as registry:
        registry.push(IMAGE)
        pulled = await pull(registry)
    assert (pulled.size, pulled.digest) == (LAYER.size, str(LAYER.digest))
    moments = [moment for moment, _ in pulled.progress]
    assert moments == sorted(moments)


async def test_a_pull_that_breaks_off_is_neither_whole_nor_right() -> None:
    async with FakeRegistry() as registry:
        registry.push(IMAGE)
        registry.script(Fault(Cut(after=100)))
        pulled = await pull(registry)
    assert pulled.size <= 100
    assert pulled.digest != str(LAYER.digest)


def log(directory: Path, *lines: tuple[float, str, int]) -> Log:
    """A log of such events, each with a number; its last line is still being written."""
    path = directory / "pullpool.out"
    rows = [
        json.dumps(
            {
                "event": event,
                "at": at,
                "timestamp": datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z"),
            }
        )
        for moment, event, at in lines
    ]
    path.write_text("\n".join(["not JSON", *rows, '{"event": "serv']))
    return Log(path)


BOTH_SERVE = ((1.0, "leads", 0), (2.0, "serving", 0), (3.0, "serving", 0))
TAKEN = ((10.5, "leads", 0), (11.0, "fill_taken_over", 300), (12.0, "serving", 0))


@pytest.mark.parametrize(
    ("came", "goes_on"),
    [
        # Late with what the old leader had: that is not yet what the new one brings.
        (((9.0, 100), (10.9, 200), (11.5, 300), (13.0, 400)), 3.0),
        # Ahead of what counts: what had come by then does not count either.
        (((9.0, 350), (10.9, 390), (11.5, 400)), 1.5),
    ],
)
def test_a_stream_goes_on_with_the_first_byte_that_the_dead_one_had_not_passed_on(
    tmp_path: Path, came: tuple[tuple[float, int], ...], goes_on: float
) -> None:
    values = figures_of(10.0, log(tmp_path, *BOTH_SERVE, *TAKEN), Pulled("", came), TALLY)
    assert values["goes_on"] == pytest.approx(goes_on)
    assert values["leads"] == pytest.approx(0.5)
    assert values["whole"] == pytest.approx(2.0)
    assert values["upstream"] == pytest.approx(1.25)
    assert values["refused"] == 3


TALLY = Tally(requests=9, refused=3, size=500, peak=None)


def test_a_service_is_whole_when_another_leads_and_the_dead_one_is_replaced(tmp_path: Path) -> None:
    assert not log(tmp_path, *BOTH_SERVE).is_whole
    assert not log(tmp_path, *BOTH_SERVE, *TAKEN[:2]).is_whole
    assert log(tmp_path, *BOTH_SERVE, *TAKEN).is_whole


def test_a_pull_that_fails_breaks_its_promise_and_none_that_was_not_measured() -> None:
    board = Board({"pullpool": "pullpool"}, {"pullpool": [Played({"failed": 1})]})
    (promise,) = promises(Scene(CONNECTIONS[0], FAST, board, ""))
    assert (promise.what, promise.kept) == ("takeover, cap 1: pulls that failed", False)
