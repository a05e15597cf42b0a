"""One question past an upstream's door: its authorization, and what a refusal leads to (D4, D5).

What was refused is asked once more with what the refusal asks for; a second refusal is weighed: is
it meant, or was the upstream too busy to look?

Theory of operation
-------------------
A token service *here*, on the upstream's own origin, is asked inside the turn that needs it and on
its socket, so there is no deadlock at a cap of one. One *elsewhere* has a gate of its own, and may
be an upstream that waits for a token from here: two that hold their only slots and want each
other's would wait for ever. So nobody who holds a slot waits for anything from elsewhere, not even
for a refresh that another question leads:

* Before each turn, with no slot held, the *errand* that is due is done: the token to begin with,
  the one that a refusal asks for, or the weighing of a second refusal.
* ``send`` runs in the turn. When it needs something from elsewhere it notes the errand and gives
  ``None``: the turn has to end, and another one to come. So it does with a token that has run out
  in the queue. Who comes again stands at the head of its class, so that this does not go on.

A cancellation ends whichever of the two runs; neither holds anything of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlencode

import aiohttp
from yarl import URL

from proxy.observe.metrics import Metrics
from proxy.oci.challenge import parse_challenges
from proxy.oci.errors import (
    Denied,
    RealmRefused,
    RedirectRefused,
    TooLarge,
    Undecided,
    UpstreamBusy,
)
from proxy.oci.token import grants
from proxy.upstream.endpoint import OriginKey
from proxy.upstream.errors import translated
from proxy.upstream.evidence import SECOND_LOOK, Evidence
from proxy.upstream.hurry import Leisure
from proxy.upstream.origin import Origin, Turn
from proxy.upstream.reach import ANYWHERE, Reach
from proxy.upstream.reply import drain
from proxy.upstream.signs import BUSY, Refusal, Sign, read_sign, speaks_of_load
from proxy.upstream.token_service import Fetch
from proxy.upstream.tokens import Authenticator
from proxy.upstream.turns import Ticket, TurnClass

MAX_TOKEN_BODY = 64 << 10
#: ECR answers an expired token with 403 and one of these in the body.
_EXPIRED = (b"token has expired", b"token expired", b"expired token")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of an upstream, authorization aside."""

    method: str
    url: URL
    headers: Mapping[str, str]
    repository: str

    @property
    def is_telling(self) -> bool:
        """Does its refusal say anything? ECR Public refuses every HEAD of a blob: the GET after it
        will say."""
        return self.method != "HEAD" or "/blobs/" not in self.url.raw_path


