"""One large blob over several connections, from a real nginx that holds each of them to a pace.

What was asked for, and how much of it was sent, is told by nginx's log; what was open towards it,
by the kernel. How long it took is told by nobody: that is for the benchmarks.
"""

import urllib.request
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import pairwise

import pytest

from proxy.testing.images import FakeImage, make_image
from tests.integration.conftest import LIMIT
from tests.integration.nginx import Exchange, Front, Nginx
from tests.integration.parts import Pullpool, Registry, Serving
from tests.integration.rig import Rig, wait_until
from tests.integration.seeding import MIB, push_image
from tests.integration.sockets import Sampler

RATE = "6m"
"""Of each connection: the blob takes some time, and its first bytes come at once."""

SIZE = 24 * MIB + 1


@pytest.fixture(scope="module")
def image(registry: Registry) -> FakeImage:
    """An image with one layer that is worth several segments."""
    made = make_image("segments/app", "v1", layers=[SIZE], seed=30, tarred=False)
    return push_image(registry.url, made)


def pull(proxy: Pullpool, image: FakeImage) -> None:
    """The manifest, as every client asks first, and then the layer: it has to be right."""
    [layer] = image.layers
    assert fetched(proxy, f"{image.name}/manifests/{image.tag}") == image.manifest
    body = fetched(proxy, f"{image.name}/blobs/{layer.digest}")
    assert len(body) == SIZE
    assert sha256(body).hexdigest() == layer.digest.hex


def fetched(proxy: Pullpool, path: str) -> bytes:
    with urllib.request.urlopen(f"{proxy.url}/v2/{path}") as answer:
        return bytes(answer.read())


def exchanges(upstream: Nginx, image: FakeImage) -> list[Exchange]:
    """The answers with bytes of the layer, all of which have ended; no byte came twice."""
    digest = str(image.layers[0].digest)
    wait_until(lambda: not upstream.answering(), "the upstream has sent everything")
    assert upstream.log.refused() == 0
    assert upstream.log.blob_bytes()[digest] == SIZE
    return [one for one in upstream.log if one.blob == digest and one.method == "GET"]


def spans(answers: list[Exchange]) -> Iterator[tuple[int, int]]:
    """Where what each of them sent begins and ends."""
    for one in answers:
        unit, _, asked = one.range.partition("=")
        assert unit == "bytes"
        start = int(asked.partition("-")[0])
        yield start, start + one.bytes


@pytest.mark.parametrize("rate", [RATE])
def test_a_large_blob_comes_in_ranges_over_several_connections_each_byte_once(
    serve: Callable[[Serving], Pullpool], upstream: Nginx, image: FakeImage
) -> None:
    proxy = serve(Serving(upstream.url, max_connections=LIMIT))
    with Sampler(upstream.port) as sampler:
        pull(proxy, image)

    assert 1 < sampler.peak <= LIMIT
    answers = exchanges(upstream, image)
    assert {one.status for one in answers} == {206}
    assert len({one.connection for one in answers}) > 1
    found = sorted(spans(answers))
    assert found[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(found))
    assert proxy.metric("pullpool_upstream_segments_total", outcome="done") > 1


@pytest.mark.parametrize("rate", [RATE])
@pytest.mark.parametrize(("connections", "segments"), [(3, 8), (8, 2)])
def test_neither_cap_nor_segments_are_exceeded(
    serve: Callable[[Serving], Pullpool],
    upstream: Nginx,
    image: FakeImage,
    connections: int,
    segments: int,
) -> None:
    proxy = serve(Serving(upstream.url, max_connections=connections, segments=segments))
    with Sampler(upstream.port) as sampler:
        pull(proxy, image)
    assert 1 < sampler.peak <= connections
    used = {one.connection for one in exchanges(upstream, image)}
    assert 1 < len(used) <= min(connections, segments)


@pytest.mark.parametrize("rate", [RATE])
def test_with_one_segment_the_blob_comes_over_one_connection(
    serve: Callable[[Serving], Pullpool], upstream: Nginx, image: FakeImage
) -> None:
    proxy = serve(Serving(upstream.url, max_connections=LIMIT, segments=1))
    pull(proxy, image)
    assert len({one.connection for one in exchanges(upstream, image)}) == 1


def test_an_upstream_that_ignores_ranges_is_read_in_one_stream(
    rig: Rig, registry: Registry, serve: Callable[[Serving], Pullpool], image: FakeImage
) -> None:
    front = Front(connections=LIMIT, rate=RATE, ranges=False)
    upstream = Nginx(rig, front, registry_port=registry.port)
    proxy = serve(Serving(upstream.url, max_connections=LIMIT))
    pull(proxy, image)
    [answer] = exchanges(upstream, image)
    assert (answer.status, answer.range != "") == (200, True)  # it was asked for one
    assert proxy.metric("pullpool_upstream_without_range_total") == 1
