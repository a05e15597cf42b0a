"""Who is in the fleet: nodes say so, are listed, and are gone when they say so no more."""

import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fleet.members import Load, Members, Node, new_id
from proxy.observe.metrics import Metrics
from proxy.oci.errors import DirectoryDown
from proxy.testing import FakeClock
from tests.unit.directory_kit import SHORT, Asking, asking
from tests.unit.redis_kit import Server, needs_redis, redis_server, until

EXPIRY = 0.5


def node(name: str, **more: str) -> Node:
    return Node(new_id(), name, more.get("zone", ""), f"http://{name}:5052", "1.0")


@contextlib.asynccontextmanager
async def joined(
    ours: Asking,
    name: str,
    *,
    load: Load | None = None,
    clock: FakeClock | None = None,
    beat: float = EXPIRY / 5,
) -> AsyncIterator[Members]:
    members = Members(
        ours.directory,
        node(name),
        load=lambda: load or Load(),
        metrics=Metrics(),
        clock=clock or FakeClock(),
        chance=random.Random(1),
        beat=beat,
        expiry=EXPIRY,
    )
    async with members:
        yield members


async def sees(members: Members, *names: str) -> None:
    """Wait until it sees just these."""

    async def so() -> bool:
        try:
            return [one.name for one in await members.look()] == list(names)
        except DirectoryDown:
            return False

    await until(so)


def text(words: str) -> bytes:
    return words.encode()


class TestWords:
    def test_what_a_node_says_is_heard(self) -> None:
        said = Node(new_id(), "n1", "a", "http://n1:5052", "1.0", Load(7, 3))
        assert Node.heard(said.id, text(said.said())) == said

    @pytest.mark.parametrize(
        "words",
        [
            "",
            "[]",
            "{",
            "null",
            '{"name": "n"}',
            '{"name":"n","zone":"","url":"u","version":"1","load":7}',
            '{"name":"n","zone":"","url":"u","version":"1","load":{"lending":1e999,"flights":0}}',
            '{"name":7,"zone":"","url":"u","version":"1","load":{"lending":0,"flights":0}}',
            '{"name":"n","zone":"","url":"u","version":"1","more":1,'
            '"load":{"lending":0,"flights":0}}',
        ],
    )
    def test_what_no_node_says_is_passed_over(self, words: str) -> None:
        assert Node.heard("1", text(words)) is None

    @given(st.binary(max_size=60))
    def test_nothing_that_a_directory_holds_can_break_a_node(self, words: bytes) -> None:
        assert Node.heard("1", words) is None

    def test_ids_are_sixteen_digits_and_differ(self) -> None:
        first, second = new_id(), new_id()
        assert first != second
        assert len(bytes.fromhex(first)) == 8


@needs_redis
class TestBeats:
    async def test_nodes_see_one_another_with_what_they_bear(self, tmp_path: Path) -> None:
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            async with joined(ours, "n1") as first, joined(ours, "n2", load=Load(9, 2)) as second:
                await sees(first, "n1", "n2")
                assert first.known[1].load == Load(9, 2)
                assert first.known[1].id == second.node.id
                assert first.as_of == 0.0
            # Who ends takes itself out at once.
            assert await server.ask("ZCARD", "pp:{members}:beats") == 0
            assert await server.ask("EXISTS", "pp:{members}:nodes") == 0

    async def test_a_node_that_dies_is_missed_and_taken_out(self, tmp_path: Path) -> None:
        async with (
            redis_server(tmp_path) as server,
            asking(server.url) as ours,
            joined(ours, "n1") as first,
            joined(ours, "n2") as second,
        ):
            await sees(first, "n1", "n2")
            await second.stop()  # without a word
            await sees(first, "n1")
            await first.beat()
            assert await server.ask("HGET", "pp:{members}:nodes", second.node.id) is None
            assert await server.ask("HEXISTS", "pp:{members}:nodes", first.node.id) == 1

    async def test_a_directory_that_forgets_everybody_knows_them_after_a_beat(
        self, tmp_path: Path
    ) -> None:
        async with (
            redis_server(tmp_path) as server,
            asking(server.url) as ours,
            joined(ours, "n1") as first,
            joined(ours, "n2"),
        ):
            await sees(first, "n1", "n2")
            await server.flush()
            await sees(first, "n1", "n2")
            await server.restart()
            await sees(first, "n1", "n2")

    async def test_a_directory_keeps_its_epoch_until_it_forgets_everybody(
        self, tmp_path: Path
    ) -> None:
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            async with joined(ours, "n1") as first, joined(ours, "n2") as second:
                epoch = await first.turned("")
                assert await second.turned("") == epoch
                await first.beat()
                assert first.epoch == epoch
                await server.flush()
                other = await first.turned(epoch)
                assert other != epoch
                assert await second.turned(epoch) == other
                await sees(first, "n1", "n2")
                await first.beat()
                assert first.count == 2
            async with joined(ours, "n3") as third:  # the others have left: it is the same
                assert await third.turned("") == other
            assert await server.ask("PTTL", "pp:{members}:epoch") > 0

    async def test_those_who_have_not_beaten_at_a_new_directory_yet_are_counted(
        self, tmp_path: Path
    ) -> None:
        """Else the first of thousands would take themselves for few, and ask like few."""
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            first, second = [
                Members(ours.directory, node(name), metrics=Metrics(), expiry=600)
                for name in ("n1", "n2")
            ]
            for one in (first, second, first):
                await one.beat()
            assert first.count == 2
            await server.flush()
            await first.beat()
            assert (first.count, ours.directory.nodes) == (2, 2)
            await first.beat()  # who is silent now has gone
            assert (first.count, ours.directory.nodes) == (1, 1)

    async def test_while_the_directory_is_away_the_last_list_stands(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with (
            redis_server(tmp_path) as server,
            asking(server.url, answer_timeout=SHORT, connect_timeout=SHORT) as ours,
            joined(ours, "n1", clock=clock) as first,
            joined(ours, "n2"),
        ):
            await sees(first, "n1", "n2")
            server.pause()
            await ours.fails()
            clock.advance(100.0)
            assert [one.name for one in first.known] == ["n1", "n2"]
            assert first.as_of == 100.0
            status = first.status()
            assert status["directory"]["up"] is False
            assert status["directory"]["error"]
            assert len(status["nodes"]) == 2
            server.resume()
            await sees(first, "n1", "n2")

    async def test_a_large_fleet_reads_its_list_rarely(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            others = [node(f"x{n}") for n in range(50)]
            async with joined(ours, "n1", clock=clock, beat=3600.0) as first:
                await sees(first, "n1")
                for other in others:
                    words = [str(10**15), other.id]
                    await server.ask("ZADD", "pp:{members}:beats", *words)
                    await server.ask("HSET", "pp:{members}:nodes", other.id, other.said())
                await first.beat()
                assert len(first.known) == 1  # 51 nodes: every 5.1 s
                clock.advance(5.0)
                await first.beat()
                assert len(first.known) == 1
                clock.advance(0.2)
                await first.beat()
                assert len(first.known) == 51

    async def test_a_node_begins_and_ends_while_there_is_no_directory(self, tmp_path: Path) -> None:
        server = Server(tmp_path)
        async with asking(server.url, wait=False) as ours, joined(ours, "n1") as first:
            await ours.fails()
            assert [one.name for one in first.known] == ["n1"]
            assert first.status()["as_of"] is None
