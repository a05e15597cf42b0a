"""Every real client pulls through pullpool: cold, warm, and when the upstream is gone."""

from collections.abc import Callable

import pytest

from proxy.testing.images import FakeImage, FakeIndex, make_image, make_index
from tests.integration.clients import Client, Containerd, Dockerd, Podman, Skopeo
from tests.integration.nginx import Nginx
from tests.integration.parts import NAME, Pullpool, Registry, Serving
from tests.integration.rig import PartFailed, Rig, as_root, needs
from tests.integration.seeding import (
    ARCHITECTURE,
    MIB,
    digests,
    push_image,
    push_index,
    sizes,
)

LAYERS = (MIB, 5 * MIB, 200_000)

Serve = Callable[[Serving], Pullpool]
Start = Callable[[Rig, str], Client]


def _podman_with_a_prefix(rig: Rig, mirror: str) -> Client:
    return Podman(rig, mirror, prefix=f"/{NAME}")


CLIENTS = [
    pytest.param(Skopeo, "team", marks=needs("skopeo"), id="skopeo"),
    pytest.param(Podman, "team", marks=[as_root, needs("podman")], id="podman"),
    pytest.param(
        _podman_with_a_prefix, "team", marks=[as_root, needs("podman")], id="podman-prefix"
    ),
    pytest.param(Containerd, "team", marks=[as_root, needs("containerd", "ctr")], id="containerd"),
    # A mirror of dockerd serves docker.io only, where one word is short for library/word.
    pytest.param(Dockerd, "library", marks=[as_root, needs("dockerd", "docker")], id="dockerd"),
]


@pytest.fixture(scope="module")
def images(registry: Registry) -> dict[str, FakeImage]:
    """The same image under a project's name and under docker.io's."""
    return {
        name: push_image(registry.url, make_image(name, "v1", layers=LAYERS, seed=1))
        for name in ("team/app", "library/app")
    }


@pytest.fixture(scope="module")
def indexes(registry: Registry) -> dict[str, FakeIndex]:
    """An image for this machine and one for another, under both names."""
    return {
        name: push_index(registry.url, make_index(name, "v1", _for_two_machines(name)))
        for name in ("team/multi", "library/multi")
    }


def _for_two_machines(name: str) -> list[FakeImage]:
    return [
        make_image(name, "", layers=LAYERS, seed=seed, architecture=architecture)
        for seed, architecture in ((2, "s390x"), (3, ARCHITECTURE))
    ]


@pytest.mark.parametrize(("start", "project"), CLIENTS)
def test_a_client_pulls_cold_warm_and_with_the_upstream_gone(
    rig: Rig,
    serve: Serve,
    upstream: Nginx,
    images: dict[str, FakeImage],
    start: Start,
    project: str,
) -> None:
    image = images[f"{project}/app"]
    proxy = serve(Serving(upstream.url))
    client = start(rig, proxy.host)

    assert client.pull(image) == digests(image)
    assert upstream.log.blob_bytes() == sizes(image)
    cold = list(upstream.log)

    assert client.pull(image) == digests(image)
    assert list(upstream.log) == cold

    upstream.stop()
    assert client.pull(image) == digests(image)


@pytest.mark.parametrize(("start", "project"), CLIENTS)
def test_a_client_fetches_of_an_index_only_what_fits_its_machine(
    rig: Rig,
    serve: Serve,
    upstream: Nginx,
    indexes: dict[str, FakeIndex],
    start: Start,
    project: str,
) -> None:
    index = indexes[f"{project}/multi"]
    _, fitting = index.images
    client = start(rig, serve(Serving(upstream.url)).host)

    assert client.pull(index) >= sizes(fitting).keys()
    assert upstream.log.blob_bytes() == sizes(fitting)


@needs("skopeo")
def test_what_was_pulled_before_a_restart_is_served_without_the_upstream(
    rig: Rig, serve: Serve, upstream: Nginx, images: dict[str, FakeImage]
) -> None:
    image = images["team/app"]
    # The tag is asked for anew each time, and an old answer is better than none.
    proxy = serve(Serving(upstream.url, tag_ttl="0s"))
    client = Skopeo(rig, proxy.host)
    client.pull(image)
    assert proxy.stop() == 0
    upstream.stop()
    proxy.start()

    assert client.pull(image) == digests(image)


@needs("skopeo")
def test_an_upstream_that_comes_back_is_asked_again(
    rig: Rig, serve: Serve, upstream: Nginx, images: dict[str, FakeImage]
) -> None:
    image = images["team/app"]
    proxy = serve(Serving(upstream.url))
    client = Skopeo(rig, proxy.host)
    upstream.stop()
    with pytest.raises(PartFailed):
        client.pull(image)
    upstream.start()

    assert client.pull(image) == digests(image)
