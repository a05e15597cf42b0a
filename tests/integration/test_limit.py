"""A crowd of real clients, all cold, in front of an upstream that refuses what is beyond its limit.

The limit is nginx's (requests in progress, 401 beyond, as Harbor answers); what pullpool opens
towards it is counted by the kernel; what was fetched is told by nginx's access log.
"""

from collections import Counter
from collections.abc import Callable

import pytest

from proxy.testing.images import FakeImage, make_image
from tests.integration.clients import Skopeo
from tests.integration.conftest import LIMIT
from tests.integration.nginx import Nginx
from tests.integration.parts import Pullpool, Registry, Serving
from tests.integration.rig import Rig, needs
from tests.integration.seeding import MIB, push_image, sizes
from tests.integration.sockets import Sampler

pytestmark = needs("skopeo")

LAYERS = (3 * MIB, 2 * MIB, MIB, 100_000)
IMAGES = 6
PULLS = 24


@pytest.fixture(scope="module")
def crowd(registry: Registry) -> list[FakeImage]:
    """What the clients want: each image is wanted by several."""
    images = [make_image(f"crowd/app{n}", "v1", layers=LAYERS, seed=10 + n) for n in range(IMAGES)]
    for image in images:
        push_image(registry.url, image)
    return [images[n % IMAGES] for n in range(PULLS)]


@pytest.mark.parametrize("rate", ["1m"])
def test_without_a_proxy_the_limit_refuses_a_crowd(
    rig: Rig, upstream: Nginx, crowd: list[FakeImage]
) -> None:
    assert Skopeo(rig, upstream.host).crowd(crowd)
    assert upstream.log.refused() > 0


@pytest.mark.parametrize("rate", ["1m"])
def test_a_crowd_is_served_within_the_cap_and_every_blob_is_fetched_once(
    rig: Rig, serve: Callable[[Serving], Pullpool], upstream: Nginx, crowd: list[FakeImage]
) -> None:
    proxy = serve(Serving(upstream.url, max_connections=LIMIT))
    with Sampler(upstream.port) as sampler:
        failed = Skopeo(rig, proxy.host).crowd(crowd)

    assert failed == []
    assert upstream.log.refused() == 0
    assert 1 < sampler.peak <= LIMIT
    wanted = Counter[str]()
    for image in crowd[:IMAGES]:
        wanted.update(sizes(image))
    assert upstream.log.blob_bytes() == wanted


def test_a_crowd_is_served_over_one_connection(
    rig: Rig, serve: Callable[[Serving], Pullpool], upstream: Nginx, crowd: list[FakeImage]
) -> None:
    proxy = serve(Serving(upstream.url, max_connections=1))
    with Sampler(upstream.port) as sampler:
        failed = Skopeo(rig, proxy.host).crowd(crowd[:IMAGES])

    assert failed == []
    assert sampler.peak == 1
