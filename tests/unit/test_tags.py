"""Freshness of tags (D13): the decision, the book that remembers them, and pulls over HTTP."""

import asyncio
import re
from asyncio import all_tasks as tasks
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.digest import Digest
from proxy.oci.errors import UpstreamTimeout
from proxy.pull.tags import TagBook, TagEntry, TagPolicy, Verdict, judge, may_be_stale
from proxy.testing import Answer as Scripted
from proxy.testing import Disconnect, FakeClock, FakeRegistry, Fault, Hang, make_image, make_index
from tests.unit.proxy_kit import (
    IMAGE,
    NAME,
    UPSTREAM,
    Pullpool,
    blob_path,
    manifest_path,
    pulling,
    running,
    until,
)
from tests.unit.store_kit import opened

DIGEST = Digest.of(b"what the tag was")
KEY = (UPSTREAM, NAME, "v1")
NEWER = make_image(NAME, "v1", layers=[100], seed=77, tarred=False)
HASTY = {"upstream_timeout": "0.05s"}


class TestVerdict:
    POLICY = TagPolicy(ttl=30, stale_while_revalidate=60)

    def entry(self, checked: float | None = None, failed: float | None = None) -> TagEntry:
        return TagEntry(DIGEST, 0, checked=checked, failed=failed)

    @pytest.mark.parametrize(
        ("checked", "failed", "now", "verdict"),
        [
            (100, None, 100, Verdict.FRESH),
            (100, None, 129.9, Verdict.FRESH),
            (100, None, 130, Verdict.BACKGROUND),
            (100, None, 189.9, Verdict.BACKGROUND),
            (100, None, 190, Verdict.CHECK),
            (100, 200, 210, Verdict.STALE),
            (100, 200, 230, Verdict.CHECK),
            (None, None, 5, Verdict.CHECK),
            (None, 1, 5, Verdict.STALE),
        ],
    )
    def test_by_age(
        self, checked: float | None, failed: float | None, now: float, verdict: Verdict
    ) -> None:
        assert judge(self.entry(checked, failed), "v1", now, self.POLICY) is verdict

    def test_a_tag_nobody_knows_is_fetched(self) -> None:
        assert judge(None, "v1", 0, self.POLICY) is Verdict.FETCH

    def test_an_immutable_tag_is_asked_for_once(self) -> None:
        policy = TagPolicy(immutable=[re.compile(r"v\d+\.\d+")])
        assert judge(self.entry(), "v1.20", 1e9, policy) is Verdict.FRESH
        assert judge(self.entry(), "v1.20-rc", 1e9, policy) is Verdict.CHECK

    @given(st.floats(0, 1e6), st.floats(0, 1e6))
    def test_stale_entries_are_not_used_beyond_their_limit(self, age: float, limit: float) -> None:
        policy = TagPolicy(stale_if_error=limit)
        assert may_be_stale(TagEntry(DIGEST, 1000), 1000 + age, policy) == (
            1000 + age - 1000 <= limit
        )


class TestBook:
    async def test_a_tag_is_known_after_a_restart_but_has_to_be_checked(
        self, tmp_path: Path
    ) -> None:
        wall = FakeClock(5000)
        async with opened(tmp_path) as store:
            await TagBook(store, clock=FakeClock(), wall=wall).confirm(KEY, DIGEST)
        async with opened(tmp_path) as store:
            book = TagBook(store, clock=FakeClock(), wall=wall)
            entry = await book.get(KEY)
            assert entry == TagEntry(DIGEST, 5000, checked=None)
            assert judge(entry, "v1", 0, TagPolicy()) is Verdict.CHECK

    async def test_a_dropped_tag_is_gone_for_good(self, tmp_path: Path) -> None:
        async with opened(tmp_path) as store:
            book = TagBook(store, clock=FakeClock(), wall=FakeClock())
            await book.confirm(KEY, DIGEST)
            assert await book.refuse(KEY, asked=FakeClock()())
            assert await book.get(KEY) is None
            assert await store.tag(*KEY) is None

    async def test_answers_count_in_the_order_in_which_they_were_asked_for(
        self, tmp_path: Path
    ) -> None:
        async with opened(tmp_path) as store:
            clock = FakeClock()
            book, at = TagBook(store, clock=clock, wall=FakeClock()), clock()
            await book.confirm(KEY, DIGEST, asked=at + 2)
            assert not await book.refuse(KEY, asked=at + 1)
            assert await book.get(KEY) is not None
            assert await book.refuse(KEY, asked=at + 4)
            await book.confirm(KEY, DIGEST, asked=at + 3)
            assert await book.get(KEY) is None
            assert await store.tag(*KEY) is None
            await book.confirm(KEY, DIGEST, asked=at + 5)
            assert await book.get(KEY) is not None

    async def test_a_tag_that_is_refused_while_it_is_looked_up_is_not_found(
        self, tmp_path: Path
    ) -> None:
        async with opened(tmp_path) as store:
            clock = FakeClock()
            await TagBook(store, clock=clock, wall=FakeClock()).confirm(KEY, DIGEST)
            book = TagBook(store, clock=clock, wall=FakeClock())
            looking = asyncio.create_task(book.get(KEY))
            await asyncio.sleep(0)  # the question is with the index
            await book.refuse(KEY, asked=clock())
            assert await looking is None
            assert await book.get(KEY) is None

    async def test_a_failure_of_an_unknown_tag_is_not_noted(self, tmp_path: Path) -> None:
        async with opened(tmp_path) as store:
            book = TagBook(store, clock=FakeClock(), wall=FakeClock())
            book.failed(KEY, UpstreamTimeout())
            assert await book.get(KEY) is None


