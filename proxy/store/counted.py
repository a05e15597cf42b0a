"""How many bytes of a staging file count for the next process, where its length does not say it.

A fill that only appends has its first bytes without a gap, and the file's length says how many. One
that was written out of order (``Staging.put``) has holes, which read as zeros, and a gap of less
than a block is not even a hole to the file system. So such a file has a *count* beside it: a
number, below which every byte is written and hashed.

* It is made, with the mark of that moment, before the first byte is written out of order.
* It only grows, and is written after the mark has moved: it may say less than is there, never more.
* It goes after the file is out of order no more: cut to what counts, whole under its name, or gone.

A count whose writing was cut short says nothing, and then the file is of no use. All this is about
processes that die. What a machine has lost when it did nobody knows, so files from before its start
are not gone on with (recovery.py).

In a thread.
"""

import os
from pathlib import Path

#: Bytes that the mark moves on before that is written: what is fetched again at most.
STEP = 1 << 20
_SUFFIX = ".count"
_DIGITS = 20


def count_file(path: Path) -> Path:
    """Where the count of a staging file is."""
    return path.with_name(path.name + _SUFFIX)


def counted_file(path: Path) -> Path | None:
    """Which staging file this is the count of; None for any other file."""
    return path.with_suffix("") if path.suffix == _SUFFIX else None


def write_count(path: Path, mark: int) -> None:
    """Let `mark` bytes of a staging file count. Raises OSError."""
    fd = os.open(count_file(path), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # One call, always as long: there is the old number or the new one.
        if os.pwrite(fd, b"%0*d" % (_DIGITS, mark), 0) != _DIGITS:
            raise OSError("the count of a fill was cut short")
    finally:
        os.close(fd)


def read_count(path: Path) -> int | None:
    """The count of a staging file; None when it has none. Raises OSError."""
    try:
        text = count_file(path).read_bytes()
    except FileNotFoundError:
        return None
    return int(text) if len(text) == _DIGITS and text.isdigit() else 0


def remove_count(path: Path) -> None:
    """The length of a staging file says it again, or there is none. Raises OSError."""
    count_file(path).unlink(missing_ok=True)
