"""What a start finds in the cache directory, and what to do about it.

The files are right and the index is a memory of them. There are six cases:

1. A staging file: its fill died with its process. Removed, for nobody ever saw it under a name;
   unless the store may *resume*: then a fill of the same digest goes on in it, from the bytes that
   are there on, which are hashed again first: as many as the file is long, or, if it was written
   out of order, as its count says (counted.py). They were written before the process died, not
   necessarily before the machine did: what is older than the machine's start is removed.
2. A row whose file has the row's size: the usual case, taken as it is. No marker of a clean
   shutdown is needed for that: the fsync comes before the rename, so a file that has its name had
   all its bytes on the disk.
3. A row without a file (removed by hand, or evicted just before a kill): dropped.
4. A row whose file has another size (somebody else's work): both are dropped.
5. A file without a row (killed between rename and row, or the index was lost): counted at once,
   so that it can be evicted, and served when its hash has been found right.
6. A file whose bytes were not synced before it got its name, and the machine has started anew since
   (durability.py): like one without a row, whatever its row says.

Anything whose name is not a digest in its place is not ours and is left alone.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxy.oci.digest import Digest
from proxy.oci.errors import DigestInvalid
from proxy.store.counted import counted_file
from proxy.store.durability import is_marked
from proxy.store.files import Layout, StagingFile
from proxy.store.index import Contents
from proxy.store.remains import Remains, counting_length, read_staging_name

# By the name that a digest would have; size in bytes, modification in microseconds since the epoch,
# and whether it was not synced.
Found = dict[str, tuple[int, int, bool]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with what was found."""

    entries: Sequence[tuple[Digest, int, int]]  # digest, size, last use; the oldest first
    unverified: Sequence[Digest]  # entries without a row, or in doubt; the youngest first
    wrong: Sequence[Digest]  # file and row contradict one another
    missing: Sequence[str]  # rows to be dropped
    manifests: Mapping[Digest, tuple[str, tuple[Digest, ...]]]  # media type, children


def make_directories(layout: Layout) -> None:
    """Make the cache directory. Raises OSError."""
    layout.root.mkdir(parents=True, exist_ok=True)


def prepare(layout: Layout, *, resume: bool = False) -> tuple[int, dict[Digest, Remains]]:
    """Make the directories, try to write, and remove what is in staging.

    Returns how many were removed, and what was kept for fills to go on with: nothing unless
    `resume`. Raises OSError when the directory cannot be written.
    """
    for directory in (layout.staging, layout.blobs):
        directory.mkdir(exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.unlink(missing_ok=True)
        StagingFile.create(probe).close()
        probe.unlink()
    removed = 0
    kept: dict[Digest, Remains] = {}
    counts: list[Path] = []
    with os.scandir(layout.staging) as files:
        for file in files:
            if file.is_dir(follow_symlinks=False):
                continue
            if counted_file(Path(file.path)) is not None:
                counts.append(Path(file.path))
                continue
            found = _remains(file) if resume else None
            if found is None:
                os.unlink(file.path)
                removed += 1
                continue
            other = kept.get(found.digest)
            if other is not None:
                found, other = sorted((found, other), key=lambda one: -one.length)
                os.unlink(other.path)
                removed += 1
            kept[found.digest] = found
    paths = {remains.path for remains in kept.values()}
    for count in counts:
        if counted_file(count) not in paths:
            count.unlink(missing_ok=True)
    return removed, kept


def _remains(file: "os.DirEntry[str]") -> Remains | None:
    """What a fill can go on with; None when there is nothing, or it cannot be relied on."""
    named = read_staging_name(file.name)
    if named is None or not file.is_file(follow_symlinks=False):
        return None
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    if file.stat(follow_symlinks=False).st_mtime < booted:
        return None  # after a power cut a file may be longer than what is in it
    length = counting_length(Path(file.path))
    digest, size = named
    if not length or (size is not None and length > size):
        return None
    return Remains(digest, size, Path(file.path), length)


def scan(layout: Layout) -> Found:
    """All files that lie where a blob would, whatever they are called. Raises OSError."""
    found: Found = {}
    for algorithm in _directories(layout.blobs):
        for prefix in _directories(Path(algorithm.path)):
            with os.scandir(prefix.path) as files:
                for file in files:
                    if file.name.startswith(prefix.name) and file.is_file(follow_symlinks=False):
                        status = file.stat(follow_symlinks=False)
                        when = status.st_mtime_ns // 1000
                        marked = is_marked(status.st_mode)
                        found[f"{algorithm.name}:{file.name}"] = (status.st_size, when, marked)
    return found


def _directories(parent: Path) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(parent) as entries:
        yield from [entry for entry in entries if entry.is_dir(follow_symlinks=False)]


def reconcile(contents: Contents, found: Found, *, doubts: bool) -> Plan:
    """Compare rows with files (cases 2 to 6 above). Takes out of `found` what has a row.

    With `doubts` files that were not synced may have lost bytes.
    """
    known: dict[str, Digest] = {}
    entries: list[tuple[Digest, int, int]] = []
    wrong: list[Digest] = []
    missing: list[str] = []
    doubtful: list[Digest] = []
    for name, size, used in contents.blobs:
        file = found.pop(name, None)
        digest = None if file is None else _digest(name)
        if file is None or digest is None:
            missing.append(name)
        elif file[0] != size:
            wrong.append(digest)
            missing.append(name)
        else:
            known[name] = digest
            entries.append((digest, size, used))
            if doubts and file[2]:
                doubtful.append(digest)
    orphans = [
        (digest, size, when)
        for name, (size, when, _) in found.items()
        if (digest := _digest(name)) is not None
    ]
    orphans.sort(key=_when)
    if orphans:
        entries = sorted([*entries, *orphans], key=_when)
    return Plan(
        entries=entries,
        unverified=[*reversed(doubtful), *(digest for digest, _, _ in reversed(orphans))],
        wrong=wrong,
        missing=missing,
        manifests=_manifests(contents, known),
    )


def _when(entry: tuple[Digest, int, int]) -> int:
    return entry[2]


def _digest(name: str) -> Digest | None:
    try:
        return Digest.parse(name)
    except DigestInvalid:
        return None


def _manifests(
    contents: Contents, known: dict[str, Digest]
) -> dict[Digest, tuple[str, tuple[Digest, ...]]]:
    manifests: dict[Digest, tuple[str, tuple[Digest, ...]]] = {}
    names = dict(known)  # a layer that many images share is one object
    for name, media_type, children in contents.manifests:
        if name not in known:
            continue
        digests: list[Digest] = []
        for child in children.split():
            digest = names.get(child)
            if digest is None:
                digest = names[child] = Digest.parse(child)
            digests.append(digest)
        manifests[known[name]] = (media_type, tuple(digests))
    return manifests
