"""Signed URLs, as the storage service behind a registry knows them: digest, expiry, HMAC."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable

from proxy.oci.digest import Digest
from proxy.testing.answers import Manners, blob_answer
from proxy.testing.content import Content
from proxy.testing.wire import SIGNED_PATH, Asked, Reply


class SignedUrls:
    """Makes such URLs and serves them from `sources`, the contents of the registries in front.

    `clock` gives seconds since the epoch.
    """

    def __init__(self, own: Content, clock: Callable[[], float]) -> None:
        self.sources = [own]
        self._clock = clock
        self._secret = secrets.token_bytes(16)

    def path_for(self, digest: Digest, ttl: float) -> str:
        """Path and query of a URL that is good for `ttl` seconds."""
        expires = f"{self._clock() + ttl:.3f}"
        return f"{SIGNED_PATH}{digest}?expires={expires}&sig={self._sign(str(digest), expires)}"

    def refusal(self, asked: Asked) -> Reply | None:
        """What becomes of a URL that was altered, is too old, or comes with a login; else None."""
        if "Authorization" in asked.headers:
            return _error(400, "InvalidArgument", "Only one auth mechanism allowed")
        expires, signature = asked.query.get("expires", ""), asked.query.get("sig", "")
        if not hmac.compare_digest(signature, self._sign(asked.reference or "", expires)):
            return _error(403, "SignatureDoesNotMatch", "The signature does not match")
        if self._clock() >= float(expires):
            return _error(403, "AccessDenied", "Request has expired")
        return None

    def answer(self, asked: Asked, manners: Manners) -> Reply:
        """The blob. It is asked for without a repository: who signed has already checked that."""
        replies = (blob_answer(asked, content, manners) for content in self.sources)
        found = next((reply for reply in replies if reply.status != 404), None)
        return found or _error(404, "NoSuchKey", "The specified key does not exist")

    def _sign(self, digest: str, expires: str) -> str:
        return hmac.new(self._secret, f"{digest} {expires}".encode(), hashlib.sha256).hexdigest()


def _error(status: int, code: str, message: str) -> Reply:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return Reply(status, body, {"Content-Type": "application/xml"})
