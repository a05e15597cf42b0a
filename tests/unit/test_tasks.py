"""Tasks over HTTP, on a whole proxy: images are brought, and everything afterwards is a hit."""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from proxy.oci.digest import Digest
from proxy.oci.manifest import DOCKER_SCHEMA1, OCI_INDEX
from proxy.pull.flight import Flight
from proxy.pull.images import MAX_DEPTH
from proxy.pull.task import MAX_IMAGES, Order
from proxy.pull.tasks import MAX_RUNNING, new_id
from proxy.testing import Answer as Scripted
from proxy.testing import FakeRegistry, Fault, Stall, make_image, make_index
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    NAME,
    SHA512,
    UPSTREAM,
    Pullpool,
    Served,
    blob_path,
    manifest_path,
    pulling,
    running,
    until,
)
from tests.unit.store_kit import stored_files
from tests.unit.task_kit import Document, all_hits, ask, done, over, prefetch

TAG = f"{NAME}:v1"
OTHER = make_image("team/other", "v1", layers=[40_000, 300], seed=3, tarred=False)


class TestPrefetch:
    async def test_afterwards_everything_is_a_hit(self, served: Served) -> None:
        pool, fake = served
        fake.push(OTHER)
        task = await done(pool, TAG, f"{UPSTREAM}/team/other@{OTHER.digest}")
        assert task["state"] == "SUCCEEDED"
        size = IMAGE.size + OTHER.size
        assert (task["bytes"], task["bytes_done"]) == (size, size)
        assert (task["blobs"], task["blobs_done"], task["failed"]) == (6, 6, 0)
        first, second = task["results"]
        assert (first["digest"], second["digest"]) == (str(IMAGE.digest), str(OTHER.digest))
        assert task["created"] <= task["started"] <= task["ended"]
        before = len(fake.counters.seen)
        await all_hits(pool, IMAGE)
        await all_hits(pool, OTHER, OTHER.digest)
        assert len(fake.counters.seen) == before
        assert pool.count("tasks_total", kind="prefetch", result="SUCCEEDED") == 1
        assert pool.count("tasks", state="SUCCEEDED") == 1
        assert (await pool.proxy.status())["tasks"]["SUCCEEDED"] == 1
        await pool.stored()

    async def test_what_is_held_is_not_fetched_again(self, served: Served) -> None:
        pool, fake = served
        await done(pool, TAG)
        before = len(fake.counters.seen)
        again = await done(pool, TAG)
        assert again["bytes_done"] == IMAGE.size
        [head] = fake.counters.seen[before:]
        assert (head.method, head.status) == ("HEAD", 304)

    async def test_a_tag_is_asked_for_though_it_is_believed(self, served: Served) -> None:
        pool, fake = served
        await pool.get(manifest_path("v1"))
        newer = make_image(NAME, "v1", layers=[100], seed=77, tarred=False)
        fake.push(newer)
        task = await done(pool, TAG)
        assert task["results"][0]["digest"] == str(newer.digest)
        await all_hits(pool, newer)

    async def test_bytes_that_another_repository_brought_are_proved_for_this_one(
        self, served: Served
    ) -> None:
        pool, fake = served
        twin = make_image("team/twin", "v1", layers=[300_000, 5_000], seed=1, tarred=False)
        assert twin.digest == IMAGE.digest
        fake.push(twin)
        await done(pool, TAG)
        gets = fake.counters.gets.total()
        assert (await done(pool, "team/twin:v1"))["state"] == "SUCCEEDED"
        assert fake.counters.gets.total() == gets
        await all_hits(pool, twin)

    async def test_sha512_and_a_tag_that_is_left_out(self, served: Served) -> None:
        pool, fake = served
        fake.retag(SHA512.name, "latest", SHA512)
        assert (await done(pool, SHA512.name))["state"] == "SUCCEEDED"
        await all_hits(pool, SHA512, "latest")

    async def test_a_pull_does_not_wait_behind_a_task(self, tmp_path: Path) -> None:
        one = {UPSTREAM: {"max_connections": 1}}
        async with pulling(tmp_path, upstreams=one) as (pool, fake):
            with fake.hold(kind="blob") as hold:
                task = await prefetch(pool, TAG)
                await hold.arrived()
                await until(lambda: depth(pool, "abandoned") == len(IMAGE.blobs) - 1)
                asked = SHA512.layers[0]
                reader = asyncio.create_task(pool.get(blob_path(asked.digest, SHA512.name)))
                await until(lambda: depth(pool, "blob") == 1)
                hold.release(1)
                await hold.arrived()  # whose turn is next
                assert depth(pool, "blob") == 0
                assert depth(pool, "abandoned") == len(IMAGE.blobs) - 1
                hold.release()
                assert (await reader).body == asked.data
            assert (await over(pool, task))["state"] == "SUCCEEDED"

    async def test_whoever_asks_joins_the_flight_of_a_task(self, tmp_path: Path) -> None:
        async with pulling(tmp_path) as (pool, fake):
            with fake.hold(kind="blob") as hold:
                task = await prefetch(pool, TAG)
                await hold.arrived(len(IMAGE.blobs))
                reader = asyncio.create_task(pool.get(blob_path()))
                await until(lambda: len(flight(pool).readers) == 1)
            assert (await reader).word == "joined"
            assert (await over(pool, task))["state"] == "SUCCEEDED"
            assert fake.counters.gets[LAYER.digest] == 1

    @pytest.mark.parametrize("on_abandon", ["finish", "cancel"])
    async def test_a_task_goes_on_with_a_flight_whose_reader_left(
        self, tmp_path: Path, on_abandon: str
    ) -> None:
        async with pulling(tmp_path, cache={"on_abandon": on_abandon}) as (pool, fake):
            with fake.hold(kind="blob") as hold:
                reader = asyncio.create_task(pool.get(blob_path()))
                await hold.arrived()
                task = await prefetch(pool, TAG)
                await hold.arrived(len(IMAGE.blobs))
                reader.cancel()
                await asyncio.wait([reader])
                await until(lambda: not flight(pool).readers)
            assert (await over(pool, task))["state"] == "SUCCEEDED"
            assert fake.counters.gets[LAYER.digest] == 1

    async def test_two_same_tasks_share_everything(self, served: Served) -> None:
        pool, fake = served
        with fake.hold(kind="blob") as hold:
            tasks = [await prefetch(pool, TAG) for _ in range(2)]
            await hold.arrived(len(IMAGE.blobs))
            clients = {f"task {task['id']}" for task in tasks}
            await until(lambda: set(flight(pool).ticket.clients) == clients)
        for task in tasks:
            assert (await over(pool, task))["state"] == "SUCCEEDED"
        assert fake.counters.gets[IMAGE.digest] == 1
        assert all(fake.counters.gets[blob.digest] == 1 for blob in IMAGE.blobs)