class Login:
    """One question to the upstream ``name`` at ``origin``, and its way past the door.

    ``reach`` is what the upstream may lead to.
    """

    def __init__(
        self,
        question: Question,
        *,
        name: str,
        origin: Origin,
        authenticator: Authenticator,
        origin_of: Callable[[URL], Awaitable[Origin]],
        metrics: Metrics,
        reach: Reach,
        hurry: Leisure,
    ) -> None:
        self._question = question
        self._name = name
        self._origin = origin
        self._authenticator = authenticator
        self._origin_of = origin_of
        self._metrics = metrics
        self._reach = reach
        self._hurry = hurry
        self._auth: dict[str, str] | None = None  # what to send; None: not looked up yet
        self._was_refused = False  # this is the second try
        self._errand: Callable[[], Awaitable[None]] | None = None
        self._comes_again = False  # it has had a turn, and left it

    @contextlib.asynccontextmanager
    async def turn(self, ticket: Ticket, repository: str) -> AsyncIterator[Turn]:
        """The next turn, when the errand before it is done. Raises what comes of either."""
        with translated(self._origin.key.label, self._metrics):
            await self._prepare(ticket)
        was_urgent, is_waiting = ticket.urgent, True
        ticket.urgent = was_urgent or self._comes_again
        try:
            async with self._origin.turn(ticket, repository) as turn:
                ticket.urgent, is_waiting = was_urgent, False
                yield turn
        finally:
            if is_waiting:
                ticket.urgent = was_urgent

    async def _prepare(self, ticket: Ticket) -> None:
        if not self._comes_again and self._is_elsewhere(self._authenticator.realm):
            # Nobody needs a token for an upstream that cannot be asked.
            await self._origin.conduct.passage(ticket, self._question.repository)
            self._errand = self._look_up
        errand, self._errand = self._errand, None
        if errand is not None:
            await errand()
            self._hurry.waits()

    async def send(self, turn: Turn) -> aiohttp.ClientResponse | None:
        """The answer, be it a refusal that is meant; ``None`` if this turn has to end first."""
        if not await self._has_login(turn):
            self._leave(turn, self._look_up)
            return None
        response = await self._ask(turn)
        if response.status in (401, 403) and not self._was_refused:
            renew = await self._renewal(turn, response)
            if renew is None:
                return response
            self._was_refused = True
            challenges = response.headers.getall("WWW-Authenticate", [])
            if self._is_elsewhere(self._authenticator.realm_after(challenges)):
                self._leave(turn, partial(renew, self._fetch(None)))
                return None
            await renew(self._fetch(turn))
            response = await self._ask(turn)
        if response.status not in (401, 403):
            return self._granted(turn, response)
        if self._question.is_telling:
            sign, reason = read_sign(await self._refusal(response))
            if sign is Sign.OVERLOAD:
                raise self._busy(turn, reason)
            if sign is Sign.UNPROVEN:
                if self._is_elsewhere(self._authenticator.realm):
                    self._leave(turn, partial(self._weigh_elsewhere, turn, reason))
                    return None
                await self._weigh(turn, reason, self._fetch(turn))
        return response

    async def _has_login(self, turn: Turn) -> bool:
        """Is what there is to send with good still, or can it be had here?"""
        if self._is_elsewhere(self._authenticator.realm):
            return self._auth is not None and self._authenticator.is_current(self._auth)
        if not self._was_refused:
            fetch = self._fetch(turn)
            self._auth = await self._authenticator.headers(self._question.repository, fetch)
        return True

    def _is_elsewhere(self, realm: str | None) -> bool:
        """Is this token service on another origin than the upstream?"""
        try:
            return realm is not None and OriginKey.of(URL(realm)) != self._origin.key
        except ValueError:
            return False  # the authenticator will say so

    def _leave(self, turn: Turn, errand: Callable[[], Awaitable[None]]) -> None:
        """End this turn for something from elsewhere: what was asked in it is asked on."""
        self._errand, self._comes_again = errand, True
        turn.was_of_use = True

    async def _look_up(self) -> None:
        fetch = self._fetch(None)
        self._auth = await self._authenticator.headers(self._question.repository, fetch)

    async def _renewal(
        self, turn: Turn, response: aiohttp.ClientResponse
    ) -> Callable[[Fetch], Awaitable[None]] | None:
        """How to get what this first refusal asks for; ``None`` if it is meant."""
        self._authenticator.realm_reach = self._reach.after(turn.peer)
        refused = await self._refusal(response)
        sign, reason = read_sign(refused)
        is_overload = sign is Sign.OVERLOAD and self._question.is_telling
        if is_overload and refused.scheme != "bearer":
            raise self._busy(turn, reason)
        expired = refused.status == 403 and any(text in refused.body.lower() for text in _EXPIRED)
        if refused.status == 403 and not expired:
            return None
        challenges = response.headers.getall("WWW-Authenticate", [])
        sent = (self._auth or {}).get("Authorization")

        async def renew(fetch: Fetch) -> None:
            try:
                self._auth = await self._authenticator.challenged(
                    self._question.repository, challenges, sent, fetch, expired=expired
                )
            except Denied:
                if is_overload:
                    raise self._busy(turn, reason) from None
                raise

        return renew

    async def _ask(self, turn: Turn) -> aiohttp.ClientResponse:
        question, auth = self._question, self._auth or {}
        return await turn.request(question.method, question.url, {**question.headers, **auth})

    async def _refusal(self, response: aiohttp.ClientResponse) -> Refusal:
        """A 401 or 403 with its body, and what its request had to show."""
        scheme, _, secret = (self._auth or {}).get("Authorization", "").partition(" ")
        is_token = scheme.lower() == "bearer"
        return Refusal(
            status=response.status,
            challenges=parse_challenges(response.headers.getall("WWW-Authenticate", [])),
            body=await drain(response),
            scheme=scheme.lower(),
            granted=grants(secret, self._question.repository, "pull") if is_token else None,
        )

    async def _weigh(self, turn: Turn, reason: str, fetch: Fetch) -> None:
        """Is this second refusal meant? Raises ``UpstreamBusy`` if not (D5)."""
        repository, origin = self._question.repository, self._origin
        match await self._authenticator.weigh(
            repository,
            fetch,
            is_stressed=lambda: origin.conduct.is_stressed,
            is_quiet=lambda: origin.state().active <= 1,
        ):
            case Evidence.REVOKED:
                origin.conduct.was_meant()
            case Evidence.OVERLOAD:
                turn.may_be_too_much(reason)
                raise UpstreamBusy(message=self._undecided(reason))
            case Evidence.NONE:  # asked again soon; the cap stays until it is known
                message = f"{self._name} refuses {repository}, which may be for lack of time"
                raise Undecided(SECOND_LOOK, message=message)

    async def _weigh_elsewhere(self, turn: Turn, reason: str) -> None:
        """The same when the refusal's own turn is over. Raises ``Denied`` if it is meant."""
        await self._weigh(turn, reason, self._fetch(None))
        turn.was_answered(well=False)
        raise Denied(f"{self._name} denies {self._question.repository} (status 401)")

    def _granted(self, turn: Turn, response: aiohttp.ClientResponse) -> aiohttp.ClientResponse:
        is_good = response.status < 400
        if is_good and self._authenticator.worked(self._question.repository):
            turn.was_too_much("granted after a refusal")  # held against the cap only now
        return response

    def _busy(self, turn: Turn, reason: str) -> UpstreamBusy:
        turn.was_too_much(reason)
        return UpstreamBusy(message=self._undecided(reason))

    def _undecided(self, reason: str) -> str:
        return f"{self._name} refuses without deciding: {reason}"

    def _fetch(self, turn: Turn | None) -> Fetch:
        """How to get a token: inside ``turn`` if it comes from here, else by a turn of its own."""

        async def fetch(
            text: str, headers: Mapping[str, str], form: Mapping[str, str] | None = None, /
        ) -> tuple[int, bytes]:
            url = URL(text, encoded=True)
            origin = await self._origin_of(url)
            with translated(origin.key.label, self._metrics):
                if turn is not None and origin is turn.origin:
                    return self._decided(turn, await _fetch_small(turn, url, headers, form))
                known, repository = self._authenticator, self._question.repository
                reach = ANYWHERE if known.lists(text) else known.realm_reach
                async with origin.turn(Ticket(TurnClass.METADATA), repository) as other:
                    self._hurry.asked(other)
                    try:
                        answer = await _fetch_small(other, url, headers, form, reach)
                        return self._decided(other, answer)
                    except RedirectRefused as error:
                        raise RealmRefused(f"{self._name}: for tokens, {error}") from error

        return fetch

    def _decided(self, turn: Turn, answer: tuple[int, bytes]) -> tuple[int, bytes]:
        """A token service's answer, unless it had no time to decide: then ``UpstreamBusy``."""
        status, body = answer
        if status in BUSY:
            turn.was_too_much(f"status {status} of the token service")
        elif status != 200 and speaks_of_load(body):
            raise self._busy(turn, "database text of the token service")
        return answer

    def __repr__(self) -> str:
        return f"<Login at {self._name} for {self._question.repository}>"


async def _fetch_small(
    turn: Turn,
    url: URL,
    headers: Mapping[str, str],
    form: Mapping[str, str] | None,
    reach: Reach = ANYWHERE,
) -> tuple[int, bytes]:
    if form is None:
        response = await turn.request("GET", url, headers, reach=reach)
    else:
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        data = urlencode(form).encode()
        response = await turn.request("POST", url, {**headers, **kind}, reach=reach, data=data)
    body = bytearray()
    while data := await turn.read():
        body += data
        if len(body) > MAX_TOKEN_BODY:
            raise TooLarge(MAX_TOKEN_BODY, f"{url.host}: a token answer larger than that")
    return response.status, bytes(body)
