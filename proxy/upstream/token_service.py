"""Asking a token service: what is sent to it, and what its answer is worth.

A user's password goes to it as Basic credentials of a GET (docs/content/spec/auth/token.md in
distribution). An identity token is exchanged by POST (oauth.md there), in the body, where logs of
URLs and headers do not show it; to a service that does not know that it goes by GET as well, as the
password of the user `<token>`. It goes nowhere but to a realm that passed `realm.py`, and into no
message.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cachetools import TTLCache
from yarl import URL

from proxy.oci.challenge import BearerChallenge
from proxy.oci.errors import Denied, TokenServiceFailed, UpstreamBusy
from proxy.oci.token import TokenReply, grants, oauth_error, parse_token_reply
from proxy.upstream.credentials import Credentials


class Fetch(Protocol):
    """GET a URL with these headers, or POST a form: status and body (at most 64 KiB)."""

    async def __call__(
        self, url: str, headers: Mapping[str, str], form: Mapping[str, str] | None = None, /
    ) -> tuple[int, bytes]: ...


#: Who we are to a token service that wants to know, for its audit.
CLIENT_ID = "pullpool"
#: Seconds for which a token service that does not know the exchange is not asked for it again.
WITHOUT_OAUTH = 3600.0
#: Answers to a POST by which a token service says that it knows GET only.
_NO_POST = frozenset({404, 405})
#: What an OAuth2 error says in the words of HTTP: about the account, or about the repository.
_OAUTH_ERRORS = {
    "invalid_grant": 401,
    "invalid_client": 401,
    "unauthorized_client": 401,
    "access_denied": 403,
    "invalid_scope": 403,
}

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

    def form(self, identity_token: str) -> tuple[str, Mapping[str, str]]:
        """Where to POST an identity token, and what with it."""
        fields = {
            "grant_type": "refresh_token",
            "service": self.service or "",
            "client_id": CLIENT_ID,
            "scope": self.scope,
            "refresh_token": identity_token,
        }
        said = {name: value for name, value in fields.items() if value}
        return str(URL(self.realm).with_fragment(None)), said

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
        self._without_oauth: TTLCache[str, bool] = TTLCache(16, WITHOUT_OAUTH, timer=clock)

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
        is_identity = credentials is not None and credentials.is_identity
        if credentials is not None and is_identity and key.realm not in self._without_oauth:
            url, form = key.form(credentials.password)
            status, body = await fetch(url, {}, form)
            error = oauth_error(body) if status == 400 else None
            if status not in _NO_POST and error != "unsupported_grant_type":
                return _OAUTH_ERRORS.get(error or "", status), body
            self._without_oauth[key.realm] = True
        headers = {"Authorization": credentials.authorization} if credentials else {}
        return await fetch(key.url(), headers)

    def _remember(self, credentials: Credentials | None) -> None:
        """These credentials were refused."""
        if credentials is not None:
            self._refused[credentials.authorization] = True

    def __repr__(self) -> str:
        return f"<TokenService of {self._name}>"