class TestPlatforms:
    IMAGES = tuple(
        make_image(NAME, "x", layers=[4000], seed=seed, tarred=False, architecture=architecture)
        for seed, architecture in ((1, "amd64"), (2, "arm64"))
    )
    INDEX = make_index(NAME, "multi", IMAGES)

    async def test_without_one_all_of_an_index_come(self, served: Served) -> None:
        pool, fake = served
        fake.push(self.INDEX)
        assert (await done(pool, f"{NAME}:multi"))["state"] == "SUCCEEDED"
        for image in self.IMAGES:
            await all_hits(pool, image, image.digest)
        assert (await pool.get(manifest_path("multi"))).word == "hit"

    async def test_only_the_one_that_is_wanted_comes(self, served: Served) -> None:
        pool, fake = served
        fake.push(self.INDEX)
        task = await done(pool, f"{NAME}:multi", platforms=("linux/arm64/v8",))
        amd64, arm64 = self.IMAGES
        assert (task["state"], task["bytes"]) == ("SUCCEEDED", arm64.size)
        await all_hits(pool, arm64, arm64.digest)
        assert str(amd64.digest) not in await pool.stored()

    async def test_one_that_is_not_there_fails_and_the_others_come(self, served: Served) -> None:
        pool, fake = served
        fake.push(self.INDEX)
        wanted = ("linux/s390x", "linux/amd64")
        task = await done(pool, f"{NAME}:multi", platforms=wanted)
        [result] = task["results"]
        assert (task["state"], task["failed"]) == ("FAILED", 1)
        assert result["error"]["message"] == "the image is not there for linux/s390x"
        await all_hits(pool, self.IMAGES[0], self.IMAGES[0].digest)

    async def test_a_manifest_that_an_index_names_in_vain_stops_no_other(
        self, served: Served
    ) -> None:
        pool, fake = served
        fake.push(self.INDEX)
        amd64, arm64 = self.IMAGES
        reference = str(amd64.digest)
        fake.script(Fault(Scripted(404), kind="manifest", reference=reference, times=None))
        task = await done(pool, f"{NAME}:multi")
        assert task["results"][0]["error"]["code"] == "MANIFEST_UNKNOWN"
        await all_hits(pool, arm64, arm64.digest)

    async def test_indexes_in_indexes_are_followed_but_not_for_ever(self, served: Served) -> None:
        pool, fake = served
        digest, size = IMAGE.digest, len(IMAGE.manifest)
        for depth in range(MAX_DEPTH + 1):
            kind = OCI_INDEX if depth else IMAGE.media_type
            entry = {"mediaType": kind, "digest": str(digest), "size": size}
            raw = json.dumps({"schemaVersion": 2, "manifests": [entry], "a": depth}).encode()
            digest, size = fake.put_manifest(NAME, raw, OCI_INDEX, tag=f"n{depth}"), len(raw)
        [deep, deeper] = [
            await done(pool, f"{NAME}:n{depth}", platforms=("linux/amd64",))
            for depth in (MAX_DEPTH - 1, MAX_DEPTH)
        ]
        assert (deep["state"], deep["blobs_done"]) == ("SUCCEEDED", len(IMAGE.blobs))
        assert deeper["results"][0]["error"]["code"] == "MANIFEST_INVALID"

    async def test_a_manifest_whose_parts_nobody_knows_is_told(self, served: Served) -> None:
        pool, fake = served
        fake.put_manifest(NAME, b'{"schemaVersion": 1}', DOCKER_SCHEMA1, tag="old")
        [result] = (await done(pool, f"{NAME}:old"))["results"]
        assert result["error"]["code"] == "MANIFEST_INVALID"
        assert DOCKER_SCHEMA1 in result["error"]["message"]


