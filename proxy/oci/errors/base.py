"""What all failures have in common: the answer, and the words of the log."""

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
