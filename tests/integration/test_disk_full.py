"""A disk that somebody else fills while a blob is on its way: everybody gets it all the same."""

import contextlib
import hashlib
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.nginx import Nginx
from tests.integration.parts import Pullpool, Registry, Serving
from tests.integration.rig import Rig, as_root, needs, run, wait_until
from tests.integration.seeding import MIB, push_large_blob

SIZE = 128 * MIB
CLIENTS = 4


def _digest(url: str) -> str:
    hasher = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=120) as answer:
        while piece := answer.read(MIB):
            hasher.update(piece)
    return f"sha256:{hasher.hexdigest()}"


def _disk(rig: Rig, size: int) -> Path:
    """A file system of its own, of so many bytes."""
    disk = rig.place("disk")
    run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk])
    rig.at_end(run, ["umount", "--lazy", disk])
    return disk


def _fill(disk: Path) -> Path:
    """Take every byte that is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(MIB))
    return filler


def _staged(cache: Path) -> int:
    return sum(path.stat().st_size for path in (cache / "staging").iterdir())


@as_root
@needs("mount", "umount")
@pytest.mark.parametrize("rate", ["16m"])
def test_a_disk_that_fills_up_in_the_middle_costs_only_the_copy(
    rig: Rig, serve: Callable[[Serving], Pullpool], registry: Registry, upstream: Nginx
) -> None:
    digest = str(push_large_blob(registry.url, "full/large", SIZE))
    disk = _disk(rig, SIZE + 64 * MIB)
    proxy = serve(Serving(upstream.url, cache=disk / "cache", min_free="0"))
    url = f"{proxy.url}/v2/full/large/blobs/{digest}"
    with ThreadPoolExecutor(CLIENTS) as clients:
        pulls = [clients.submit(_digest, url) for _ in range(CLIENTS)]
        wait_until(lambda: _staged(disk / "cache") >= 20 * MIB, "the fill to be under way")
        with upstream.paused():
            filler = _fill(disk)
            # Without this the test would say nothing about a full disk.
            assert not any(pull.done() for pull in pulls)
        assert [pull.result() for pull in pulls] == [digest] * CLIENTS

    wait_until(lambda: proxy.metric("pullpool_flights") == 0, "the flight to end")
    assert proxy.metric("pullpool_store_blobs") == 0
    assert _staged(disk / "cache") == 0
    # With room again, the next pull is kept.
    filler.unlink()
    assert _digest(url) == digest
    wait_until(lambda: proxy.metric("pullpool_store_blobs") == 1, "the blob to be kept")
