"""Authorization for one upstream: what to send, and what to do when it is refused.

Theory of operation. An upstream begins unknown: requests go without `Authorization` until its first
challenge. From then on the scheme it asked for is remembered and every request carries its header
at once: Basic credentials, or a Bearer token for the request's repository
(docs/content/spec/auth/token.md in distribution).

Tokens are kept by (realm, service, scope, account). One is *fresh* until 10 s or a tenth of its
life before its end, whichever is less, then *ageing* until its end, then gone. A fresh one is used;
in its place, or where there is none, one refresh runs and everybody who needs that token waits for
it. An ageing token, or one that was refused, is forgotten only when a new one has arrived: a token
service that fails must not take away what still works.

The refresh is led by the first request that needs it, by its own means: inside its own turn and
with its own slot, so that it cannot wait for a slot which its followers hold (D4: no deadlock at a
cap of 1), or, where tokens come from another origin, while neither it nor its followers hold one
(`login.py`). There is no task behind it:

- the leader gets a token, or fails: its followers get the same;
- the leader is cancelled: the refresh ends with it, the followers wake, the first of them leads
  with its own slot and the others follow that one;
- a follower is cancelled: nobody notices;
- all are cancelled: nothing is left, the next caller leads.

A JWT that does not grant what was asked for is given to those who waited but never kept: Harbor
under load signs tokens with empty access, and the next request has to ask again.

What is said to the token service, and how an identity token is, is `token_service.py`'s.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cachetools import TLRUCache

from proxy.oci.challenge import Challenge, offers_basic, parse_challenges, pick_bearer
from proxy.oci.errors import Denied, RealmRefused, UpstreamError
from proxy.oci.token import grants
from proxy.upstream.answering import Action, Decision, decide, scheme
from proxy.upstream.credentials import Credentials, CredentialSource
from proxy.upstream.evidence import Evidence, Witnesses
from proxy.upstream.reach import Reach, Scope
from proxy.upstream.realm import endpoint, realm_allowed, realm_listed
from proxy.upstream.token_service import Fetch, TokenKey, TokenService

# Tokens are a few KiB: some MiB for an upstream of which a thousand repositories are in use.
_MAX_TOKENS = 1024

# A token is replaced this long before its end, or at nine tenths of its life if that is later:
# a request that leaves with it must still arrive.
_EARLY_SECONDS = 10.0
_EARLY_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class _Token:
    """A token; both times by the authenticator's clock."""

    value: str = field(repr=False)
    fresh_until: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class _Need:
    """One caller's need of a token, and its means to get it."""

    key: TokenKey
    repository: str
    credentials: Credentials | None
    fetch: Fetch


# How a refresh ended: a token, the failure that all share, or None when its leader was cancelled.
_Outcome = str | Exception | None


