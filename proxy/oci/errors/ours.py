"""We failed."""

from __future__ import annotations

from proxy.oci.errors.base import ErrorCode, PullError


class InternalError(PullError):
    """We failed; the message says as much as a stranger may know."""

    reason = "internal"
    default_message = "internal error"


class StoreFailed(InternalError):
    """The cache directory could not be read or written."""

    reason = "store_failed"
    default_message = "the cache failed"


class LeaderMissing(InternalError):
    """The process that leads does not answer, and nobody can take its place yet."""

    reason = "leader_missing"
    default_message = "the process that asks the upstreams does not answer at the moment"
    status = 503
    code = ErrorCode.UNAVAILABLE

    def __init__(self, retry_after: float = 5.0) -> None:
        super().__init__(retry_after=retry_after)


class DirectoryDown(InternalError):
    """The fleet's directory does not answer; whoever asked it goes on without."""

    reason = "directory_down"
    default_message = "the fleet's directory does not answer"
    status = 503
    code = ErrorCode.UNAVAILABLE


class ShuttingDown(InternalError):
    """The process drains and takes no new work. `retry_after` in seconds."""

    reason = "shutting_down"
    default_message = "this proxy is shutting down"
    status = 503
    code = ErrorCode.UNAVAILABLE

    def __init__(self, retry_after: float = 5.0) -> None:
        super().__init__(retry_after=retry_after)
