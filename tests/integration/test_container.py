"""The container image is built and runs as a sidecar: read-only, not root, healthy, pulled from."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.parts import free_port
from proxy.testing.images import FakeImage, make_image
from tests.integration import container
from tests.integration.clients import Dockerd
from tests.integration.nginx import Nginx
from tests.integration.parts import Registry
from tests.integration.rig import Rig, as_root, listens, needs
from tests.integration.seeding import MIB, digests, push_image, sizes

pytestmark = [as_root, needs("dockerd", "docker", "debootstrap", "docker-registry", "nginx")]

IMAGE = "pullpool:test"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dockerd]:
    """A container engine that has pullpool's image, built from the working tree."""
    with Rig(tmp_path_factory.mktemp("engine")) as rig:
        dockerd = container.start_engine(rig)
        version = container.import_base_image(dockerd, rig)
        container.build(dockerd, container.make_context(rig, version), IMAGE)
        yield dockerd


@pytest.fixture
def image(registry: Registry) -> FakeImage:
    """What the client container pulls."""
    sidecar = make_image("team/sidecar", "v1", layers=(2 * MIB, MIB), seed=40)
    return push_image(registry.url, sidecar)


@pytest.fixture
def sidecar(engine: Dockerd, upstream: Nginx) -> Iterator[tuple[str, int]]:
    """pullpool in a container as one would run it: (container, port)."""
    port, admin = free_port(), free_port()
    name = f"pullpool-{port}"
    settings = {
        "PULLPOOL_LISTEN": f"127.0.0.1:{port}",
        "PULLPOOL_ADMIN": f"127.0.0.1:{admin}",
        "PULLPOOL_UPSTREAM_URL": upstream.url,
    }
    engine.run(
        "run",
        "--detach",
        f"--name={name}",
        "--network=host",
        "--read-only",
        "--tmpfs=/tmp",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        f"--volume={name}:/var/lib/pullpool",
        *(f"--env={key}={value}" for key, value in settings.items()),
        IMAGE,
    )
    yield name, port
    engine.run("rm", "--force", name)
    engine.run("volume", "rm", name)


def test_the_image_is_not_root_and_has_a_health_check_and_no_index_in_it(engine: Dockerd) -> None:
    told = json.loads(engine.run("image", "inspect", IMAGE))[0]["Config"]
    assert told["User"] == "65532:65532"
    assert told["Healthcheck"]["Test"] == ["CMD", "pullpool", "healthcheck"]
    assert not [line for line in told["Env"] if line.startswith("PIP_")]
    assert engine.run("run", "--rm", "--network=host", IMAGE, "--help")


def test_a_container_pulls_through_its_sidecar(
    engine: Dockerd, sidecar: tuple[str, int], upstream: Nginx, image: FakeImage
) -> None:
    name, port = sidecar
    container.wait_for(engine, name, lambda: listens(port), "the sidecar listens")
    script = Path(container.__file__).with_name("container_client.py")

    def pull() -> set[str]:
        said = engine.run(
            "run",
            "--rm",
            "--network=host",
            f"--volume={script}:/pull.py:ro",
            container.BASE,
            *("python3", "/pull.py", f"http://127.0.0.1:{port}", image.name, image.tag),
        )
        return set(said.split())

    assert pull() == digests(image)
    upstream.stop()
    assert pull() == digests(image)
    assert upstream.log.blob_bytes() == sizes(image)


def test_the_sidecar_becomes_healthy_and_ends_when_it_is_asked_to(
    engine: Dockerd, sidecar: tuple[str, int]
) -> None:
    name, _ = sidecar
    container.wait_for(
        engine, name, lambda: container.health(engine, name) == "healthy", "the engine is content"
    )
    assert engine.run("exec", name, "id", "--user").strip() == "65532"
    engine.run("stop", name)
    assert container.exit_code(engine, name) == 0
