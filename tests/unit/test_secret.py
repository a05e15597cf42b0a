"""The fleet's secret is replaced while nodes run: who understands whom, and for how long."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fleet.orders import Seal
from proxy.fleet.seal import Said, Sealer, Unsealed
from proxy.fleet.secret import LATE, SOON, Derived, Secret
from proxy.fleet.tags import Sealer as TagSealer
from proxy.fleet.tags import Told
from proxy.oci.digest import Digest
from proxy.testing import FakeClock
from tests.unit.proxy_kit import running, until
from tests.unit.redis_kit import needs_redis, redis_server

OLD, NEW, NEWER = b"the old secret: 16", b"the new secret: 16", b"the newer secret: 16"
ONE, TWO = "1" * 16, "2" * 16
SAID = Said(("GET", "/", "", "", ""))


def state(secret: Secret) -> tuple[bytes, ...]:
    """The one that is used, and all that are accepted."""
    return secret.used, *secret.accepted


def test_a_new_one_is_accepted_at_once_and_used_when_the_others_know_it() -> None:
    clock = FakeClock()
    secret = Secret(OLD, clock)
    assert state(secret) == (OLD, OLD)
    secret.replace(NEW)
    assert state(secret) == (OLD, OLD, NEW)
    clock.advance(SOON)
    assert state(secret) == (NEW, NEW, OLD)
    clock.advance(LATE - 1)
    assert secret.accepted == (NEW, OLD)
    clock.advance(1)
    assert state(secret) == (NEW, NEW)


def test_one_that_is_replaced_before_it_was_used_is_accepted_all_the_same() -> None:
    clock = FakeClock()
    secret = Secret(OLD, clock)
    secret.replace(NEW)
    clock.advance(SOON / 2)
    secret.replace(NEWER)
    assert secret.accepted == (OLD, NEWER, NEW)
    clock.advance(SOON * 2)
    assert secret.used == NEWER
    assert secret.accepted == (NEWER, OLD, NEW)
    clock.advance(LATE)
    assert list(secret.accepted) == [NEWER]


def test_one_that_is_put_back_stays() -> None:
    clock = FakeClock()
    secret = Secret(OLD, clock)
    secret.replace(NEW)
    secret.replace(NEW)
    secret.replace(OLD)
    clock.advance(SOON)
    assert state(secret) == (OLD, OLD, NEW)  # another node may have begun to use the new one
    clock.advance(LATE)
    assert state(secret) == (OLD, OLD)


def test_what_was_read_last_is_used_in_the_end_also_when_it_was_read_before() -> None:
    clock = FakeClock()
    secret = Secret(OLD, clock)
    for one in (NEW, NEWER, NEW):
        secret.replace(one)
        clock.advance(SOON / 4)
    clock.advance(2 * SOON)
    assert state(secret) == (NEW, NEW, OLD, NEWER)
    clock.advance(LATE)
    assert state(secret) == (NEW, NEW)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 100)), max_size=8))
def test_a_node_that_reads_each_one_later_is_understood_all_the_time(
    changes: list[tuple[int, int]],
) -> None:
    """Within a minute, by one that read it at once; and both use the file's in the end."""
    clock = FakeClock()
    late = 60
    at, reads = 0, []
    for number, after in changes:
        at += after
        reads += [(at, 0, b"%d" % number), (at + late, 1, b"%d" % number)]
    both = Secret(b"0", clock), Secret(b"0", clock)
    now = 0
    for when, node, text in sorted(reads):
        for _ in range(when - now):
            clock.advance(1)
            assert both[0].used in both[1].accepted
            assert both[1].used in both[0].accepted
        now = when
        both[node].replace(text)
    clock.advance(SOON)
    last = b"%d" % changes[-1][0] if changes else b"0"
    assert (both[0].used, both[1].used) == (last, last)


