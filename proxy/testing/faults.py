"""Scripted misbehaviour: what goes wrong, for which requests, how often.

A fault strikes a request that has passed the connection limit and authentication, so a script does
not depend on how many challenges a client needs first. Actions are values. Those that change an
answer are applied by the pure function `distort`; those that concern the connection (`Cut`,
`Reset`, `Stall`, `Hang`, `Disconnect`, `Raw`) are carried out while writing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from proxy.oci.digest import Digest
from proxy.testing.pattern import Pattern
from proxy.testing.wire import Asked, Kind, Reply


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer with this instead."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Cut:
    """End the connection with FIN after `after` body bytes; the length was announced in full."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class Reset:
    """End it with RST once the peer's kernel has `after` body bytes (over TLS: at most so many)."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class Stall:
    """Stop after `after` body bytes until `FakeRegistry.release()`, then go on."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class Hang:
    """Send no header until `FakeRegistry.release()`, then answer rightly."""


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close without a single byte of answer, as a server does that just dropped an idle socket."""

    reset: bool = False


@dataclass(frozen=True, slots=True)
class Raw:
    """Write these bytes in place of an answer; then `late`, when the client has had time to read
    them and to think the answer complete; then `forever`, again and again while the client reads,
    with a `pause` in seconds; then FIN, or with `ends` false nothing more."""

    data: bytes
    forever: bytes = b""
    pause: float = 0.0
    ends: bool = True
    late: bytes = b""


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Flip all bits of the body byte at offset `at`, counted from the end when negative."""

    at: int = 0


@dataclass(frozen=True, slots=True)
class ShortLength:
    """Announce and send `by` bytes less than there are, and end cleanly."""

    by: int = 1


@dataclass(frozen=True, slots=True)
class Oversize:
    """Grow the body to `size` bytes with blanks, which leaves JSON valid."""

    size: int


@dataclass(frozen=True, slots=True)
class WrongContentRange:
    """Shift the range that a 206 claims to hold; the bytes stay those that were asked for."""

    shift: int = 1


@dataclass(frozen=True, slots=True)
class WrongDigestHeader:
    """Claim another digest in `Docker-Content-Digest`."""


@dataclass(frozen=True, slots=True)
class IgnoreRange:
    """Answer 200 with the whole body, whatever range was asked for."""


@dataclass(frozen=True, slots=True)
class EmptyAccess:
    """Issue a token that is valid but grants nothing (Harbor with its database in trouble)."""


Action = (
    Answer
    | Cut
    | Reset
    | Stall
    | Hang
    | Disconnect
    | Raw
    | Corrupt
    | ShortLength
    | Oversize
    | WrongContentRange
    | WrongDigestHeader
    | IgnoreRange
    | EmptyAccess
)


@dataclass(frozen=True, slots=True)
class Fault:
    """`action` for the next `times` requests that match (None: for ever).

    Every given field has to match: `kind` (a `Kind` or its word), `reference` (a tag or digest; a
    manifest asked for by tag also matches its digest), `repository`, `method`. Raises ValueError
    for an unknown kind, which could never strike.
    """

    action: Action
    kind: str | None = None
    reference: str | Digest | None = None
    repository: str | None = None
    method: str | None = None
    times: int | None = 1

    def __post_init__(self) -> None:
        check_kind(self.kind)

    def matches(self, asked: Asked, resolved: Digest | None = None) -> bool:
        """Whether this fault is meant for that request; `resolved` is what its tag points to."""
        return matches(asked, resolved, self.kind, self.reference, self.repository, self.method)


def check_kind(kind: str | None) -> None:
    """Raise ValueError when nothing can be of this kind."""
    if kind is not None:
        Kind(kind)


def matches(
    asked: Asked,
    resolved: Digest | None,
    kind: str | None,
    reference: str | Digest | None,
    repository: str | None,
    method: str | None,
) -> bool:
    """Whether a request fits all of the given fields; None fits everything."""
    return (
        (kind is None or kind == asked.kind)
        and (reference is None or str(reference) in (asked.reference, str(resolved)))
        and (repository is None or repository == asked.repository)
        and (method is None or method == asked.method)
    )


class Script:
    """Faults that have not yet been used up; the earliest scripted one that matches strikes."""

    def __init__(self) -> None:
        self._faults: list[tuple[Fault, int | None]] = []

    def add(self, faults: tuple[Fault, ...]) -> None:
        """Append faults behind those already waiting."""
        self._faults.extend((fault, fault.times) for fault in faults)

    def clear(self) -> None:
        """Behave from now on."""
        self._faults.clear()

    def take(self, asked: Asked, resolved: Digest | None) -> Action | None:
        """Use up one strike of the first matching fault."""
        for position, (fault, left) in enumerate(self._faults):
            if not fault.matches(asked, resolved):
                continue
            if left is not None and left <= 1:
                del self._faults[position]
            elif left is not None:
                self._faults[position] = (fault, left - 1)
            return fault.action
        return None

    def __len__(self) -> int:
        return len(self._faults)


_SPAN = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def distort(action: Action | None, reply: Reply) -> Reply:
    """The answer as the fault leaves it. Connection faults leave it as it is."""
    match action:
        case Answer(status, headers, body):
            return Reply(status, body, headers)
        case Corrupt(at):
            return replace(reply, body=_flipped(reply.body, at))
        case ShortLength(by):
            kept = max(0, len(reply.body) - by)
            return replace(reply, body=reply.body[:kept], declared=kept)
        case Oversize(size):
            return replace(reply, body=bytes(reply.body).ljust(size), declared=None)
        case WrongContentRange(shift):
            return _shifted(reply, shift)
        case WrongDigestHeader():
            return reply.with_headers(Docker_Content_Digest=str(Digest.of(b"another")))
        case _:
            return reply


def _flipped(body: bytes | memoryview | Pattern, at: int) -> bytes:
    changed = bytearray(bytes(body))
    if changed:
        changed[at % len(changed)] ^= 0xFF
    return bytes(changed)


def _shifted(reply: Reply, shift: int) -> Reply:
    span = _SPAN.fullmatch(reply.headers.get("Content-Range", ""))
    if span is None:
        return reply
    first, last, size = (int(part) for part in span.groups())
    return reply.with_headers(Content_Range=f"bytes {first + shift}-{last + shift}/{size}")
