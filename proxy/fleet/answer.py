"""Reading the head of a giver's answer: HTTP/1.1 as our own listener writes it, and no more.

A giver may be anybody who stole a key, so what is read here is as narrow as what is sent: one head,
of bounded size, each header once, a body whose length is said. What HTTP allows besides (interim
answers, chunks, folded lines, bodies that end with their connection) is refused: each of them has
its own history of two readers that disagreed.

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

#: Bytes of a head, at most: 64 digests take 2,732 of them.
MOST = 8 << 10
END = b"\r\n\r\n"

_STATUS = re.compile(r"HTTP/1\.1 ([2-5][0-9]{2})(?: [\t -~]*)?")
_FIELD = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([!-~]?(?:[\t -~]*[!-~])?)[ \t]*")
_LENGTH = re.compile(r"0|[1-9][0-9]{0,11}")


class Malformed(ValueError):
    """It is no answer that a node gives."""


@dataclass(frozen=True, slots=True)
class Head:
    """``headers`` by their names in lower case; ``length``: the bytes of the body."""

    status: int
    headers: Mapping[str, str]
    length: int

    def get(self, name: str) -> str | None:
        return self.headers.get(name.lower())

    @property
    def ends_connection(self) -> bool:
        """Will it be closed behind this answer?"""
        return self.headers.get("connection", "keep-alive").lower() != "keep-alive"


def parse_head(data: bytes) -> Head:
    """Read a head without the empty line that ends it. Raises ``Malformed``."""
    try:
        first, *lines = data.decode("ascii").split("\r\n")
    except UnicodeDecodeError as error:
        raise Malformed("it is not ASCII") from error
    status = _STATUS.fullmatch(first)
    if status is None:
        raise Malformed(f"no status line: {first[:80]!r}")
    headers = _fields(lines)
    if "transfer-encoding" in headers:
        raise Malformed("its body has no length")
    length = headers.get("content-length", "")
    if not _LENGTH.fullmatch(length):
        raise Malformed(f"no length of a body: {length[:80]!r}")
    return Head(int(status[1]), headers, int(length))


def _fields(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise Malformed(f"no header: {line[:80]!r}")
        name = field[1].lower()
        if name in headers:
            raise Malformed(f"{name} came twice")
        headers[name] = field[2]
    return headers
