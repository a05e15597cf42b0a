"""What a 401 says about how to authenticate (RFC 9110 §11.6.1).

The header is a list whose items are themselves lists, both with commas, and registries put commas
into quoted values on top (`scope="repository:a:pull,push"`). So it is scanned, not split. The scan
never raises: a part it cannot read is skipped, as some upstreams under load answer 401 with an
empty or broken challenge, and that is a finding too, not a fault of this parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SEPARATORS = re.compile(r"[ \t,]+")
_EQUALS = re.compile(r"[ \t]*=[ \t]*")
# Possessive, so that an unterminated string costs one pass and not many.
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*+)"', re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
# The grammar allows a token here; bare URLs (`realm=https://…`) are met in the wild.
_BARE = re.compile(r'[^\s,"]+')
# token68 stands alone behind its scheme: the next thing is a comma or the end.
_TOKEN68 = re.compile(r"[ \t]+[0-9A-Za-z._~+/-]++=*+[ \t]*(?=,|$)")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge: `scheme` and the names of `params` in lower case, values as they came."""

    scheme: str
    params: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BearerChallenge:
    """Where a token is to be had (distribution, "Token Authentication Specification")."""

    realm: str
    service: str | None = None
    scope: str | None = None
    error: str | None = None


def parse_challenges(headers: Iterable[str]) -> tuple[Challenge, ...]:
    """All challenges of all WWW-Authenticate headers, in order. Never raises."""
    return tuple(challenge for header in headers for challenge in _scan(header))


def pick_bearer(challenges: Iterable[Challenge]) -> BearerChallenge | None:
    """The first Bearer challenge that names a realm; None when there is none."""
    for challenge in challenges:
        if challenge.scheme == "bearer" and (realm := challenge.params.get("realm")):
            params = challenge.params
            return BearerChallenge(
                realm, params.get("service"), params.get("scope"), params.get("error")
            )
    return None


def offers_basic(challenges: Iterable[Challenge]) -> bool:
    """Whether one of the challenges is Basic (RFC 7617)."""
    return any(challenge.scheme == "basic" for challenge in challenges)


def _scan(header: str) -> Iterator[Challenge]:
    """Split one header into challenges.

    A word followed by "=" and a value is a parameter of the challenge it stands in; any other
    word opens a new challenge. A parameter before the first scheme belongs to nothing.
    """
    scheme: str | None = None
    params: dict[str, str] = {}
    position = 0
    while (word := _next_word(header, position)) is not None:
        value, after = _read_value(header, word.end())
        if after is not None:
            if value is not None:
                params.setdefault(word.group().lower(), value)
            position = after
            continue
        if scheme is not None:
            yield Challenge(scheme, params)
        scheme, params = word.group().lower(), {}
        token68 = _TOKEN68.match(header, word.end())
        position = token68.end() if token68 else word.end()
    if scheme is not None:
        yield Challenge(scheme, params)


def _next_word(header: str, position: int) -> re.Match[str] | None:
    """The next token at or after `position`, past separators and whatever cannot be read."""
    while position < len(header):
        if separators := _SEPARATORS.match(header, position):
            position = separators.end()
        elif word := _TOKEN.match(header, position):
            return word
        elif quoted := _QUOTED.match(header, position):
            position = quoted.end()
        elif header[position] == '"':  # unterminated: nothing after it can be trusted
            return None
        else:
            position += 1
    return None


def _read_value(header: str, position: int) -> tuple[str | None, int | None]:
    """The value after "=" and where it ends; (None, None) if there is no "=" here.

    A value that is there but cannot be read gives (None, end): its parameter is dropped.
    """
    equals = _EQUALS.match(header, position)
    if equals is None:
        return None, None
    if quoted := _QUOTED.match(header, equals.end()):
        return _ESCAPE.sub(r"\1", quoted.group(1)), quoted.end()
    if bare := _BARE.match(header, equals.end()):
        return bare.group(), bare.end()
    return None, equals.end()
