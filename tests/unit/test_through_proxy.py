"""Through an egress proxy: one socket a lane, whatever happens, and its password to nobody else."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
from pathlib import Path

import aiohttp
import pytest
import trustme
from yarl import URL

from proxy.observe.metrics import Metrics
from proxy.oci.errors import EgressFailed, EgressRefused
from proxy.testing import Cut, Disconnect, FakeClock, FakeRegistry, Fault, Reset
from proxy.testing.faults import Action
from proxy.testing.forward import ForwardProxy
from proxy.upstream.cap import START
from proxy.upstream.egress import Egress, EgressProxy
from proxy.upstream.endpoint import OriginKey, OriginSettings
from proxy.upstream.hosts import HostPattern
from proxy.upstream.origin import Origin
from proxy.upstream.reach import Reach, Scope
from tests.unit.proxy_kit import IMAGE, LAYER, UPSTREAM, blob_path, manifest_path, running
from tests.unit.upstream_kit import LOOPS, MIB, noise, opened, run_on, ticket, tls, until
from tests.unit.virtual import run_virtually

every_loop = pytest.mark.parametrize("loop", LOOPS)
every_way = pytest.mark.parametrize(
    ("secure_proxy", "secure"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["http-by-http", "https-by-http", "http-by-https", "https-by-https"],
)
PASSWORD = "user:s3cr3t"


def through(
    proxy: ForwardProxy,
    url: str,
    cap: int = 2,
    connect_timeout: float = 10.0,
    url_of_proxy: str | None = None,
) -> Origin:
    way = EgressProxy.parse(url_of_proxy or proxy.url)
    settings = OriginSettings(
        max_connections=cap,
        connect_timeout=connect_timeout,
        tls=tls().client,
        proxy_tls=tls().client,
        egress=Egress(way, way),
    )
    return Origin(OriginKey.of(URL(url)), settings, metrics=Metrics(), clock=FakeClock())


async def ask(origin: Origin, url: str, reach: Reach | None = None) -> bytes:
    async with origin.turn(ticket()) as turn:
        response = await turn.request("GET", URL(url), reach=reach or Reach())
        return await response.read()


def context(secure: bool) -> ssl.SSLContext | None:
    return tls().server if secure else None


@every_loop
@every_way
def test_a_crowd_that_behaves_badly_never_has_more_sockets_than_the_cap(
    loop: str, secure_proxy: bool, secure: bool
) -> None:
    async def main() -> None:
        chance = random.Random(1)
        async with (
            FakeRegistry(ssl_context=context(secure)) as registry,
            ForwardProxy(ssl_context=context(secure_proxy), credentials=PASSWORD) as proxy,
        ):
            digest = registry.put_blob("team/app", noise(MIB))
            url = f"{registry.url}/v2/team/app/blobs/{digest}"

            async def pull() -> bytes:
                return await ask(origin, url)

            async def leave() -> None:
                async with origin.turn(ticket()) as turn:
                    await (await turn.request("GET", URL(url))).content.readany()

            async with opened(through(proxy, registry.url, cap=3)) as origin:
                faults: list[Action] = [Cut(1000), Reset(1000), Disconnect()]
                registry.script(*(Fault(chance.choice(faults)) for _ in range(12)))
                pulls = [asyncio.create_task(chance.choice([pull, leave])()) for _ in range(30)]
                for one in chance.sample(pulls, 8):
                    for _ in range(chance.randrange(30)):
                        await asyncio.sleep(0)
                    one.cancel()
                outcomes = await asyncio.gather(*pulls, return_exceptions=True)
                expected = (aiohttp.ClientError, asyncio.CancelledError)
                broken = [o for o in outcomes if isinstance(o, BaseException)]
                assert all(isinstance(o, expected) for o in broken), broken
                assert any(isinstance(o, bytes) for o in outcomes)
                assert proxy.peak_sockets <= 3
                assert await pull() == noise(MIB)
                assert origin.state().active == 0
            await until(lambda: proxy.sockets_now == 0)

    run_on(loop, main())


@every_loop
@every_way
def test_a_socket_is_used_again_and_the_password_goes_to_the_proxy_only(
    loop: str, secure_proxy: bool, secure: bool
) -> None:
    async def main() -> None:
        async with (
            FakeRegistry(ssl_context=context(secure)) as registry,
            ForwardProxy(ssl_context=context(secure_proxy), credentials=PASSWORD) as proxy,
            opened(through(proxy, registry.url)) as origin,
        ):
            digest = registry.put_blob("team/app", b"hello")
            url = f"{registry.url}/v2/team/app/blobs/{digest}"
            for _ in range(3):
                assert await ask(origin, url) == b"hello"
            assert (proxy.peak_sockets, registry.counters.peak_sockets) == (1, 1)
            assert len(proxy.seen) == (1 if secure else 3)
            expected = registry.netloc if secure else url
            assert {one.target for one in proxy.seen} == {expected}
            heads = [seen.headers for seen in registry.counters.seen]
            assert not any("Proxy-Authorization" in head for head in heads)
            assert origin.key == OriginKey.of(URL(registry.url))

    run_on(loop, main())


@every_loop
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_a_proxy_that_refuses_is_named_and_its_password_is_not(loop: str, secure: bool) -> None:
    async def main() -> None:
        async with (
            FakeRegistry(ssl_context=context(secure)) as registry,
            ForwardProxy(credentials="user:other") as proxy,
        ):
            wrong = proxy.url.replace("other", "s3cr3t")
            async with opened(through(proxy, registry.url, url_of_proxy=wrong)) as origin:
                with pytest.raises(EgressRefused) as caught:
                    await ask(origin, registry.url)
            text = str(caught.value)
            assert proxy.netloc in text
            assert "407" in text
            assert "s3cr3t" not in repr((caught.value, caught.value.__cause__, origin))
            await until(lambda: proxy.sockets_now == 0)

    run_on(loop, main())


@every_loop
def test_a_connect_that_is_refused_or_not_answered_leaves_no_socket(loop: str) -> None:
    async def main() -> None:
        async with FakeRegistry(ssl_context=tls().server) as registry, ForwardProxy() as proxy:
            async with opened(through(proxy, registry.url, 1, connect_timeout=1.0)) as origin:
                proxy.refuse = 502
                with pytest.raises(EgressFailed, match="answers 502 to CONNECT"):
                    await ask(origin, registry.url)
                proxy.hangs = True
                with pytest.raises(EgressFailed, match="no connection in time"):
                    await ask(origin, registry.url)
                proxy.hangs, proxy.refuse = False, None
                digest = registry.put_blob("team/app", b"hello")
                url = f"{registry.url}/v2/team/app/blobs/{digest}"
                assert await ask(origin, url) == b"hello"
                assert proxy.peak_sockets == 1
            await until(lambda: proxy.sockets_now == 0)

    run_on(loop, main())


@every_loop
def test_a_request_cancelled_while_connect_hangs_leaves_no_socket(loop: str) -> None:
    async def main() -> None:
        async with FakeRegistry(ssl_context=tls().server) as registry, ForwardProxy() as proxy:
            proxy.hangs = True
            async with opened(through(proxy, registry.url, 1)) as origin:
                asking = asyncio.create_task(ask(origin, registry.url))
                await until(lambda: bool(proxy.seen))
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                assert origin.state().active == 0
                await until(lambda: proxy.sockets_now == 0)

    run_on(loop, main())


async def test_nobody_at_the_proxys_address_is_said_so() -> None:
    async with ForwardProxy() as proxy:
        origin = through(proxy, "https://harbor.example.com")
        label = proxy.netloc
    async with opened(origin):
        with pytest.raises(EgressFailed, match=f"proxy {label} cannot be reached"):
            await ask(origin, "https://harbor.example.com/")


async def test_names_are_the_proxys_to_resolve_but_addresses_are_judged_before() -> None:
    async with (
        FakeRegistry() as registry,
        ForwardProxy(names={"harbor.invalid": "127.0.0.1"}) as proxy,
    ):
        digest = registry.put_blob("team/app", b"hello")
        url = f"http://harbor.invalid:{registry.port}/v2/team/app/blobs/{digest}"
        async with opened(through(proxy, url)) as origin:
            assert await ask(origin, url, Reach(Scope.PUBLIC)) == b"hello"
        for near in ("127.0.0.1", "[::1]", "localhost", "169.254.169.254"):
            there = f"http://{near}:{registry.port}/"
            async with opened(through(proxy, there)) as origin:
                with pytest.raises(Exception, match="leads to"):
                    await ask(origin, there, Reach(Scope.PUBLIC))
        assert len(proxy.seen) == 1


async def test_a_whole_pull_goes_through_the_proxy_of_the_settings(tmp_path: Path) -> None:
    """Names that nobody else can resolve, TLS inside, a password, a blob from the CDN."""
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("harbor.invalid", "cdn.invalid").configure_cert(server)
    await asyncio.to_thread(authority.cert_pem.write_to_path, str(tmp_path / "ca.pem"))
    names = {"harbor.invalid": "127.0.0.1", "cdn.invalid": "127.0.0.1"}
    async with (
        FakeRegistry(ssl_context=server, name="cdn.invalid") as cdn,
        FakeRegistry(
            ssl_context=server, name="harbor.invalid", redirect_blobs_to=cdn, auth="bearer"
        ) as fake,
        ForwardProxy(credentials=PASSWORD, names=names) as proxy,
    ):
        fake.push(IMAGE)
        upstream = {"url": fake.url, "proxy": proxy.url, "ca_file": str(tmp_path / "ca.pem")}
        upstreams = {UPSTREAM: upstream}
        async with running(tmp_path / "cache", "", upstreams=upstreams) as pool:
            assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
            assert (await pool.get(blob_path())).body == LAYER.data
            assert {one.target for one in proxy.seen} == {fake.netloc, cdn.netloc}
            proxy.refuse = 502
            answer = await pool.get(manifest_path("v2"))
            status = await pool.admin("/api/v1/status")
            metrics = await pool.admin("/metrics")
            texts = (pool.log.encode(), answer.body, status.body, metrics.body)
            assert not any(b"s3cr3t" in text for text in texts)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
async def test_a_password_that_the_proxy_refuses_is_told_at_once_and_is_no_overload(
    tmp_path: Path, secure: bool
) -> None:
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    await asyncio.to_thread(authority.cert_pem.write_to_path, str(tmp_path / "ca.pem"))
    async with (
        FakeRegistry(ssl_context=server if secure else None) as fake,
        ForwardProxy(credentials="user:right") as proxy,
    ):
        fake.push(IMAGE)
        mine = {"url": fake.url, "proxy": proxy.url, "ca_file": str(tmp_path / "ca.pem")}
        wrong = {**mine, "proxy": proxy.url.replace("right", "wrong")}
        async with running(tmp_path / "cache", "", upstreams={UPSTREAM: mine}) as pool:
            assert (await pool.get(manifest_path("v1"))).status == 200
            for blob in IMAGE.blobs:
                assert (await pool.get(blob_path(blob.digest))).status == 200
            await pool.stored()
        asked = len(proxy.seen)
        clock = FakeClock()
        async with running(
            tmp_path / "cache", "", clock=clock, upstreams={UPSTREAM: wrong}
        ) as pool:
            for number, path in enumerate([manifest_path("v2"), blob_path("sha256:" + 64 * "0")]):
                answer = await pool.get(path)
                assert (answer.status, answer.code) == (502, "UNAVAILABLE")
                assert f"expected of the egress proxy {proxy.netloc}".encode() in answer.body
                assert b"got 407" in answer.body
                assert len(proxy.seen) == asked + number + 1  # nothing is tried again
            assert (await pool.get(manifest_path("v1"))).word == "stale"
            for _ in range(20):
                clock.advance(1.0)
                assert (await pool.get(manifest_path("v3"))).status == 502
            [origin] = pool.proxy.origins.details()
            assert (origin["breaker"]["state"], origin["limit"]) == ("closed", START)
            assert pool.count("upstream_overloads_total", upstream=fake.netloc) == 0


def test_a_proxy_that_is_down_is_named_and_not_the_upstream(tmp_path: Path) -> None:
    async def run() -> None:
        async with ForwardProxy() as proxy:
            url, netloc = proxy.url, proxy.netloc
        mine = {"url": "http://harbor.example.com", "proxy": url}
        clock = asyncio.get_running_loop().time
        texts = set()
        async with running(
            tmp_path, "", clock=clock, pause=1.0, upstreams={UPSTREAM: mine}
        ) as pool:
            for number in range(10):
                answer = await pool.get(manifest_path("v1", f"team/n{number}"))
                assert answer.status in (502, 503)
                texts.add(json.loads(answer.body)["errors"][0]["message"])
        assert all(f"the egress proxy {netloc} cannot be reached" in text for text in texts)
        assert not any("is down" in text for text in texts)
        assert any("harbor.example.com:80 is not asked: " in text for text in texts)

    run_virtually(run())


async def test_a_host_of_no_proxy_is_reached_without_it(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, ForwardProxy() as proxy:
        fake.push(IMAGE)
        mine = {"url": fake.url, "proxy": proxy.url, "no_proxy": ["127.0.0.0/8"]}
        async with running(tmp_path, "", upstreams={UPSTREAM: mine}) as pool:
            assert (await pool.get(manifest_path("v1"))).status == 200
        assert not proxy.seen


def test_no_proxy_spares_by_port() -> None:
    proxy = EgressProxy.parse("http://p:1")
    egress = Egress(proxy, proxy, (HostPattern.parse("harbor.example.com:8443"),))
    assert egress.proxy_for("https", "harbor.example.com", 8443) is None
    assert egress.proxy_for("https", "harbor.example.com", 443) is proxy
