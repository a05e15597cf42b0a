"""A cache directory that holds very much, made in seconds: what a proxy has after years.

The files and the rows are those that the store itself would have written; only the bytes did not
come from anywhere, and nothing is synced to the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path

from benchmarks.containerd import NAME
from benchmarks.images import CONFIG_TYPE, LAYER_TYPE, MANIFEST_TYPE
from benchmarks.load import Want
from proxy.oci.digest import Digest
from proxy.store.files import Layout
from proxy.store.index import Index

USED = 1_700_000_000_000_000  # microseconds since the epoch; any moment of the past will do
SEEN = 4_000_000_000.0  # seconds since the epoch: a link that is not pruned


def hold_manifests(directory: Path, number: int) -> list[Want]:
    """Has the cache hold so many images' manifests, each of a repository of its own."""
    found = {f"bench/held-{at}": _manifest(at) for at in range(number)}
    digests = [Digest.of(raw) for raw in found.values()]
    _write(directory, zip(digests, found.values(), strict=True))
    asyncio.run(_register_manifests(directory, list(found), digests, list(found.values())))
    return [
        Want("manifest", repository, str(digest), str(digest), len(raw))
        for (repository, raw), digest in zip(found.items(), digests, strict=True)
    ]


def hold_blobs(directory: Path, number: int) -> None:
    """Has the cache hold so many tiny blobs."""
    bodies = [f"blob {at}".encode() for at in range(number)]
    digests = [Digest.of(body) for body in bodies]
    _write(directory, zip(digests, bodies, strict=True))
    asyncio.run(_register_blobs(directory, digests, [len(body) for body in bodies]))


def _manifest(number: int) -> bytes:
    """A manifest of eight layers; what it names is nowhere."""
    layers = [Digest.of(f"layer {number} {at}".encode()) for at in range(8)]
    config = Digest.of(f"config {number}".encode())
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": str(config), "size": 1000 + number},
        "layers": [
            {"mediaType": LAYER_TYPE, "digest": str(layer), "size": 1_000_000 + number}
            for layer in layers
        ],
    }
    return json.dumps(document).encode()


def _write(directory: Path, bodies: Iterator[tuple[Digest, bytes]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    layout = Layout(directory)
    for digest, body in bodies:
        path = layout.blob(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)


async def _register_blobs(directory: Path, digests: Sequence[Digest], sizes: Sequence[int]) -> None:
    async with _index(directory) as index:
        rows = [index.put_blob(str(d), size, USED) for d, size in zip(digests, sizes, strict=True)]
        await asyncio.gather(*rows)


async def _register_manifests(
    directory: Path, repositories: Sequence[str], digests: Sequence[Digest], raws: Sequence[bytes]
) -> None:
    await _register_blobs(directory, digests, [len(raw) for raw in raws])
    rows: list[Coroutine[None, None, None]] = []
    async with _index(directory) as index:
        for repository, digest, raw in zip(repositories, digests, raws, strict=True):
            document = json.loads(raw)
            named = (document["config"], *document["layers"])
            children = [descriptor["digest"] for descriptor in named]
            rows.append(index.put_manifest(str(digest), MANIFEST_TYPE, children))
            rows.append(index.link(NAME, repository, [(str(digest), len(raw))], SEEN))
        await asyncio.gather(*rows)


@contextlib.asynccontextmanager
async def _index(directory: Path) -> AsyncIterator[Index]:
    index = await Index.open(Layout(directory).index)
    try:
        yield index
    finally:
        await index.close()
