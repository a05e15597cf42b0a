"""Which blobs to give up when room is needed: a ledger that decides and touches no file.

The ledger knows the size and the last use of every stored blob, which manifest names which
children, what is pinned, and how many bytes are promised to fills that are still running.
`admit` answers a request for room with the blobs to remove; whoever asked removes the files.

Use is counted by image: a touch of a manifest takes everything it names along, through an index
down to the layers. Without that, the base layers of a busy image look idle (a client that has
them never asks for them again) and the cache would keep manifests whose layers are gone.
Inside an image the manifest is the youngest and its layers are older, so that an image that has
to go gives up its large parts first.

Room is asked for in one step: either `admit` finds enough and the bytes are promised, or it
refuses and nothing has changed. Between the high and the low water mark nothing is evicted, so
removal comes in rounds and not once per fill.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from proxy.oci.digest import Digest

# A digest that is already the youngest need not move; its time of use is still renewed this
# often, in microseconds, for the people who read it.
_RENEW = 1_000_000


@dataclass(slots=True)
class Entry:
    """One stored blob: size in bytes, last use in microseconds since the epoch."""

    size: int
    used: int


class Ledger:
    """Sizes, ages, pins and promises of everything in the store.

    Times are microseconds since the epoch and only ever grow inside one ledger, whatever the
    clock does, so that sorting by them gives the order of use back after a restart.
    """

    def __init__(self, *, max_size: int, high_water: float = 0.95, low_water: float = 0.85) -> None:
        if max_size <= 0:
            raise ValueError(f"max_size must be positive, not {max_size}")
        if not 0 < low_water <= high_water <= 1:
            raise ValueError(f"expected 0 < low <= high <= 1, got {low_water} and {high_water}")
        self.max_size = max_size
        self.high = int(max_size * high_water)
        self.low = int(max_size * low_water)
        self.held = 0  # bytes of all entries
        self.reserved = 0  # bytes promised to fills
        self._pinned = 0  # bytes of entries that have a pin
        self._entries: OrderedDict[Digest, Entry] = OrderedDict()  # oldest first
        self._children: dict[Digest, tuple[Digest, ...]] = {}
        self._pins: dict[Digest, int] = {}  # may name digests that are not held (yet)
        self._latest = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._entries

    def __iter__(self) -> Iterator[Digest]:
        """All held digests, the oldest first."""
        return iter(self._entries)

    def __repr__(self) -> str:
        return (
            f"<Ledger {self.held}+{self.reserved}/{self.max_size} bytes, "
            f"{len(self._entries)} blobs, {len(self._pins)} pinned>"
        )

    def get(self, digest: Digest) -> Entry | None:
        return self._entries.get(digest)

    # What is held

    def add(self, digest: Digest, size: int, now: int) -> Entry:
        """Enter a blob at the young end; one that is already there gets the new size."""
        self._leave(digest)
        entry = self._entries[digest] = Entry(size, self._stamp(now))
        self.held += size
        if digest in self._pins:
            self._pinned += size
        return entry

    def restore(self, entries: Iterable[tuple[Digest, int, int]]) -> None:
        """Enter what was held before a restart, each digest once, from the oldest use on."""
        into, latest = self._entries, self._latest  # many: no call for each of them
        for digest, size, used in entries:
            latest = used if used > latest else latest + 1
            into[digest] = Entry(size, latest)
            self.held += size
        self._latest = latest

    def insert(self, entries: Iterable[tuple[Digest, int, int]]) -> list[Digest]:
        """Enter what was found late, each at the age that it has; returns what was not held.

        Costs a look at everything that is younger than the oldest of them.
        """
        found = {digest: Entry(size, used) for digest, size, used in entries}
        for digest in found.keys() & self._entries.keys():
            del found[digest]
        if not found:
            return []
        oldest = min(entry.used for entry in found.values())
        younger = takewhile(lambda each: each[1].used > oldest, reversed(self._entries.items()))
        for digest, entry in sorted([*younger, *found.items()], key=lambda each: each[1].used):
            self._entries[digest] = entry
            self._entries.move_to_end(digest)
            self._latest = max(self._latest, entry.used)
        self.held += sum(entry.size for entry in found.values())
        self._pinned += sum(entry.size for digest, entry in found.items() if digest in self._pins)
        return list(found)

    def entries(self) -> list[tuple[Digest, Entry]]:
        """Everything that is held now, the oldest first, to be looked at beside the loop."""
        return list(self._entries.items())

    def remove(self, digest: Digest) -> bool:
        """Forget a blob, pinned or not, and what it names as children. Pins stay."""
        self._children.pop(digest, None)
        return self._leave(digest)

    def _leave(self, digest: Digest) -> bool:
        entry = self._entries.pop(digest, None)
        if entry is None:
            return False
        self.held -= entry.size
        if digest in self._pins:
            self._pinned -= entry.size
        return True

    # Use

    def set_children(self, manifest: Digest, children: Iterable[Digest]) -> None:
        """Say what a manifest names; the children need not be held (yet)."""
        self._children[manifest] = tuple(children)

    def touch(self, digest: Digest, now: int) -> list[tuple[Digest, int]]:
        """Move a blob, and all that it names, to the young end; returns the new times of use."""
        entry = self._entries.get(digest)
        if entry is None:
            return []
        is_youngest = next(reversed(self._entries)) == digest
        if is_youngest and now - entry.used < _RENEW:
            return []
        moved: list[tuple[Digest, int]] = []
        for member in self._image(digest):
            self._entries.move_to_end(member)
            used = self._entries[member].used = self._stamp(now)
            moved.append((member, used))
        return moved

    def _image(self, root: Digest) -> list[Digest]:
        """Everything held that `root` names, itself last: children come before parents."""
        seen: dict[Digest, None] = {}
        ahead = [root]
        while ahead:
            digest = ahead.pop()
            if digest in seen or digest not in self._entries:
                continue
            seen[digest] = None
            ahead.extend(self._children.get(digest, ()))
        return list(reversed(seen))

    def _stamp(self, now: int) -> int:
        self._latest = max(now, self._latest + 1)
        return self._latest

    # Pins

    def pin(self, digest: Digest) -> None:
        """Protect a digest from eviction until as many unpins; it need not be held (yet)."""
        pins = self._pins.get(digest, 0)
        if pins == 0 and (entry := self._entries.get(digest)):
            self._pinned += entry.size
        self._pins[digest] = pins + 1

    def unpin(self, digest: Digest) -> None:
        pins = self._pins[digest]
        if pins > 1:
            self._pins[digest] = pins - 1
            return
        del self._pins[digest]
        if entry := self._entries.get(digest):
            self._pinned -= entry.size

    def is_pinned(self, digest: Digest) -> bool:
        return digest in self._pins

    # Room

    @property
    def spare(self) -> int:
        """Bytes that nobody uses and nobody was promised."""
        return max(0, self.max_size - self._pinned - self.reserved)

    def admit(self, size: int, spare: int | None = None) -> tuple[Digest, ...] | None:
        """Promise `size` bytes to a fill; returns what has to be removed from the disk for it.

        The victims have left the ledger when this returns. None means that there is no room
        even without everything that may go; then nothing has changed. `spare` is how many bytes
        the disk can take before `min_free` is touched, less what is promised and not yet
        written; it may be negative, and None stands for a disk that nobody asked.
        """
        evictable = self.held - self._pinned
        for_disk = 0 if spare is None else max(0, size - spare)
        for_size = self._excess(size, evictable)
        if for_size is None or for_disk > evictable:
            return None
        victims = self._evict(max(for_size, for_disk))
        self.reserved += size
        return victims

    def release(self, size: int) -> None:
        """Give a promise back: the fill was stored, or dropped."""
        self.reserved -= size

    def shed(self, size: int) -> tuple[Digest, ...]:
        """Give up at least `size` bytes if there are as many: the disk is fuller than we are."""
        return self._evict(size)

    def shrink(self) -> tuple[Digest, ...]:
        """Go below the low mark if above the high one (a smaller `max_size` after a restart)."""
        evictable = self.held - self._pinned
        excess = self._excess(0, evictable)
        return self._evict(evictable if excess is None else excess)

    def _excess(self, size: int, evictable: int) -> int | None:
        """How many bytes must go so that `size` more fit; None when they cannot."""
        wanted = self.held + self.reserved + size
        if wanted <= self.high:
            return 0
        # Down to the low mark; with too much pinned or promised for that, the high one, and at
        # last no more than is needed.
        for mark in (self.low, self.high, self.max_size):
            if wanted - mark <= evictable:
                return max(0, wanted - mark)
        return None

    def _evict(self, size: int) -> tuple[Digest, ...]:
        victims: list[Digest] = []
        freed = 0
        if size <= 0:
            return ()
        for digest, entry in self._entries.items():
            if freed >= size:
                break
            if digest not in self._pins:
                victims.append(digest)
                freed += entry.size
        for digest in victims:
            self.remove(digest)
        return tuple(victims)
