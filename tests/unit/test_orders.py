"""Orders to the nodes of a fleet: who takes them, how often, what is heard, and who is believed."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fleet.members import Node
from proxy.fleet.orders import (
    LIFE,
    MOST_ORDERS,
    SKEW,
    FleetOrder,
    OrderBook,
    Seal,
    Word,
    check_wanted,
    chosen,
    place_of,
)
from proxy.oci.errors import RequestInvalid, TaskUnknown
from proxy.pull.order_results import MOST_NAMED, Part, Reported, image_of
from proxy.pull.taking_orders import TakingOrders, task_of
from proxy.pull.task import ImageResult, Order, Task, TaskState
from proxy.pull.tasks import new_id
from proxy.testing import FakeClock
from tests.unit.directory_kit import Asking, asking
from tests.unit.order_kit import SECRET, OrderNode, order_nodes, states_of
from tests.unit.redis_kit import Server, needs_redis, redis_server
from tests.unit.redis_kit import until as asked_until
from tests.unit.store_kit import silent
from tests.unit.test_task_table import FakeRows, FakeRunner, table

NODES = [Node(f"{n:016x}", f"n{n}", "ab"[n % 2], f"http://n{n}:1", "1") for n in range(12)]
NAMES = st.text("abc/:@", min_size=1, max_size=8)


class TestChoice:
    @given(NAMES, st.integers(1, 14), st.permutations(NODES))
    def test_the_same_nodes_are_chosen_for_the_same_image(
        self, image: str, count: int, mixed: list[Node]
    ) -> None:
        found = chosen(NODES, str(count), image)
        assert len(found) == min(count, len(NODES))
        assert chosen(mixed, str(count), image) == found
        again = [Node("f" * 16, one.name, one.zone, one.url, "2") for one in NODES]  # restarted
        assert {one.name for one in chosen(again, str(count), image)} == {o.name for o in found}

    @given(NAMES, st.integers(1, 11), st.integers(0, 11))
    def test_a_node_that_goes_moves_only_its_own_images(
        self, image: str, count: int, place: int
    ) -> None:
        left = [node for node in NODES if node is not NODES[place]]
        before = {node.name for node in chosen(NODES, str(count), image)}
        after = {node.name for node in chosen(left, str(count), image)}
        assert before - {NODES[place].name} <= after

    def test_images_are_spread(self) -> None:
        found = {chosen(NODES, "1", f"image-{n}")[0].name for n in range(200)}
        assert len(found) == len(NODES)

    def test_all_or_those_of_a_zone(self) -> None:
        assert chosen(NODES, "all", "x") == NODES
        assert chosen(NODES, "zone=a", "x") == NODES[::2]
        assert chosen(NODES, "zone=c", "x") == []

    @pytest.mark.parametrize("text", ["", "0", "-1", "some", "zone=", "zone", "ALL", "1.5", "3 "])
    def test_other_words_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match='nodes are "all"'):
            check_wanted(text)
        with pytest.raises(RequestInvalid):
            Order.parse({"kind": "prefetch", "images": ["a"], "nodes": text})


class TestSeal:
    def test_it_is_read_only_as_what_it_is_and_of_late(self) -> None:
        seal = Seal(SECRET)
        sealed = seal.seal(("order", "a"), {"x": 1}, 1000.0)
        assert seal.read(("order", "a"), sealed, 1000.0) == {"at": 1000.0, "x": 1}
        for about in (("order", "b"), ("report", "a"), ("order", "a", "")):
            assert seal.read(about, sealed, 1000.0) is None
        assert Seal(b"a guess").read(("order", "a"), sealed, 1000.0) is None
        for now in (1000.0 + LIFE + SKEW + 1, 1000.0 - SKEW - 1):
            assert seal.read(("order", "a"), sealed, now) is None

    @given(st.integers(0, 400), st.integers(1, 255))
    def test_no_changed_byte_goes_unseen(self, at: int, change: int) -> None:
        seal = Seal(SECRET)
        sealed = bytearray(seal.seal(("order", "a"), {"word": "do"}, 100.0))
        sealed[at % len(sealed)] ^= change
        assert seal.read(("order", "a"), bytes(sealed), 100.0) is None


def part(node: str, state: TaskState, *, is_gone: bool = False) -> Part:
    image = ImageResult("a", state, None, 2, 1, 10, 5)
    return Part(node, "", {0: image}, state, is_gone)


class TestSums:
    def test_what_is_gone_counts_only_if_it_was_done(self) -> None:
        good, gone = part("n1", TaskState.SUCCEEDED), part("n2", TaskState.RUNNING, is_gone=True)
        was = part("n3", TaskState.SUCCEEDED, is_gone=True)
        whole = image_of(0, "a", [good, gone, was])
        assert (whole.state, whole.bytes, whole.bytes_done) == (TaskState.SUCCEEDED, 20, 10)
        assert image_of(0, "a", [gone]).state is TaskState.FAILED

    def test_it_goes_on_while_one_does(self) -> None:
        states = [TaskState.FAILED, TaskState.PENDING]
        found = image_of(0, "a", [part(f"n{n}", state) for n, state in enumerate(states)])
        assert found.state is TaskState.RUNNING

    def test_the_nodes_that_failed_are_named_but_not_thousands_of_them(self) -> None:
        parts = [part(f"n{n:02}", TaskState.CANCELLED) for n in range(MOST_NAMED + 3)]
        error = image_of(0, "a", parts).error
        assert error is not None
        assert error[1].startswith("n00: it was cancelled there; n01: ")
        assert error[1].endswith("; and 3 nodes more")

    @given(st.lists(st.sampled_from(TaskState), max_size=5))
    def test_a_report_is_read_as_it_was_made(self, states: list[TaskState]) -> None:
        images = {n: ImageResult("", state, None, 3, 2, 1, 0) for n, state in enumerate(states)}
        reported = Reported(TaskState.RUNNING, images)
        assert Reported.read(reported.document()) == reported

    @pytest.mark.parametrize(
        "document", [{}, {"state": "X", "images": []}, {"state": "RUNNING", "images": [[1]]}]
    )
    def test_what_is_no_report_is_none(self, document: dict[str, Any]) -> None:
        assert Reported.read(document) is None

    def test_a_task_for_nodes_is_kept_with_them(self) -> None:
        result = part("n1", TaskState.SUCCEEDED).result()
        order = Order(("a",), nodes="2")
        task = Task("0" * 16, 1, order, 1.0, images=(ImageResult("a"),), nodes=(result,))
        assert Task.read("0" * 16, 1, task.text()) == task


@contextlib.asynccontextmanager
async def on_directory(path: Path) -> AsyncIterator[tuple[Asking, Server]]:
    async with redis_server(path) as server, asking(server.url) as ours:
        yield ours, server


async def order(node: OrderNode, nodes: str, *images: str) -> dict[str, Any]:
    return await node.tasks.add(new_id(), Order(images, nodes=nodes))


async def over_time(node: OrderNode, task: dict[str, Any], clock: FakeClock) -> dict[str, Any]:
    """The task when it is over; time runs fast."""
    waiting = asyncio.create_task(node.tasks.wait(task["id"], 600.0))
    while not waiting.done():
        clock.advance(1.0)
        await asyncio.sleep(0.03)
    return await waiting


def let_go(nodes: Sequence[OrderNode]) -> None:
    for node in nodes:
        node.work.go.set()


@needs_redis
class TestOrders:
    async def test_all_nodes_do_it_and_each_one_is_told(self, tmp_path: Path) -> None:
        async with on_directory(tmp_path) as (ours, server), order_nodes(ours, "n1", "n2") as nodes:
            task = await order(nodes[0], "all", "x", "y")
            document = await nodes[0].seen(task, "RUNNING", "n2")
            assert document["state"] == "RUNNING"
            let_go(nodes)
            ended = await nodes[0].tasks.wait(task["id"], 600.0)
            assert ended["state"] == "SUCCEEDED"
            assert [(n["node"], n["state"], n["bytes_done"]) for n in ended["by_node"]] == [
                ("n1", "SUCCEEDED", 20),
                ("n2", "SUCCEEDED", 20),
            ]
            assert (ended["bytes"], ended["bytes_done"]) == (40, 40)
            assert [node.work.begun for node in nodes] == [[("x", "y")]] * 2
            live = await nodes[0].book.live()
            assert live == {}
            assert await server.ask("ZCARD", "pp:{orders}:live") == 0

    async def test_each_image_has_nodes_of_its_own(self, tmp_path: Path) -> None:
        names, images = ("n1", "n2", "n3", "n4"), [f"image-{n}" for n in range(12)]
        async with on_directory(tmp_path) as (ours, _), order_nodes(ours, *names) as nodes:
            let_go(nodes)
            task = await order(nodes[0], "2", *images)
            ended = await nodes[0].tasks.wait(task["id"], 600.0)
            assert ended["state"] == "SUCCEEDED"
            begun = [image for node in nodes for one in node.work.begun for image in one]
            assert sorted(begun) == sorted(2 * images)
            again = await order(nodes[1], "2", f"{'hub.example.com'}/image-0")
            await nodes[1].tasks.wait(again["id"], 600.0)
            had = {n.node.name for n in nodes if any("image-0" in one for one in n.work.begun)}
            have = {n.node.name for n in nodes if ("hub.example.com/image-0",) in n.work.begun}
            assert have == had  # however it is written, and whoever is told

    async def test_a_zone_or_nobody(self, tmp_path: Path) -> None:
        names = ("a/n1", "b/n2", "b/n3")
        async with on_directory(tmp_path) as (ours, _), order_nodes(ours, *names) as nodes:
            let_go(nodes)
            task = await order(nodes[0], "zone=b", "x")
            ended = await nodes[0].tasks.wait(task["id"], 600.0)
            assert [node["node"] for node in ended["by_node"]] == ["n2", "n3"]
            assert [len(node.work.begun) for node in nodes] == [0, 1, 1]
            nobody = await order(nodes[0], "zone=c", "x")
            ended = await nodes[0].tasks.wait(nobody["id"], 600.0)
            assert ended["state"] == "FAILED"
            assert "'zone=c'" in ended["results"][0]["error"]["message"]

    async def test_what_fails_names_its_nodes(self, tmp_path: Path) -> None:
        async with on_directory(tmp_path) as (ours, _), order_nodes(ours, "n1", "n2") as nodes:
            let_go(nodes)
            task = await order(nodes[0], "all", "good", "bad")
            ended = await nodes[0].tasks.wait(task["id"], 600.0)
            assert [one["state"] for one in ended["results"]] == ["SUCCEEDED", "FAILED"]
            words = ended["results"][1]["error"]["message"]
            assert "n1: " in words
            assert "n2: " in words
            assert ended["by_node"][0]["error"].startswith("bad: ")

    async def test_many_of_them_do_not_wait_for_one_another(self, tmp_path: Path) -> None:
        """Each node brings one task at a time, and each has told the other more than that."""
        async with on_directory(tmp_path) as (ours, _), order_nodes(ours, "n1", "n2") as nodes:
            let_go(nodes)
            tasks = [
                (node, await order(node, "all", f"{node.node.name}-{n}"))
                for n in range(5)
                for node in nodes
            ]
            for node, task in tasks:
                assert (await node.tasks.wait(task["id"], 600.0))["state"] == "SUCCEEDED"

    async def test_cancelled_here_it_is_cancelled_there(self, tmp_path: Path) -> None:
        async with on_directory(tmp_path) as (ours, _), order_nodes(ours, "n1", "n2") as nodes:
            task = await order(nodes[0], "all", "x")
            await nodes[0].seen(task, "RUNNING", "n2")
            ended = await nodes[0].tasks.cancel(task["id"])
            assert ended["state"] == "CANCELLED"
            assert {one["state"] for one in ended["by_node"]} == {"CANCELLED"}
            for node in nodes:
                there = await node.tasks.wait(task_of(task["id"]), 600.0)
                assert there["state"] == "CANCELLED"

    async def test_one_that_is_cancelled_while_the_directory_is_down(self, tmp_path: Path) -> None:
        async with on_directory(tmp_path) as (ours, server), order_nodes(ours, "n1", "n2") as nodes:
            task = await order(nodes[0], "all", "x")
            await nodes[0].seen(task, "RUNNING", "n2")
            await server.kill()
            assert (await nodes[0].tasks.cancel(task["id"]))["state"] == "CANCELLED"
            assert (await nodes[1].tasks.get(task_of(task["id"])))["state"] == "RUNNING"
            await server.restart()
            there = await nodes[1].tasks.wait(task_of(task["id"]), 600.0)
            assert there["state"] == "CANCELLED"

    async def test_a_node_that_dies_is_told_as_gone_and_keeps_nobody(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with (
            on_directory(tmp_path) as (ours, _),
            order_nodes(ours, "n1", "n2", clock=clock) as nodes,
        ):
            task = await order(nodes[0], "all", "x")
            await nodes[0].seen(task, "RUNNING", "n2")
            nodes[0].work.go.set()
            await nodes[0].seen(task, "SUCCEEDED", "n1")
            await nodes[1].taking.__aexit__(None, None, None)
            nodes[1].leave()
            ended = await over_time(nodes[0], task, clock)
            assert ended["state"] == "SUCCEEDED"
            assert states_of(ended, "n2") == ["RUNNING", "GONE"]
            assert states_of(ended, "n1") == ["SUCCEEDED", "THERE"]

    async def test_a_node_that_is_started_again_goes_on_with_it(self, tmp_path: Path) -> None:
        async with on_directory(tmp_path) as (ours, _), order_nodes(ours, "n1") as [first]:
            async with OrderNode(ours, "n2", first.sight) as second:
                task = await order(first, "all", "x")
                await first.seen(task, "RUNNING", "n2")
            async with OrderNode(ours, "n2", first.sight, rows=second.rows) as again:
                let_go([first, again])
                ended = await first.tasks.wait(task["id"], 600.0)
                assert ended["state"] == "SUCCEEDED"
                assert [one["id"] for one in await again.newest()] == [task_of(task["id"])]

    async def test_the_node_that_was_told_may_be_started_again(self, tmp_path: Path) -> None:
        async with on_directory(tmp_path) as (ours, _), order_nodes(ours, "n1") as [first]:
            async with OrderNode(ours, "n2", first.sight) as told:
                task = await order(told, "all", "x")
                await told.seen(task, "RUNNING", "n1")
            async with OrderNode(ours, "n2", first.sight, rows=told.rows) as again:
                let_go([first, again])
                ended = await again.tasks.wait(task["id"], 600.0)
                assert ended["state"] == "SUCCEEDED"
                assert first.work.begun == [("x",)]

    async def test_a_node_with_another_secret_fails_it_in_time(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with (
            on_directory(tmp_path) as (ours, _),
            order_nodes(ours, "n1", clock=clock) as [first],
            OrderNode(ours, "n2", first.sight, clock=clock, secret=b"x" * 20) as deaf,
        ):
            let_go([first])
            task = await order(first, "all", "x")
            await first.seen(task, "SUCCEEDED", "n1")
            ended = await over_time(first, task, clock)
            assert ended["state"] == "FAILED"
            assert "n2: it does not answer" in ended["results"][0]["error"]["message"]
            assert not deaf.work.begun

    async def test_without_a_directory_it_waits_and_says_so(self, tmp_path: Path) -> None:
        async with on_directory(tmp_path) as (ours, server), order_nodes(ours, "n1", "n2") as nodes:
            await server.kill()
            task = await order(nodes[0], "all", "x")
            note = "waits: the fleet's directory does not answer"

            async def waits() -> bool:
                document = await nodes[0].tasks.get(task["id"])
                return str(document["note"]).startswith(note)

            await asked_until(waits)
            let_go(nodes)
            await server.restart()
            ended = await nodes[0].tasks.wait(task["id"], 600.0)
            assert (ended["state"], ended["note"]) == ("SUCCEEDED", None)

    async def test_a_directory_that_forgets_all_loses_nothing(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with (
            on_directory(tmp_path) as (ours, server),
            order_nodes(ours, "n1", "n2", clock=clock) as nodes,
        ):
            task = await order(nodes[0], "all", "x")
            await nodes[0].seen(task, "RUNNING", "n2")
            await server.flush()
            let_go(nodes)
            assert (await over_time(nodes[0], task, clock))["state"] == "SUCCEEDED"
            assert [node.work.begun for node in nodes] == [[("x",)]] * 2

    async def test_a_late_do_does_not_undo_a_cancel(self, tmp_path: Path) -> None:
        async with on_directory(tmp_path) as (ours, _):
            book = OrderBook(ours.directory, secret=SECRET, wall=FakeClock())
            id = new_id()
            assert await book.give(FleetOrder(id, Word.CANCEL, {}, {}))
            assert await book.give(FleetOrder(id, Word.DO, {}, {}))
            found = await book.read(id)
            assert found is not None
            assert found.word is Word.CANCEL

    async def test_there_are_only_so_many_and_they_end(self, tmp_path: Path) -> None:
        async with on_directory(tmp_path) as (ours, server):
            book = OrderBook(ours.directory, secret=SECRET, wall=FakeClock())
            ids = [new_id() for _ in range(MOST_ORDERS)]
            for id in ids:
                assert await book.give(FleetOrder(id, Word.DO, {}, {}))
            assert not await book.give(FleetOrder(new_id(), Word.DO, {}, {}))
            assert await book.give(FleetOrder(ids[0], Word.DO, {}, {}))  # it is there already
            await server.ask("ZADD", "pp:{orders}:live", 1, ids[5])  # its time is over
            assert await book.give(FleetOrder(new_id(), Word.DO, {}, {}))
            assert ids[5] not in await book.live()
            for key in await server.ask("KEYS", "*"):
                assert 0 < await server.ask("PTTL", key) <= 2 * LIFE * 1000


class Forgetful:
    """A table that knows no task any more."""

    def __init__(self) -> None:
        self.added = list[str]()

    async def add(self, id: str, order: Order) -> dict[str, Any]:
        self.added.append(id)
        return order.document()

    async def get(self, id: str) -> dict[str, Any]:
        raise TaskUnknown

    async def cancel(self, id: str) -> dict[str, Any]:
        raise TaskUnknown


@needs_redis
class TestStolenDirectory:
    """Who can write to the directory cannot make nodes do anything."""

    async def test_an_order_that_no_node_has_given_is_not_taken(self, tmp_path: Path) -> None:
        async with on_directory(tmp_path) as (ours, _), order_nodes(ours, "n1") as [node]:
            forger = OrderBook(ours.directory, secret=b"a guess", wall=time.time)
            work = Order(("x",)).document()
            id = new_id()
            await forger.give(FleetOrder(id, Word.DO, {place_of(node.node): None}, work))
            await node.taking.round()
            await node.taking.round()
            assert await node.newest() == []
            # Nor what was sealed for another order.
            let_go([node])
            task = await order(node, "all", "y")
            await node.tasks.wait(task["id"], 600.0)
            assert node.work.begun == [("y",)]

    async def test_an_old_order_that_is_shown_again_does_nothing_twice(
        self, tmp_path: Path
    ) -> None:
        async with on_directory(tmp_path) as (ours, server), order_nodes(ours, "n1") as [node]:
            task = await order(node, "all", "x")
            await node.seen(task, "RUNNING", "n1")
            sealed = await server.ask("HGET", "pp:{orders}:sealed", task["id"])
            node.work.go.set()
            await node.tasks.wait(task["id"], 600.0)
            other = new_id()
            for id in (task["id"], other):  # as it was, and under another name
                await server.ask("ZADD", "pp:{orders}:live", 2**52, id)
                await server.ask("HSET", "pp:{orders}:marks", id, "again")
                await server.ask("HSET", "pp:{orders}:sealed", id, sealed)
            for _ in range(3):
                await node.taking.round()
            assert node.work.begun == [("x",)]
            assert len(await node.newest()) == 2  # the task, and that of its order

    async def test_nor_does_it_when_the_table_has_forgotten_its_task(self, tmp_path: Path) -> None:
        async with on_directory(tmp_path) as (ours, server):
            book, table = OrderBook(ours.directory, secret=SECRET, wall=time.time), Forgetful()
            taking = TakingOrders(book, "here", table, clock=FakeClock(), log=silent())
            id = new_id()
            await book.give(FleetOrder(id, Word.DO, {"here": None}, Order(("x",)).document()))
            await taking.round()
            for mark in ("again", "and again"):
                await server.ask("HSET", "pp:{orders}:marks", id, mark)
                await taking.round()
            assert table.added == [task_of(id)]

    async def test_a_forged_end_or_report_is_not_believed(self, tmp_path: Path) -> None:
        async with on_directory(tmp_path) as (ours, _), order_nodes(ours, "n1") as [node]:
            task = await order(node, "all", "x")
            await node.seen(task, "RUNNING", "n1")
            forger = OrderBook(ours.directory, secret=b"a guess", wall=time.time)
            done = Reported(TaskState.SUCCEEDED, {0: ImageResult("x", TaskState.SUCCEEDED)})
            await forger.report(task["id"], place_of(node.node), done.document())
            await forger.give(FleetOrder(task["id"], Word.CANCEL, {}, {}))
            for _ in range(3):
                await node.taking.round()
            assert (await node.tasks.get(task["id"]))["state"] == "RUNNING"
            assert (await node.tasks.get(task_of(task["id"])))["state"] == "RUNNING"

    async def test_what_is_there_does_not_hold_the_loop_up(self, tmp_path: Path) -> None:
        """Whatever stands in the keys, the next good order is taken."""
        async with on_directory(tmp_path) as (ours, server), order_nodes(ours, "n1") as [node]:
            let_go([node])
            for id in ("x", b"\xff" * 16, "0" * 16):
                await server.ask("ZADD", "pp:{orders}:live", 2**52, id)
                await server.ask("HSET", "pp:{orders}:sealed", id, b"\xff" * 40)
            await node.taking.round()
            task = await order(node, "all", "x")
            await server.ask("HSET", f"pp:{{order {task['id']}}}:reports", b"\xff", b"\xff" * 33)
            assert (await node.tasks.wait(task["id"], 600.0))["state"] == "SUCCEEDED"


async def test_a_server_without_a_fleet_refuses_it() -> None:
    async with table(FakeRows(), FakeRunner()) as tasks:
        with pytest.raises(RequestInvalid, match=r"set fleet\.directory and fleet\.secret"):
            await tasks.add(new_id(), Order(("a",), nodes="all"))
        assert tasks.counts()["PENDING"] == 0
