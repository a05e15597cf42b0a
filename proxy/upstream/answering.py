"""How a 401 is answered: with a token, with the credentials, or not at all. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from proxy.oci.challenge import BearerChallenge, Challenge, offers_basic, pick_bearer


class Action(Enum):
    """What a refused request does next."""

    BEARER = "fetch a token"
    BASIC = "send the credentials"
    DENY = "give up"


@dataclass(frozen=True, slots=True)
class Decision:
    """An action, with the challenge that BEARER answers or the reason of a DENY."""

    action: Action
    bearer: BearerChallenge | None = None
    reason: str = ""


def decide(challenges: Sequence[Challenge], sent: str | None, has_credentials: bool) -> Decision:
    """What to do about a 401 with these challenges to a request with this `Authorization`.

    1. Bearer offered: fetch a token, whatever was sent and whatever else is offered. Credentials
       are for the token service then, not for every request.
    2. Basic only, to a Bearer token: the upstream gave tokens a moment ago, so this is no change of
       scheme. Falling back would show the password to every request.
    3. Basic only, otherwise: send the credentials if there are any and they were not just refused.
    4. Nothing usable: there is nothing to answer.
    """
    bearer = pick_bearer(challenges)
    if bearer is not None:
        return Decision(Action.BEARER, bearer)
    if not offers_basic(challenges):
        return Decision(Action.DENY, reason="it names no way to authenticate")
    if scheme(sent) == "bearer":
        return Decision(Action.DENY, reason="it answers a token with a Basic challenge")
    if not has_credentials:
        return Decision(Action.DENY, reason="it wants credentials and none are configured")
    if scheme(sent) == "basic":
        return Decision(Action.DENY, reason="it refuses the configured credentials")
    return Decision(Action.BASIC)


def scheme(sent: str | None) -> str:
    """The scheme of an `Authorization` value in lower case, "" for none."""
    return sent.partition(" ")[0].lower() if sent else ""
