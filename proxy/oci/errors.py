"""Every failure a client may see, each knowing the answer it deserves.

The edge turns whatever reaches it into one reply, so the mapping from failure to status and code
has to sit with the failure and not in a table somewhere else. There are three families, because
they have three owners: the client asked wrongly, the upstream failed, or we failed. Codes are those
of the OCI distribution-spec ("Error Codes"); two words of the older Docker API, UNAVAILABLE and
UNKNOWN, stand for what the specification has no code for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar, Self

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class ErrorCode(StrEnum):
    """The `code` of an error body."""

    BLOB_UNKNOWN = "BLOB_UNKNOWN"
    DIGEST_INVALID = "DIGEST_INVALID"
    MANIFEST_UNKNOWN = "MANIFEST_UNKNOWN"
    MANIFEST_INVALID = "MANIFEST_INVALID"
    NAME_INVALID = "NAME_INVALID"
    NAME_UNKNOWN = "NAME_UNKNOWN"
    SIZE_INVALID = "SIZE_INVALID"
    UNAUTHORIZED = "UNAUTHORIZED"
    DENIED = "DENIED"
    UNSUPPORTED = "UNSUPPORTED"
    TOOMANYREQUESTS = "TOOMANYREQUESTS"
    UNAVAILABLE = "UNAVAILABLE"
    UNKNOWN = "UNKNOWN"


class PullError(Exception):
    """A pull that cannot be answered as asked.

    `status`, `code` and `message` make the reply; `detail` goes into its body; `headers` go beside
    it and already hold `Retry-After` (whole seconds, rounded up, at least 1) when `retry_after`
    (seconds) is given. `reason` is a short word from a bounded set, for logs and metric labels.
    """

    reason: ClassVar[str] = "error"
    default_message: ClassVar[str] = "the pull failed"
    status: int = 500
    code: ErrorCode = ErrorCode.UNKNOWN

    def __init__(
        self,
        message: str | None = None,
        *,
        detail: Mapping[str, object] | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
        status: int | None = None,
        code: ErrorCode | None = None,
    ) -> None:
        self.message = self.default_message if message is None else message
        super().__init__(self.message)
        self.detail = detail
        self.retry_after = retry_after
        self.headers: Mapping[str, str] = dict(headers)
        if retry_after is not None:
            self.headers = {**headers, "Retry-After": str(max(1, math.ceil(retry_after)))}
        if status is not None:
            self.status = status
        if code is not None:
            self.code = code

    def body(self, request_id: str) -> bytes:
        """The JSON of the distribution-spec: one error, with the request id in its detail."""
        detail = {**(self.detail or {}), "request_id": request_id}
        error = {"code": self.code, "message": self.message, "detail": detail}
        return json.dumps({"errors": [error]}, default=str, separators=(",", ":")).encode()

    @property
    def retried_as(self) -> str:
        """Why another try after it draws on the retry budget; empty if it does not."""
        return self.reason

    def bare(self) -> Self:
        """The same words without the traceback and the causes, which hold the frames of a request:
        what may be kept, and raised to many."""
        copy = type(self).__new__(type(self), *self.args)
        copy.__dict__.update(self.__dict__)
        return copy

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.status} {self.code}: {self.message}>"


# -- the client asked wrongly ---------------------------------------------------------------------


class ClientError(PullError):
    """The client asked wrongly; asking again the same way cannot help."""

    reason = "bad_request"
    default_message = "the request is not valid"
    status = 400
    code = ErrorCode.UNSUPPORTED


class RequestInvalid(ClientError):
    """A request that is malformed in a way no other error names."""

    reason = "request_invalid"


class NameInvalid(ClientError):
    """A repository name outside the grammar."""

    reason = "name_invalid"
    default_message = "the repository name is not valid"
    code = ErrorCode.NAME_INVALID


class DigestInvalid(ClientError):
    """A digest outside the grammar, or of an algorithm that is not sha256 or sha512."""

    reason = "digest_invalid"
    default_message = "the digest is not valid"
    code = ErrorCode.DIGEST_INVALID


class TagInvalid(ClientError):
    """A tag outside the grammar. No manifest can have it, hence 404: conformance asks for that."""

    reason = "tag_invalid"
    default_message = "no manifest can have this tag"
    status = 404
    code = ErrorCode.MANIFEST_UNKNOWN


class NameUnknown(ClientError):
    """A namespace or repository that no configured upstream stands for."""

    reason = "name_unknown"
    default_message = "no upstream is configured for this name"
    status = 404
    code = ErrorCode.NAME_UNKNOWN


class EndpointUnknown(ClientError):
    """A path that is none of the read endpoints of the distribution API."""

    reason = "endpoint_unknown"
    default_message = "there is no such endpoint"
    status = 404


class MethodNotAllowed(ClientError):
    """A write: this registry can only be read (RFC 9110 §15.5.6 asks for `Allow`)."""

    reason = "method_not_allowed"
    default_message = "this registry is read-only"
    status = 405

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message, headers={"Allow": "GET, HEAD"})


class RangeNotSatisfiable(ClientError):
    """No byte of the asked range exists in content of `size` bytes (RFC 9110 §15.5.17)."""

    reason = "range_not_satisfiable"
    status = 416
    code = ErrorCode.SIZE_INVALID

    def __init__(self, size: int) -> None:
        super().__init__(
            f"the range lies outside the content of {size} bytes",
            detail={"size": size},
            headers={"Content-Range": f"bytes */{size}"},
        )


class NotAcceptable(ClientError):
    """The manifest exists, but in no media type that the client accepts."""

    reason = "not_acceptable"
    default_message = "the manifest has a media type that the request does not accept"
    status = 404
    code = ErrorCode.MANIFEST_UNKNOWN


# -- the upstream failed --------------------------------------------------------------------------


class UpstreamError(PullError):
    """The upstream failed, or did not give what it promised."""

    reason = "upstream_error"
    default_message = "the upstream failed"
    status = 502
    code = ErrorCode.UNAVAILABLE


class NotFound(UpstreamError):
    """The upstream does not have it.

    `kind` is "manifest", "blob", "referrers", "tags" or "name".
    """

    reason = "not_found"
    status = 404

    _codes: ClassVar[Mapping[str, ErrorCode]] = MappingProxyType(
        {
            "manifest": ErrorCode.MANIFEST_UNKNOWN,
            "referrers": ErrorCode.MANIFEST_UNKNOWN,
            "blob": ErrorCode.BLOB_UNKNOWN,
            "tags": ErrorCode.NAME_UNKNOWN,
            "name": ErrorCode.NAME_UNKNOWN,
        }
    )

    def __init__(
        self, kind: str, message: str | None = None, *, detail: Mapping[str, object] | None = None
    ) -> None:
        what = "repository" if kind in ("tags", "name") else kind
        super().__init__(
            message or f"the upstream does not have this {what}",
            detail=detail,
            code=self._codes[kind],
        )
        self.kind = kind


class Denied(UpstreamError):
    """The upstream refuses this repository to us.

    403 and never a challenge: a client given the upstream's challenge would fetch a token for us
    from the upstream's token service, which cannot work.
    """

    reason = "denied"
    default_message = "the upstream denies access to this repository"
    status = 403
    code = ErrorCode.DENIED


class Overloaded(UpstreamError):
    """Base of the answers that say "later". The edge may choose 429 or 503 by the client."""

    reason = "overloaded"
    default_message = "there is too much to do at the moment"
    status = 503
    code = ErrorCode.TOOMANYREQUESTS

    def __init__(
        self,
        retry_after: float | None = None,
        *,
        message: str | None = None,
        status: int | None = None,
        detail: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message, retry_after=retry_after, status=status, detail=detail)


class Throttled(Overloaded):
    """The upstream's own 429: its quota or its rate is used up."""

    reason = "throttled"
    default_message = "the upstream limits our requests"


