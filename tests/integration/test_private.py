"""Private images: registries that want tokens (over TLS) or a password, and real clients."""

from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.testing.images import FakeImage, make_image
from tests.integration.clients import Skopeo
from tests.integration.conftest import Private
from tests.integration.nginx import Front, Nginx
from tests.integration.parts import ROBOT, Pullpool, Registry, Serving
from tests.integration.rig import PartFailed, Rig, needs
from tests.integration.seeding import MIB, digests, push_image, sizes

pytestmark = needs("skopeo")

Serve = Callable[[Serving], Pullpool]


@pytest.fixture(scope="module")
def image(registry: Registry) -> FakeImage:
    """An image of the private registry, put there through the open door."""
    layers = (2 * MIB, MIB, 300_000)
    return push_image(registry.url, make_image("secret/app", "v1", layers=layers, seed=30))


def test_the_registry_gives_nothing_to_strangers(
    rig: Rig, private: Private, image: FakeImage
) -> None:
    with pytest.raises(PartFailed, match=r"denied|unauthorized|authentication required"):
        Skopeo(rig, private.nginx.host).pull(image)


def test_a_private_image_is_pulled_with_a_token_over_tls(
    rig: Rig, serve: Serve, private: Private, image: FakeImage
) -> None:
    proxy = serve(private.serving())
    client = Skopeo(rig, proxy.host)

    assert client.pull(image) == digests(image)
    assert private.nginx.log.blob_bytes() == sizes(image)
    assert {account for account, _ in private.tokens.asked} == {ROBOT[0]}

    private.nginx.stop()
    assert client.pull(image) == digests(image)


def test_a_crowd_of_clients_shares_one_token(
    rig: Rig, serve: Serve, private: Private, image: FakeImage
) -> None:
    proxy = serve(private.serving())

    assert Skopeo(rig, proxy.host).crowd([image] * 6) == []
    assert private.nginx.log.blob_bytes() == sizes(image)
    scopes = [scopes for _, scopes in private.tokens.asked]
    assert scopes == [("repository:secret/app:pull",)]


def test_wrong_credentials_are_a_denial_and_nothing_is_kept(
    rig: Rig, serve: Serve, private: Private, image: FakeImage
) -> None:
    proxy = serve(private.serving(account=(ROBOT[0], "a guess")))
    with pytest.raises(PartFailed):
        Skopeo(rig, proxy.host).pull(image)

    assert private.nginx.log.blob_bytes() == {}
    assert proxy.metric("pullpool_store_blobs") == 0


def test_a_certificate_of_a_strange_authority_is_refused(
    rig: Rig, serve: Serve, private: Private, image: FakeImage
) -> None:
    proxy = serve(Serving(private.nginx.url, credentials=ROBOT))
    with pytest.raises(PartFailed):
        Skopeo(rig, proxy.host).pull(image)

    assert private.tokens.asked == []


def test_a_private_image_is_pulled_with_a_password(
    rig: Rig, serve: Serve, storage: Path, image: FakeImage
) -> None:
    registry = Registry(rig, storage=storage, password=True)
    nginx = Nginx(rig, Front(), registry_port=registry.port)
    proxy = serve(Serving(nginx.url, credentials=ROBOT))
    client = Skopeo(rig, proxy.host)

    assert client.pull(image) == digests(image)
    assert nginx.log.blob_bytes() == sizes(image)
