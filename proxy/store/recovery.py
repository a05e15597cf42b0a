"""What a start finds in the cache directory, and what to do about it.

The files are right and the index is a memory of them, but one that may be relied on until somebody
opens the file: whoever finds then that it is missing, or not as long as its row says, fetches the
blob again. So a store serves as soon as it has read its rows, and looks at the directory
afterwards. That looks at names alone, which is a tenth of what the files' sizes would take.

It looks before it serves where rows say too little: when there are none (the index is lost, or
new), and when the machine has started anew and files may have lost bytes (durability.py).

There are six cases:

1. A staging file: its fill died with its process. Removed, for nobody ever saw it under a name;
   unless the store may *resume*: then a fill of the same digest goes on in it, from the bytes that
   are there on, which are hashed again first: as many as the file is long, or, if it was written
   out of order, as its count says (counted.py). They were written before the process died, not
   necessarily before the machine did: what is older than the machine's start is removed.
2. A row whose file is there: the usual case, taken as it is. No marker of a clean shutdown is
   needed for that: the fsync comes before the rename, so a file that has its name had all its bytes
   on the disk.
3. A row without a file (removed by hand, or evicted just before a kill): dropped, by the look or by
   whoever wants to open it.
4. A row whose file has another size (somebody else's work): both are dropped when it is opened.
5. A file without a row (killed between rename and row, or the index was lost): counted when the
   look has found it, so that it can be evicted, and served when its hash has been found right.
6. A file whose bytes were not synced before it got its name, and the machine has started anew since
   (durability.py): like one without a row, whatever its row says.

What is found late may have changed since the look: a blob that was stored or evicted meanwhile has
another entry in the ledger, or none, and that is right.

Anything whose name is not a digest in its place is not ours and is left alone.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxy.oci.digest import Digest
from proxy.oci.errors import DigestInvalid
from proxy.store.counted import counted_file
from proxy.store.durability import is_marked
from proxy.store.eviction import Entry
from proxy.store.files import Layout, StagingFile
from proxy.store.index import Contents
from proxy.store.remains import Remains, counting_length, read_staging_name

Aged = tuple[Digest, int, int]  # size in bytes, last use in microseconds since the epoch
Held = tuple[Digest, Entry]


@dataclass(frozen=True, slots=True)
class Memory:
    """What the index remembers."""

    entries: Sequence[Aged]  # the oldest first
    manifests: Mapping[Digest, tuple[str, tuple[Digest, ...]]]  # media type, children
    strange: Sequence[str]  # rows whose name is none of ours


@dataclass(frozen=True, slots=True)
class Look:
    """What the directory says about what is held, and beyond it."""

    missing: Sequence[Held]  # they have no file
    unknown: Sequence[Aged]  # files of which nothing is known; the oldest first
    doubtful: Sequence[Digest]  # they may have lost bytes; the youngest first


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


def remember(contents: Contents) -> Memory:
    """Read the index's rows, of which there are as many as blobs."""
    names = [row[0] for row in contents.blobs]
    digests = Digest.parse_all(names)
    known = dict(zip(names, digests, strict=True)) if contents.manifests else {}
    return Memory(
        entries=[
            (digest, size, used)
            for digest, (_, size, used) in zip(digests, contents.blobs, strict=True)
            if digest is not None
        ],
        manifests=_manifests(contents, known),
        strange=[name for name, digest in zip(names, digests, strict=True) if digest is None],
    )


def _manifests(
    contents: Contents, known: Mapping[str, Digest | None]
) -> dict[Digest, tuple[str, tuple[Digest, ...]]]:
    rows = [
        (digest, media_type, children.split())
        for name, media_type, children in contents.manifests
        if (digest := known.get(name)) is not None
    ]
    # A layer that many images share is one object.
    others = list({child for _, _, children in rows for child in children} - known.keys())
    names = {**known, **dict(zip(others, Digest.parse_all(others), strict=True))}
    return {
        digest: (media_type, tuple(c for child in children if (c := names[child]) is not None))
        for digest, media_type, children in rows
    }


def look(
    layout: Layout,
    held: Sequence[Held],
    *,
    doubts: bool,
    stopped: Callable[[], bool],
    names: Callable[[str], list[str]] = os.listdir,
) -> Look | None:
    """Compare what is held with the names in the directory (cases 3, 5 and 6 above).

    With `doubts` files that were not synced may have lost bytes. None when stopped before the end.
    Raises OSError.
    """
    missing: list[Held] = []
    unknown: list[Aged] = []
    doubtful: list[Held] = []
    shelves = _by_directory(held)
    for algorithm in _directories(layout.blobs):
        for prefix in _directories(Path(algorithm.path)):
            if stopped():
                return None
            found = set(names(prefix.path))
            ours = shelves.pop((algorithm.name, prefix.name), {})
            # A listing may pass over a name while others come and go: ask for each.
            missing.extend(
                ours[name]
                for name in ours.keys() - found
                if not os.path.lexists(os.path.join(prefix.path, name))
            )
            unknown.extend(_unknown(algorithm.name, Path(prefix.path), found - ours.keys()))
            if doubts:
                there = ours.keys() & found
                doubtful.extend(ours[name] for name in there if _marked(prefix.path, name))
    for ours in shelves.values():
        missing.extend(ours.values())
    return Look(
        missing=missing,
        unknown=sorted(unknown, key=lambda each: each[2]),
        doubtful=[digest for digest, _ in sorted(doubtful, key=_used, reverse=True)],
    )


def _directories(parent: Path) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(parent) as entries:
        yield from [entry for entry in entries if entry.is_dir(follow_symlinks=False)]


def _by_directory(held: Sequence[Held]) -> dict[tuple[str, str], dict[str, Held]]:
    shelves: dict[tuple[str, str], dict[str, Held]] = {}
    for each in held:
        digest = each[0]
        shelves.setdefault((digest.algorithm, digest.hex[:2]), {})[digest.hex] = each
    return shelves


def _unknown(algorithm: str, directory: Path, names: set[str]) -> Iterator[Aged]:
    for name in names:
        digest = _digest(f"{algorithm}:{name}")
        if digest is None or not name.startswith(directory.name):
            continue
        try:
            status = os.lstat(directory / name)
        except FileNotFoundError:  # evicted, or removed by hand, a moment ago
            continue
        if stat.S_ISREG(status.st_mode):
            yield digest, status.st_size, status.st_mtime_ns // 1000


def _marked(directory: str, name: str) -> bool:
    try:
        return is_marked(os.lstat(os.path.join(directory, name)).st_mode)
    except FileNotFoundError:
        return False


def _used(held: Held) -> int:
    return held[1].used


def _digest(name: str) -> Digest | None:
    try:
        return Digest.parse(name)
    except DigestInvalid:
        return None