class UpstreamBusy(Overloaded):
    """The upstream refuses because it has too much to do, whatever its status says (DESIGN D5)."""

    reason = "upstream_busy"
    default_message = "the upstream has too much to do"


class Undecided(UpstreamBusy):
    """The same, or a denial: another look is taken before anybody is told (DESIGN D5).

    The upstream answered, so that look is no retry of something that failed.
    """

    reason = "upstream_undecided"

    @property
    def retried_as(self) -> str:
        return ""


class QueueFull(Overloaded):
    """The bounded queue in front of the upstream holds no further waiter."""

    reason = "queue_full"
    default_message = "too many requests wait for the upstream"


class QueueTimeout(Overloaded):
    """The request's turn did not come before its deadline."""

    reason = "queue_timeout"
    default_message = "the turn to ask the upstream did not come in time"


class UpstreamUnavailable(UpstreamError):
    """No usable answer: refused, reset, TLS failure, name not resolved, 5xx."""

    reason = "upstream_unavailable"
    default_message = "the upstream cannot be reached"


class UpstreamUnreachable(UpstreamUnavailable):
    """There was no connection: refused, name not resolved, TLS failure."""

    reason = "upstream_unreachable"


class UpstreamDown(UpstreamUnavailable):
    """The upstream is known to be down, so it was not asked. 503: Retry-After belongs to it.

    ``talks``: it can be reached and answers badly, which may be over in a moment.
    """

    reason = "upstream_down"
    default_message = "the upstream is down"
    status = 503
    talks = False


