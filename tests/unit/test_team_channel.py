"""Frames and descriptors over a real socket: order, bounds, silence, and nothing left open."""

import array
import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator

import pytest

from proxy.team.channel import Channel, ChannelClosed, is_own_user
from proxy.team.frames import Frame
from tests.unit.proxy_kit import until
from tests.unit.store_kit import descriptors


class End:
    """One end, and what it heard."""

    def __init__(self, sock: socket.socket, beat: float = 60.0) -> None:
        self.frames: list[Frame] = []
        self.fds: list[int] = []
        self.closed: list[str] = []
        self.channel = Channel(sock, on_frame=self._take, on_closed=self.closed.append, beat=beat)

    def _take(self, frame: Frame, fd: int | None) -> None:
        self.frames.append(frame)
        if fd is not None:
            self.fds.append(fd)

    def close(self) -> None:
        self.channel.close()
        for fd in self.fds:
            os.close(fd)


@contextlib.contextmanager
def ends(beat: float = 60.0) -> Iterator[tuple[End, End]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    one, other = End(left, beat), End(right, beat)
    try:
        yield one, other
    finally:
        one.close()
        other.close()


@contextlib.contextmanager
def half(beat: float = 60.0) -> Iterator[tuple[End, socket.socket]]:
    """An end whose peer is a bare socket."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    one = End(left, beat)
    try:
        with right:
            right.setblocking(False)
            yield one, right
    finally:
        one.close()


async def test_frames_arrive_in_order_with_their_descriptors() -> None:
    before = descriptors()
    with ends() as (one, other), tempfile.TemporaryFile(buffering=0) as file:
        file.write(b"the bytes")
        for number in range(1, 200):
            fd = file.fileno() if number % 3 == 0 else None
            one.channel.send("x", number, data=bytes(number * 50), fd=fd, at=number)
        await until(lambda: len(other.frames) == 199)
        assert [frame.call for frame in other.frames] == list(range(1, 200))
        assert all(frame.data == bytes(frame.call * 50) for frame in other.frames)
        assert [frame.fds for frame in other.frames] == [int(n % 3 == 0) for n in range(1, 200)]
        assert {os.pread(fd, 9, 0) for fd in other.fds} == {b"the bytes"}
        assert not any(os.get_inheritable(fd) for fd in other.fds)
    assert descriptors() == before


async def test_a_frame_longer_than_the_sockets_buffers_arrives_whole() -> None:
    data = os.urandom(9 << 20)
    with ends() as (one, other):
        one.channel.send("big", 1, data=data)
        one.channel.send("small", 2)
        await until(lambda: len(other.frames) == 2)
        assert other.frames[0].data == data
        assert other.frames[1].kind == "small"


async def test_the_end_of_one_side_is_told_to_the_other_once() -> None:
    with ends() as (one, other):
        one.channel.close("enough")
        one.channel.close("again")
        await until(lambda: bool(other.closed))
        assert one.closed == ["enough"]
        assert len(other.closed) == 1
        with pytest.raises(ChannelClosed):
            other.channel.send("x")


async def test_a_peer_that_takes_nothing_is_left() -> None:
    with half() as (one, _):
        for _ in range(6):
            if not one.channel.is_closed:
                one.channel.send("big", 1, data=bytes(15 << 20))
        assert one.closed == ["the peer takes nothing"]


async def test_a_peer_that_says_nothing_is_left_and_one_that_beats_is_not() -> None:
    with half(beat=0.01) as (one, _):
        await until(lambda: bool(one.closed))
        assert one.closed == ["nothing was heard for 5 beats"]
    with ends(beat=0.05) as (one, other):
        await asyncio.sleep(0.05 * 8)
        assert (one.closed, other.closed) == ([], [])
        assert (one.frames, other.frames) == ([], [])


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(17), b"\xff" * 17])
async def test_a_peer_that_speaks_otherwise_is_left(noise: bytes) -> None:
    with half() as (one, peer):
        peer.send(noise)
        await until(lambda: bool(one.closed))
        assert one.frames == []


async def test_descriptors_that_belong_to_no_frame_are_closed_and_their_sender_left() -> None:
    with tempfile.TemporaryFile() as file:
        before = descriptors()
        with half() as (one, peer):
            beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))]
            for part in (b"\0", b"\0", b"\0"):
                with contextlib.suppress(OSError):
                    peer.sendmsg([part], beside)
            await until(lambda: bool(one.closed))
            assert one.closed == ["descriptors came without a frame"]
        assert descriptors() == before


async def test_a_frame_whose_descriptor_did_not_come_is_refused() -> None:
    with half() as (one, peer):
        peer.send(Frame("x", 1, fds=1).encode())
        await until(lambda: bool(one.closed))
        assert one.closed == ["a descriptor did not come"]


def test_the_other_end_of_a_pair_is_our_own_user() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        assert is_own_user(left)
