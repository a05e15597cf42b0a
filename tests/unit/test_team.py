"""Several proxies on one cache: one gate, one set of flights, one cache; hits by each (D15)."""

import asyncio
from pathlib import Path

import pytest

from proxy.app import Proxy, Surroundings
from proxy.oci.digest import Digest
from proxy.store.lock import CacheDirBusy, CacheDirUnusable, DirectoryLock
from proxy.testing import Answer, Corrupt, Fault, Stall, make_image
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    NAME,
    SHA512,
    UPSTREAM,
    RawClient,
    blob_path,
    manifest_path,
    running,
    settings_for,
    until,
)
from tests.unit.team_kit import calls, leading, pair
from tests.unit.upstream_kit import MIB, noise

UNUSED = "http://127.0.0.1:9"


async def test_a_follower_serves_what_the_leader_fetches(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, fake):
        manifest = await follower.get(manifest_path("v1"))
        assert (manifest.status, manifest.body) == (200, IMAGE.manifest)
        for blob in IMAGE.blobs:
            answer = await follower.get(blob_path(blob.digest))
            assert (answer.status, answer.word, answer.body) == (200, "miss", blob.data)
        assert fake.counters.gets[LAYER.digest] == 1
        await leader.stored()


async def test_a_follower_serves_hits_without_the_leader(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, _):
        await leader.get(manifest_path("v1"))
        await leader.get(blob_path())
        await leader.stored()
        follower.proxy.front.lose()  # nobody to ask
        part = await follower.get(blob_path(), Range="bytes=10-99")
        assert (part.status, part.body) == (206, LAYER.data[10:100])
        assert (await follower.get(blob_path())).word == "hit"
        manifest = await follower.get(manifest_path(IMAGE.digest))
        assert (manifest.word, manifest.body) == ("hit", IMAGE.manifest)
        assert (await follower.head(blob_path())).headers["Content-Length"] == str(LAYER.size)
        beyond = await follower.get(blob_path(), Range=f"bytes={LAYER.size}-")
        assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{LAYER.size}")


async def test_every_kind_of_question_is_answered_by_a_follower_as_by_the_leader(
    tmp_path: Path,
) -> None:
    paths = (
        manifest_path("v1"),
        manifest_path("none"),
        manifest_path(IMAGE.digest),
        manifest_path(SHA512.digest, "team/strong"),
        blob_path(),
        blob_path(f"sha256:{'0' * 64}"),
        f"/v2/{NAME}/tags/list?n=5",
        f"/v2/{NAME}/referrers/{IMAGE.digest}",
        f"/v2/other.example.com/{NAME}/manifests/v1?ns=other.example.com",
        "/v2/",
    )
    async with pair(tmp_path) as (leader, follower, _):
        for path in paths:
            for method in ("HEAD", "GET"):
                one, other = await follower.ask(method, path), await leader.ask(method, path)
                assert (one.status, len(one.body)) == (other.status, len(other.body)), path
                own = {"Date", "X-Request-Id", "Server-Timing", "X-Pullpool-Cache"}
                for name in other.headers.keys() - own:
                    assert one.headers[name] == other.headers[name], (path, name)
                if one.status >= 400 and method == "GET":
                    assert one.code == other.code


