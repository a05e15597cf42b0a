"""What is said to the directory: Lua scripts, each of which touches the keys of one hash tag.

A script is given its tag's root as KEYS[1], such as ``pp:{members}``, and makes its keys from it:
``KEYS[1] .. ':beats'``. All of them live on one server then, of a Cluster too.
"""

from __future__ import annotations

import binascii
import hashlib
from dataclasses import dataclass, field

#: How many slots the keys of a Cluster fall into.
SLOTS = 16384

Argument = str | bytes | int | float


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script by the name that metrics and logs call it (there are few of them).

    ``wants_run_id``: the id of the server's process comes as the last of ARGV. Another id, and it
    is another server or has been started again: what was in its memory may be gone.
    """

    name: str
    text: str
    wants_run_id: bool = False
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", sha)

    def __repr__(self) -> str:
        return f"<Script {self.name} {self.sha[:8]}>"


def root_of(tag: str) -> str:
    """KEYS[1] of a tag. Raises ValueError for one that would fall into another slot."""
    if not tag or "{" in tag or "}" in tag:
        raise ValueError(f"a hash tag is not empty and holds no braces, got {tag!r}")
    return f"pp:{{{tag}}}"


def slot_of(tag: str) -> int:
    """The slot of a Cluster that the keys with this tag fall into (CRC-16/XMODEM of the tag)."""
    return binascii.crc_hqx(tag.encode(), 0) % SLOTS
