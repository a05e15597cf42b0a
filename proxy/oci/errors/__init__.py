"""Every failure a client may see, each knowing the answer it deserves.

The edge turns whatever reaches it into one reply, so the mapping from failure to status and code
has to sit with the failure and not in a table somewhere else. There are three families, because
they have three owners: the client asked wrongly, the upstream failed, or we failed. Codes are those
of the OCI distribution-spec ("Error Codes"); two words of the older Docker API, UNAVAILABLE and
UNKNOWN, stand for what the specification has no code for.
"""

from __future__ import annotations

from proxy.oci.errors.base import (
    ErrorCode,
    PullError,
)
from proxy.oci.errors.client import (
    ClientError,
    DigestInvalid,
    EndpointUnknown,
    MethodNotAllowed,
    NameInvalid,
    NameUnknown,
    NotAcceptable,
    RangeNotSatisfiable,
    RequestInvalid,
    TagInvalid,
    TaskUnknown,
)
from proxy.oci.errors.ours import (
    DirectoryDown,
    InternalError,
    LeaderMissing,
    ShuttingDown,
    StoreFailed,
)
from proxy.oci.errors.upstream import (
    Denied,
    DigestMismatch,
    EgressFailed,
    EgressRefused,
    LeaseLost,
    ManifestInvalid,
    NotFound,
    Overloaded,
    PeerBusy,
    PeerFailed,
    PeerLied,
    QueueFull,
    QueueTimeout,
    RealmRefused,
    RedirectRefused,
    SizeMismatch,
    Throttled,
    TokenServiceFailed,
    TooLarge,
    Undecided,
    UnexpectedAnswer,
    UpstreamBusy,
    UpstreamDown,
    UpstreamError,
    UpstreamStalled,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)

__all__ = [
    "ClientError",
    "Denied",
    "DigestInvalid",
    "DigestMismatch",
    "DirectoryDown",
    "EgressFailed",
    "EgressRefused",
    "EndpointUnknown",
    "ErrorCode",
    "InternalError",
    "LeaderMissing",
    "LeaseLost",
    "ManifestInvalid",
    "MethodNotAllowed",
    "NameInvalid",
    "NameUnknown",
    "NotAcceptable",
    "NotFound",
    "Overloaded",
    "PeerBusy",
    "PeerFailed",
    "PeerLied",
    "PullError",
    "QueueFull",
    "QueueTimeout",
    "RangeNotSatisfiable",
    "RealmRefused",
    "RedirectRefused",
    "RequestInvalid",
    "ShuttingDown",
    "SizeMismatch",
    "StoreFailed",
    "TagInvalid",
    "TaskUnknown",
    "Throttled",
    "TokenServiceFailed",
    "TooLarge",
    "Undecided",
    "UnexpectedAnswer",
    "UpstreamBusy",
    "UpstreamDown",
    "UpstreamError",
    "UpstreamStalled",
    "UpstreamTimeout",
    "UpstreamUnavailable",
    "UpstreamUnreachable",
]
