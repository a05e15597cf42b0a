"""Our own authentication of clients: Basic (RFC 7617) against an htpasswd file.

A challenge leaves pullpool here and nowhere else. It is ours, never an upstream's: clients answer
it with the credentials that they have for pullpool (`docker login`, hosts.toml), and those go no
further than this module.
"""

from __future__ import annotations

import base64
import binascii

from aiohttp import web

from proxy.oci.errors import ClientError, ErrorCode
from proxy.web.passwords import Passwords

CHALLENGE = 'Basic realm="pullpool"'


class Unauthenticated(ClientError):
    """The client has shown no name and password, or wrong ones."""

    reason = "unauthenticated"
    default_message = "a name and a password are needed here"
    status = 401
    code = ErrorCode.UNAUTHORIZED

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message, headers={"WWW-Authenticate": CHALLENGE})


class Authentication:
    """Lets in who is in the file."""

    def __init__(self, passwords: Passwords) -> None:
        self._passwords = passwords

    async def name(self, request: web.BaseRequest) -> str:
        """The client's name. Raises ``Unauthenticated``."""
        values = request.headers.getall("Authorization", [])
        shown = parse_basic(values[0]) if len(values) == 1 else None
        if shown is None:
            raise Unauthenticated
        name, password = shown
        if not await self._passwords.is_right(name, password):
            raise Unauthenticated("the name or the password is wrong")
        return name


def parse_basic(header: str) -> tuple[str, str] | None:
    """Name and password of an Authorization header; None when it is not of this kind.

    UTF-8 (RFC 7617 §2.1); neither may hold control characters (§2).
    """
    scheme, _, token = header.strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        text = base64.b64decode(token.strip(), validate=True).decode()
    except (binascii.Error, ValueError):
        return None
    name, colon, password = text.partition(":")
    if not colon or not name or any(c < " " or c == "\x7f" for c in text):
        return None
    return name, password
