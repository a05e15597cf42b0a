"""A crowd of simple clients: each pulls one image, and gives up at the first answer that is no.

A client asks for what container runtimes ask for: the manifest by its tag, then config and layers,
each checked against its digest. It does so over one connection (runtimes take about three, which
would make a crowd of three times the size), and it does not retry: what the registry answers to a
crowd is what the figures show.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from proxy.oci.digest import Digest
from proxy.oci.errors import PullError
from proxy.oci.manifest import MANIFEST_ACCEPT, Descriptor, Manifest, parse_manifest

#: Seconds until a connection that neither opens nor says anything counts as broken.
_PATIENCE = 60.0
_READ_BUFFER = 1 << 18


class PullFailed(Exception):
    """This pull is over; what it met has been counted."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a client pulls."""

    repository: str
    tag: str


class Tally:
    """What a crowd has got so far; the screen reads it while the crowd is at work.

    - `served`, `failed`: pulls that are over.
    - `bytes`: blob bytes that arrived, those of failed pulls included.
    - `refused`: answers other than 200, by status. `broken`: the other failures, by a word.
    - `times`: seconds that each served pull took.
    - `sizes`: the manifests and blobs of the served pulls, each once, with their bytes.
    """

    def __init__(self, pulls: int) -> None:
        self.pulls = pulls
        self.served = 0
        self.failed = 0
        self.bytes = 0
        self.refused: Counter[int] = Counter()
        self.broken: Counter[str] = Counter()
        self.times: list[float] = []
        self.sizes: dict[Digest, int] = {}

    def note_served(self, manifest: Manifest, seconds: float) -> None:
        """Count a pull that got everything."""
        self.served += 1
        self.times.append(seconds)
        self.sizes[manifest.digest] = len(manifest.raw)
        self.sizes.update((child.digest, child.size) for child in manifest.children)

    def refuse(self, status: int) -> PullFailed:
        """Count an answer that ends a pull, and give the exception for it."""
        self.refused[status] += 1
        return PullFailed(f"answered {status}")

    def break_off(self, word: str) -> PullFailed:
        """Count a failure that is no answer, and give the exception for it."""
        self.broken[word] += 1
        return PullFailed(word)

    def __repr__(self) -> str:
        return f"<Tally {self.served} served, {self.failed} failed of {self.pulls}>"


async def run_crowd(registry: str, images: Sequence[Image], tally: Tally) -> None:
    """Let all of the tally's clients go at once; return when the last of them is done."""
    async with asyncio.TaskGroup() as crowd:
        for number in range(tally.pulls):
            client = _Client(registry, images[number % len(images)], tally)
            crowd.create_task(client.run(_source(number)))


def _source(number: int) -> tuple[str, int] | None:
    """An address of its own for each client, as in a real crowd; Linux has all of 127/8."""
    if sys.platform != "linux":
        return None
    return f"127.1.{number // 250}.{1 + number % 250}", 0


class _Client:
    """One pull of one image, over a connection of its own."""

    def __init__(self, registry: str, image: Image, tally: Tally) -> None:
        self._base = f"{registry}/v2/{image.repository}"
        self._tag = image.tag
        self._tally = tally

    async def run(self, source: tuple[str, int] | None) -> None:
        """Pull, and count what became of it."""
        began = time.monotonic()
        connector = aiohttp.TCPConnector(limit=1, local_addr=source)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_PATIENCE, sock_read=_PATIENCE)
        try:
            async with aiohttp.ClientSession(
                connector=connector,
                timeout=timeout,
                auto_decompress=False,
                read_bufsize=_READ_BUFFER,
                headers={"User-Agent": "pullpool-demo"},
            ) as session:
                manifest = await self._pull(session)
        except PullFailed:
            self._tally.failed += 1
        else:
            self._tally.note_served(manifest, time.monotonic() - began)

    async def _pull(self, session: aiohttp.ClientSession) -> Manifest:
        manifest = await self._manifest(session)
        for child in manifest.children:
            await self._blob(session, child)
        return manifest

    async def _manifest(self, session: aiohttp.ClientSession) -> Manifest:
        url = f"{self._base}/manifests/{self._tag}"
        try:
            async with session.get(url, headers={"Accept": MANIFEST_ACCEPT}) as response:
                if response.status != 200:
                    raise self._tally.refuse(response.status)
                raw = await response.read()
                digest = Digest.of(raw)
                if response.headers.get("Docker-Content-Digest") != str(digest):
                    raise self._tally.break_off("wrong digest")
                return parse_manifest(raw, response.headers.get("Content-Type"), digest)
        except PullError as error:
            raise self._tally.break_off("unreadable manifest") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._tally.break_off(_word(error)) from error

    async def _blob(self, session: aiohttp.ClientSession, blob: Descriptor) -> None:
        verifier = blob.digest.verifier()
        try:
            async with session.get(f"{self._base}/blobs/{blob.digest}") as response:
                if response.status != 200:
                    raise self._tally.refuse(response.status)
                async for chunk in response.content.iter_any():
                    verifier.update(chunk)
                    self._tally.bytes += len(chunk)
        except (aiohttp.ClientError, OSError) as error:
            raise self._tally.break_off(_word(error)) from error
        if not verifier.matches():
            raise self._tally.break_off("wrong digest")


def _word(error: Exception) -> str:
    """What to call a failure of the connection in the figures."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "no connection"
    return "broken off"
