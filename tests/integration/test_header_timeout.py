"""A client that gives up without headers, and a slot that comes later than that."""

import http.client
import threading
import urllib.request
from collections.abc import Callable

import pytest

from proxy.testing.images import make_image
from tests.integration.nginx import Nginx
from tests.integration.parts import Pullpool, Registry, Serving
from tests.integration.rig import needs, wait_until
from tests.integration.seeding import MIB, push_image

PATIENCE = 3.0
"""Seconds for which the client waits for headers: containerd's thirty, scaled down.

Less than the four after which the slot comes, and long for a proxy on a busy machine."""

QUEUE = '[queue]\nheader_deadline = "0.3s"'


@needs("nginx", "docker-registry")
@pytest.mark.parametrize("rate", ["1m"])
def test_a_client_with_a_header_time_out_gets_the_blob_whose_slot_comes_later(
    serve: Callable[[Serving], Pullpool], upstream: Nginx, registry: Registry
) -> None:
    image = push_image(
        registry.url, make_image("team/patience", "v1", layers=(8 * MIB, 300_000), seed=11)
    )
    large, small = image.layers
    proxy = serve(Serving(upstream.url, max_connections=1, tables=QUEUE))
    urllib.request.urlopen(f"{proxy.url}/v2/{image.name}/manifests/v1").close()

    def blob(digest: object) -> str:
        return f"/v2/{image.name}/blobs/{digest}"

    got: list[bytes] = []

    def pull_the_large_one() -> None:
        with urllib.request.urlopen(f"{proxy.url}{blob(large.digest)}") as answer:
            got.append(answer.read())

    holder = threading.Thread(target=pull_the_large_one)
    holder.start()
    try:
        active = {"state": "active"}
        wait_until(lambda: proxy.metric("pullpool_upstream_connections", **active) == 1, "a turn")
        client = http.client.HTTPConnection(proxy.host, timeout=PATIENCE)
        client.request("GET", blob(small.digest), headers={"User-Agent": "containerd/2.3.0"})
        sock = client.sock
        answer = client.getresponse()  # TimeoutError without headers in time
        assert answer.status == 200
        assert answer.headers["Warning"].startswith('299 - "queued, ')
        assert answer.headers["Content-Length"] == str(small.size)
        sock.settimeout(None)
        assert answer.read() == small.data
        client.close()
    finally:
        holder.join()
    assert got == [large.data]
    sent = upstream.log.blob_bytes()
    assert sent[str(small.digest)] == small.size
    # The turn of the large one was cut: what was in the kernels by then was sent again.
    assert large.size <= sent[str(large.digest)] < 2 * large.size
