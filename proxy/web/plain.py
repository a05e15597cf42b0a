"""Plain requests: the strict reading of a head in front of aiohttp's parser.

A request is plain when there is only one way to read it and nothing in it changes how its
connection goes on: GET or HEAD in origin-form, HTTP/1.1, no body, no range, no upgrade, one Host.
Whatever is not plain is not wrong: it is for aiohttp's parser to say what it is. So this refuses
everything that two parsers might read differently (bare LF, folded lines, spaces before a colon,
bytes beyond ASCII, a name twice), and every name that the answer or the connection may depend on
and that is not understood here.

A head is mostly the same bytes again. What differs are lines that the answer does not depend on (an
id for tracing, credentials for somebody else): ``settled`` takes them out, so that what is left can
be looked up. They are taken out as whole, well-formed lines; one that is not stays and is refused.

Whoever puts another id into each head mostly puts it in the same place: a ``Stencil`` is such a
head but for the one value, and tells whether another head differs from it in nothing else. Then
``settled`` would leave the same of both.

Pure: bytes in, values out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: Bytes of a head beyond its request line, and lines of it: half of what aiohttp is allowed.
MAX_HEAD = 8 << 10
MAX_LINES = 64

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST = re.compile(rb"(?:GET|HEAD) /[!\"$-~]* HTTP/1\.1")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([\t -~]*)")
#: Names that answers depend on here, and names that nobody may send to be plain.
_UNDERSTOOD = rb"accept|connection|host|if-none-match|user-agent|x-forwarded-for"
_REFUSED = (
    rb"content-[a-z-]*|etag|expect|http2-settings|if-range|keep-alive|max-forwards"
    rb"|proxy-connection|range|sec-websocket-[0-9a-z-]*|server|te|trailer|transfer-encoding|upgrade"
)
_REFUSED_NAME = re.compile(_REFUSED)
_ORDINARY = re.compile(
    rb"\r\n(?!(?i:" + _UNDERSTOOD + rb"|" + _REFUSED + rb"):)" + _TOKEN + rb":[\t -~]*(?=\r\n)"
)
_VALUE = re.compile(rb"[\t -~]*")
_SECRET = re.compile(rb"(?i)\r\n(?:proxy-)?(?:authorization|cookie):")


@dataclass(frozen=True, slots=True)
class Head:
    """What the answer depends on, of the lines after the request line."""

    agent: str = "-"
    if_none_match: str | None = None
    accept: tuple[str, ...] = ()
    forwarded: tuple[str, ...] = ()
    #: By media type: does the client take it? For whoever asks often.
    takes: dict[str, bool] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Stencil:
    """Heads that begin with ``start`` and end with ``stop``, with any value in between."""

    start: bytes
    stop: bytes

    @classmethod
    def of(cls, one: bytes, other: bytes) -> Stencil | None:
        """That of two heads of which ``settled`` leaves the same; None if more differs than one
        value, or if they hold what must not stay in memory."""
        lines, others = one.split(b"\r\n"), other.split(b"\r\n")
        if len(lines) != len(others) or has_secret(one) or has_secret(other):
            return None
        unlike = [at for at, line in enumerate(lines) if line != others[at]]
        if len(unlike) != 1:
            return None
        at = unlike[0]
        name, colon, _ = lines[at].partition(b":")
        if not others[at].startswith(name + colon):
            return None
        return cls(b"\r\n".join([*lines[:at], name + colon]), b"\r\n".join([b"", *lines[at + 1 :]]))

    def fits(self, rest: bytes) -> bool:
        """Does this head differ from the two in that value alone?"""
        return (
            rest.startswith(self.start)
            and rest.endswith(self.stop)
            and len(rest) <= MAX_HEAD
            and _VALUE.fullmatch(rest, len(self.start), len(rest) - len(self.stop)) is not None
        )


def is_plain_line(line: bytes) -> bool:
    """Is this the request line of a plain request?"""
    return _REQUEST.fullmatch(line) is not None


def settled(rest: bytes) -> bytes | None:
    """``rest`` without the lines that do not matter; None for more than may be plain.

    ``rest`` is a head from the end of the request line to the empty line, both included."""
    if len(rest) > MAX_HEAD:
        return None
    left, count = _ORDINARY.subn(b"", rest)
    return left if count <= MAX_LINES else None


def has_secret(rest: bytes) -> bool:
    """Does a head hold what must not stay in memory?"""
    return _SECRET.search(rest) is not None


def parse_head(rest: bytes) -> Head | None:
    """Read what ``settled`` has left; None when it is not plain."""
    if not rest.endswith(b"\r\n\r\n") or len(rest) > MAX_HEAD:
        return None
    lines = rest[2:-4].split(b"\r\n")
    if not rest.startswith(b"\r\n") or len(lines) > MAX_LINES:
        return None
    found: dict[str, list[str]] = {}
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            return None
        name, value = match[1].lower(), match[2].strip(b" \t")
        if _REFUSED_NAME.fullmatch(name):
            return None
        found.setdefault(name.decode(), []).append(value.decode())
    return _head(found)


def _head(found: dict[str, list[str]]) -> Head | None:
    hosts = found.get("host", [])
    once = [found.get(name, []) for name in ("connection", "if-none-match", "user-agent")]
    if len(hosts) != 1 or not hosts[0] or any(len(values) > 1 for values in once):
        return None
    connection, condition, agent = once
    if connection and connection[0].lower() != "keep-alive":
        return None
    return Head(
        agent=agent[0] if agent else "-",
        if_none_match=condition[0] if condition else None,
        accept=tuple(found.get("accept", ())),
        forwarded=tuple(found.get("x-forwarded-for", ())),
    )
