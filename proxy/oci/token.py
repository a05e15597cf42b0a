"""What a token service answers, and what a token says it allows.

Sources: distribution, "Token Authentication Specification" and "Token Authentication
Implementation" (the `access` claim). A token is never verified here: it is the upstream's to
judge. Reading its claims only tells whether it is worth keeping: Harbor under load hands out tokens
that are valid and allow nothing.
"""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import dataclass

from proxy.oci.errors import TokenServiceFailed

# "expires_in: … If omitted, this defaults to 60 seconds."
DEFAULT_EXPIRES_IN = 60.0

# The token goes into a header line: RFC 6750 §2.1 allows b64token there and nothing else. What some
# services send besides is kept as long as it cannot break the line.
_HEADER_SAFE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class TokenReply:
    """A token and its lifetime in seconds, at least 1."""

    token: str
    expires_in: float = DEFAULT_EXPIRES_IN

    def __repr__(self) -> str:  # tokens are secrets and reprs end up in logs
        return f"<TokenReply for {self.expires_in:g} s>"


@dataclass(frozen=True, slots=True)
class Access:
    """One entry of the `access` claim."""

    type: str
    name: str
    actions: frozenset[str]


def parse_token_reply(body: bytes) -> TokenReply:
    """Read a token service's answer. Raises TokenServiceFailed when there is no token in it."""
    reply = _json_object(body)
    if reply is None:
        raise TokenServiceFailed("the token service's answer is not a JSON object")
    token = reply.get("token") or reply.get("access_token")
    if not isinstance(token, str) or not _HEADER_SAFE.fullmatch(token):
        raise TokenServiceFailed("the token service's answer holds no usable token")
    return TokenReply(token, _expires_in(reply.get("expires_in")))


def oauth_error(body: bytes) -> str | None:
    """The error code of a refused OAuth2 exchange (RFC 6749 §5.2); ``None`` without one."""
    error = (_json_object(body) or {}).get("error")
    return error if isinstance(error, str) else None


def jwt_access(token: str) -> tuple[Access, ...] | None:
    """The `access` claim of a JWT; None when the token is opaque or has no such claim.

    `null` is what Go writes for an empty list, so it counts as a claim that allows nothing.
    """
    claims = _jwt_claims(token)
    if claims is None or "access" not in claims:
        return None
    entries = claims["access"]
    if entries is None:
        return ()
    if not isinstance(entries, list):
        return None
    return tuple(access for entry in entries if (access := _access(entry)) is not None)


def grants(token: str, repository: str, action: str) -> bool:
    """Whether the token allows `action` on `repository`, as far as can be seen from outside.

    A token that cannot be read gets the benefit of the doubt.
    """
    access = jwt_access(token)
    if access is None:
        return True
    return any(
        entry.type == "repository"
        and entry.name == repository
        and not entry.actions.isdisjoint((action, "*"))
        for entry in access
    )


def _json_object(body: bytes) -> dict[str, object] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):  # RecursionError: thousands of opening brackets
        return None
    return value if isinstance(value, dict) else None


def _expires_in(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return DEFAULT_EXPIRES_IN
    try:
        seconds = float(value)
    except OverflowError:
        return DEFAULT_EXPIRES_IN
    if not math.isfinite(seconds):
        return DEFAULT_EXPIRES_IN
    # 0 is what a service sends that leaves the field unset in a typed structure. A token that
    # lives no time at all cannot be meant; one second makes us ask again, and soon.
    return max(1.0, seconds)


def _jwt_claims(token: str) -> dict[str, object] | None:
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        payload = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
    except ValueError:
        return None
    return _json_object(payload)


def _access(entry: object) -> Access | None:
    if not isinstance(entry, dict):
        return None
    kind, name, actions = entry.get("type"), entry.get("name"), entry.get("actions")
    if not isinstance(kind, str) or not isinstance(name, str):
        return None
    listed = actions if isinstance(actions, list) else []
    return Access(kind, name, frozenset(action for action in listed if isinstance(action, str)))
