"""TLS on the registry listener: certificates that change, and those that clients show."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from proxy.config import HostPort
from proxy.testing import make_image
from proxy.web.reload import Unusable
from proxy.web.tls import MAX_NAME, TlsFiles, certificate_name, server_context
from tests.unit.proxy_kit import (
    LAYER,
    Pullpool,
    blob_path,
    manifest_path,
    pulling,
    running,
    until,
)


@dataclass(frozen=True, slots=True)
class Pki:
    """An authority, and the files of a listener's certificate."""

    ca: trustme.CA
    directory: Path

    @property
    def files(self) -> TlsFiles:
        return TlsFiles(self.directory / "cert.pem", self.directory / "key.pem")

    @property
    def client_ca(self) -> Path:
        return self.directory / "ca.pem"

    def issue(self, ca: trustme.CA | None = None) -> None:
        """Write a new certificate for 127.0.0.1."""
        issued = (ca or self.ca).issue_cert("127.0.0.1", common_name="pullpool")
        self.files.cert.write_bytes(b"".join(c.bytes() for c in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(self.files.key)

    def settings(self, *, clients: bool = False) -> dict[str, Any]:
        keys = {"cert_file": str(self.files.cert), "key_file": str(self.files.key)}
        return {"tls": keys | ({"client_ca_file": str(self.client_ca)} if clients else {})}

    def trust(self, client: trustme.LeafCert | None = None) -> ssl.SSLContext:
        """What a client trusts, and shows."""
        context = ssl.create_default_context(cadata=self.ca.cert_pem.bytes().decode())
        if client is not None:
            client.configure_cert(context)
        return context


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    made = Pki(trustme.CA(), tmp_path)
    made.issue()
    made.ca.cert_pem.write_to_path(made.client_ca)
    return made


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


async def get(
    session: aiohttp.ClientSession, pool: Pullpool, path: str, trust: ssl.SSLContext
) -> bytes:
    async with session.get(f"{pool.proxy.url}{path}", ssl=trust) as response:
        assert response.status == 200
        return await response.read()


async def serial(address: HostPort, trust: ssl.SSLContext) -> str:
    """The serial number of the certificate that a new connection gets."""
    _, writer = await asyncio.open_connection(address.host, address.port, ssl=trust)
    certificate = writer.get_extra_info("peercert")
    writer.transport.abort()
    return str(certificate["serialNumber"])


def write(file: Path, data: bytes) -> None:
    file.write_bytes(data)


async def changed(pool: Pullpool, change: Callable[[], None]) -> None:
    """Change the files and let the proxy look."""
    await asyncio.to_thread(change)
    assert pool.proxy.certificates is not None
    await pool.proxy.certificates.look()


async def test_pulls_over_tls_are_whole(
    tmp_path: Path, pki: Pki, session: aiohttp.ClientSession
) -> None:
    async with pulling(tmp_path / "cache", **pki.settings()) as (pool, _):
        assert pool.proxy.url.startswith("https://")
        await get(session, pool, manifest_path("v1"), pki.trust())
        for _ in range(2):
            assert await get(session, pool, blob_path(), pki.trust()) == LAYER.data
            await pool.stored()
        await until(lambda: len(pool.access_log) == 3)  # a client may be done before its handler
        assert [line["cache"] for line in pool.access_log] == ["miss", "miss", "hit"]


async def test_clients_that_read_slowly_side_by_side_get_their_own_bytes(
    tmp_path: Path, pki: Pki, session: aiohttp.ClientSession
) -> None:
    """They share the memory that files are read to, and their sockets take a part of it."""
    images = [
        make_image(f"team/{n}", "v1", layers=[12 << 20], seed=n, tarred=False) for n in range(3)
    ]
    async with pulling(tmp_path / "cache", **pki.settings()) as (pool, fake):
        address, readers, writers = pool.address, [], []
        for image in images:
            fake.push(image)
            path = blob_path(image.layers[0].digest, image.name)
            await get(session, pool, path, pki.trust())
            await pool.stored()
            reader, writer = await asyncio.open_connection(
                address.host, address.port, ssl=pki.trust(), limit=32 << 10
            )
            readers.append(reader)
            writers.append(writer)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: pullpool\r\n\r\n".encode())
        for reader in readers:
            await reader.readuntil(b"\r\n\r\n")
        bodies = [bytearray() for _ in images]
        while not all(len(body) == 12 << 20 for body in bodies):
            for body, reader in zip(bodies, readers, strict=True):
                if len(body) < 12 << 20:
                    body += await reader.read(64 << 10)
        for body, image, writer in zip(bodies, images, writers, strict=True):
            assert body == image.layers[0].data
            writer.transport.abort()


async def test_new_connections_get_the_new_certificate_and_running_ones_go_on(
    tmp_path: Path, pki: Pki
) -> None:
    trust = pki.trust()
    async with running(tmp_path / "cache", "http://127.0.0.1:1", **pki.settings()) as pool:
        first = await serial(pool.address, trust)
        address = pool.address
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=trust)
        await changed(pool, pki.issue)
        assert await serial(address, trust) != first
        writer.write(b"GET /v2/ HTTP/1.1\r\nHost: pullpool\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.transport.abort()
        assert len(pool.events("reloaded")) == 1


async def test_a_broken_certificate_is_logged_and_the_old_one_stays(
    tmp_path: Path, pki: Pki
) -> None:
    trust = pki.trust()
    other = trustme.CA().issue_cert("127.0.0.1")
    async with running(tmp_path / "cache", "http://127.0.0.1:1", **pki.settings()) as pool:
        first = await serial(pool.address, trust)
        for broken in (b"", b"not a certificate", other.cert_chain_pems[0].bytes()):
            await changed(pool, partial(write, pki.files.cert, broken))
            assert await serial(pool.address, trust) == first
        await changed(pool, pki.files.cert.unlink)
        assert await serial(pool.address, trust) == first
        assert len(pool.events("not_reloaded")) == 4
        await changed(pool, pki.issue)
        assert await serial(pool.address, trust) != first


async def test_files_that_did_not_change_are_left_alone(tmp_path: Path, pki: Pki) -> None:
    async with running(tmp_path / "cache", "http://127.0.0.1:1", **pki.settings()) as pool:
        await changed(pool, lambda: None)
        assert not pool.events("reloaded")


async def test_a_client_with_a_certificate_is_known_by_its_name(
    tmp_path: Path, pki: Pki, session: aiohttp.ClientSession
) -> None:
    client = pki.ca.issue_cert("node-7.example.com", common_name="node-7")
    async with pulling(tmp_path / "cache", **pki.settings(clients=True)) as (pool, _):
        await get(session, pool, manifest_path("v1"), pki.trust(client))
        [line] = pool.access_log
        assert (line["user"], line["client"]) == ("node-7", "127.0.0.1")


async def test_a_client_without_a_certificate_of_the_authority_is_sent_away(
    tmp_path: Path, pki: Pki
) -> None:
    stranger = trustme.CA().issue_cert("node-7.example.com")
    url = "http://127.0.0.1:1"
    async with running(tmp_path / "cache", url, **pki.settings(clients=True)) as pool:
        for client in (None, stranger):
            async with aiohttp.ClientSession() as session:
                with pytest.raises(aiohttp.ClientError):
                    await get(session, pool, "/v2/", pki.trust(client))
        assert not pool.access_log


async def test_a_certificate_that_cannot_be_used_stops_the_start(tmp_path: Path, pki: Pki) -> None:
    await asyncio.to_thread(pki.files.key.write_text, "not a key")
    with pytest.raises(Unusable, match=r"key\.pem"):
        async with running(tmp_path / "cache", "http://127.0.0.1:1", **pki.settings()):
            pass


def test_a_key_with_a_password_is_refused_and_not_asked_about(pki: Pki) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(pki.files.key.read_bytes(), None)
    pki.files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(Unusable, match="protected by a password"):
        server_context(pki.files)


@pytest.mark.parametrize(
    ("certificate", "name"),
    [
        (None, None),
        ({}, None),
        ({"subject": ((("commonName", "node"),),)}, "node"),
        ({"subject": ((("organizationName", "o"),), (("commonName", "node"),))}, "node"),
        ({"subject": ((("organizationName", "o"),),)}, None),
        ({"subject": (), "subjectAltName": (("DNS", "a.b"), ("DNS", "c"))}, "a.b"),
        ({"subject": ((("commonName", " "),),), "subjectAltName": (("URI", "x:y"),)}, "x:y"),
        ({"subject": ((("commonName", "a\nb"),),)}, "a?b"),
        ({"subject": ((("commonName", "n" * 999),),)}, "n" * MAX_NAME),
    ],
)
def test_a_certificate_names_its_subject(certificate: dict[str, Any] | None, name: str) -> None:
    assert certificate_name(certificate) == name
