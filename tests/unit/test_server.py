"""The listener's own limits: what a connection may cost when its client does nothing."""

import socket

import pytest

from proxy.web.server import STUCK_SECONDS, limit_delivery


def test_a_client_that_takes_no_byte_is_given_up_by_the_kernel() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()),
    ):
        accepted, _ = server.accept()
        with accepted:
            limit_delivery(accepted, 0.2)
            with pytest.raises(TimeoutError):
                accepted.sendall(bytes(64 << 20))  # far more than the buffers of both sides hold


def test_the_limit_is_set_in_milliseconds() -> None:
    with socket.socket() as sock:
        limit_delivery(sock)
        found = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert found == STUCK_SECONDS * 1000


def test_other_sockets_are_left_alone() -> None:
    one, other = socket.socketpair()
    with one, other:
        limit_delivery(one)
    limit_delivery(None)
