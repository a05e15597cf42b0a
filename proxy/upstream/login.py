"""One request past an upstream's door: its authorization, and what a refusal leads to (D4, D5).

The token is fetched inside the turn that needs it, on the same socket when the token service is on
the same origin, so there is no deadlock at a cap of one. What was refused is asked once more with
what the refusal asks for; a second refusal is weighed: is it meant, or was the upstream too busy to
look?
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import aiohttp
from yarl import URL

from proxy.observe.metrics import Metrics
from proxy.oci.challenge import parse_challenges
from proxy.oci.errors import Denied, RealmRefused, RedirectRefused, TooLarge, UpstreamBusy
from proxy.oci.token import grants
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
    """One question to the upstream ``name``, and its way past the door.

    ``reach`` is what the upstream may lead to.
    """

    def __init__(
        self,
        question: Question,
        *,
        name: str,
        authenticator: Authenticator,
        origin_of: Callable[[URL], Awaitable[Origin]],
        metrics: Metrics,
        reach: Reach,
        hurry: Leisure,
    ) -> None:
        self._question = question
        self._name = name
        self._authenticator = authenticator
        self._origin_of = origin_of
        self._metrics = metrics
        self._reach = reach
        self._hurry = hurry

    async def send(self, turn: Turn) -> aiohttp.ClientResponse:
        """The answer, be it a refusal that is meant."""
        question, repository = self._question, self._question.repository
        fetch = self._token_fetch(turn)
        auth = await self._authenticator.headers(repository, fetch)
        response = await self._ask(turn, auth)
        if response.status not in (401, 403):
            return self._granted(turn, response)
        self._authenticator.realm_reach = self._reach.after(turn.peer)
        refused = await _refusal(response, auth, repository)
        sign, reason = read_sign(refused)
        if sign is Sign.OVERLOAD and question.is_telling and refused.scheme != "bearer":
            raise self._busy(turn, reason)
        expired = refused.status == 403 and any(text in refused.body.lower() for text in _EXPIRED)
        if refused.status == 403 and not expired:
            return response
        challenges = response.headers.getall("WWW-Authenticate", [])
        try:
            auth = await self._authenticator.challenged(
                repository, challenges, auth.get("Authorization"), fetch, expired=expired
            )
        except Denied:
            if sign is Sign.OVERLOAD and question.is_telling:
                raise self._busy(turn, reason) from None
            raise
        response = await self._ask(turn, auth)
        if response.status not in (401, 403):
            return self._granted(turn, response)
        if question.is_telling:
            await self._expect_denial(turn, await _refusal(response, auth, repository))
        return response

    async def _ask(self, turn: Turn, auth: Mapping[str, str]) -> aiohttp.ClientResponse:
        question = self._question
        return await turn.request(question.method, question.url, {**question.headers, **auth})

    async def _expect_denial(self, turn: Turn, refused: Refusal) -> None:
        """Is this second refusal meant? Raises ``UpstreamBusy`` if not (D5)."""
        sign, reason = read_sign(refused)
        if sign is Sign.UNPROVEN:
            repository, fetch = self._question.repository, self._token_fetch(turn)
            conduct = turn.origin.conduct
            match await self._authenticator.weigh(
                repository, fetch, is_stressed=lambda: conduct.is_stressed
            ):
                case Evidence.OVERLOAD:
                    sign = Sign.OVERLOAD
                case Evidence.NONE:  # asked again soon; the cap stays until it is known
                    message = f"{self._name} refuses {repository}, which may be for lack of time"
                    raise UpstreamBusy(SECOND_LOOK, message=message)
        if sign is Sign.OVERLOAD:
            raise self._busy(turn, reason)

    def _granted(self, turn: Turn, response: aiohttp.ClientResponse) -> aiohttp.ClientResponse:
        is_good = response.status < 400
        if is_good and self._authenticator.worked(self._question.repository):
            turn.was_too_much("granted after a refusal")  # held against the cap only now
        return response

    def _busy(self, turn: Turn, reason: str) -> UpstreamBusy:
        turn.was_too_much(reason)
        return UpstreamBusy(message=f"{self._name} refuses without deciding: {reason}")

    def _token_fetch(self, turn: Turn) -> Fetch:
        """How to GET a token inside ``turn``: on its own socket, or by a turn elsewhere."""

        async def fetch(text: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
            url = URL(text, encoded=True)
            origin = await self._origin_of(url)
            with translated(origin.key.label, self._metrics):
                if origin is turn.origin:
                    return self._decided(turn, await _fetch_small(turn, url, headers))
                known = self._authenticator
                reach = ANYWHERE if known.lists(text) else known.realm_reach
                async with origin.turn(Ticket(TurnClass.METADATA), turn.repository) as other:
                    self._hurry.asked(other)
                    try:
                        answer = await _fetch_small(other, url, headers, reach)
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


async def _refusal(
    response: aiohttp.ClientResponse, auth: Mapping[str, str], repository: str
) -> Refusal:
    """A 401 or 403 with its body, and what its request had to show."""
    scheme, _, secret = auth.get("Authorization", "").partition(" ")
    return Refusal(
        status=response.status,
        challenges=parse_challenges(response.headers.getall("WWW-Authenticate", [])),
        body=await drain(response),
        scheme=scheme.lower(),
        granted=grants(secret, repository, "pull") if scheme.lower() == "bearer" else None,
    )


async def _fetch_small(
    turn: Turn, url: URL, headers: Mapping[str, str], reach: Reach = ANYWHERE
) -> tuple[int, bytes]:
    response = await turn.request("GET", url, headers, reach=reach)
    body = bytearray()
    while data := await turn.read():
        body += data
        if len(body) > MAX_TOKEN_BODY:
            raise TooLarge(MAX_TOKEN_BODY, f"{url.host}: a token answer larger than that")
    return response.status, bytes(body)