class TestFailures:
    @pytest.mark.parametrize(
        ("name", "code"),
        [
            ("nowhere.example.com/team/app:v1", "NAME_UNKNOWN"),
            ("Team/app", "NAME_INVALID"),
            (f"{NAME}:gone", "MANIFEST_UNKNOWN"),
            (f"{NAME}@sha256:0", "DIGEST_INVALID"),
            (f"{NAME}@sha256:{'0' * 64}", "MANIFEST_UNKNOWN"),
        ],
    )
    async def test_an_image_that_cannot_be_had_is_told_and_the_others_come(
        self, served: Served, name: str, code: str
    ) -> None:
        pool, _ = served
        task = await done(pool, name, TAG)
        assert (task["state"], task["failed"]) == ("FAILED", 1)
        wrong, right = task["results"]
        assert (wrong["image"], wrong["state"], wrong["error"]["code"]) == (name, "FAILED", code)
        assert (right["state"], right["error"]) == ("SUCCEEDED", None)
        await all_hits(pool, IMAGE)
        assert pool.count("tasks_total", kind="prefetch", result="FAILED") == 1

    async def test_a_blob_that_fails_stops_no_other(self, served: Served) -> None:
        pool, fake = served
        fault = Fault(Scripted(403), kind="blob", reference=str(LAYER.digest), times=None)
        fake.script(fault)
        [result] = (await done(pool, TAG))["results"]
        assert (result["state"], result["error"]["code"]) == ("FAILED", "DENIED")
        assert (result["blobs"], result["blobs_done"]) == (3, 2)
        assert result["bytes_done"] == IMAGE.size - LAYER.size

    async def test_a_busy_upstream_is_waited_for(self, served: Served) -> None:
        pool, fake = served
        fake.script(Fault(Scripted(503), kind="blob", times=5))
        assert (await done(pool, TAG))["state"] == "SUCCEEDED"

    async def test_a_cache_that_is_too_small_is_told(self, tmp_path: Path) -> None:
        cache = {"max_size": LAYER.size + 2000}
        async with pulling(tmp_path, cache=cache) as (pool, fake):
            with fake.hold(kind="blob", reference=str(LAYER.digest)) as hold:
                task = await prefetch(pool, TAG)
                await hold.arrived()
                small = {str(blob.digest) for blob in IMAGE.blobs if blob is not LAYER}
                await until(lambda: len(pool.proxy.puller.flights) == 1)
                assert small < set(await asyncio.to_thread(stored_files, pool.cache))
            [result] = (await over(pool, task))["results"]
            assert result["state"] == "FAILED"
            assert "was evicted again" in result["error"]["message"]
        cache = {"max_size": LAYER.size - 1}
        async with pulling(tmp_path / "less", cache=cache) as (pool, _):
            [result] = (await done(pool, TAG))["results"]
            assert result["state"] == "FAILED"
            assert "has no room for" in result["error"]["message"]


