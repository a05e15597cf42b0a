"""Asking a token service: what is sent to it, and what its answer is worth.

docs/content/spec/auth/token.md in distribution.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from cachetools import TTLCache
from yarl import URL

from proxy.oci.challenge import BearerChallenge
from proxy.oci.errors import Denied, TokenServiceFailed, UpstreamBusy
from proxy.oci.token import TokenReply, grants, parse_token_reply
from proxy.upstream.credentials import Credentials

Fetch = Callable[[str, Mapping[str, str]], Awaitable[tuple[int, bytes]]]
"""GET a URL with these headers, in the caller's own turn: status and body (at most 64 KiB)."""

#: Seconds in which credentials that were refused are not shown again: behind a token service there
#: may be a directory that locks accounts.
REFUSED_FOR = 10.0


@dataclass(frozen=True, slots=True)
class TokenKey:
    """Which token: what its request says, credentials' secret aside. No repository: any token."""

    realm: str
    service: str | None
    repository: str | None
    account: str | None

    @classmethod
    def of(
        cls, bearer: BearerChallenge, repository: str | None, credentials: Credentials | None
    ) -> "TokenKey":
        account = credentials.account if credentials else None
        return cls(bearer.realm, bearer.service, repository, account)

    @property
    def scope(self) -> str:
        return f"repository:{self.repository}:pull" if self.repository else ""

    def url(self) -> str:
        """The token request; what the realm already has in its query stays."""
        query = {"service": self.service, "scope": self.scope, "account": self.account}
        said = [(name, value) for name, value in query.items() if value]
        return str(URL(self.realm).with_fragment(None).extend_query(said))


class TokenService:
    """The token service of the upstream ``name``. ``clock`` is monotonic, in seconds."""

    def __init__(self, name: str, *, clock: Callable[[], float]) -> None:
        self._name = name
        self._refused: TTLCache[str, bool] = TTLCache(1, REFUSED_FOR, timer=clock)

    async def token(
        self, key: TokenKey, credentials: Credentials | None, fetch: Fetch
    ) -> TokenReply:
        """Raises Denied, TokenServiceFailed and whatever ``fetch`` raises."""
        if credentials is not None and self._refused.get(credentials.authorization):
            raise Denied(f"the token service of {self._name} has just refused the credentials")
        status, body = await self._ask(key, credentials, fetch)
        if status in (401, 403):
            if status == 401:  # about the account; 403 may be about the repository
                self._remember(credentials)
            who = "the configured credentials" if credentials else "anonymous access"
            raise Denied(
                f"the token service of {self._name} refuses {who} to {key.repository} "
                f"(status {status})"
            )
        if status != 200:
            raise TokenServiceFailed(f"the token service of {self._name} answered {status}")
        return parse_token_reply(body)

    async def is_granted(
        self, key: TokenKey, credentials: Credentials | None, fetch: Fetch
    ) -> bool:
        """Does it give access to the key's repository, or without one any token at all?

        Raises ``UpstreamBusy`` when it says neither.
        """
        status, body = await self._ask(key, credentials, fetch)
        if status in (401, 403):
            if key.repository is None:
                self._remember(credentials)
            return False
        if status != 200:
            raise UpstreamBusy(message=f"the token service of {self._name} answered {status}")
        token = parse_token_reply(body).token
        return key.repository is None or grants(token, key.repository, "pull")

    async def _ask(
        self, key: TokenKey, credentials: Credentials | None, fetch: Fetch
    ) -> tuple[int, bytes]:
        headers = {"Authorization": credentials.authorization} if credentials else {}
        return await fetch(key.url(), headers)

    def _remember(self, credentials: Credentials | None) -> None:
        """These credentials were refused."""
        if credentials is not None:
            self._refused[credentials.authorization] = True

    def __repr__(self) -> str:
        return f"<TokenService of {self._name}>"
