"""The index's upserts: one by itself, as after a pull, and a thousand that come together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from benchmarks.micro.kit import Benchmark
from proxy.oci.digest import Digest
from proxy.store.index import Index

SEEN = 1_700_000_000.0


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def index(tmp_path: Path, runner: asyncio.Runner) -> Iterator[Index]:
    index = runner.run(Index.open(tmp_path / "index.db"))
    yield index
    runner.run(index.close())


def test_put_a_blob(benchmark: Benchmark, runner: asyncio.Runner, index: Index) -> None:
    numbers = count()

    def put() -> None:
        digest = str(Digest.of(str(next(numbers)).encode()))
        runner.run(index.put_blob(digest, 1, 1))

    benchmark(put)
    assert len(runner.run(index.load()).blobs) == next(numbers)


def test_link_a_thousand_blobs_again(
    benchmark: Benchmark, runner: asyncio.Runner, index: Index
) -> None:
    rows = [(str(Digest.of(str(number).encode())), number) for number in range(1_000)]
    benchmark(lambda: runner.run(index.link("upstream", "team/app", rows, SEEN)))
    assert runner.run(index.linked("upstream", "team/app", rows[7][0])) == (7,)
