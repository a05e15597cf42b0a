"""Digests: the names of bytes, and the running hash that proves bytes deserve their name.

Only sha256 and sha512 exist here: they are the algorithms the OCI image-spec registers and clients
use, and each further one would widen what a client may make us hash and store.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from proxy.oci.errors import DigestInvalid

#: Bytes as they come: ones of their own, or a view of where they lie.
Chunk = bytes | memoryview

# image-spec, "Digests": encoded is lower-case hex, and its length belongs to the algorithm.
_HEX = {
    "sha256": re.compile(r"[0-9a-f]{64}"),
    "sha512": re.compile(r"[0-9a-f]{128}"),
}
_EACH_SHA256 = re.compile(r"^sha256:([0-9a-f]{64})$", re.MULTILINE)
_SHA256_TEXT = len("sha256:") + 64


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A content digest. `str()` gives the wire form `sha256:<64 hex>`.

    Raises DigestInvalid for anything that is not a sha256 or sha512 digest in lower-case hex.
    """

    algorithm: str
    hex: str

    def __post_init__(self) -> None:
        grammar = _HEX.get(self.algorithm)
        if grammar is None or not grammar.fullmatch(self.hex):
            raise DigestInvalid(detail={"digest": f"{self.algorithm}:{self.hex}"[:200]})

    def __hash__(self) -> int:
        # Of the hex alone, which tells them apart: both would have to be put together first.
        return hash(self.hex)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the wire form. Raises DigestInvalid."""
        algorithm, _, encoded = text.partition(":")
        return cls(algorithm, encoded)

    @classmethod
    def parse_all(cls, texts: Sequence[str]) -> Sequence[Self | None]:
        """Read very many wire forms, as a start does; None for what is not one."""
        together = "\n".join(texts)
        found = _EACH_SHA256.findall(together)
        # As many lines of that length as there are texts: then each of them is one.
        if len(found) != len(texts) or len(together) != len(texts) * (_SHA256_TEXT + 1) - 1:
            return [cls._parse_or_none(text) for text in texts]
        blank = object.__new__
        digests: list[Self | None] = []
        for encoded in found:  # what the constructor does, which would ask each one again
            digest = blank(cls)
            _set_algorithm(digest, "sha256")
            _set_hex(digest, encoded)
            digests.append(digest)
        return digests

    @classmethod
    def _parse_or_none(cls, text: str) -> Self | None:
        try:
            return cls.parse(text)
        except DigestInvalid:
            return None

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview, algorithm: str = "sha256") -> Self:
        """The digest of bytes at hand. Raises DigestInvalid for an unknown algorithm."""
        if algorithm not in _HEX:
            raise DigestInvalid(detail={"algorithm": algorithm[:200]})
        return cls(algorithm, hashlib.new(algorithm, data).hexdigest())

    def verifier(self) -> Verifier:
        """A fresh running hash that expects this digest."""
        return Verifier(self)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


_set_algorithm, _set_hex = (vars(Digest)[name].__set__ for name in ("algorithm", "hex"))


class Verifier:
    """A running hash and length over bytes that arrive in order.

    It may be handed from thread to thread (hashlib releases the interpreter lock for large
    buffers), but two threads must not update it at the same time: the order of bytes is the
    caller's promise. `actual` and `matches` may be asked at any point and do not end it.
    """

    __slots__ = ("_hash", "count", "expected")

    def __init__(self, expected: Digest) -> None:
        self.expected = expected
        self.count = 0  # bytes hashed
        self._hash = hashlib.new(expected.algorithm)

    def update(self, data: Chunk | bytearray) -> None:
        """Hash the next bytes."""
        self._hash.update(data)
        self.count += data.nbytes if isinstance(data, memoryview) else len(data)

    def actual(self) -> Digest:
        """The digest of all bytes so far."""
        return Digest(self.expected.algorithm, self._hash.hexdigest())

    def matches(self) -> bool:
        """Whether the bytes so far are the expected content."""
        return self.actual() == self.expected

    def __repr__(self) -> str:
        return f"<Verifier {self.expected} after {self.count} bytes>"
