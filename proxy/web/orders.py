"""Orders: requests of the admin listener that change something, or tell more than figures.

A browser must not be able to give one on behalf of a page that its user looks at. Such a request is
either plain (a form, ``text/plain``) and lacks the JSON content type, which no page can send to
another origin unasked; or it names another Origin; or it reached us by DNS rebinding, and its Host
is a name of the attacker's. So: JSON, our own Origin or none, and a Host that nobody else can own.
"""

from __future__ import annotations

import ipaddress
import json
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web


class Refused(Exception):
    """The order is not taken; ``status`` and words of the answer."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status

    def answer(self) -> web.Response:
        """What whoever gave it is told."""
        return web.json_response({"error": str(self)}, status=self.status)


async def order(request: web.Request, own: str) -> Any:
    """The JSON of an order, which may come from where it comes from. Raises ``Refused``.

    ``own`` is what the listener was told to be called.
    """
    check(request, own)
    if request.content_type != "application/json":
        raise Refused(415, "send application/json")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Refused(400, "send it without Content-Encoding")
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise Refused(400, str(error)) from error
    except web.HTTPRequestEntityTooLarge as error:
        raise Refused(413, "the order is too long") from error


def check(request: web.Request, own: str) -> None:
    """May it come from where it comes from? Raises ``Refused``."""
    refused = refusal(request.headers.get("Host"), request.headers.get("Origin"), own)
    if refused is not None:
        raise Refused(403, refused)


def refusal(host: str | None, origin: str | None, own: str) -> str | None:
    """Why a request that changes something may not come from where it comes from; None: it may.

    ``host`` and ``origin`` are its headers, ``own`` is what the listener is called.
    """
    try:
        name = urlsplit(f"//{host or ''}").hostname or ""
    except ValueError:
        name = ""
    if name not in ("localhost", own.lower().strip("[]")) and not _is_address(name):
        return "the Host header must be an address, localhost, or the configured admin host"
    if origin is not None and origin.lower() != f"http://{host}".lower():
        return "requests from other origins are refused"
    return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
