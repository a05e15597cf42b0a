"""What a fill leaves behind when its process dies, or ends with others going on: its staging file.

The file's name says which blob it was to become, so nothing else has to be right for the next
process to go on with it. What is in it counts up to a point, and only after it has been
hashed again. Up to where that is, its length says, or, if it was written out of order, its count
(counted.py).
"""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from proxy.oci.digest import Digest
from proxy.oci.errors import DigestInvalid
from proxy.store.counted import read_count, remove_count
from proxy.store.files import StagingFile


@dataclass(frozen=True, slots=True)
class Remains:
    """A staging file that outlived its process: the blob's first `length` bytes are in it.

    `size` is the blob's, as far as it was known. In bytes.
    """

    digest: Digest
    size: int | None
    path: Path
    length: int


def staging_name(digest: Digest, size: int | None) -> str:
    """A name for one fill's file, which no other has; it says what the file is to become."""
    # Two fills of one digest (or one after a crash) must never share a file.
    size_of = "" if size is None else size
    return f"{digest.algorithm}-{digest.hex}-{size_of}-{secrets.token_hex(8)}"


def read_staging_name(name: str) -> tuple[Digest, int | None] | None:
    """Digest and size of what a staging file was to become; None for any other name."""
    parts = name.split("-")
    if len(parts) != 4 or not (parts[2] == "" or (parts[2].isascii() and parts[2].isdecimal())):
        return None
    try:
        digest = Digest(parts[0], parts[1])
    except DigestInvalid:
        return None
    return digest, int(parts[2][:20]) if parts[2] else None


def counting_length(path: Path) -> int:
    """How many bytes of a staging file count: those that its count allows, or else all, but none
    from its first hole on. Raises OSError."""
    allowed = read_count(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        length = os.fstat(fd).st_size
        filled = os.lseek(fd, 0, os.SEEK_HOLE) if length else 0
    finally:
        os.close(fd)
    return filled if allowed is None else min(filled, allowed)


def reopen(remains: Remains) -> StagingFile:
    """Open what was left, cut to what counts. Raises OSError; then it is gone."""
    try:
        writer = os.open(remains.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(writer, remains.length)
            remove_count(remains.path)  # only now: the length says it again
        except OSError:
            os.close(writer)
            raise
    except OSError:
        remains.path.unlink(missing_ok=True)
        remove_count(remains.path)
        raise
    return StagingFile.beside(remains.path, writer)