async def test_readers_of_leader_and_follower_share_one_flight_and_one_cap(tmp_path: Path) -> None:
    cap = {UPSTREAM: {"max_connections": 2}}
    async with pair(tmp_path, upstreams=cap) as (leader, follower, fake):
        blobs = [noise(MIB + number) for number in range(6)]
        digests = [fake.put_blob(NAME, data) for data in blobs]
        hold = fake.hold(kind="blob")
        asked = [
            asyncio.create_task(pool.get(blob_path(digest)))
            for digest in digests
            for pool in (leader, follower, follower)
        ]
        await calls(leader, 12)
        hold.release()
        words = []
        for number, task in enumerate(asked):
            answer = await task
            assert answer.body == blobs[number // 3]
            words.append(answer.word)
        assert words.count("miss") == 6
        assert words.count("joined") == 12
        assert fake.counters.peak_sockets <= 2
        for data, digest in zip(blobs, digests, strict=True):
            assert fake.counters.bytes_by_digest[digest] == len(data)


async def test_a_wrong_digest_resets_the_followers_client_too(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, fake):
        digest = fake.put_blob(NAME, noise(MIB))
        fake.script(Fault(Corrupt(at=7), kind="blob"))
        async with RawClient.connected(follower.address) as client:
            await client.ask(blob_path(digest))
            assert await client.ending() == "RST"
        assert len(client.body) < MIB
        assert await leader.stored() == set()


async def test_permission_is_asked_for_through_each_repository(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, fake):
        assert (await leader.get(blob_path())).status == 200
        await leader.stored()
        fake.put_blob("team/other", b"something else")
        refused = await follower.get(blob_path(LAYER.digest, "team/other"))
        assert (refused.status, refused.code) == (404, "BLOB_UNKNOWN")
        fake.script(Fault(Answer(403), kind="blob", times=9))
        assert (await follower.get(blob_path(LAYER.digest, "team/third"))).status == 403
        assert (await follower.get(blob_path())).word == "hit"


async def test_a_client_that_leaves_a_follower_leaves_the_flight(tmp_path: Path) -> None:
    async with pair(tmp_path, cache={"on_abandon": "cancel"}) as (leader, follower, fake):
        digest = fake.put_blob(NAME, noise(2 * MIB))
        fake.script(Fault(Stall(MIB), kind="blob"))
        async with RawClient.connected(follower.address) as client:
            await client.ask(blob_path(digest))
            await fake.stalls.arrived()
            await client.until(lambda data: len(data) > MIB // 2)
        await until(lambda: leader.count("fills_abandoned_total", action="cancel") == 1)
        await calls(leader, 0)
        fake.release()
        assert await leader.stored() == set()


async def test_what_a_follower_serves_counts_as_used(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, _):
        used = list[Digest]()
        await leader.get(blob_path())
        await leader.stored()
        leader.proxy.leader.touch = used.append
        for _ in range(3):
            assert (await follower.get(blob_path())).word == "hit"
        await until(lambda: used == [LAYER.digest])


async def test_a_fresh_tag_is_not_asked_for(tmp_path: Path) -> None:
    async with pair(tmp_path) as (_, follower, _fake):
        assert (await follower.get(manifest_path("v1"))).word == "miss"
        await follower.get(manifest_path("v1"))
        follower.proxy.front.lose()  # nobody to ask
        for method in ("GET", "HEAD"):
            answer = await follower.ask(method, manifest_path("v1"))
            assert (answer.status, answer.word) == (200, "hit")
            assert answer.headers["Docker-Content-Digest"] == str(IMAGE.digest)


@pytest.mark.parametrize("asked", ["leader", "follower"])
async def test_a_tag_that_is_refreshed_is_believed_by_no_follower(
    tmp_path: Path, asked: str
) -> None:
    async with pair(tmp_path) as (leader, follower, fake):
        for _ in range(2):
            assert (await follower.get(manifest_path("v1"))).body == IMAGE.manifest
        other = make_image(NAME, "v1", layers=[1000], seed=9, tarred=False)
        fake.push(other)
        assert (await follower.get(manifest_path("v1"))).body == IMAGE.manifest
        pool = leader if asked == "leader" else follower
        url = f"{pool.proxy.admin_url}/api/v1/refresh"
        async with pool.session.post(url, json={"images": [f"{UPSTREAM}/{NAME}:v1"]}) as answer:
            [found] = (await answer.json())["images"]
            assert found["now"] == str(other.digest)
        assert (await leader.get(manifest_path("v1"))).body == other.manifest
        assert (await follower.get(manifest_path("v1"))).body == other.manifest


async def test_a_tag_without_ttl_is_asked_for_each_time(tmp_path: Path) -> None:
    async with pair(tmp_path, tags={"ttl": "0s"}) as (_, follower, fake):
        for _ in range(3):
            assert (await follower.get(manifest_path("v1"))).status == 200
        assert fake.counters.manifests + fake.counters.heads >= 3
        fake.remove(NAME, "v1")
        assert (await follower.get(manifest_path("v1"))).status == 404


async def test_an_evicted_blob_is_a_miss_for_a_follower_that_had_seen_it(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, fake):
        await follower.get(blob_path())
        await leader.stored()
        assert (await follower.get(blob_path())).word == "hit"
        shelf = leader.proxy.store._shelf
        shelf.ledger.remove(LAYER.digest)
        await shelf.evict([LAYER.digest], "room")
        again = await follower.get(blob_path())
        assert (again.word, again.body) == ("miss", LAYER.data)
        assert fake.counters.gets[LAYER.digest] == 2


# -- the leader goes ---------------------------------------------------------------------------


async def test_a_follower_leads_when_the_leader_ends_and_goes_on_with_its_fills(
    tmp_path: Path,
) -> None:
    """The client of the follower sees one body, and the upstream is asked for each byte once."""
    size = 3 * MIB
    async with pair(tmp_path) as (leader, follower, fake):
        digest = fake.put_blob(NAME, noise(size))
        fake.script(Fault(Stall(MIB), kind="blob"))
        async with RawClient.connected(follower.address) as client:
            await client.ask(blob_path(digest))
            await fake.stalls.arrived()
            await client.until(lambda data: len(data) > MIB // 2)
            await leader.proxy.__aexit__(None, None, None)
            await leading(follower)
            assert await client.rest(size) == noise(size)
        assert fake.counters.bytes_by_digest[digest] <= size + MIB // 4
        assert follower.events("fill_taken_over")[0]["at"] >= MIB // 2
        assert str(digest) in await follower.stored()
        fake.release()


async def test_a_body_that_a_new_leader_goes_on_with_waits_for_the_verdict_as_before(
    tmp_path: Path,
) -> None:
    """What had come is lost, the client is far ahead, and the upstream sends wrong bytes now."""
    size, first = 40 * MIB, 20 * MIB
    async with pair(tmp_path, upstreams={UPSTREAM: {"segments": 1}}) as (leader, follower, fake):
        digest = fake.put_blob(NAME, noise(size))
        fake.script(Fault(Stall(first), kind="blob"))
        async with RawClient.connected(follower.address) as client:
            await client.ask(blob_path(digest), headers="Connection: close\n")
            await fake.stalls.arrived()
            await client.until(lambda data: len(data) > first - MIB)
            fake.script(Fault(Corrupt(), kind="blob", times=None))
            [staging] = await asyncio.to_thread(list, (tmp_path / "staging").iterdir())
            await asyncio.to_thread(staging.unlink)  # so that there is nothing to go on with
            await leader.proxy.__aexit__(None, None, None)
            await leading(follower)
            ending = await client.ending()
        fake.release()
        assert (ending, len(client.body) < size) == ("RST", True)
        assert not follower.events("fill_taken_over")


async def test_requests_without_an_answer_are_asked_again_of_the_next_leader(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (leader, follower, fake):
        hold = fake.hold()
        asked = [
            asyncio.create_task(follower.get(manifest_path("v1"))),
            asyncio.create_task(follower.get(blob_path())),
            asyncio.create_task(follower.get(f"/v2/{NAME}/tags/list")),
        ]
        await calls(leader, 3)
        await leader.proxy.__aexit__(None, None, None)
        hold.release()
        await leading(follower)
        assert [(await task).status for task in asked] == [200, 200, 200]
        assert (await follower.get(manifest_path("v1"))).body == IMAGE.manifest


async def test_a_third_follows_the_second_when_the_first_has_gone(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, fake), running(tmp_path, fake.url) as third:
        await leader.proxy.__aexit__(None, None, None)
        await until(lambda: follower.proxy.front.leads or third.proxy.front.leads)
        first, second = (follower, third) if follower.proxy.front.leads else (third, follower)
        assert (await second.get(manifest_path("v1"))).status == 200
        assert (await first.get(manifest_path("v1"))).word in ("hit", "joined")
        status = await second.proxy.status()
        assert (status["role"], status["followers"]) == ("follower", 1)


# -- refusals ----------------------------------------------------------------------------------


async def test_a_directory_whose_holder_does_not_listen_is_refused(tmp_path: Path) -> None:
    lock = await asyncio.to_thread(DirectoryLock.acquire, tmp_path / "LOCK")
    proxy = Proxy(settings_for(tmp_path, UNUSED), around=Surroundings(role_patience=0.2))
    try:
        with pytest.raises(CacheDirBusy, match="is in use by another process"):
            await proxy.__aenter__()
    finally:
        lock.release()
    async with Proxy(settings_for(tmp_path, UNUSED)):
        pass


async def test_other_upstreams_under_the_same_names_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path, UNUSED):
        with pytest.raises(CacheDirUnusable, match="its upstreams are configured otherwise"):
            async with running(tmp_path, "http://127.0.0.1:10"):
                pass