class Authenticator:
    """Knows how one upstream wants to be asked, and keeps its tokens.

    `name` is for messages, `url` the upstream's (realms are held to it), `auth_realms` further
    hosts that tokens may come from. `clock` is monotonic, in seconds. `on_refresh` hears the result
    of each token request: "ok", "ungranted" (a token without the access asked for), "denied",
    "failed" or "cancelled".
    """

    def __init__(
        self,
        *,
        name: str,
        url: str,
        credentials: CredentialSource | None,
        auth_realms: Sequence[str] = (),
        clock: Callable[[], float],
        on_refresh: Callable[[str], None],
    ) -> None:
        self._name = name
        self._url = url
        self._source = credentials
        self._auth_realms = tuple(auth_realms)
        self._clock = clock
        self._on_refresh = on_refresh
        self._learned: Decision | None = None
        self.realm_reach = Reach(Scope.PUBLIC)  # how near the one who named the realm may lead
        self._tokens: TLRUCache[TokenKey, _Token, float] = TLRUCache(
            _MAX_TOKENS, ttu=lambda _key, token, _now: token.expires_at, timer=clock
        )
        # The `Authorization` of every token that has not run out, kept or not.
        self._issued: TLRUCache[str, float, float] = TLRUCache(
            _MAX_TOKENS, ttu=lambda _token, expires_at, _now: expires_at, timer=clock
        )
        self._service = TokenService(name, clock=clock)
        self._witnesses = Witnesses(clock=clock)
        self._refreshes: dict[TokenKey, asyncio.Future[_Outcome]] = {}

    def __repr__(self) -> str:
        known = self._learned.action.name.lower() if self._learned else "no challenge yet"
        held, running = len(self._tokens), len(self._refreshes)
        return f"<Authenticator {self._name} {known}, {held} tokens, {running} refreshing>"

    async def headers(self, repository: str, fetch: Fetch) -> dict[str, str]:
        """What to send with the first try for `repository` (the upstream's name for it).

        Empty while the upstream has challenged nobody. Raises as `challenged` does.
        """
        if self._learned is None:
            return {}
        return await self._answer(
            self._learned, repository, await self._credentials(), refused=None, fetch=fetch
        )

    async def challenged(
        self,
        repository: str,
        challenges: Sequence[str],
        sent: str | None,
        fetch: Fetch,
        *,
        expired: bool = False,
    ) -> dict[str, str]:
        """What to send instead of `sent` (the refused `Authorization`, None if there was none).

        `challenges` are the values of the answer's `WWW-Authenticate` headers. `expired` says that
        the upstream called what was sent out of date in other words (ECR: a 403 without
        challenges); it is then renewed by the scheme known. Call it once per request: a second
        refusal is meant.

        Raises Denied when there is nothing better to send or the token service refuses,
        RealmRefused for a token service that is not the upstream's, TokenServiceFailed when that
        one fails, whatever `fetch` raises, and CredentialsUnavailable.
        """
        credentials = await self._credentials()
        judged = _unless_replaced(sent, credentials)
        offered = parse_challenges(challenges)
        decision = decide(offered, judged, credentials is not None)
        if expired and not offered and self._renewable(judged):
            decision = self._learned or decision
        if decision.action is Action.DENY and self._is_stale_token(offered, judged):
            decision = self._learned or decision
        if decision.action is Action.DENY:
            raise Denied(f"{self._name} denies {repository}: {decision.reason}")
        self._learn(decision)
        return await self._answer(decision, repository, credentials, refused=sent, fetch=fetch)

    def _is_stale_token(self, offered: Sequence[Challenge], judged: str | None) -> bool:
        """A Basic challenge to a token: Harbor says so to one that is out of date, and when it is
        too busy to look. A new token tells the two apart."""
        known = self._learned is not None and self._learned.action is Action.BEARER
        return known and scheme(judged) == "bearer" and offers_basic(offered)

    @property
    def realm(self) -> str | None:
        """Where tokens come from, as far as is known; `None` while none are needed."""
        bearer = self._learned.bearer if self._learned is not None else None
        return None if bearer is None else bearer.realm

    def realm_after(self, challenges: Sequence[str]) -> str | None:
        """Where the token comes from that answers these challenges."""
        bearer = pick_bearer(parse_challenges(challenges))
        return self.realm if bearer is None else bearer.realm

    def is_current(self, headers: Mapping[str, str]) -> bool:
        """Can a request still be sent with these `headers`, which were looked up before?"""
        return self.realm is None or headers.get("Authorization", "") in self._issued

    def lists(self, url: str) -> bool:
        """Did the operator name the host of this token service?"""
        return realm_listed(url, self._auth_realms)

    def worked(self, repository: str) -> bool:
        """The upstream has just granted access to `repository`; whether it was in doubt, so that an
        earlier refusal was for want of time."""
        return self._witnesses.worked(repository)

    async def weigh(
        self,
        repository: str,
        fetch: Fetch,
        *,
        is_stressed: Callable[[], bool],
        is_quiet: Callable[[], bool],
    ) -> Evidence:
        """A token came without access to `repository`: is that for want of rights, or of time?

        See `Witnesses.weigh`. Raises as `fetch` does.
        """
        bearer = self._learned.bearer if self._learned is not None else None
        if bearer is None:
            return Evidence.DENIAL
        credentials = await self._credentials()

        async def ask(name: str | None) -> bool:
            key = TokenKey.of(bearer, name, credentials)
            is_granted = await self._service.is_granted(key, credentials, fetch)
            if is_granted and name is not None:
                self._witnesses.granted(name)
            return is_granted

        return await self._witnesses.weigh(
            repository,
            ask,
            is_anonymous=credentials is None,
            is_stressed=is_stressed,
            is_quiet=is_quiet,
        )

    def _renewable(self, judged: str | None) -> bool:
        """Whether the scheme in use has something newer to offer than what was judged."""
        if self._learned is None:
            return False
        return self._learned.action is Action.BEARER or judged is None

    def _learn(self, decision: Decision) -> None:
        if decision.bearer is not None:
            realm = decision.bearer.realm
            if not realm_allowed(realm, self._url, self._auth_realms):
                where = endpoint(realm)
                host = where.host if where else "a malformed realm"
                raise RealmRefused(
                    f"{self._name} sends for its tokens to {host}, which is neither on its domain "
                    "nor in auth_realms"
                )
        self._learned = decision

    async def _credentials(self) -> Credentials | None:
        return None if self._source is None else await self._source.get()

    async def _answer(
        self,
        decision: Decision,
        repository: str,
        credentials: Credentials | None,
        *,
        refused: str | None,
        fetch: Fetch,
    ) -> dict[str, str]:
        if decision.bearer is None:
            return {"Authorization": credentials.authorization} if credentials else {}
        key = TokenKey.of(decision.bearer, repository, credentials)
        need = _Need(key, repository, credentials, fetch)
        return {"Authorization": f"Bearer {await self._token(need, refused)}"}

    async def _token(self, need: _Need, refused: str | None) -> str:
        """A token other than the refused one; an ageing one rather than none."""
        try:
            return await self._fresh_token(need, refused)
        except UpstreamError:
            held = self._tokens.get(need.key)
            if held is None or f"Bearer {held.value}" == refused:
                raise
            return held.value

    async def _fresh_token(self, need: _Need, refused: str | None) -> str:
        while True:
            held = self._tokens.get(need.key)
            is_fresh = held is not None and self._clock() < held.fresh_until
            if held is not None and is_fresh and f"Bearer {held.value}" != refused:
                return held.value
            refresh = self._refreshes.get(need.key)
            if refresh is None:
                return await self._lead(need)
            # wait() leaves the future alone when this caller is cancelled.
            await asyncio.wait([refresh])
            outcome = refresh.result()
            if isinstance(outcome, str):
                return outcome
            if outcome is not None:
                raise outcome
            # The leader was cancelled. Look again: another follower may lead, or be done, by now.

    async def _lead(self, need: _Need) -> str:
        """Refresh for everybody. The table's entry and the future end together, however it ends."""
        refresh: asyncio.Future[_Outcome] = asyncio.get_running_loop().create_future()
        self._refreshes[need.key] = refresh
        outcome: _Outcome = None
        result = "cancelled"
        try:
            outcome, result = await self._request(need)
            return outcome
        except Exception as error:
            outcome, result = error, "denied" if isinstance(error, Denied) else "failed"
            raise
        finally:
            del self._refreshes[need.key]
            refresh.set_result(outcome)
            self._on_refresh(result)

    async def _request(self, need: _Need) -> tuple[str, str]:
        """Ask the token service, keep what it grants; the token and the result for `on_refresh`."""
        # Lifetimes count from before the request: late answers must not make tokens younger.
        asked_at = self._clock()
        reply = await self._service.token(need.key, need.credentials, need.fetch)
        self._issued[f"Bearer {reply.token}"] = asked_at + reply.expires_in
        if not grants(reply.token, need.repository, "pull"):
            return reply.token, "ungranted"
        self._witnesses.granted(need.repository)
        self._keep(need.key, reply.token, asked_at, reply.expires_in)
        return reply.token, "ok"

    def _keep(self, key: TokenKey, token: str, asked_at: float, lifetime: float) -> None:
        early = min(_EARLY_SECONDS, lifetime * _EARLY_SHARE)
        expires_at = asked_at + lifetime
        self._tokens[key] = _Token(token, expires_at - early, expires_at)


def _unless_replaced(sent: str | None, credentials: Credentials | None) -> str | None:
    """`sent`, unless it is a password that has been replaced since: its refusal says nothing."""
    if scheme(sent) == "basic" and credentials and sent != credentials.authorization:
        return None
    return sent
