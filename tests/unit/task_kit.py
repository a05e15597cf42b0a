"""What the tests of tasks over HTTP share: orders, and what becomes of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from proxy.cli.task_client import Event, events
from proxy.testing.images import FakeImage
from tests.unit.proxy_kit import Pullpool, blob_path, manifest_path

Document = dict[str, Any]


async def ask(
    pool: Pullpool, method: str, path: str = "", body: Any = None, **headers: str
) -> tuple[int, Document]:
    """A request about tasks: status and JSON."""
    url = f"{pool.proxy.admin_url}/api/v1/tasks{path}"
    async with pool.session.request(method, url, json=body, headers=headers) as response:
        return response.status, await response.json()


async def prefetch(pool: Pullpool, *images: str, platforms: tuple[str, ...] = ()) -> Document:
    """Order it; the task as it is then."""
    body = {"kind": "prefetch", "images": images, "platforms": platforms}
    status, task = await ask(pool, "POST", body=body)
    assert status == 202
    return task


async def over(pool: Pullpool, task: Document) -> Document:
    """The task when it is over."""
    while task["state"] in ("PENDING", "RUNNING"):
        status, task = await ask(pool, "GET", f"/{task['id']}/wait?timeout=60")
        assert status == 200
    return task


async def done(pool: Pullpool, *images: str, platforms: tuple[str, ...] = ()) -> Document:
    return await over(pool, await prefetch(pool, *images, platforms=platforms))


async def all_hits(pool: Pullpool, image: FakeImage, reference: object = None) -> None:
    """A client pulls the image, and nothing of it is asked of the upstream."""
    paths = [manifest_path(reference or image.tag, image.name)]
    paths += [manifest_path(image.digest, image.name)]
    paths += [blob_path(blob.digest, image.name) for blob in image.blobs]
    for path in paths:
        for method in ("HEAD", "GET"):
            answer = await pool.ask(method, path)
            assert (answer.status, answer.word) == (200, "hit"), path


class Listening:
    """A client of `/api/v1/events`."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.heard = list[Event]()
        self.last = ""

    async def event(self) -> Event | None:
        """The next event; None at the end of the stream."""
        lines = list[bytes]()
        while (line := await self.response.content.readline()) != b"\n":
            if not line:
                return None
            lines.append(line)
        for event in events([*lines, b"\n"]):
            self.heard.append(event)
            self.last = event.id or self.last
            return event
        return await self.event()  # a comment


@asynccontextmanager
async def listening(pool: Pullpool, query: str = "", last: str = "") -> AsyncIterator[Listening]:
    url = f"{pool.proxy.admin_url}/api/v1/events{query}"
    headers = {"Last-Event-ID": last} if last else {}
    async with pool.session.get(url, headers=headers) as response:
        assert response.status == 200
        yield Listening(response)