def flight(pool: Pullpool, digest: Digest = LAYER.digest) -> Flight:
    found = pool.proxy.puller.flights.find(digest)
    assert found is not None
    return found


def depth(pool: Pullpool, name: str) -> int:
    [gate] = pool.proxy.origins.states()
    return gate.depth[name]


class TestOrder:
    @pytest.mark.parametrize(
        "body",
        [
            [],
            {"images": [TAG]},
            {"kind": "dance", "images": [TAG]},
            {"kind": "prefetch"},
            {"kind": "prefetch", "images": []},
            {"kind": "prefetch", "images": TAG},
            {"kind": "prefetch", "images": [1]},
            {"kind": "prefetch", "images": [""]},
            {"kind": "prefetch", "images": ["a" * 1001]},
            {"kind": "prefetch", "images": ["team/\x1b[2Japp"]},
            {"kind": "prefetch", "images": ["team/äpp"]},
            {"kind": "prefetch", "images": [TAG] * (MAX_IMAGES + 1)},
            {"kind": "prefetch", "images": [TAG], "platforms": ["linux"]},
            {"kind": "prefetch", "images": [TAG], "nodes": "all"},
        ],
    )
    async def test_what_is_no_order_is_refused(self, served: Served, body: Any) -> None:
        status, answer = await ask(served[0], "POST", body=body)
        assert (status, list(answer)) == (400, ["error"])
        assert (await ask(served[0], "GET"))[1]["tasks"] == []

    async def test_too_long_a_body_is_refused_in_json(self, served: Served) -> None:
        body = json.dumps({"kind": "prefetch", "images": ["a" * (2 << 20)]}).encode()
        url, headers = (
            f"{served[0].proxy.admin_url}/api/v1/tasks",
            {"Content-Type": "application/json"},
        )
        async with served[0].session.post(url, data=io.BytesIO(body), headers=headers) as answer:
            assert answer.status == 413
            assert await answer.json() == {"error": "the order is too long"}

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", ""),
            ("GET", ""),
            ("GET", "/{id}"),
            ("GET", "/{id}/wait"),
            ("DELETE", "/{id}"),
            ("GET", "/../events"),
        ],
    )
    @pytest.mark.parametrize(
        "headers", [{"Host": "attacker.example.com"}, {"Origin": "http://attacker.example.com"}]
    )
    async def test_no_page_of_somebody_elses(
        self, served: Served, method: str, path: str, headers: dict[str, str]
    ) -> None:
        pool, _ = served
        task = await done(pool, TAG)
        body = {"kind": "prefetch", "images": [TAG]} if method == "POST" else None
        url = path.format(id=task["id"])
        status, answer = await ask(pool, method, url, body, **headers)
        assert (status, list(answer)) == (403, ["error"])
        assert (await ask(pool, "GET"))[1]["counts"]["SUCCEEDED"] == 1

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
    async def test_only_json(self, served: Served, kind: str) -> None:
        pool, _ = served
        url = f"{pool.proxy.admin_url}/api/v1/tasks"
        data, headers = b'{"kind": "prefetch", "images": ["a"]}', {"Content-Type": kind}
        async with pool.session.post(url, data=data, headers=headers) as answer:
            assert answer.status == 415

    @pytest.mark.parametrize(
        "query", ["state=asleep", "limit=-1", "limit=x", "limit=nan", "limit=inf"]
    )
    async def test_a_question_that_is_none_is_refused(self, served: Served, query: str) -> None:
        assert (await ask(served[0], "GET", f"?{query}"))[0] == 400

    async def test_a_task_that_there_is_not(self, served: Served) -> None:
        for method, path in (("GET", ""), ("GET", "/wait"), ("DELETE", "")):
            status, answer = await ask(served[0], method, f"/0123456789abcdef{path}")
            assert (status, list(answer)) == (404, ["error"])
        url = f"{served[0].proxy.admin_url}/api/v1/events?task=0123456789abcdef"
        async with served[0].session.get(url) as response:
            assert response.status == 404

    async def test_the_place_of_a_new_task_is_told(self, served: Served) -> None:
        pool, _ = served
        url = f"{pool.proxy.admin_url}/api/v1/tasks"
        body = {"kind": "prefetch", "images": [TAG, TAG]}
        async with pool.session.post(url, json=body) as answer:
            task = await answer.json()
            assert answer.headers["Location"] == f"/api/v1/tasks/{task['id']}"
        assert task["images"] == [TAG]
        assert (await over(pool, task))["blobs"] == 3


