"""IPv6 at both sides: literals, names with addresses of both kinds, one socket at a time."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import pytest
import trustme
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from proxy.testing import FakeClock, FakeRegistry
from proxy.upstream.dns import OriginResolver
from proxy.upstream.endpoint import OriginKey
from proxy.upstream.lane import Lane
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    UPSTREAM,
    blob_path,
    manifest_path,
    running,
)
from tests.unit.upstream_kit import LOOPS, run_on


def _why_not() -> str:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError as error:
        return f"this machine has no ::1: {error}"
    return ""


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


async def test_an_upstream_at_a_literal(tmp_path: Path) -> None:
    async with FakeRegistry(host="::1") as fake:
        fake.push(IMAGE)
        assert fake.url.startswith("http://[::1]:")
        async with running(tmp_path, fake.url) as pool:
            assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
            assert (await pool.get(blob_path())).body == LAYER.data
            label = f"[::1]:{fake.port}"
            assert pool.count("upstream_requests_total", upstream=label, code="200") >= 1


async def test_tls_and_a_redirect_to_a_literal(tmp_path: Path) -> None:
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("::1").configure_cert(server)
    await asyncio.to_thread(authority.cert_pem.write_to_path, str(tmp_path / "ca.pem"))
    async with (
        FakeRegistry(host="::1", ssl_context=server) as cdn,
        FakeRegistry(host="::1", ssl_context=server, redirect_blobs_to=cdn) as fake,
    ):
        fake.push(IMAGE)
        mine = {UPSTREAM: {"url": fake.url, "ca_file": str(tmp_path / "ca.pem")}}
        async with running(tmp_path / "cache", "", upstreams=mine) as pool:
            assert (await pool.get(blob_path())).body == LAYER.data


@pytest.mark.parametrize("listen", ["[::1]:0", "[::]:0"])
async def test_clients_come_by_ipv6(tmp_path: Path, listen: str) -> None:
    async with FakeRegistry() as fake:
        fake.push(IMAGE)
        async with running(tmp_path, fake.url, listen=listen) as pool:
            url = f"http://[::1]:{pool.address.port}{manifest_path('v1')}"
            async with pool.session.get(url) as response:
                assert await response.read() == IMAGE.manifest
            assert pool.access_log[0]["client"] == "::1"


class Names(AbstractResolver):
    """Knows the addresses of one name."""

    def __init__(self, *hosts: str) -> None:
        self._hosts = hosts

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=one,
                port=port,
                family=socket.AF_INET6 if ":" in one else socket.AF_INET,
                proto=0,
                flags=0,
            )
            for one in self._hosts
        ]

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("served", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("hosts", [("::1", "127.0.0.1"), ("127.0.0.1", "::1")], ids=str)
def test_a_name_with_addresses_of_both_kinds_is_reached_by_the_one_that_answers(
    loop: str, served: str, hosts: tuple[str, ...]
) -> None:
    async def main() -> None:
        async with FakeRegistry(host=served) as fake:
            digest = fake.put_blob("team/app", b"hello")
            names = OriginResolver(Names(*hosts), patience=10, clock=FakeClock())
            lane = Lane(tls=None, resolver=names, connect_timeout=10, read_timeout=10)
            url = URL(f"http://harbor.example.com:{fake.port}/v2/team/app/blobs/{digest}")
            try:
                for _ in range(4):
                    response = await lane.request("GET", url, {"Connection": "close"})
                    assert await response.read() == b"hello"
                    assert lane.peer == served
            finally:
                await lane.close()
            assert fake.counters.peak_sockets == 1

    run_on(loop, main())


def test_a_label_and_a_key_of_an_ipv6_origin() -> None:
    key = OriginKey.of(URL("https://[2001:DB8::1]:8443/v2/"))
    assert (key.host, key.port, key.label) == ("2001:db8::1", 8443, "[2001:db8::1]:8443")
