"""Upstreams that break under load, and real clients that must not notice.

The overloaded Harbor of `proxy.testing` breaks beyond six requests in progress in all the ways of
the real one, and pullpool is told that it may open 32 sockets: it has to find out. nginx in front
of docker-registry refuses beyond its limit with a 401 that is none.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from proxy.testing.images import FakeImage, make_image
from proxy.testing.overload import Misbehaviour
from tests.integration.clients import Containerd, Dockerd, ManyAtOnce, Podman, Skopeo
from tests.integration.harbor import LOGIN, Content, Harbor
from tests.integration.nginx import Front, Nginx
from tests.integration.parts import Pullpool, Registry, Serving
from tests.integration.rig import Rig, as_root, needs
from tests.integration.seeding import MIB, digests, push_image

Serve = Callable[[Serving], Pullpool]

BREAKS_BEYOND = 6
CAP = 32
CONTENT = Content(images=6, layers=(MIB, 300_000, 50_000, 1000))

needs_all_three = needs("podman", "containerd", "ctr", "dockerd", "docker")


def pull_with_all_clients(rig: Rig, proxy: Pullpool, images: Sequence[FakeImage]) -> None:
    """podman, containerd and dockerd pull all the images at the same time, and hold them then."""
    kinds: list[Callable[[Rig, str], ManyAtOnce]] = [Podman, Containerd, Dockerd]
    clients = [kind(rig, proxy.host) for kind in kinds]
    with ThreadPoolExecutor(len(clients)) as threads:
        pulls = [threads.submit(client.pull_all, images) for client in clients]
    expected = frozenset[str]().union(*map(digests, images))
    assert [pull.result() == expected for pull in pulls] == [True] * len(clients)


def failed_answers(proxy: Pullpool) -> dict[str, float]:
    """How many answers of pullpool were of each status that tells a client to give up or come back.

    400 is left out: clients that may speak plain HTTP try TLS first, which is no HTTP.
    """
    name = "pullpool_http_requests_total"
    statuses = ("401", "403", "404", "408", "429", "500", "502", "503", "504")
    counted = {code: proxy.metric(name, code=code) for code in statuses}
    return {code: count for code, count in counted.items() if count}


@as_root
@needs_all_three
def test_all_clients_at_once_pull_everything_from_an_overloaded_harbor(
    rig: Rig, serve: Serve
) -> None:
    pace = ("--rate=2097152", "--service-time=0.05", "--token-ttl=60")
    harbor = Harbor(rig, CONTENT, f"--breaks-beyond={BREAKS_BEYOND}", *pace)
    proxy = serve(Serving(harbor.url, max_connections=CAP, credentials=LOGIN))

    pull_with_all_clients(rig, proxy, harbor.images)

    assert failed_answers(proxy) == {}
    counted = harbor.counters()
    assert sum(counted["overloads"].values()) > 0
    assert counted["peak_requests"] == BREAKS_BEYOND
    once = sum(image.size + len(image.manifest) for image in harbor.images)
    assert counted["bytes_sent"] <= 1.1 * once


@as_root
@needs_all_three
def test_all_clients_at_once_pull_everything_through_a_limit_they_were_not_told(
    rig: Rig, serve: Serve, registry: Registry
) -> None:
    # The first cap is four, of which blobs get three. Each answer takes a while: the limit is met.
    front = Front(connections=2, rate="900k")
    upstream = Nginx(rig, front, registry_port=registry.port)
    images = [
        push_image(
            registry.url, make_image(f"library/app-{n}", "v1", layers=CONTENT.layers, seed=60 + n)
        )
        for n in range(CONTENT.images)
    ]
    proxy = serve(Serving(upstream.url, max_connections=CAP))

    pull_with_all_clients(rig, proxy, images)

    assert failed_answers(proxy) == {}
    assert upstream.log.refused() > 0


@needs("skopeo")
@pytest.mark.parametrize("kind", list(Misbehaviour))
def test_a_crowd_does_not_notice_any_one_misbehaviour(
    rig: Rig, serve: Serve, kind: Misbehaviour
) -> None:
    content = Content(images=6, layers=(150_000, 1000))
    pace = ("--rate=1048576", "--service-time=0.1")
    harbor = Harbor(rig, content, "--breaks-beyond=2", f"--misbehave={kind}", *pace)
    proxy = serve(Serving(harbor.url, max_connections=CAP, credentials=LOGIN))

    assert Skopeo(rig, proxy.host).crowd(harbor.images) == []

    assert failed_answers(proxy) == {}
    assert harbor.counters()["overloads"][kind] > 0
