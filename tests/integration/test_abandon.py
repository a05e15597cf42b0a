"""A client that leaves in the middle of a large blob, from a registry over TLS.

With TLS an event loop may go on reading a body that nobody wants, and the download runs to its end
unseen. nginx sees it: its access log has the bytes that it really sent.
"""

import hashlib
import http.client
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pytest

from tests.integration.conftest import Private
from tests.integration.nginx import Nginx
from tests.integration.parts import Pullpool, Registry, Serving
from tests.integration.rig import wait_until
from tests.integration.seeding import MIB, push_large_blob

SIZE = 256 * MIB

Serve = Callable[[Serving], Pullpool]


@dataclass(frozen=True, slots=True)
class Large:
    """A large blob of the private registry."""

    digest: str
    path: str


@pytest.fixture(scope="module")
def large(registry: Registry) -> Large:
    """A blob that takes seconds at the pace of these upstreams."""
    digest = str(push_large_blob(registry.url, "secret/large", SIZE))
    return Large(digest, f"/v2/secret/large/blobs/{digest}")


@contextmanager
def _getting(proxy: Pullpool, path: str) -> Iterator[http.client.HTTPResponse]:
    """A GET that was answered with 200; its socket is closed at the end, wherever it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port)
    # Both hold the socket.
    with closing(connection):
        connection.request("GET", path)
        with connection.getresponse() as answer:
            assert answer.status == 200
            yield answer


def _digest_of(answer: http.client.HTTPResponse) -> str:
    hasher = hashlib.sha256()
    while piece := answer.read(MIB):
        hasher.update(piece)
    return f"sha256:{hasher.hexdigest()}"


def _digest(proxy: Pullpool, path: str) -> str:
    with _getting(proxy, path) as answer:
        return _digest_of(answer)


def _read_a_little_and_leave(proxy: Pullpool, path: str) -> None:
    with _getting(proxy, path) as answer:
        assert len(answer.read(MIB)) == MIB


def _nothing_flows(proxy: Pullpool, nginx: Nginx) -> bool:
    return proxy.metric("pullpool_flights") == 0 and nginx.answering() == 0


@pytest.mark.parametrize("rate", ["32m"])
def test_a_client_that_leaves_stops_the_download_when_it_is_to_be_cancelled(
    serve: Serve, private: Private, large: Large
) -> None:
    proxy = serve(private.serving(on_abandon="cancel"))
    _read_a_little_and_leave(proxy, large.path)
    wait_until(lambda: _nothing_flows(proxy, private.nginx), "the download to stop")

    sent = private.nginx.log.blob_bytes()[large.digest]
    assert MIB <= sent <= SIZE // 4
    # What was broken off does not stand in the way of the next pull.
    assert _digest(proxy, large.path) == large.digest


@pytest.mark.parametrize("rate", ["128m"])
def test_a_download_goes_on_without_its_client_when_it_is_to_be_finished(
    serve: Serve, private: Private, large: Large
) -> None:
    proxy = serve(private.serving(on_abandon="finish"))
    _read_a_little_and_leave(proxy, large.path)
    wait_until(lambda: _nothing_flows(proxy, private.nginx), "the download to end")
    assert private.nginx.log.blob_bytes() == {large.digest: SIZE}

    private.nginx.stop()
    assert _digest(proxy, large.path) == large.digest


@pytest.mark.parametrize("rate", ["64m"])
def test_one_client_that_leaves_does_not_stop_the_download_of_another(
    serve: Serve, private: Private, large: Large
) -> None:
    proxy = serve(private.serving(on_abandon="cancel"))
    with _getting(proxy, large.path) as staying:
        _read_a_little_and_leave(proxy, large.path)
        assert _digest_of(staying) == large.digest

    assert private.nginx.log.blob_bytes() == {large.digest: SIZE}