class UnexpectedAnswer(UpstreamUnavailable):
    """A status that means nothing here (400, 418): more about what was asked for than about who
    was asked."""

    reason = "unexpected_answer"
    default_message = "the upstream's answer means nothing here"


class EgressFailed(UpstreamUnavailable):
    """The egress proxy on the way to the upstream cannot be reached, or makes no connection.

    ``said`` is the message without the upstream's name.
    """

    reason = "egress_failed"
    default_message = "the egress proxy makes no connection"

    def __init__(self, said: str | None = None, *, upstream: str = "") -> None:
        self.said = self.default_message if said is None else said
        super().__init__(f"{upstream}: {self.said}" if upstream else self.said)


class EgressRefused(UpstreamError):
    """The egress proxy refuses us: its answer to our configuration, not the upstream's to us.

    Another try meets the same, so it is none of those failures that may pass.
    """

    reason = "egress_refused"
    default_message = "the egress proxy refuses us"


class UpstreamTimeout(UpstreamError):
    """The upstream did not answer in time."""

    reason = "upstream_timeout"
    default_message = "the upstream did not answer in time"
    status = 504


class UpstreamStalled(UpstreamTimeout):
    """The upstream's bytes came too slowly for too long."""

    reason = "upstream_stalled"
    default_message = "the upstream's answer came to a halt"


class DigestMismatch(UpstreamError):
    """The bytes that came are not the bytes that were asked for. Nothing of them is kept."""

    reason = "digest_mismatch"
    code = ErrorCode.DIGEST_INVALID

    def __init__(self, expected: object, actual: object) -> None:
        super().__init__(
            f"the upstream sent content with digest {actual}, expected {expected}",
            detail={"expected": str(expected), "actual": str(actual)},
        )


class SizeMismatch(UpstreamError):
    """More or fewer bytes came than were announced. Sizes in bytes."""

    reason = "size_mismatch"
    code = ErrorCode.SIZE_INVALID

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(
            f"the upstream sent {actual} bytes, expected {expected}",
            detail={"expected": expected, "actual": actual},
        )


class TooLarge(UpstreamError):
    """An answer beyond what we are ready to hold in memory. `limit` in bytes."""

    reason = "too_large"
    code = ErrorCode.SIZE_INVALID

    def __init__(self, limit: int, message: str | None = None) -> None:
        super().__init__(
            message or f"the upstream's answer is larger than {limit} bytes",
            detail={"limit": limit},
        )


class ManifestInvalid(UpstreamError):
    """What the upstream sent as a manifest is not one."""

    reason = "manifest_invalid"
    default_message = "the upstream sent a manifest that is not valid"
    code = ErrorCode.MANIFEST_INVALID


class RealmRefused(UpstreamError):
    """The upstream names a token service that may not see its credentials."""

    reason = "realm_refused"
    default_message = "the upstream names a token service on a foreign host"
    code = ErrorCode.UNAUTHORIZED


class RedirectRefused(UpstreamError):
    """A redirect that is not followed: https to http, another scheme, an address that is too near
    to us (``upstream/reach.py``), or too many."""

    reason = "redirect_refused"
    default_message = "the upstream redirects to where we do not go"


class TokenServiceFailed(UpstreamError):
    """The token service gave no token that can be used."""

    reason = "token_service_failed"
    default_message = "the upstream's token service failed"


# -- we failed ------------------------------------------------------------------------------------


class InternalError(PullError):
    """We failed; the message says as much as a stranger may know."""

    reason = "internal"
    default_message = "internal error"


class StoreFailed(InternalError):
    """The cache directory could not be read or written."""

    reason = "store_failed"
    default_message = "the cache failed"


class ShuttingDown(InternalError):
    """The process drains and takes no new work. `retry_after` in seconds."""

    reason = "shutting_down"
    default_message = "this proxy is shutting down"
    status = 503
    code = ErrorCode.UNAVAILABLE

    def __init__(self, retry_after: float = 5.0) -> None:
        super().__init__(retry_after=retry_after)
