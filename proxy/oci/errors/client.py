"""The client asked wrongly."""

from __future__ import annotations

from proxy.oci.errors.base import ErrorCode, PullError


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


class TaskUnknown(ClientError):
    """A task that there is not, or not any more."""

    reason = "task_unknown"
    default_message = "there is no such task, or it is over for so long that it was forgotten"
    status = 404


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
