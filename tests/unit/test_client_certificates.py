"""Certificates towards upstreams: shown to the upstream and nobody else, and read again."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from proxy.testing import Answer as Scripted
from proxy.testing import FakeClock, FakeRegistry, Fault
from proxy.testing.forward import ForwardProxy
from proxy.upstream.certificates import INTERVAL, CannotTrust, TlsFiles
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    UPSTREAM,
    Pullpool,
    blob_path,
    manifest_path,
    running,
)


@dataclass(frozen=True, slots=True)
class Files:
    """Where a proxy's certificates are."""

    directory: Path

    def keys(self) -> dict[str, str]:
        return {f"{name}_file": str(self.directory / name) for name in _NAMES}

    async def write(self, ca: trustme.CA, client: trustme.CA) -> None:
        await asyncio.to_thread(self._write, ca, client)

    def _write(self, ca: trustme.CA, client: trustme.CA) -> None:
        certificate = client.issue_cert("pullpool@example.com")
        ca.cert_pem.write_to_path(str(self.directory / "ca"))
        certificate.cert_chain_pems[0].write_to_path(str(self.directory / "client_cert"))
        certificate.private_key_pem.write_to_path(str(self.directory / "client_key"))


_NAMES = ("ca", "client_cert", "client_key")


def server(authority: trustme.CA, clients: trustme.CA, *, needed: bool) -> ssl.SSLContext:
    """Asks for a client's certificate; refuses who shows none if it is ``needed``."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    clients.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED if needed else ssl.CERT_OPTIONAL
    return context


def shown(registry: FakeRegistry) -> list[bool]:
    """Of each connection that is open now: did it show a certificate?"""
    transports = [one.transport for one in registry._listener._connections.values()]
    return [bool(one.get_extra_info("peercert")) for one in transports if one is not None]


@contextlib.asynccontextmanager
async def pulling(tmp_path: Path, url: str, **keys: Any) -> AsyncIterator[Pullpool]:
    upstreams = {UPSTREAM: {"url": url, **Files(tmp_path).keys(), **keys}}
    async with running(tmp_path / "cache", "", upstreams=upstreams) as pool:
        yield pool


async def test_the_upstream_sees_the_certificate_and_the_cdn_does_not(tmp_path: Path) -> None:
    ours, clients = trustme.CA(), trustme.CA()
    await Files(tmp_path).write(ours, clients)
    async with (
        FakeRegistry(ssl_context=server(ours, clients, needed=False)) as cdn,
        FakeRegistry(ssl_context=server(ours, clients, needed=True), redirect_blobs_to=cdn) as fake,
    ):
        fake.push(IMAGE)
        async with pulling(tmp_path, fake.url) as pool:
            assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
            assert (await pool.get(blob_path())).body == LAYER.data
            assert set(shown(fake)) == {True}
            assert set(shown(cdn)) == {False}


async def test_an_egress_proxy_that_asks_does_not_see_it(tmp_path: Path) -> None:
    ours, clients = trustme.CA(), trustme.CA()
    await Files(tmp_path).write(ours, clients)
    # It believes certificates of ours only, so one that is shown is one that fails.
    suspicious = server(ours, trustme.CA(), needed=False)
    async with (
        FakeRegistry(ssl_context=server(ours, clients, needed=True)) as fake,
        ForwardProxy(ssl_context=suspicious) as proxy,
    ):
        fake.push(IMAGE)
        async with pulling(tmp_path, fake.url, proxy=proxy.url) as pool:
            assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
            assert set(shown(fake)) == {True}


async def test_another_upstream_cannot_lead_to_where_the_certificate_is_shown(
    tmp_path: Path,
) -> None:
    ours, clients = trustme.CA(), trustme.CA()
    await Files(tmp_path).write(ours, clients)
    async with (
        FakeRegistry(ssl_context=server(ours, clients, needed=True)) as secret,
        FakeRegistry() as other,
    ):
        secret.push(IMAGE)
        location = f"{secret.url}{blob_path()}"
        other.script(Fault(Scripted(307, {"Location": location}), times=None))
        known = {"url": secret.url, **Files(tmp_path).keys()}
        upstreams = {"secret.example.com": known, UPSTREAM: {"url": other.url}}
        async with running(
            tmp_path / "cache", "", upstreams=upstreams, default_upstream=UPSTREAM
        ) as pool:
            answer = await pool.get(blob_path())
            assert (answer.status, answer.code) == (502, "UNAVAILABLE")
            assert not secret.counters.seen
            mine = await pool.get(f"{blob_path()}?ns=secret.example.com")
            assert mine.body == LAYER.data


async def test_without_the_certificate_it_is_a_tls_failure(tmp_path: Path) -> None:
    ours, clients = trustme.CA(), trustme.CA()
    await Files(tmp_path).write(ours, clients)
    async with FakeRegistry(ssl_context=server(ours, clients, needed=True)) as fake:
        nothing = {"client_cert_file": None, "client_key_file": None}
        async with pulling(tmp_path, fake.url, **nothing) as pool:
            answer = await pool.get(manifest_path("v1"))
            assert (answer.status, answer.code) == (502, "UNAVAILABLE")


# -- files that change -------------------------------------------------------------------------


async def test_new_files_make_a_new_context_and_broken_ones_leave_the_old(tmp_path: Path) -> None:
    clock = FakeClock()
    heard: list[CannotTrust | None] = []
    files = Files(tmp_path)
    await files.write(trustme.CA(), trustme.CA())
    ca, cert, key = (tmp_path / name for name in _NAMES)
    tls = TlsFiles(ca_file=ca, cert_file=cert, key_file=key, clock=clock, on_reload=heard.append)
    first = await tls.context()
    assert tls.shows_certificate
    await files.write(trustme.CA(), trustme.CA())
    assert await tls.context() is first  # not looked at again so soon
    clock.advance(INTERVAL)
    second = await tls.context()
    assert second is not first
    clock.advance(INTERVAL)
    assert await tls.context() is second  # nothing has changed
    await asyncio.to_thread(cert.write_text, "not a certificate")
    clock.advance(INTERVAL)
    assert await tls.context() is second
    await asyncio.to_thread(cert.unlink)
    clock.advance(INTERVAL)
    assert await tls.context() is second
    await files.write(trustme.CA(), trustme.CA())
    clock.advance(INTERVAL)
    assert await tls.context() is not second
    assert [type(one) for one in heard] == [type(None), CannotTrust, CannotTrust, type(None)]
    assert str(cert) in str(heard[1])


class Slow(TlsFiles):
    """Reads the files when ``may_read`` is set, and says that it has begun."""

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        self.reading, self.may_read = threading.Event(), threading.Event()

    def _read(self) -> ssl.SSLContext:
        self.reading.set()
        self.may_read.wait()
        return super()._read()


async def test_who_leaves_while_the_files_are_read_leaves_the_reading_to_the_next(
    tmp_path: Path,
) -> None:
    clock, file, heard = FakeClock(), tmp_path / "ca", list[CannotTrust | None]()
    trustme.CA().cert_pem.write_to_path(str(file))
    tls = Slow(ca_file=file, clock=clock, on_reload=heard.append)
    tls.may_read.set()
    first = await tls.context()
    await asyncio.to_thread(trustme.CA().cert_pem.write_to_path, str(file))
    clock.advance(INTERVAL)
    tls.reading.clear()
    tls.may_read.clear()
    leaving = asyncio.create_task(tls.context())
    await asyncio.to_thread(tls.reading.wait)
    leaving.cancel()
    await asyncio.wait([leaving])
    tls.may_read.set()
    assert await tls.context() is not first
    assert heard == [None]


async def test_files_that_are_no_use_stop_the_start(tmp_path: Path) -> None:
    await Files(tmp_path).write(trustme.CA(), trustme.CA())
    key = tmp_path / "client_key"
    await asyncio.to_thread(key.write_text, "no key")
    with pytest.raises(CannotTrust, match="client_cert_file"):
        async with pulling(tmp_path, "https://127.0.0.1:1"):
            pass


async def test_a_renewed_authority_is_believed_by_the_next_socket(tmp_path: Path) -> None:
    clock = FakeClock()
    old, new, clients = trustme.CA(), trustme.CA(), trustme.CA()
    await Files(tmp_path).write(old, clients)
    async with FakeRegistry(ssl_context=server(new, clients, needed=True)) as fake:
        fake.push(IMAGE)
        upstreams = {UPSTREAM: {"url": fake.url, **Files(tmp_path).keys()}}
        async with running(tmp_path / "cache", "", clock=clock, upstreams=upstreams) as pool:
            assert (await pool.get(manifest_path("v1"))).status == 502
            await Files(tmp_path).write(new, clients)
            clock.advance(INTERVAL)
            assert (await pool.get(manifest_path("v1"))).body == IMAGE.manifest
            assert pool.events("reloaded")
