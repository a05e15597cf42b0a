"""containerd since 2.3 gives up on a server that sends no header for 30 s (containerd#13164).

So whoever makes its pull wait longer has to say something meanwhile. This test waits, in the only
way there is: in real time, and with the real client.
"""

import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.parts import free_port
from tests.integration.clients import Containerd
from tests.integration.harbor import Content, FakeRegistryProgram
from tests.integration.parts import Pullpool, Serving
from tests.integration.rig import PartFailed, Rig, as_root, needs, wait_until
from tests.integration.seeding import digests

PATIENCE = 30.0
"""Seconds that containerd waits for the first header."""

PACE = 1_000_000
"""Bytes a second of the upstream. Nobody who waits costs the one who waits behind less than 2 s."""

CONTENT = Content(repository="team/app", images=19, layers=(2_200_000,))


def read(url: str) -> int:
    with urllib.request.urlopen(url) as answer:
        return len(answer.read())


@as_root
@needs("containerd", "go")
def test_a_blob_that_waits_for_its_slot_longer_than_containerd_waits_for_headers(
    rig: Rig, serve: Callable[[Serving], Pullpool], ctr: Path
) -> None:
    upstream = FakeRegistryProgram(rig, CONTENT, f"--rate={PACE}")
    silent = FakeRegistryProgram(rig, CONTENT, f"--latency={PATIENCE + 5}")
    proxy = serve(Serving(upstream.url, max_connections=1))
    # Whatever it asks next cannot be reached: what fails has failed at the mirror.
    nowhere = f"http://127.0.0.1:{free_port()}"
    through_pullpool, straight = (
        Containerd(rig, host, server=nowhere, ctr=ctr) for host in (proxy.host, silent.host)
    )
    *others, image = upstream.images

    with ThreadPoolExecutor(len(others) + 1) as threads:
        control = threads.submit(straight.pull, image)
        reads = [
            threads.submit(read, f"{proxy.url}/v2/{other.name}/blobs/{other.layers[0].digest}")
            for other in others
        ]
        # Enough to wait behind, should the first of them be done before the last have come.
        wait_until(lambda: proxy.metric("pullpool_queue_depth") >= len(others) - 2, "a queue")
        began = time.monotonic()
        assert through_pullpool.pull(image) == digests(image)
        assert time.monotonic() - began > PATIENCE
        assert [done.result() for done in reads] == [other.layers[0].size for other in others]
        with pytest.raises(PartFailed, match="timeout awaiting response headers"):
            control.result()
    assert upstream.counters()["peak_sockets"] == 1
