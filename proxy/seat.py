"""A worker's place among those of one supervisor: what it inherits from it."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Seat:
    """Worker ``number`` of ``of``. ``registry`` are its own listening sockets, ``admin`` those of
    all; both are bound already. ``directory`` is private to the workers; the first end of
    ``lifeline``, a pipe, reads its end when the supervisor has died."""

    number: int
    of: int
    registry: Sequence[socket.socket]
    admin: Sequence[socket.socket]
    directory: Path
    lifeline: tuple[int, int]
