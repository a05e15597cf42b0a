"""Blobs over HTTP: ranges, deadlines (D7), permission by repository (D12), one fetch for all."""

import asyncio
from pathlib import Path
from typing import Self

import pytest

from proxy.testing import Answer as Scripted
from proxy.testing import Cut, FakeClock, FakeRegistry, Fault, Hold, make_image
from proxy.testing.images import pseudo_random
from tests.unit.proxy_kit import (
    LAYER,
    NAME,
    UPSTREAM,
    Answer,
    Pullpool,
    RawClient,
    Served,
    blob_path,
    manifest_path,
    pulling,
    running,
    slots_taken,
    until,
    waiting,
)

SIZE = LAYER.size
SOON = "0.05s"
"""A deadline that a test waits for."""
ONE = {UPSTREAM: {"max_connections": 1}}

RANGES = [
    ("bytes=0-0", 0, 1),
    ("bytes=0-", 0, SIZE),
    ("bytes=100-199", 100, 200),
    (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
    (f"bytes=5-{SIZE + 100}", 5, SIZE),
    ("bytes=-1", SIZE - 1, SIZE),
    (f"bytes=-{SIZE + 5}", 0, SIZE),
]


class TestRanges:
    @pytest.mark.parametrize("state", ["stored", "cold"])
    @pytest.mark.parametrize(("header", "start", "stop"), RANGES)
    async def test_a_range_is_served(
        self, served: Served, header: str, start: int, stop: int, state: str
    ) -> None:
        pool, _ = served
        if state == "stored":
            await pool.get(blob_path())
            await pool.stored()
        answer = await pool.get(blob_path(), Range=header)
        assert (answer.status, answer.body) == (206, LAYER.data[start:stop])
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{SIZE}"
        assert answer.headers["Content-Length"] == str(stop - start)
        assert answer.headers["Docker-Content-Digest"] == str(LAYER.digest)

    @pytest.mark.parametrize(("header", "start", "stop"), RANGES)
    async def test_a_range_of_a_blob_in_flight_is_served_as_its_bytes_come(
        self, served: Served, header: str, start: int, stop: int
    ) -> None:
        pool, fake = served
        half = SIZE // 2
        fake.script(Fault(Cut(after=half), kind="blob"))
        with fake.hold(kind="blob") as hold:
            whole = asyncio.create_task(pool.get(blob_path()))
            await hold.arrived()
            part = asyncio.create_task(pool.get(blob_path(), Range=header))
            await until(lambda: pool.count("coalesced_requests_total", kind="blob") == 1)
        assert (await whole).body == LAYER.data
        answer = await part
        assert (answer.status, answer.body) == (206, LAYER.data[start:stop])

    @pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
    @pytest.mark.parametrize(
        "header", [f"bytes={SIZE}-", f"bytes={SIZE + 5}-{SIZE + 9}", "bytes=-0"]
    )
    async def test_a_range_outside_is_refused_with_the_size(
        self, served: Served, header: str, warm: bool
    ) -> None:
        pool, _ = served
        if warm:
            await pool.get(blob_path())
            await pool.stored()
        answer = await pool.get(blob_path(), Range=header)
        assert (answer.status, answer.code) == (416, "SIZE_INVALID")
        assert answer.headers["Content-Range"] == f"bytes */{SIZE}"

    @pytest.mark.parametrize(
        "header", ["bytes=0-1,5-6", "bytes=0-1, 5-", "lines=1-2", "bytes=9-3", "bytes=x-", "bytes="]
    )
    async def test_what_is_not_one_range_gets_the_whole(self, served: Served, header: str) -> None:
        answer = await served[0].get(blob_path(), Range=header)
        assert (answer.status, answer.body) == (200, LAYER.data)
        assert "Content-Range" not in answer.headers

    @pytest.mark.parametrize(
        ("condition", "status"),
        [(f'"{LAYER.digest}"', 206), ('"other"', 200), ("Sun, 22 Nov 2026 04:30:17 GMT", 200)],
    )
    async def test_a_range_if_nothing_has_changed(
        self, served: Served, condition: str, status: int
    ) -> None:
        answer = await served[0].get(blob_path(), Range="bytes=0-9", If_Range=condition)
        assert answer.status == status

    async def test_a_far_range_of_a_cold_blob_does_not_wait_for_all_before_it(
        self, tmp_path: Path
    ) -> None:
        size = 40 << 20
        data = pseudo_random("far", size)
        async with pulling(tmp_path, upstreams=ONE) as (pool, fake):
            digest = fake.put_blob(NAME, data)
            answer = await pool.get(blob_path(digest), Range=f"bytes={size - 10}-")
            assert (answer.status, answer.body) == (206, data[-10:])
            asked = [seen.headers.get("Range") for seen in fake.counters.seen]
            assert f"bytes={size - 10}-{size - 1}" in asked
            await pool.stored()

    async def test_a_head_ignores_the_range(self, served: Served) -> None:
        answer = await served[0].head(blob_path(), Range="bytes=0-9")
        assert answer.status == 200
        assert answer.headers["Content-Length"] == str(SIZE)


class TestOneFetch:
    async def test_a_crowd_costs_one_fetch(self, served: Served) -> None:
        pool, fake = served
        with fake.hold(kind="blob") as hold:
            crowd = [asyncio.create_task(pool.get(blob_path())) for _ in range(20)]
            await hold.arrived()
            await until(lambda: pool.count("coalesced_requests_total", kind="blob") == 19)
        answers = await asyncio.gather(*crowd)
        assert all(answer.body == LAYER.data for answer in answers)
        assert sorted(str(answer.word) for answer in answers) == ["joined"] * 19 + ["miss"]
        assert fake.counters.gets[LAYER.digest] == 1
        assert pool.count("coalesced_requests_total", kind="blob") == 19
        assert await pool.stored() == {str(LAYER.digest)}

    async def test_a_head_joins_what_is_under_way(self, served: Served) -> None:
        pool, fake = served
        await pool.get(manifest_path("v1"))
        with fake.hold(kind="blob") as hold:
            whole = asyncio.create_task(pool.get(blob_path()))
            await hold.arrived()
            answer = await pool.head(blob_path())
        assert (answer.status, answer.word) == (200, "joined")
        assert answer.headers["Content-Length"] == str(SIZE)
        await whole

    async def test_heads_of_one_blob_are_asked_once(self, served: Served) -> None:
        pool, fake = served
        with fake.hold(kind="blob", method="HEAD") as hold:
            crowd = [asyncio.create_task(pool.head(blob_path())) for _ in range(5)]
            await hold.arrived()
            await until(lambda: pool.proxy.puller.questions == 5)
        assert {answer.status for answer in await asyncio.gather(*crowd)} == {200}
        assert fake.counters.heads == 1


class SlotTaken:
    """Somebody has the only slot of the upstream, until told to give it back."""

    def __init__(self, hold: Hold, task: asyncio.Task[Answer]) -> None:
        self._hold = hold
        self._task = task

    @classmethod
    async def by(cls, pool: Pullpool, fake: FakeRegistry) -> Self:
        hold = fake.hold(kind="tags")
        task = asyncio.create_task(pool.get(f"/v2/{NAME}/tags/list"))
        await hold.arrived()
        return cls(hold, task)

    def release(self) -> None:
        self._hold.release()

    async def gone(self) -> None:
        assert (await self._task).status == 200


class TestDeadlines:
    """D7: nobody waits in silence."""

    async def test_a_blob_whose_slot_does_not_come_is_answered_early_and_sent_later(
        self, tmp_path: Path
    ) -> None:
        deadlines = {"header_deadline": SOON}
        async with pulling(tmp_path, upstreams=ONE, queue=deadlines) as (pool, fake):
            await pool.get(manifest_path("v1"))  # tells the blob's size
            slot = await SlotTaken.by(pool, fake)
            async with pool.session.get(f"{pool.proxy.url}{blob_path()}") as response:
                # The headers are here, and nobody has let the slot go.
                assert response.status == 200
                assert response.headers["Content-Length"] == str(SIZE)
                assert response.headers["Docker-Content-Digest"] == str(LAYER.digest)
                assert response.headers["Warning"].startswith('299 - "queued, ')
                assert fake.counters.gets[LAYER.digest] == 0
                slot.release()
                assert await response.read() == LAYER.data
            await slot.gone()
            assert await pool.stored() >= {str(LAYER.digest)}

    async def test_a_blob_of_unknown_size_is_chunked_then(self, tmp_path: Path) -> None:
        deadlines = {"header_deadline": SOON}
        async with pulling(tmp_path, upstreams=ONE, queue=deadlines) as (pool, fake):
            slot = await SlotTaken.by(pool, fake)
            async with pool.session.get(f"{pool.proxy.url}{blob_path()}") as response:
                assert response.status == 200
                assert response.headers["Transfer-Encoding"] == "chunked"
                slot.release()
                assert await response.read() == LAYER.data
            await slot.gone()

    async def test_an_early_range_keeps_its_place_too(self, tmp_path: Path) -> None:
        deadlines = {"header_deadline": SOON}
        async with pulling(tmp_path, upstreams=ONE, queue=deadlines) as (pool, fake):
            await pool.get(manifest_path("v1"))
            slot = await SlotTaken.by(pool, fake)
            asked = {"Range": "bytes=10-19"}
            async with pool.session.get(f"{pool.proxy.url}{blob_path()}", headers=asked) as answer:
                assert answer.status == 206
                slot.release()
                assert await answer.read() == LAYER.data[10:20]
            await slot.gone()

    @pytest.mark.parametrize(
        ("agent", "status"),
        [
            ("containerd/2.1.0", 503),
            ("docker/28.0", 503),
            ("skopeo/1.9.3", 429),
            ("libpod/4.3.1", 429),
            ("Buildah/1.28", 429),
            ("cri-o/1.30", 429),
            ("containers/5.2", 429),
        ],
    )
    async def test_spill_sends_the_client_to_its_next_host(
        self, tmp_path: Path, agent: str, status: int
    ) -> None:
        spill = {UPSTREAM: {"max_connections": 1, "overload": "spill"}}
        async with pulling(tmp_path, upstreams=spill, queue={"header_deadline": SOON}) as (
            pool,
            fake,
        ):
            async with slots_taken(pool, fake.url):
                answer = await pool.get(blob_path(), User_Agent=agent)
            assert (answer.status, answer.code) == (status, "TOOMANYREQUESTS")
            assert int(answer.headers["Retry-After"]) > 0

    async def test_a_body_that_does_not_begin_in_time_is_broken_off_by_fin(
        self, tmp_path: Path
    ) -> None:
        deadlines = {"header_deadline": "0.02s", "blob_deadline": SOON}
        async with pulling(tmp_path, upstreams=ONE, queue=deadlines) as (pool, fake):
            await pool.get(manifest_path("v1"))
            slot = await SlotTaken.by(pool, fake)
            async with RawClient.connected(pool.address) as client:
                await client.ask(blob_path())
                assert await client.ending() == "FIN"
            assert b"200 OK" in client.received
            assert client.body == b""
            slot.release()
            await slot.gone()
            [line] = [line for line in pool.access_log if line["path"] == blob_path()]
            assert (line["status"], line["reason"]) == (200, "queue_timeout")

    async def test_a_full_queue_says_so_at_once(self, tmp_path: Path) -> None:
        async with pulling(tmp_path, upstreams=ONE, queue={"max_waiting": 1}) as (pool, fake):
            slot = await SlotTaken.by(pool, fake)
            queued = asyncio.create_task(pool.get(blob_path()))
            await until(lambda: waiting(pool) == 1)
            answer = await pool.get(manifest_path("v1"))
            assert (answer.status, answer.code) == (503, "TOOMANYREQUESTS")
            assert int(answer.headers["Retry-After"]) > 0
            slot.release()
            assert (await queued).body == LAYER.data
            await slot.gone()

    async def test_a_proof_that_waits_is_not_answered_early(self, tmp_path: Path) -> None:
        """Bytes of another repository are never promised before they are allowed."""
        deadlines = {"header_deadline": SOON, "manifest_deadline": "60s"}
        async with pulling(tmp_path, upstreams=ONE, queue=deadlines) as (pool, fake):
            await pool.get(blob_path())
            await pool.stored()
            slot = await SlotTaken.by(pool, fake)
            answer = await pool.get(blob_path(name="team/third"))
            assert (answer.status, answer.code) == (503, "TOOMANYREQUESTS")
            slot.release()
            await slot.gone()


class TestPermission:
    """D12: bytes by digest, permission and denial by repository."""

    async def test_a_stored_blob_is_not_served_through_another_repository(
        self, tmp_path: Path
    ) -> None:
        secret = make_image("secret/app", "v1", layers=[1000], seed=9, tarred=False)
        layer = secret.layers[0]
        robot = {"username": "robot", "password": "s3cret", "access": "shared"}
        async with FakeRegistry(
            auth="bearer", users={"robot": "s3cret"}, private={"forbidden/app": ["nobody"]}
        ) as fake:
            fake.push(secret)
            fake.push(make_image("team/app", "v1", layers=[10], seed=2))
            async with running(tmp_path, fake.url, upstreams={UPSTREAM: robot}) as pool:
                assert (await pool.get(blob_path(layer.digest, secret.name))).status == 200
                await pool.stored()
                for name, status, code in [
                    ("team/app", 404, "BLOB_UNKNOWN"),
                    ("no/such", 404, "BLOB_UNKNOWN"),
                    ("forbidden/app", 403, "DENIED"),
                ]:
                    answer = await pool.get(blob_path(layer.digest, name))
                    assert (answer.status, answer.code) == (status, code)
                    assert (await pool.head(blob_path(layer.digest, name))).status == status

    async def test_a_blob_in_flight_is_not_served_through_another_repository(
        self, served: Served
    ) -> None:
        pool, fake = served
        fake.put_blob("team/other", b"something else")
        with fake.hold(kind="blob", repository=NAME) as hold:
            whole = asyncio.create_task(pool.get(blob_path()))
            await hold.arrived()
            answer = await pool.get(blob_path(name="team/other"))
            assert (answer.status, answer.code) == (404, "BLOB_UNKNOWN")
        assert (await whole).body == LAYER.data

    async def test_a_flight_that_went_on_through_another_repository_gives_it_nothing(
        self, served: Served
    ) -> None:
        """The first source fails for a moment, the second one brings the bytes."""
        pool, fake = served
        fake.put_blob("team/other", b"something else")
        await pool.get(manifest_path("v1"))
        fake.script(Fault(Scripted(503), kind="blob", repository="team/other"))
        with fake.hold(kind="blob", repository="team/other", method="GET") as hold:
            stranger = asyncio.create_task(pool.get(blob_path(name="team/other")))
            await hold.arrived()
            owner = asyncio.create_task(pool.get(blob_path()))
            await until(lambda: pool.count("coalesced_requests_total", kind="blob") == 1)
        assert (await owner).body == LAYER.data
        answer = await stranger
        assert (answer.status, answer.code) == (404, "BLOB_UNKNOWN")

    async def test_a_repository_that_has_it_too_gets_the_stored_bytes(self, served: Served) -> None:
        pool, fake = served
        await pool.get(blob_path())
        await pool.stored()
        fake.put_blob("team/other", LAYER.data)
        answer = await pool.get(blob_path(name="team/other"))
        assert (answer.body, answer.word) == (LAYER.data, "revalidated")
        again = await pool.get(blob_path(name="team/other"))
        assert again.word == "hit"
        assert (fake.counters.gets[LAYER.digest], fake.counters.heads) == (1, 1)

    async def test_denials_are_remembered_for_a_while_by_repository(self, tmp_path: Path) -> None:
        clock = FakeClock()
        async with pulling(tmp_path, clock=clock) as (pool, fake):
            fake.put_blob("team/other", LAYER.data)
            fake.script(Fault(Scripted(403), kind="blob", repository=NAME, times=None))
            for _ in range(3):
                answer = await pool.get(blob_path())
                assert (answer.status, answer.code) == (403, "DENIED")
            assert fake.counters.gets[LAYER.digest] == 1
            assert (await pool.get(blob_path(name="team/other"))).status == 200
            clock.advance(10.1)
            fake.clear_script()
            assert (await pool.get(blob_path())).status == 200

    async def test_what_a_manifest_names_is_late_and_not_missing(self, served: Served) -> None:
        pool, fake = served
        await pool.get(manifest_path("v1"))
        fake.script(Fault(Scripted(404), kind="blob", times=2))
        assert (await pool.get(blob_path())).body == LAYER.data

    async def test_what_a_manifest_names_is_never_remembered_as_missing(
        self, served: Served
    ) -> None:
        pool, fake = served
        await pool.get(manifest_path("v1"))
        fake.script(Fault(Scripted(404), kind="blob", times=None))
        for method in ("GET", "HEAD"):
            assert (await pool.ask(method, blob_path())).status == 404
        fake.clear_script()
        assert (await pool.head(blob_path())).status == 200
        assert (await pool.get(blob_path())).body == LAYER.data