@contextlib.asynccontextmanager
async def busy(pool: Pullpool, fake: FakeRegistry) -> AsyncIterator[list[Document]]:
    """As many tasks run as may, and go on when the block ends."""
    with fake.hold(kind="blob") as hold:
        tasks = [await prefetch(pool, TAG) for _ in range(MAX_RUNNING)]
        await hold.arrived(len(IMAGE.blobs))
        yield tasks


class TestQueue:
    async def test_a_thousand_wait_and_none_is_refused(self, served: Served) -> None:
        pool, fake = served
        async with busy(pool, fake):
            order = Order((f"{SHA512.name}@{SHA512.digest}",))
            added = [await pool.proxy.tasks.add(new_id(), order) for _ in range(1000)]
            assert {task["state"] for task in added} == {"PENDING"}
            _, answer = await ask(pool, "GET", "?state=pending&limit=3")
            assert answer["counts"]["PENDING"] == 1000
            assert answer["counts"]["RUNNING"] == MAX_RUNNING
            newest = [task["id"] for task in reversed(added[-3:])]
            assert [task["id"] for task in answer["tasks"]] == newest
            assert "results" not in answer["tasks"][0]
            assert pool.count("tasks", state="PENDING") == 1000
        assert (await over(pool, added[-1]))["state"] == "SUCCEEDED"
        await until(lambda: not pool.proxy.tasks.counts()["RUNNING"])
        started = [line["task"] for line in pool.events("task_over")][MAX_RUNNING:]
        assert sorted(started) == sorted(task["id"] for task in added)
        for place, task in enumerate(added[:: MAX_RUNNING * 10]):
            assert abs(started.index(task["id"]) - place * MAX_RUNNING * 10) <= 2 * MAX_RUNNING
        assert fake.counters.gets[SHA512.digest] == 1
        assert pool.proxy.tasks.counts()["SUCCEEDED"] == 500  # the others are forgotten
        assert len(await pool.proxy.store.tasks()) == 500

    async def test_cancelled_while_it_waits_it_never_runs(self, served: Served) -> None:
        pool, fake = served
        async with busy(pool, fake):
            task = await prefetch(pool, f"{SHA512.name}:v1")
            status, ended = await ask(pool, "DELETE", f"/{task['id']}")
            assert (status, ended["state"], ended["started"]) == (200, "CANCELLED", None)
            assert ended["results"][0]["state"] == "CANCELLED"
        await until(lambda: not pool.proxy.tasks.counts()["RUNNING"])
        assert SHA512.digest not in fake.counters.gets
        assert (await ask(pool, "DELETE", f"/{task['id']}"))[1] == ended
        assert pool.count("tasks_total", kind="prefetch", result="CANCELLED") == 1

    async def test_cancelled_while_it_runs_it_leaves_its_flights(self, served: Served) -> None:
        pool, fake = served
        fake.script(Fault(Stall(100_000), kind="blob", reference=str(LAYER.digest)))
        task = await prefetch(pool, TAG)
        await fake.stalls.arrived()
        status, ended = await ask(pool, "DELETE", f"/{task['id']}")
        assert (status, ended["state"]) == (200, "CANCELLED")
        await until(lambda: not len(pool.proxy.puller.flights))
        fake.release()
        assert str(LAYER.digest) not in await pool.stored()
        assert not pool.events("fill_failed")

    async def test_a_cancelled_task_takes_no_flight_from_others(self, served: Served) -> None:
        pool, fake = served
        with fake.hold(kind="blob") as hold:
            tasks = [await prefetch(pool, TAG) for _ in range(2)]
            await hold.arrived(len(IMAGE.blobs))
            await until(lambda: len(flight(pool).ticket.clients) == 2)
            reader = asyncio.create_task(pool.get(blob_path(IMAGE.layers[1].digest)))
            await until(lambda: len(flight(pool, IMAGE.layers[1].digest).readers) == 1)
            await ask(pool, "DELETE", f"/{tasks[0]['id']}")
            assert set(flight(pool).ticket.clients) == {f"task {tasks[1]['id']}"}
        assert (await reader).status == 200
        assert (await over(pool, tasks[1]))["state"] == "SUCCEEDED"
        assert all(fake.counters.gets[blob.digest] == 1 for blob in IMAGE.blobs)

    async def test_a_question_ends_with_its_time(self, served: Served) -> None:
        pool, fake = served
        with fake.hold(kind="blob") as hold:
            task = await prefetch(pool, TAG)
            await hold.arrived()
            _, found = await ask(pool, "GET", f"/{task['id']}/wait?timeout=0.01")
            assert found["state"] == "RUNNING"
            assert found["results"][0]["blobs"] == 3
        await over(pool, task)


