"""Frames, and descriptors, over one connected Unix socket.

asyncio's transports cannot pass descriptors, so the socket is watched directly. Nothing here waits:
what arrives is handed to ``on_frame`` at once, what cannot leave is queued, and a peer that lets
``MAX_QUEUED`` bytes pile up is disconnected. ``on_closed`` is called once, whatever the reason.

Each side sends a frame at every *beat*, an empty one if need be, and counts its own beats since it
last heard anything. ``PATIENCE`` of them are the end: the peer is stopped, or hangs. Beats are
counted and not seconds, because a process that was itself stopped, or starved, for a minute has
not listened for a minute, and must not blame its peer.

Descriptors: one that is sent is duplicated until the kernel has it; one that was received belongs
to whoever gets the frame. Those whose frame never came are closed with the channel.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from proxy.team.frames import MAX_FDS, BadFrame, Frame, Frames

#: Seconds between two beats, and beats without a word from the peer until it counts as gone.
BEAT = 1.0
PATIENCE = 5
#: Bytes that may wait until the peer takes them.
MAX_QUEUED = 64 << 20
#: Bytes taken from the socket at once.
_READ = 256 << 10
_FD_BYTES = struct.calcsize("i")


class ChannelClosed(Exception):
    """There is nobody to speak to any more."""


class Channel:
    """One end. The socket is its own from here on; ``close`` ends it."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        on_frame: Callable[[Frame, int | None], None],
        on_closed: Callable[[str], None],
        beat: float = BEAT,
    ) -> None:
        """``on_frame`` gets each frame, and the descriptor that came with it, which it owns."""
        sock.setblocking(False)
        self._sock = sock
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._beat = beat
        self._loop = asyncio.get_running_loop()
        self._frames = Frames()
        self._fds: deque[int] = deque()
        self._out: deque[tuple[memoryview, int | None]] = deque()
        self._queued = 0
        self._silent = 0
        self._has_spoken = False
        self.is_closed = False
        self._loop.add_reader(sock, self._read)
        self._timer = self._loop.call_later(beat, self._tick)

    # -- out -------------------------------------------------------------------------------

    def send(
        self,
        kind: str,
        call: int = 0,
        *,
        data: bytes = b"",
        fd: int | None = None,
        **fields: Any,
    ) -> None:
        """Send a frame, and with it the open file ``fd``, which stays the caller's.

        Raises ``ChannelClosed``.
        """
        if self.is_closed:
            raise ChannelClosed("the channel is closed")
        frame = Frame(kind, call, fields, data, 0 if fd is None else 1)
        encoded = memoryview(frame.encode())
        self._out.append((encoded, None if fd is None else os.dup(fd)))
        self._queued += len(encoded)
        self._has_spoken = True
        if len(self._out) == 1:
            self._write()
        if self._queued > MAX_QUEUED:
            self.close("the peer takes nothing")

    def _write(self) -> None:
        try:
            while self._out:
                self._write_one()
        except (BlockingIOError, InterruptedError):
            self._loop.add_writer(self._sock, self._write)
            return
        except OSError as error:
            self.close(str(error))
            return
        self._loop.remove_writer(self._sock)

    def _write_one(self) -> None:
        data, fd = self._out[0]
        beside = []
        if fd is not None:
            beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        sent = self._sock.sendmsg([data], beside)
        self._queued -= sent
        if fd is not None:  # it has gone with the first byte
            os.close(fd)
        if sent == len(data):
            self._out.popleft()
        else:
            self._out[0] = (data[sent:], None)

    # -- in --------------------------------------------------------------------------------

    def _read(self) -> None:
        space = socket.CMSG_SPACE(MAX_FDS * _FD_BYTES)
        try:
            data, beside, flags, _ = self._sock.recvmsg(_READ, space, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(str(error))
            return
        for level, kind, raw in beside:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
                self._fds.extend(fds)
        if not data:
            self.close("the peer has gone")
        elif flags & socket.MSG_CTRUNC:
            self.close("no descriptor is left to receive one")
        else:
            self._silent = 0
            self._take(data)

    def _take(self, data: bytes) -> None:
        try:
            for frame in self._frames.feed(data):
                if frame.fds > len(self._fds):
                    raise BadFrame("a descriptor did not come")
                fd = self._fds.popleft() if frame.fds else None
                if frame.kind != "beat":
                    self._on_frame(frame, fd)
                elif fd is not None:
                    os.close(fd)
                if self.is_closed:
                    return
            # One may have come ahead of the rest of its frame; more belong to no frame at all.
            if len(self._fds) > MAX_FDS:
                raise BadFrame("descriptors came without a frame")
        except BadFrame as error:
            self.close(str(error))

    # -- the end ---------------------------------------------------------------------------

    def _tick(self) -> None:
        self._silent += 1
        if self._silent > PATIENCE:
            self.close(f"nothing was heard for {PATIENCE} beats")
            return
        self._timer = self._loop.call_later(self._beat, self._tick)
        if not self._has_spoken:
            self.send("beat")
        self._has_spoken = False

    def close(self, reason: str = "closed") -> None:
        """Let go of the peer; a second call does nothing."""
        if self.is_closed:
            return
        self.is_closed = True
        self._timer.cancel()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for fd in (*self._fds, *(fd for _, fd in self._out if fd is not None)):
            os.close(fd)
        self._fds.clear()
        self._out.clear()
        self._on_closed(reason)

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"{self._queued} bytes queued"
        return f"<Channel {state}>"


def is_own_user(sock: socket.socket) -> bool:
    """Does the process at the other end run as our user? The kernel says so, at connect time."""
    size = struct.calcsize("3i")
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _pid, uid, _gid = struct.unpack("3i", raw)
    return bool(uid == os.geteuid())