async def pull(pool: Pullpool) -> None:
    """All of IMAGE."""
    assert (await pool.get(manifest_path("v1"))).status == 200
    for blob in IMAGE.blobs:
        assert (await pool.get(blob_path(blob.digest))).status == 200
    await pool.stored()


class TestFreshness:
    async def test_within_ttl_nothing_is_asked(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            await pool.get(manifest_path("v1"))
            fake.retag(NAME, "v1", NEWER)
            clock.advance(29.9)
            answer = await pool.get(manifest_path("v1"))
            assert (answer.body, answer.word) == (IMAGE.manifest, "hit")
            assert len(fake.counters.seen) == 1

    async def test_after_ttl_one_conditional_head_is_asked(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            await pool.get(manifest_path("v1"))
            clock.advance(30.1)
            answer = await pool.get(manifest_path("v1"))
            assert (answer.body, answer.word) == (IMAGE.manifest, "revalidated")
            asked = fake.counters.seen[-1]
            assert (asked.method, asked.status) == ("HEAD", 304)
            assert asked.headers["If-None-Match"] == f'"{IMAGE.digest}"'
            assert (await pool.get(manifest_path("v1"))).word == "hit"
            assert len(fake.counters.seen) == 2

    async def test_a_tag_that_moved_is_fetched(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            await pool.get(manifest_path("v1"))
            fake.retag(NAME, "v1", NEWER)
            clock.advance(30.1)
            answer = await pool.get(manifest_path("v1"))
            assert (answer.body, answer.word) == (NEWER.manifest, "miss")
            assert (fake.counters.manifests, fake.counters.heads) == (2, 1)

    async def test_a_tag_that_was_deleted_is_gone(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            await pull(pool)
            fake.remove(NAME, "v1")
            clock.advance(30.1)
            answer = await pool.get(manifest_path("v1"))
            assert (answer.status, answer.code) == (404, "MANIFEST_UNKNOWN")
            assert (await pool.get(manifest_path(IMAGE.digest))).status == 200

    async def test_an_upstream_that_does_not_say_the_digest_is_asked_for_the_bytes(
        self, tmp_path: Path
    ) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            await pool.get(manifest_path("v1"))
            fake.retag(NAME, "v1", NEWER)
            fake.script(Fault(Scripted(200), method="HEAD"))
            clock.advance(30.1)
            assert (await pool.get(manifest_path("v1"))).body == NEWER.manifest

    async def test_a_digest_never_expires(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            await pool.get(manifest_path(IMAGE.digest))
            clock.advance(1e7)
            assert (await pool.get(manifest_path(IMAGE.digest))).word == "hit"
            assert len(fake.counters.seen) == 1

    async def test_an_immutable_tag_is_not_checked(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock, tags={"immutable": ["v\\d"]}) as (pool, fake):
            await pool.get(manifest_path("v1"))
            clock.advance(1e6)
            assert (await pool.get(manifest_path("v1"))).word == "hit"
            assert len(fake.counters.seen) == 1

    async def test_while_a_tag_is_checked_in_the_background_the_old_one_is_served(
        self, tmp_path: Path
    ) -> None:
        clock = FakeClock()
        late = {"stale_while_revalidate": "60s"}
        async with pulling(tmp_path, clock=clock, tags=late) as (pool, fake):
            await pool.get(manifest_path("v1"))
            fake.retag(NAME, "v1", NEWER)
            clock.advance(31)
            with fake.hold(method="HEAD") as hold:
                answers = [await pool.get(manifest_path("v1")) for _ in range(3)]
                await hold.arrived()
            assert {(answer.body, answer.word) for answer in answers} == {(IMAGE.manifest, "stale")}
            await until(lambda: not any(t.get_name().startswith("check ") for t in tasks()))
            assert (await pool.get(manifest_path("v1"))).body == NEWER.manifest
            assert fake.counters.heads == 1

    async def test_a_check_is_made_once_for_all(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            await pool.get(manifest_path("v1"))
            clock.advance(31)
            with fake.hold(method="HEAD") as hold:
                crowd = [asyncio.create_task(pool.get(manifest_path("v1"))) for _ in range(9)]
                await hold.arrived()
                await until(lambda: pool.proxy.puller.questions == 9)
            answers = await asyncio.gather(*crowd)
            assert {answer.word for answer in answers} == {"revalidated"}
            assert fake.counters.heads == 1


class TestStale:
    @pytest.mark.parametrize(
        "fault", [Scripted(500), Scripted(503), Scripted(429), Scripted(502), Disconnect()]
    )
    async def test_an_upstream_that_fails_does_not_fail_a_pull_of_what_is_held(
        self, tmp_path: Path, fault: Scripted | Disconnect
    ) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            await pull(pool)
            fake.script(Fault(fault, times=None))
            clock.advance(31)
            for _ in range(2):
                answer = await pool.get(manifest_path("v1"))
                assert (answer.status, answer.body, answer.word) == (200, IMAGE.manifest, "stale")
                assert answer.headers["Warning"].startswith('299 - "served stale: ')
            asked = len(fake.counters.seen)
            clock.advance(1)
            await pool.get(manifest_path("v1"))
            assert len(fake.counters.seen) == asked  # it is not asked again for a while
            fake.clear_script()
            clock.advance(31)
            assert (await pool.get(manifest_path("v1"))).word == "revalidated"

    async def test_a_head_is_covered_too(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            await pull(pool)
            fake.script(Fault(Scripted(500), times=None))
            clock.advance(31)
            answer = await pool.head(manifest_path("v1"))
            assert (answer.status, answer.word) == (200, "stale")
            assert answer.headers["Docker-Content-Digest"] == str(IMAGE.digest)

    async def test_without_its_blobs_a_manifest_does_not_stand_in(self, tmp_path: Path) -> None:
        """podman takes the mirror that answers its manifest, and goes nowhere else for blobs."""
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            await pool.get(manifest_path("v1"))
            await pool.get(blob_path())  # one layer of two, and no config
            fake.script(Fault(Scripted(500), times=None))
            clock.advance(31)
            answer = await pool.get(manifest_path("v1"))
            assert (answer.status, answer.code) == (502, "UNAVAILABLE")

    async def test_an_index_stands_in_with_one_whole_image(self, tmp_path: Path) -> None:
        clock = FakeClock()
        amd = make_image(NAME, "amd", layers=[10], seed=3)
        arm = make_image(NAME, "arm", layers=[10], seed=4, architecture="arm64")
        index = make_index(NAME, "multi", [arm, amd])
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            fake.push(index)
            await pool.get(manifest_path("multi"))
            fake.script(Fault(Scripted(500), method="HEAD", times=None))
            clock.advance(31)
            assert (await pool.get(manifest_path("multi"))).status == 502
            for path in [
                manifest_path(amd.digest),
                *(blob_path(blob.digest) for blob in amd.blobs),
            ]:
                assert (await pool.get(path)).status == 200
            await pool.stored()
            assert (await pool.get(manifest_path("multi"))).word == "stale"

    async def test_beyond_its_limit_an_old_answer_does_not_stand_in(self, tmp_path: Path) -> None:
        clock, wall = FakeClock(), FakeClock()
        async with pulling(tmp_path, clock=clock, wall=wall) as (pool, fake):
            await pull(pool)
            fake.script(Fault(Scripted(500), times=None))
            clock.advance(90_000)
            wall.advance(90_000)
            assert (await pool.get(manifest_path("v1"))).status == 502

    @pytest.mark.parametrize(("status", "code"), [(403, "DENIED"), (404, "MANIFEST_UNKNOWN")])
    async def test_no_is_an_answer(self, tmp_path: Path, status: int, code: str) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            await pull(pool)
            fake.script(Fault(Scripted(status), times=None))
            clock.advance(31)
            for _ in range(2):
                answer = await pool.get(manifest_path("v1"))
                assert (answer.status, answer.code) == (status, code)
            assert fake.counters.heads == 1

    async def test_an_upstream_that_hangs_costs_no_more_than_its_time(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock, tags=HASTY) as (pool, fake):
            await pull(pool)
            fake.script(Fault(Hang()))
            clock.advance(31)
            answer = await pool.get(manifest_path("v1"))
            assert (answer.word, answer.body) == ("stale", IMAGE.manifest)
            assert "no answer about this tag within 0.05 s" in answer.headers["Warning"]
            # The question goes on, and its answer is of use to the next one.
            fake.release()
            while (await pool.get(manifest_path("v1"))).word != "hit":
                pass
            assert fake.counters.heads == 1

    async def test_an_upstream_that_hangs_costs_a_client_with_nothing_held_its_deadline(
        self, tmp_path: Path
    ) -> None:
        async with pulling(tmp_path, queue={"manifest_deadline": "0.05s"}) as (pool, fake):
            fake.script(Fault(Hang(), times=None))
            answer = await pool.get(manifest_path("v1"))
            assert (answer.status, answer.code) == (504, "UNAVAILABLE")
            assert UPSTREAM in str(pool.access_log[-1]["error"])

    async def test_after_a_restart_with_the_upstream_down_what_is_held_is_served(
        self, tmp_path: Path
    ) -> None:
        async with FakeRegistry() as fake:
            fake.push(IMAGE)
            async with running(tmp_path, fake.url) as pool:
                await pull(pool)
        async with running(tmp_path, fake.url) as pool:
            with pytest.raises(aiohttp.ClientConnectorError):
                await pool.session.get(fake.url)
            answer = await pool.get(manifest_path("v1"))
            assert (answer.body, answer.word) == (IMAGE.manifest, "stale")
            for blob in IMAGE.blobs:
                answer = await pool.get(blob_path(blob.digest))
                assert (answer.body, answer.word) == (blob.data, "hit")
            assert (await pool.get(manifest_path(IMAGE.digest))).word == "hit"
            assert (await pool.get(manifest_path("v2"))).status == 502


class TestNegative:
    async def test_what_is_not_there_is_asked_once_in_a_while(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            for method in ("GET", "HEAD", "GET"):
                assert (await pool.ask(method, manifest_path("v9"))).status == 404
            assert len(fake.counters.seen) == 1
            fake.retag(NAME, "v9", IMAGE)
            assert (await pool.get(manifest_path("v9"))).status == 404
            clock.advance(10.1)
            assert (await pool.get(manifest_path("v9"))).status == 200

    async def test_an_image_that_a_fresh_index_names_is_late_and_not_missing(
        self, tmp_path: Path
    ) -> None:
        amd = make_image(NAME, "amd", layers=[10], seed=3)
        index = make_index(NAME, "multi", [amd])
        async with pulling(tmp_path) as (pool, fake):
            fake.push(index)
            await pool.get(manifest_path("multi"))
            missing = Fault(Scripted(404), reference=amd.digest, times=2)
            fake.script(missing)
            assert (await pool.get(manifest_path(amd.digest))).body == amd.manifest
            fake.script(missing)
            assert (await pool.head(manifest_path(amd.digest))).status == 200

    async def test_an_image_that_an_index_names_is_never_remembered_as_missing(
        self, tmp_path: Path
    ) -> None:
        amd = make_image(NAME, "amd", layers=[10], seed=3)
        async with pulling(tmp_path) as (pool, fake):
            fake.push(make_index(NAME, "multi", [amd]))
            await pool.get(manifest_path("multi"))
            fake.script(Fault(Scripted(404), reference=amd.digest, times=None))
            assert (await pool.get(manifest_path(amd.digest))).status == 404
            fake.clear_script()
            assert (await pool.get(manifest_path(amd.digest))).status == 200
