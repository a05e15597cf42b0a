"""Told apart: an upstream that says no, and one that is too busy to know (D5).

Pure. Harbor at its limit answers 401 in four ways that have nothing to do with rights: with an
empty challenge (its middleware could not look the project up), with a Basic challenge to a request
that carried a token it issued itself, with the database's error text in the body, or with tokens
that are validly signed and grant nothing (goharbor/harbor#16056; its ``v2auth`` and ``token``
packages). But it answers wrong credentials and forbidden or unknown projects with tokens that grant
nothing too, so that sign alone proves neither: ``UNPROVEN`` asks for evidence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from proxy.oci.challenge import Challenge, offers_basic, pick_bearer

#: What a database, a pool or a cache says when it is out of connections or out of reach, in the
#: words of Go's drivers, which registries put into their answers. Not as the end of a longer word:
#: a refusal may name a repository, and one may be called ``team/mysql`` or ``redis``.
_DATABASE = re.compile(
    rb"too many (?:clients|connections)|connection reset by peer|connection refused"
    rb"|(?:read|write|dial) tcp|i/o timeout|bad connection|broken pipe|context deadline exceeded"
    rb"|remaining connection slots"
    rb"|(?<![\w/.-])(?:(?:pq|sql|driver|pgconn): |redis: (?:connection|client))",
    re.IGNORECASE,
)

#: What Harbor says of a project that does not exist: with 401 and an empty challenge too.
_UNKNOWN = re.compile(rb"project [^\"]{1,300} not found", re.IGNORECASE)

#: Statuses by which an upstream says in the open that it cannot now.
BUSY = frozenset({500, 502, 503, 504})


class Sign(StrEnum):
    """What a refusal means."""

    DENIAL = "denial"
    OVERLOAD = "overload"
    UNPROVEN = "unproven"  # a token that grants nothing: wrong, forbidden, or too busy to look


@dataclass(frozen=True, slots=True)
class Refusal:
    """A 401 or 403, and what its request had to show: ``scheme`` of its Authorization in lower case
    ("" for none), ``granted`` true if its token names the access asked for, false if it names less,
    ``None`` without a token."""

    status: int
    challenges: Sequence[Challenge]
    body: bytes
    scheme: str
    granted: bool | None


def speaks_of_load(body: bytes) -> bool:
    """Does an error's text come from a database, a pool or a cache that is out of connections?"""
    return _DATABASE.search(body) is not None


def read_sign(refusal: Refusal) -> tuple[Sign, str]:
    """What ``refusal`` means, and why, in a few words for the log and the metric.

    1. The database speaks: overload, whatever the status.
    2. 403 is a decision somebody made: denial.
    3. 401 that names no way to authenticate: nobody who meant it would leave that out, but for
       Harbor about a project that it does not have.
    4. A token without the access: unproven.
    5. Only Basic is offered to a token that has the access: Harbor could not look the project up.
    6. Anything else: the upstream wants other credentials, and there are none.
    """
    if speaks_of_load(refusal.body):
        return Sign.OVERLOAD, "database text in a refusal"
    if refusal.status != 401:
        return Sign.DENIAL, "refused"
    bearer, basic = pick_bearer(refusal.challenges), offers_basic(refusal.challenges)
    if bearer is None and not basic and _UNKNOWN.search(refusal.body):
        return Sign.DENIAL, "unknown project"
    if bearer is None and not basic:
        return Sign.OVERLOAD, "401 without a challenge"
    if refusal.scheme == "bearer" and refusal.granted is False:
        return Sign.UNPROVEN, "a token without the access"
    if refusal.scheme == "bearer" and bearer is None:
        return Sign.OVERLOAD, "Basic challenge to a token"
    return Sign.DENIAL, "refused"
