"""Tags that the leader has called fresh, and for how long: a follower needs not ask for them.

The leader says with its answer how long a tag needs no question, and takes it back when the tag is
refreshed, has moved, or is denied. Both come over one channel, in order, and both are noted when
they arrive and not when somebody gets round to them, so an answer that is already overtaken cannot
be believed after it was taken back. What is kept dies with the channel. So do the marks of those
who prepared something from it (``store/marks.py``).
"""

from __future__ import annotations

from collections.abc import Callable

from cachetools import LRUCache

from proxy.oci.digest import Digest
from proxy.pull.tags import MAX_TAGS, Fresh, TagKey
from proxy.store.marks import Marks


class FreshTags:
    """What tags are, until when. ``clock`` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # With the time when that was said, and for how long.
        self._known: LRUCache[TagKey, tuple[Digest, float, float]] = LRUCache(MAX_TAGS)
        self._marks: Marks[TagKey] = Marks()

    def believe(self, key: TagKey, digest: Digest, seconds: float) -> None:
        """The tag is ``digest`` for so long."""
        if seconds > 0:
            self._known[key] = (digest, self._clock(), seconds)
            self._marks.withdraw(key)

    def doubt(self, key: TagKey) -> None:
        """The tag may be something else by now."""
        self._known.pop(key, None)
        self._marks.withdraw(key)

    def clear(self) -> None:
        """There is nobody any more who would take anything back."""
        self._known.clear()
        self._marks.clear()

    def find(self, key: TagKey) -> Fresh | None:
        """What the tag is, if that is still to be believed."""
        known = self._known.get(key)
        if known is None:
            return None
        digest, said, seconds = known
        if self._clock() - said >= seconds:
            return None
        return Fresh(digest, self._marks.of(key), said, seconds)

    def __repr__(self) -> str:
        return f"<FreshTags {len(self._known)}>"
