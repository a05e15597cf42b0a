"""A worker's place among those of one supervisor: what it inherits from it."""

from __future__ import annotations

import os
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


def is_sibling(pid: int) -> bool:
    """Is this process a child of our parent? Looks it up in /proc."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    # After the name, which is in parentheses and may hold anything: state, parent, ...
    return int(status.rpartition(")")[2].split()[1]) == os.getppid()
