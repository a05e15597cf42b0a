"""One image, where it is found in a fake registry, and the plainest client there is."""

from __future__ import annotations

import asyncio
import base64
import json

import aiohttp

from proxy.oci.digest import Digest
from proxy.testing import (
    FakeRegistry,
    make_image,
)

IMAGE = make_image("team/app", "v1", layers=[100_000, 700_000], seed=1, tarred=False)
LAYER = IMAGE.layers[1]


def manifest_url(registry: FakeRegistry, reference: object = "v1", name: str = "team/app") -> str:
    return f"{registry.url}/v2/{name}/manifests/{reference}"


def blob_url(registry: FakeRegistry, digest: Digest = LAYER.digest, name: str = "team/app") -> str:
    return f"{registry.url}/v2/{name}/blobs/{digest}"


def basic(user: str, password: str) -> dict[str, str]:
    encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {encoded}"}


def claims(token: str) -> dict[str, list[dict[str, object]]]:
    """What a JWT says."""
    payload = token.split(".")[1]
    loaded: dict[str, list[dict[str, object]]] = json.loads(
        base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
    )
    return loaded


async def error_code(answer: aiohttp.ClientResponse) -> str:
    return str((await answer.json(content_type=None))["errors"][0]["code"])


async def dial(registry: FakeRegistry) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection; the registry accepts in the order of dialling."""
    reader, writer = await asyncio.open_connection("127.0.0.1", registry.port)
    return reader, writer


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str
) -> tuple[bytes, bytes]:
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = [
        line.split(b":")[1] for line in head.splitlines() if line.startswith(b"Content-Length")
    ]
    return head, await reader.readexactly(int(length))


async def ping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await ask(reader, writer, "/v2/")


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()
