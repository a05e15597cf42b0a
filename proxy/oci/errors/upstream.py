"""The upstream failed, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from proxy.oci.errors.base import ErrorCode, PullError


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


class LeaseLost(UpstreamUnavailable):
    """The sockets to the upstream had to be given up, as the fleet's directory could not confirm
    that they are this node's. It says nothing of the upstream; what was cut goes on later."""

    reason = "lease_lost"
    default_message = "the fleet's directory did not confirm this connection"


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


class PeerFailed(UpstreamError):
    """Another node did not give a stripe that it should have: it is gone, silent, or refuses.

    No client hears of it: the stripe is asked for elsewhere. `outcome` is what the directory and
    the metrics are told; `answered` the status of a refusal.
    """

    reason = "peer_failed"
    default_message = "the node did not give the stripe"
    outcome: ClassVar[str] = "failed"

    def __init__(
        self,
        message: str | None = None,
        *,
        answered: int | None = None,
        retry_after: float | None = None,
        has_stalled: bool = False,
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.answered = answered
        self.has_stalled = has_stalled


class PeerBusy(PeerFailed):
    """The node has no room on its uplink now, or is being asked enough by us."""

    reason = "peer_busy"
    default_message = "the node has no room for another transfer"
    outcome = "busy"


class PeerLied(PeerFailed):
    """What the node sent is not the stripe: nothing that it says is of any use."""

    reason = "peer_lied"
    default_message = "the node sent what is not the stripe"
    outcome = "lied"