class TestRestart:
    async def test_what_ran_and_what_waited_goes_on_in_the_old_order(self, tmp_path: Path) -> None:
        async with FakeRegistry() as fake:
            fake.push(IMAGE)
            fake.push(SHA512)
            async with running(tmp_path, fake.url) as pool:
                finished = await done(pool, f"{SHA512.name}:v1")
                with fake.hold(kind="blob") as hold:
                    begun = [await prefetch(pool, TAG) for _ in range(MAX_RUNNING)]
                    waiting = [await prefetch(pool, TAG) for _ in range(3)]
                    await hold.arrived(len(IMAGE.blobs))
                    await pool.proxy.__aexit__(None, None, None)
            async with running(tmp_path, fake.url) as pool:
                assert (await ask(pool, "GET", f"/{finished['id']}"))[1] == finished
                for task in (*begun, *waiting):
                    assert (await over(pool, task))["state"] == "SUCCEEDED"
                ended = [line["task"] for line in pool.events("task_over")]
                assert set(ended[:MAX_RUNNING]) == {task["id"] for task in begun}
                _, found = await ask(pool, "GET")
                order = [task["id"] for task in (finished, *begun, *waiting)]
                assert [task["id"] for task in found["tasks"]] == order[::-1]
                await all_hits(pool, IMAGE)
                newer = await prefetch(pool, TAG)
                _, found = await ask(pool, "GET", "?limit=1")
                assert found["tasks"][0]["id"] == newer["id"]
                await over(pool, newer)

    async def test_while_it_drains_nothing_runs_and_orders_are_kept(self, tmp_path: Path) -> None:
        async with FakeRegistry() as fake:
            fake.push(IMAGE)
            async with running(tmp_path, fake.url) as pool:
                with fake.hold(kind="blob") as hold:
                    begun = await prefetch(pool, TAG)
                    await hold.arrived()
                    pool.proxy.drain()
                    await until(lambda: not len(pool.proxy.puller.flights))
                late = await prefetch(pool, TAG)
                for task in (begun, late):
                    assert (await ask(pool, "GET", f"/{task['id']}"))[1]["state"] == "PENDING"
                await pool.proxy.__aexit__(None, None, None)
            async with running(tmp_path, fake.url) as pool:
                for task in (begun, late):
                    assert (await over(pool, task))["state"] == "SUCCEEDED"

    async def test_a_row_that_no_version_wrote_costs_only_itself(self, tmp_path: Path) -> None:
        async with FakeRegistry() as fake:
            fake.push(IMAGE)
            async with running(tmp_path, fake.url) as pool:
                task = await done(pool, TAG)
                await pool.proxy.store.put_task("0" * 16, 99, json.dumps({"kind": "dance"}))
                await pool.proxy.__aexit__(None, None, None)
            async with running(tmp_path, fake.url) as pool:
                _, found = await ask(pool, "GET")
                assert [one["id"] for one in found["tasks"]] == [task["id"]]
                assert pool.events("task_not_read")[0]["task"] == "0" * 16
