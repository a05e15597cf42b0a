"""The fleet's secret, which may be replaced while all nodes run.

It lies in a file. A new one is written there on one node after the other, or brought to all within
a minute or so by what mounts it. Until each has read it, nodes with the new one and with the old
one have to understand each other. So a secret that was read

* is accepted at once,
* is used for what is sealed here after ``SOON`` seconds, when the others know it too,
* is accepted for ``LATE`` seconds longer when another one is used instead.

One that another one replaces before it was used here is never used, only accepted. A node that
begins with the new one knows no other: until the others have read it they do not understand it,
nor it them.

Whoever replaces it because somebody else knows it can shorten that only by restarting all nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

#: Seconds until a secret that was read is used, and for which the one before is accepted then.
SOON, LATE = 90.0, 600.0

T = TypeVar("T")


class Secret:
    """``clock`` is monotonic."""

    def __init__(self, secret: bytes, clock: Callable[[], float] = lambda: 0.0) -> None:
        self._clock = clock
        self._used = secret
        self._next: tuple[bytes, float] | None = None  # and when it is used
        self._former: list[tuple[bytes, float]] = []  # and until when each is accepted

    @classmethod
    def of(cls, secret: bytes | Secret) -> Secret:
        """One that never changes, of bytes."""
        return secret if isinstance(secret, Secret) else cls(secret)

    def replace(self, secret: bytes) -> None:
        """Another one was read."""
        self._pass()
        if secret == (self._used if self._next is None else self._next[0]):
            return
        since = self._clock() + SOON
        if self._next is not None:  # not used here any more; others begin to, and read this later
            self._former.append((self._next[0], since + LATE))
        self._next = None if secret == self._used else (secret, since)  # None: it was put back

    def _pass(self) -> None:
        now = self._clock()
        if self._next is not None and self._next[1] <= now:
            secret, since = self._next
            self._former.append((self._used, since + LATE))
            self._used, self._next = secret, None
        self._former = [one for one in self._former if one[1] > now]

    @property
    def used(self) -> bytes:
        """What to seal with."""
        self._pass()
        return self._used

    @property
    def accepted(self) -> tuple[bytes, ...]:
        """What others may have sealed with, the likeliest first."""
        self._pass()
        others = [self._next] if self._next is not None else []
        others += reversed(self._former)
        return tuple(dict.fromkeys((self._used, *(one for one, _ in others))))

    def __repr__(self) -> str:
        return f"<Secret, {int(self._next is not None)} to come, {len(self._former)} former>"


class Derived(Generic[T]):
    """What is made of the secret for one purpose, such as a key."""

    def __init__(self, secret: bytes | Secret, derive: Callable[[bytes], T]) -> None:
        """Raises what ``derive`` raises."""
        self._secret = Secret.of(secret)
        self._derive = derive
        self._made: dict[bytes, T] = {}
        _ = self.used

    @property
    def used(self) -> T:
        return self._of(self._secret.used)

    @property
    def accepted(self) -> Sequence[T]:
        secrets = self._secret.accepted
        if len(self._made) > len(secrets):
            self._made = {secret: self._of(secret) for secret in secrets}
        return [self._of(secret) for secret in secrets]

    def _of(self, secret: bytes) -> T:
        made = self._made.get(secret)
        if made is None:
            made = self._made[secret] = self._derive(secret)
        return made

    def __repr__(self) -> str:
        return f"<Derived of {self._secret!r}>"  # and not a word more
