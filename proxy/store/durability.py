"""What of a stored blob has to be on the disk before it counts as stored, and what may be doubted.

Theory of operation. A process that dies loses nothing that it wrote: the kernel has it. What loses
is the machine (power, kernel), and it loses what was not synced, in any order: a name may be on the
disk and the bytes behind it not. So a blob that was not synced before it got its name is *doubtful*
once the machine has started anew, and is hashed before anybody gets it:

* its file is made with a mark, one bit of its mode. A name leads to an inode, and an inode has had
  its mode from the beginning. A row of the index could not say it: rows are lost, and an old one
  that is not might speak of an earlier file of the same name.
* ``BOOT`` in the cache directory names the boot during which all marked files were written or
  proved. It is written when a start has proved what it doubted, so a start that was cut short
  doubts again. What is torn or missing names no boot, which means doubt.
* a file that was proved is synced, and then loses its mark.

The mark outlives a change of the setting: what was stored without a sync stays doubtful.
"""

from __future__ import annotations

import os
import stat
from enum import StrEnum
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

#: Mode of a blob's file.
PLAIN = 0o644
#: The bit that marks one that was not synced; no umask in use takes it from the owner.
MARK = 0o100


class Durability(StrEnum):
    """How much is synced before a blob counts as stored.

    ``full``: its bytes, then its name. ``file``: its bytes; a power cut may take the name, and the
    blob is fetched again. ``none``: nothing; after a power cut what was stored without is hashed.
    """

    NONE = "none"
    FILE = "file"
    FULL = "full"

    @property
    def mode(self) -> int:
        """What a staging file is made with."""
        return PLAIN | MARK if self is Durability.NONE else PLAIN


def is_marked(mode: int) -> bool:
    """Was a file with this mode not synced before it got its name?"""
    return bool(mode & MARK)


def boot_id() -> str | None:
    """Which boot of the machine this is; None where nobody knows."""
    try:
        return _BOOT_ID.read_text().strip() or None
    except OSError:
        return None


def was_proved_in(file: Path, boot: str | None) -> bool:
    """Does ``BOOT`` say that nothing can have been lost since?"""
    try:
        return boot is not None and file.read_text() == boot
    except (OSError, ValueError):
        return False


def note_proved(file: Path, boot: str | None) -> None:
    """Let the next start of this boot doubt nothing. Raises OSError."""
    if boot is not None:
        file.write_text(boot)


def settle(path: Path) -> None:
    """Sync a file whose content is right, and then take its mark. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        if is_marked(mode):
            os.fsync(fd)
            os.fchmod(fd, stat.S_IMODE(mode) & ~MARK)
    finally:
        os.close(fd)