def test_what_is_derived_follows_and_is_made_once() -> None:
    clock, made = FakeClock(), list[bytes]()

    def derive(secret: bytes) -> bytes:
        made.append(secret)
        return secret.upper()

    secret = Secret(OLD, clock)
    derived = Derived(secret, derive)
    secret.replace(NEW)
    for _ in range(3):
        assert list(derived.accepted) == [OLD.upper(), NEW.upper()]
        assert derived.used == OLD.upper()
    clock.advance(SOON)
    assert derived.used == NEW.upper()
    assert made == [OLD, NEW]
    clock.advance(LATE)
    assert list(derived.accepted) == [NEW.upper()]
    secret.replace(OLD)
    assert list(derived.accepted) == [NEW.upper(), OLD.upper()]
    assert made == [OLD, NEW, OLD]  # what is over was forgotten


def test_nothing_of_a_secret_is_shown() -> None:
    secret = Secret(OLD)
    secret.replace(NEW)
    shown = repr(secret) + repr(Derived(secret, bytes))
    assert OLD.decode() not in shown
    assert NEW.decode() not in shown


@pytest.mark.parametrize("first", [True, False])
def test_nodes_understand_each_other_while_one_has_read_the_new_one_and_one_has_not(
    first: bool,
) -> None:
    clock = FakeClock()
    ours, theirs = Secret(OLD, clock), Secret(OLD, clock)
    (ours if first else theirs).replace(NEW)
    taker, giver = Sealer(ours, ONE, wall=clock), Sealer(theirs, TWO, wall=clock)

    def speak() -> None:
        asked = taker.seal(TWO, SAID)
        assert giver.accept(str(asked), SAID) == asked
        taker.check_answer(asked, giver.seal_answer(asked, SAID), SAID)

    speak()
    clock.advance(SOON - 1)
    speak()
    (theirs if first else ours).replace(NEW)
    clock.advance(1)
    speak()  # one uses it, the other not yet
    clock.advance(SOON)
    speak()
    clock.advance(LATE + SOON)
    with pytest.raises(Unsealed, match="another secret"):
        giver.accept(str(Sealer(OLD, ONE, wall=clock).seal(TWO, SAID)), SAID)


def test_what_the_directory_keeps_is_understood_while_the_secret_changes() -> None:
    clock = FakeClock()
    secret = Secret(OLD, clock)
    question, told = ("upstream", "name", "v1"), Told(Digest.of(b"m"), "type", 7)
    tag = TagSealer(OLD).seal(question, told, 0.0)
    order = Seal(OLD).seal(("order", "1"), {"word": "do"}, 0.0)
    tags, orders = TagSealer(secret), Seal(secret)
    secret.replace(NEW)
    clock.advance(SOON)
    assert tags.read(question, tag, 0.0, 60.0) == told
    assert orders.read(("order", "1"), order, 0.0) == {"at": 0.0, "word": "do"}
    assert TagSealer(NEW).read(question, tags.seal(question, told, 0.0), 0.0, 60.0) == told
    clock.advance(LATE)
    assert tags.read(question, tag, 0.0, 60.0) is None
    assert orders.read(("order", "1"), order, 0.0) is None


@needs_redis
@pytest.mark.real_seconds
async def test_a_secret_s_file_is_read_again_and_one_that_is_no_use_is_not_taken(
    tmp_path: Path,
) -> None:
    file = tmp_path / "secret"
    file.write_bytes(OLD + b"\n")
    async with redis_server(tmp_path) as server:
        fleet = {
            "directory": server.url,
            "listen": "127.0.0.1:0",
            "advertise": "http://127.0.0.1:5052",
            "secret_file": str(file),
        }
        async with running(tmp_path, "http://127.0.0.1:9", fleet=fleet) as node:
            assert node.proxy.fleet is not None
            sealer = node.proxy.fleet.sealer
            assert sealer is not None
            wall = node.proxy._around.wall
            asked = Sealer(NEW, ONE, wall=wall)
            with pytest.raises(Unsealed):
                sealer.accept(str(asked.seal(sealer.node, SAID)), SAID)
            await asyncio.to_thread(file.write_bytes, b"short")
            await until(lambda: bool(node.events("not_reloaded")))
            await asyncio.to_thread(file.write_bytes, NEW)
            await until(lambda: bool(node.events("reloaded")))
            for secret in (OLD, NEW):
                other = Sealer(secret, ONE, wall=wall)
                asked_of_us = other.seal(sealer.node, SAID)
                assert sealer.accept(str(asked_of_us), SAID) == asked_of_us
            assert all(text not in node.log for text in (OLD.decode(), NEW.decode()))
