"""What an upstream said, told once to the fleet: who asks, who is told, and who is not believed."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fleet.tags import MOST, SKEW, Sealer, SharedTags, Told, Where
from proxy.oci.digest import Digest
from tests.unit.directory_kit import Asking, asking
from tests.unit.redis_kit import Server, needs_redis, redis_server

QUESTION = ("hub.example.com", "team/app", "v1")
OTHER = ("hub.example.com", "team/app", "v2")
DIGEST = Digest.of(b"a manifest")
TOLD = Told(DIGEST, "application/vnd.oci.image.manifest.v1+json", 10)
SECRET = b"the fleet's secret"
TTL = 30.0


class Wall:
    """Wall-clock time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Node(SharedTags):
    """A node with a clock of its own."""

    def __init__(self, ours: Asking, name: str, wall: Wall, secret: bytes = SECRET) -> None:
        super().__init__(ours.directory, node=name, secret=secret, wall=wall, chance=lambda: 0.0)


@asynccontextmanager
async def two_nodes(directory: Path) -> AsyncIterator[tuple[Node, Node, Server, Wall]]:
    wall = Wall()
    async with redis_server(directory) as server, asking(server.url) as ours:
        yield Node(ours, "one", wall), Node(ours, "two", wall), server, wall


class TestSeal:
    def test_what_was_sealed_is_read_with_its_age(self) -> None:
        sealer = Sealer(SECRET)
        sealed = sealer.seal(QUESTION, Told(DIGEST, "type", 10, Where("a", "http://a"), 2.0), 100.0)
        read = sealer.read(QUESTION, sealed, 105.0, TTL)
        assert read == Told(DIGEST, "type", 10, Where("a", "http://a"), 7.0)

    def test_an_answer_to_another_question_is_none(self) -> None:
        sealer = Sealer(SECRET)
        assert sealer.read(OTHER, sealer.seal(QUESTION, TOLD, 100.0), 100.0, TTL) is None

    def test_who_has_another_secret_is_not_believed(self) -> None:
        sealed = Sealer(b"another").seal(QUESTION, TOLD, 100.0)
        assert Sealer(SECRET).read(QUESTION, sealed, 100.0, TTL) is None

    @pytest.mark.parametrize("later", [TTL + SKEW + 1, -SKEW - 1])
    def test_an_answer_of_another_time_is_none(self, later: float) -> None:
        sealer = Sealer(SECRET)
        sealed = sealer.seal(QUESTION, TOLD, 1000.0)
        assert sealer.read(QUESTION, sealed, 1000.0 + later, TTL) is None

    @given(st.binary(max_size=2 * MOST))
    def test_no_bytes_that_nobody_sealed_are_read(self, data: bytes) -> None:
        assert Sealer(SECRET).read(QUESTION, data, 0.0, TTL) is None

    @given(st.integers(0, 400), st.integers(1, 255))
    def test_no_changed_byte_goes_unseen(self, at: int, change: int) -> None:
        sealer = Sealer(SECRET)
        sealed = bytearray(sealer.seal(QUESTION, TOLD, 100.0))
        sealed[at % len(sealed)] ^= change
        assert sealer.read(QUESTION, bytes(sealed), 100.0, TTL) is None


@needs_redis
class TestTelling:
    async def test_the_first_asks_and_the_second_is_told(self, tmp_path: Path) -> None:
        async with two_nodes(tmp_path) as (one, two, _, _):
            assert await one.learn(QUESTION, TTL) is None
            waiting = asyncio.create_task(two.learn(QUESTION, TTL))
            await one.tell(QUESTION, TOLD, TTL)
            assert await waiting == TOLD

    async def test_who_has_nothing_to_tell_lets_another_ask_at_once(self, tmp_path: Path) -> None:
        async with two_nodes(tmp_path) as (one, two, server, _):
            assert await one.learn(QUESTION, TTL) is None
            await one.leave(QUESTION)
            assert await two.learn(QUESTION, TTL) is None
            assert await server.ask("DBSIZE") == 1  # the claim of the second

    async def test_a_claim_of_another_is_not_taken_back(self, tmp_path: Path) -> None:
        async with two_nodes(tmp_path) as (one, two, server, _):
            await one.learn(QUESTION, TTL)
            await two.leave(QUESTION)
            assert await server.ask("DBSIZE") == 1

    async def test_an_answer_ages_by_the_wall_and_ends_with_its_ttl(self, tmp_path: Path) -> None:
        async with two_nodes(tmp_path) as (one, two, _, wall):
            await one.tell(QUESTION, TOLD, TTL)
            wall.now += 12
            told = await two.learn(QUESTION, TTL)
            assert told is not None
            assert told.age == 12
            wall.now += TTL + SKEW
            assert await two.learn(QUESTION, TTL) is None

    async def test_an_answer_that_is_as_old_as_it_may_be_is_not_told(self, tmp_path: Path) -> None:
        async with two_nodes(tmp_path) as (one, two, _, _):
            await one.learn(QUESTION, TTL)
            await one.tell(QUESTION, Told(DIGEST, "type", 1, age=TTL), TTL)
            assert await two.learn(QUESTION, TTL) is None

    async def test_an_answer_that_was_asked_for_before_does_not_replace_a_later_one(
        self, tmp_path: Path
    ) -> None:
        async with two_nodes(tmp_path) as (one, two, _, _):
            moved = Told(Digest.of(b"where the tag is now"), "type", 1)
            await one.tell(QUESTION, moved, TTL)
            await two.tell(QUESTION, replace(TOLD, age=5.0), TTL)
            told = await two.learn(QUESTION, TTL)
            assert told is not None
            assert told.digest == moved.digest

    async def test_what_is_put_there_by_who_has_no_secret_is_ignored(self, tmp_path: Path) -> None:
        async with two_nodes(tmp_path) as (one, two, server, wall):
            await one.tell(QUESTION, TOLD, TTL)
            (key,) = await server.ask("KEYS", "*told")
            forged = Sealer(b"a guess").seal(QUESTION, TOLD, wall.now)
            await server.ask("SET", key, forged)
            assert await two.learn(QUESTION, TTL) is None

    async def test_an_entry_holds_no_more_than_it_says(self, tmp_path: Path) -> None:
        async with two_nodes(tmp_path) as (one, _, server, _):
            await one.tell(QUESTION, TOLD, TTL)
            (key,) = await server.ask("KEYS", "*told")
            content = json.loads((await server.ask("GET", key))[32:])
            assert content.keys() == {"digest", "type", "size", "where", "at"}
            assert 0 < await server.ask("PTTL", key) <= TTL * 1000

    async def test_without_a_directory_everybody_asks(self, tmp_path: Path) -> None:
        async with two_nodes(tmp_path) as (one, two, server, _):
            await one.tell(QUESTION, TOLD, TTL)
            await server.kill()
            assert await two.learn(QUESTION, TTL) is None
            await one.tell(QUESTION, TOLD, TTL)
            await one.leave(QUESTION)
