"""What the directory has said of a blob in one generation, and what it was told (`pursuit.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from proxy.fleet.claims import View
from proxy.fleet.steps import Fresh


@dataclass(frozen=True, slots=True)
class Proof:
    """The hash that a stripe was verified against or found to have, and who published it."""

    hash: bytes
    by: str


@dataclass(slots=True)
class Told:
    """`view`: the last one, with all `hashes` up to then and the last holdings that came with any;
    `publishers`: who published them; `have`: which stripes this node has said that it has."""

    view: View = field(default_factory=View)
    hashes: list[bytes] = field(default_factory=list)
    publishers: list[str] = field(default_factory=list)
    have: int = 0

    @property
    def published(self) -> int:
        """How many stripes have a hash in the directory."""
        return len(self.hashes)

    def proof(self, stripe: int) -> Proof | None:
        """What was published of it."""
        if stripe >= self.published:
            return None
        return Proof(self.hashes[stripe], self.publishers[stripe])

    def learn(self, view: View, *, is_wrong: bool) -> None:
        """A view of this generation has come; the hashes of one that `is_wrong` are no use."""
        known = self.published
        if not is_wrong:
            self.hashes += view.hashes[known - view.first :]
            self.publishers += view.publishers[known - view.first :]
        self.view = replace(
            view,
            first=0,
            hashes=tuple(self.hashes),
            publishers=(),
            holdings=view.holdings or self.view.holdings,
        )

    def entered(self, fresh: Fresh, count: int) -> None:
        """The directory has so many hashes, now that it was told these."""
        end = fresh.first + len(fresh.hashes)
        if count > end:
            return  # another one has published them: its hashes are to be looked at
        if count == end:
            self.hashes[fresh.first :] = fresh.hashes
            self.publishers[fresh.first :] = fresh.by
        else:  # it has lost them
            del self.hashes[count:], self.publishers[count:]
        self.view = replace(self.view, hashes=tuple(self.hashes))
