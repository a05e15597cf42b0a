"""The grammars that requests pass: digests, references, paths, ranges, challenges, manifests."""

from __future__ import annotations

import pytest

from benchmarks.images import MANIFEST_TYPE
from benchmarks.micro.kit import ACCEPT, BLOB_PATH, CHALLENGE, DIGEST, IMAGE, Benchmark
from proxy.oci.challenge import parse_challenges, pick_bearer
from proxy.oci.digest import Digest
from proxy.oci.manifest import acceptable, parse_manifest
from proxy.oci.paths import Kind, parse_path
from proxy.oci.ranges import ByteRange, parse_content_range
from proxy.oci.reference import Repository, Tag, parse_reference

MIB = 1 << 20


def test_parse_a_digest(benchmark: Benchmark) -> None:
    assert str(benchmark(Digest.parse, DIGEST)) == DIGEST


def test_hash_a_mebibyte(benchmark: Benchmark) -> None:
    assert benchmark(Digest.of, bytes(MIB)).algorithm == "sha256"


def test_parse_a_repository(benchmark: Benchmark) -> None:
    assert benchmark(Repository.parse, "library/team/application").components


@pytest.mark.parametrize("text", [DIGEST, "v1.2.3-alpine"], ids=["digest", "tag"])
def test_parse_a_reference(benchmark: Benchmark, text: str) -> None:
    assert isinstance(benchmark(parse_reference, text), (Digest, Tag))


def test_parse_a_path(benchmark: Benchmark) -> None:
    assert benchmark(parse_path, BLOB_PATH).kind is Kind.BLOB


def test_parse_and_resolve_a_range(benchmark: Benchmark) -> None:
    def resolve() -> int:
        asked = ByteRange.parse("bytes=1048576-2097151")
        assert asked is not None
        return asked.resolve(64 * MIB).length

    assert benchmark(resolve) == MIB


def test_parse_a_content_range(benchmark: Benchmark) -> None:
    span = benchmark(parse_content_range, "bytes 1048576-2097151/67108864")
    assert span is not None
    assert span.length == MIB


def test_parse_a_challenge(benchmark: Benchmark) -> None:
    challenge = benchmark(lambda: pick_bearer(parse_challenges([CHALLENGE])))
    assert challenge is not None


def test_parse_a_manifest_of_twelve_layers(benchmark: Benchmark) -> None:
    digest = Digest.of(IMAGE.manifest)
    manifest = benchmark(parse_manifest, IMAGE.manifest, MANIFEST_TYPE, digest)
    assert len(manifest.children) == 13


def test_compare_a_type_with_what_a_client_accepts(benchmark: Benchmark) -> None:
    assert benchmark(acceptable, MANIFEST_TYPE, [ACCEPT])
