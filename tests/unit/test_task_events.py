"""What becomes of tasks, as events: who listens, leaves, is slow, and comes back."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from proxy.cli.task_client import Event, events
from proxy.config import HostPort
from proxy.oci.errors import Overloaded, ShuttingDown, TaskUnknown
from proxy.pull.task import Document, Order, TaskState
from proxy.pull.task_news import MAX_BEHIND, MAX_LISTENERS, Listener, Listeners, News, Watch
from proxy.web.tasks import TaskPages, framed
from tests.unit.proxy_kit import IMAGE, NAME, RawClient, Served, until
from tests.unit.task_kit import ask, done, listening, over, prefetch

TAG = f"{NAME}:v1"


def listeners(served: Served) -> int:
    return len(served[0].proxy.tasks._listeners)


async def test_a_task_is_told_from_its_order_to_its_end(served: Served) -> None:
    pool, fake = served
    async with listening(pool) as listener:
        assert listener.response.headers["Content-Type"] == "text/event-stream"
        assert listener.response.headers["Cache-Control"] == "no-store"
        with fake.hold(kind="blob") as hold:
            task = await prefetch(pool, TAG)
            await hold.arrived(len(IMAGE.blobs))
            while True:
                event = await listener.event()
                assert event is not None
                said = json.loads(event.data)
                assert (event.kind, said["id"]) == ("task", task["id"])
                if said["blobs"]:
                    break
            assert (said["state"], said["bytes"], said["bytes_done"]) == ("RUNNING", IMAGE.size, 0)
        while said["state"] == "RUNNING":
            event = await listener.event()
            assert event is not None
            said = json.loads(event.data)
        assert said == await over(pool, task)
        assert said["state"] == "SUCCEEDED"


async def test_who_comes_late_hears_how_everything_is(served: Served) -> None:
    pool, _ = served
    tasks = [await done(pool, TAG) for _ in range(3)]
    async with listening(pool) as listener:
        for task in tasks:
            event = await listener.event()
            assert event is not None
            assert json.loads(event.data) == task
        # Only with the last one everything is said: who is cut off before hears all again.
        assert [bool(event.id) for event in listener.heard] == [False, False, True]


async def test_who_comes_back_hears_what_has_changed(served: Served) -> None:
    pool, _ = served
    await done(pool, TAG)
    async with listening(pool) as listener:
        await listener.event()
    second = await done(pool, TAG)
    async with listening(pool, last=listener.last) as listener:
        event = await listener.event()
        assert event is not None
        assert json.loads(event.data) == second
    async with listening(pool, last="another.7") as listener:
        first = [await listener.event() for _ in range(2)]
        assert len({json.loads(event.data)["id"] for event in first if event}) == 2


async def test_one_who_listens_to_one_task_hears_of_no_other(served: Served) -> None:
    pool, fake = served
    with fake.hold(kind="blob") as hold:
        wanted = await prefetch(pool, TAG)
        await hold.arrived()
        async with listening(pool, f"?task={wanted['id']}") as listener:
            other = await prefetch(pool, TAG)
            await ask(pool, "DELETE", f"/{other['id']}")
            await ask(pool, "DELETE", f"/{wanted['id']}")
            while (event := await listener.event()) is not None:
                said = json.loads(event.data)
                assert said["id"] == wanted["id"]
                if said["state"] == "CANCELLED":
                    break


async def test_who_leaves_is_forgotten_at_once(served: Served) -> None:
    async with listening(served[0]):
        await until(lambda: listeners(served) == 1)
    await until(lambda: not listeners(served))


async def test_the_drain_ends_the_stream_with_a_word(served: Served) -> None:
    pool, _ = served
    async with listening(pool) as listener:
        pool.proxy.drain()
        event = await listener.event()
        assert event is not None
        assert event.kind == "end"
        assert json.loads(event.data) == {"reason": "this proxy is shutting down"}
        assert await listener.event() is None
    assert not listeners(served)


async def test_silence_is_broken_by_comments() -> None:
    board = FakeBoard()
    async with serving(TaskPages(board, host="127.0.0.1", keep_alive=0.01)) as url:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/api/v1/events") as got:
            text = b""
            while text.count(b": nothing new\n\n") < 3:
                text += await got.content.readany()
        assert text.startswith(b"retry: 2000\n\n")
    assert board.listeners == 0


async def test_one_who_takes_nothing_is_cut_off() -> None:
    """His socket is full: no word can reach him any more, so the body has no end."""
    board = FakeBoard(endless=True)
    async with serving(TaskPages(board, host="127.0.0.1", stuck=0.05)) as url:
        port = int(url.rpartition(":")[2])
        async with RawClient.connected(HostPort("127.0.0.1", port), receive_buffer=4096) as client:
            await client.send("GET /api/v1/events HTTP/1.1\nHost: 127.0.0.1\n\n")
            await until(lambda: board.told > 0)
            await until(lambda: board.listeners == 0)
            await client.ending()
            assert not client.received.endswith(b"0\r\n\r\n")


class FakeWatch:
    """Says nothing, or the same again and again."""

    def __init__(self, board: "FakeBoard") -> None:
        self._board = board

    async def next(self) -> News | None:
        if not self._board.endless:
            await asyncio.get_running_loop().create_future()
        self._board.told += 1
        return News("", "task", {"a": "b" * 100_000})

    def close(self) -> None:
        self._board.listeners -= 1


class FakeBoard:
    """A board to which one can only listen."""

    def __init__(self, *, endless: bool = False) -> None:
        self.endless = endless
        self.told = 0
        self.listeners = 0

    async def watch(self, last: str | None, only: str | None) -> Watch:
        self.listeners += 1
        return FakeWatch(self)

    async def add(self, id: str, order: Order) -> Document:
        raise TaskUnknown

    async def newest(self, state: TaskState | None, most: int) -> Document:
        raise TaskUnknown

    async def get(self, id: str) -> Document:
        raise TaskUnknown

    async def wait(self, id: str, seconds: float) -> Document:
        raise TaskUnknown

    async def cancel(self, id: str) -> Document:
        raise TaskUnknown


@contextlib.asynccontextmanager
async def serving(pages: TaskPages) -> AsyncIterator[str]:
    """The pages alone, where they are served as the admin listener does it."""
    app = web.Application()
    app.add_routes(pages.routes())
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class TestListener:
    """The queue of one listener."""

    async def test_a_task_that_changes_often_is_told_once(self) -> None:
        said: dict[str, Document] = {"a": {"n": 1}}
        listener = a_listener(said)
        for n in range(1000):
            said["a"] = {"n": n}
            listener.changed("a")
        assert await listener.next() == News("m", "task", {"n": 999})
        waiting = asyncio.ensure_future(listener.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        listener.changed("a")
        assert (await waiting) is not None

    async def test_a_slow_one_is_let_go_with_a_word(self) -> None:
        listener = a_listener({str(n): {} for n in range(MAX_BEHIND + 1)})
        for n in range(MAX_BEHIND):
            listener.changed(str(n))
        assert (await listener.next()) == News("", "task", {})
        listener.changed("0")
        listener.changed(str(MAX_BEHIND))
        assert await listener.next() == News("", "end", {"reason": "you listen too slowly"})
        assert await listener.next() is None

    async def test_what_it_is_to_hear_first_makes_nobody_slow(self) -> None:
        many = [str(n) for n in range(5 * MAX_BEHIND)]
        listener = Listener(
            many, only=None, tell=lambda _: {}, mark=lambda: "m", on_close=lambda _: None
        )
        for task in many:
            listener.changed(task)
            assert await listener.next() is not None

    async def test_a_task_that_was_forgotten_is_left_out(self) -> None:
        listener = a_listener({"b": {}})
        listener.changed("a")
        listener.changed("b")
        assert await listener.next() == News("m", "task", {})

    async def test_a_cancelled_wait_loses_nothing(self) -> None:
        listener = a_listener({"a": {}})
        waiting = asyncio.ensure_future(listener.next())
        await asyncio.sleep(0)
        listener.changed("a")
        waiting.cancel()
        await asyncio.wait([waiting])
        assert await listener.next() == News("m", "task", {})

    async def test_there_are_so_many_at_most(self) -> None:
        table = Listeners()

        def add() -> Listener:
            return table.add([], only=None, tell=lambda _: None, mark=lambda: "m")

        all_of_them = [add() for _ in range(MAX_LISTENERS)]
        with pytest.raises(Overloaded):
            add()
        all_of_them[0].close()
        all_of_them[0].close()
        add()
        table.stop()
        with pytest.raises(ShuttingDown):
            await all_of_them[1].next()


def a_listener(said: dict[str, Document]) -> Listener:
    return Listener([], only=None, tell=said.get, mark=lambda: "m", on_close=lambda _: None)


class TestFrames:
    def test_an_event_is_read_as_it_was_written(self) -> None:
        document = {"image": 'a"\n\r\n\u2028ü', "n": 1}
        [event] = events(framed(News("e.1", "task", document)).splitlines(keepends=True))
        assert (event.kind, event.id, json.loads(event.data)) == ("task", "e.1", document)

    def test_comments_and_unknown_fields_are_left_out_and_an_id_stays(self) -> None:
        text = b": hello\n\nid: 7\ndata: a\ndata:b\n\nretry: 3\nevent: x\ndata: c\n\ndata: cut"
        found = list(events(text.splitlines(keepends=True)))
        assert found == [Event("message", "a\nb", "7"), Event("x", "c", "7")]
