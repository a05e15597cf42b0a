"""Artifacts of no container: Apptainer images, pulled by `oras://` in a crowd.

It is what the founding issue is about (dragonflyoss/dragonfly#3662): at the registry's limit its
users got "failed to get checksum … 401 Unauthorized".
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.testing.images import pseudo_random
from tests.integration.clients import Oras
from tests.integration.nginx import Front, Nginx
from tests.integration.parts import Pullpool, Registry, Serving
from tests.integration.rig import Rig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("oras") is None, reason="not installed: the Python package oras"
)

TOOLS = 4
PULLS = 10
SIZE = 600_000
CAP = 32
LIMIT = 2


@pytest.fixture(scope="module")
def tools(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The contents of the artifacts by their names, as pushed by the package itself."""
    made = {f"tools/tool{n}": pseudo_random(f"tool {n}", SIZE + n) for n in range(TOOLS)}
    place = tmp_path_factory.mktemp("tools")
    for name, data in made.items():
        file = place / f"{Path(name).name}.sif"
        file.write_bytes(data)
        Oras(registry.host).push(name, file)
    return made


@pytest.fixture
def limited(rig: Rig, registry: Registry) -> Nginx:
    """The registry, two requests at a time, 401 beyond, and slow enough to be found at it."""
    return Nginx(rig, Front(connections=LIMIT, rate="200k"), registry_port=registry.port)


def test_without_a_proxy_a_crowd_of_oras_pulls_is_refused(
    rig: Rig, limited: Nginx, tools: dict[str, bytes]
) -> None:
    failed, _ = Oras(limited.host).crowd(rig, _crowd(tools))
    assert failed
    assert limited.log.refused() > 0


def test_a_crowd_of_oras_pulls_is_served_by_an_upstream_at_its_limit(
    rig: Rig, serve: Callable[[Serving], Pullpool], limited: Nginx, tools: dict[str, bytes]
) -> None:
    proxy = serve(Serving(limited.url, max_connections=CAP))
    crowd = _crowd(tools)

    failed, pulled = Oras(proxy.host).crowd(rig, crowd)

    assert failed == []
    assert pulled == [{f"{Path(name).name}.sif": tools[name]} for name in crowd]
    assert limited.log.refused() > 0
    assert sorted(limited.log.blob_bytes().values())[-TOOLS:] == sorted(map(len, tools.values()))


def _crowd(tools: dict[str, bytes]) -> list[str]:
    names = list(tools)
    return [names[number % len(names)] for number in range(PULLS)]
