"""A registry that breaks under load, in the ways in which Harbor does.

Harbor asks its database for each request, and when the database has no connection left most of the
places that asked take the error for a refusal. So beyond `Overload.requests` requests in progress
one of these is drawn, by weight, for each further one that arrives:

- `empty-challenge`: 401, `WWW-Authenticate` there but empty, the database's error in the body
  (Harbor's v2auth middleware);
- `basic-challenge`: 401 with a Basic challenge to a request whose Bearer token is good (the
  permission check of its token context); the very answer of a real denial;
- `database-text`: 401 or 500 that only the text in the body gives away (goharbor/harbor#16056,
  #7963);
- `empty-access`: a token, valid for its whole life, that grants nothing (the token service);
  whoever uses it later is refused, however little there is to do by then;
- `500`: an internal error that says nothing;
- `reset`: RST instead of an answer.

A kind strikes only what it can: tokens are poisoned where a scope is asked for, challenges are
what requests for content get. A request that none of the chosen kinds can strike is answered well.

A request is in progress from its arrival until its last byte has left or its client has; token
requests are. One that was drawn for is not: it holds no connection of the database, and counted, a
crowd that asks again would keep a registry down for ever that nobody is served by.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from proxy.testing.tokens import harbor_denial
from proxy.testing.wire import Asked, Kind, Reply, error_reply

POISONED_TOKEN = "poisoned-token"

_EMPTY = {"WWW-Authenticate": "", "Docker-Distribution-Api-Version": "registry/2.0"}
_TEXTS = (
    "read tcp 172.18.0.7:55650->10.200.38.58:5432: read: connection reset by peer",
    "Error 1040: Too many connections",
    "pq: sorry, too many clients already",
)


class Misbehaviour(StrEnum):
    """What an overloaded Harbor does to a request; see the module."""

    EMPTY_CHALLENGE = "empty-challenge"
    BASIC_CHALLENGE = "basic-challenge"
    DATABASE_TEXT = "database-text"
    EMPTY_ACCESS = "empty-access"
    SERVER_ERROR = "500"
    RESET = "reset"


def _all_alike() -> Mapping[str, float]:
    return dict.fromkeys(Misbehaviour, 1.0)


@dataclass(frozen=True, slots=True)
class Overload:
    """Breaks beyond `requests` in progress: `kinds` by weight, drawn with a generator from `seed`.

    `refusal_time` is the seconds that a broken answer takes. Raises ValueError for an unknown kind,
    a weight that is not positive, and numbers below zero.
    """

    requests: int
    kinds: Mapping[str, float] = field(default_factory=_all_alike)
    refusal_time: float = 0.005
    seed: int = 1

    def __post_init__(self) -> None:
        if self.requests < 0 or self.refusal_time < 0:
            raise ValueError("requests and refusal_time cannot be negative")
        for kind, weight in self.kinds.items():
            Misbehaviour(kind)
            if weight <= 0:
                raise ValueError(f"the weight of {kind} is {weight}, not positive")


class Load:
    """The requests that one registry is answering now, and what becomes of the next.

    `on_progress` gets the number in progress whenever it has grown.
    """

    def __init__(self, overload: Overload | None, on_progress: Callable[[int], None]) -> None:
        self.in_progress = 0
        self._on_progress = on_progress
        self.overload = overload

    @property
    def overload(self) -> Overload | None:
        """How much is too much; may be set, and holds for requests that arrive afterwards."""
        return self._overload

    @overload.setter
    def overload(self, overload: Overload | None) -> None:
        self._overload = overload
        self._random = random.Random(overload.seed if overload else 0)

    def strike(self, asked: Asked) -> Misbehaviour | None:
        """Draw what this request gets instead of an answer; None when it gets one."""
        if self._overload is None or self.in_progress < self._overload.requests:
            return None
        fitting = {
            Misbehaviour(kind): weight
            for kind, weight in self._overload.kinds.items()
            if _can_strike(Misbehaviour(kind), asked)
        }
        if not fitting:
            return None
        (drawn,) = self._random.choices(list(fitting), list(fitting.values()))
        return drawn

    @contextlib.contextmanager
    def carrying(self) -> Iterator[None]:
        """One request more is in progress until the block ends."""
        self.in_progress += 1
        self._on_progress(self.in_progress)
        try:
            yield
        finally:
            self.in_progress -= 1

    def broken_reply(
        self, kind: Misbehaviour, asked: Asked, challenge: Mapping[str, str]
    ) -> Reply | None:
        """The answer in an error's place; None for the kinds that are none, or a real one.

        `challenge` are the headers of an honest 401 to this request.
        """
        match kind:
            case Misbehaviour.EMPTY_CHALLENGE:
                return error_reply(401, "UNAUTHORIZED", self._random.choice(_TEXTS), _EMPTY)
            case Misbehaviour.BASIC_CHALLENGE:
                return harbor_denial(asked)
            case Misbehaviour.DATABASE_TEXT:
                text = self._random.choice(_TEXTS)
                if self._random.random() < 0.5:
                    return error_reply(500, "UNKNOWN", text)
                return error_reply(401, "UNAUTHORIZED", text, challenge)
            case Misbehaviour.SERVER_ERROR:
                return error_reply(500, "UNKNOWN", "internal server error")
            case _:
                return None

    def __repr__(self) -> str:
        return f"<Load {self.in_progress} in progress, {self._overload!r}>"


def _can_strike(kind: Misbehaviour, asked: Asked) -> bool:
    is_token = asked.kind is Kind.TOKEN
    match kind:
        case Misbehaviour.EMPTY_CHALLENGE:
            return not is_token
        case Misbehaviour.BASIC_CHALLENGE:
            login = asked.headers.get("Authorization", "")
            return not is_token and login.lower().startswith("bearer ")
        case Misbehaviour.EMPTY_ACCESS:
            return is_token and bool(asked.scopes)
        case _:
            return True
