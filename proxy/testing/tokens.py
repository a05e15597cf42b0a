"""Who may pull what, and the token service that says so.

Two styles exist in the field. The distribution style refuses: 401 for wrong credentials, 403 for a
repository that the user may not pull. Harbor's style never does once a scope is asked for: it
answers 200 with a valid token that grants nothing, and at the registry answers every refused
Authorization header with a Basic challenge, whatever scheme the header had, and every request for
a project that does not exist (a name's first component is its project) with an empty one, logged
in or not (src/server/middleware/v2auth/auth.go). Only a request without scope and without good
credentials is a 401 in both.

A service is known by its name, so one token server can stand behind several registries; the account
list stays with the registry that the token is for.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from proxy.testing.wire import Asked, Reply, error_reply, harbor_refusal, json_reply


class WrongCredentials(Exception):
    """The request names a user, but not the right password."""


@dataclass(frozen=True, slots=True)
class Accounts:
    """Users with passwords, and the users of each private repository; other ones are public.

    `identities`: the users of identity tokens, by token.
    """

    users: Mapping[str, str]
    private: Mapping[str, Collection[str]]
    identities: Mapping[str, str] = field(default_factory=dict)

    def login(self, authorization: str | None) -> str | None:
        """The user behind a Basic header, None for nobody. Raises WrongCredentials."""
        if authorization is None:
            return None
        scheme, _, encoded = authorization.partition(" ")
        if scheme.lower() != "basic":
            raise WrongCredentials
        try:
            name, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise WrongCredentials from None
        if self.users.get(name) != password:
            raise WrongCredentials
        return name

    def may_pull(self, user: str | None, repository: str) -> bool:
        """Whether the user (None: anonymous) may read a repository."""
        allowed = self.private.get(repository)
        return allowed is None or user in allowed


@dataclass(frozen=True, slots=True)
class Policy:
    """How a registry wants its tokens: `ttl` in seconds, JWTs or opaque, refusals as Harbor's."""

    accounts: Accounts
    ttl: float = 300.0
    opaque: bool = False
    harbor: bool = False


@dataclass(frozen=True, slots=True)
class Service:
    """One audience of tokens; `has_project` tells which first components of names there are."""

    name: str
    policy: Policy
    has_project: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Grant:
    """What an issued token is good for; `expires` by the service's clock, in seconds.

    `poisoned`: it grants nothing although its holder has the right to more.
    """

    service: str
    repositories: frozenset[str]
    expires: float
    poisoned: bool = False


class TokenService:
    """Issues and checks tokens. `clock` gives seconds since the epoch."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._services: dict[str, Service] = {}
        self._grants: dict[str, Grant] = {}
        self._numbers = itertools.count(1)

    def adopt(self, service: Service) -> None:
        """Issue tokens for this service from now on."""
        self._services[service.name] = service

    def revoke_all(self) -> None:
        """Forget every token, as a registry does whose signing key was changed."""
        self._grants.clear()

    def issue(self, asked: Asked, *, empty: bool = False) -> Reply:
        """Answer a token request; `empty` withholds all access whatever the rights are."""
        if asked.method == "POST" and self._exchanges(asked.form.get("service", "")):
            return self._exchange(asked, empty=empty)
        if asked.method != "GET":
            return error_reply(405, "UNSUPPORTED", "only GET", {"Allow": "GET"})
        service = self._services.get(asked.query.get("service", ""))
        if service is None:
            return error_reply(400, "UNSUPPORTED", "unknown service")
        scopes = asked.scopes
        user, refused = None, False
        try:
            user = service.policy.accounts.login(asked.headers.get("Authorization"))
        except WrongCredentials:
            refused = True
        if refused and not (service.policy.harbor and scopes):
            return error_reply(401, "UNAUTHORIZED", "incorrect username or password")
        if service.policy.harbor and not scopes and user is None:
            return error_reply(401, "UNAUTHORIZED", "unauthorized")
        return self._decide(service, user, scopes, refused=refused, empty=empty)

    def _exchanges(self, name: str) -> bool:
        """Whether a service takes identity tokens."""
        service = self._services.get(name)
        return service is not None and bool(service.policy.accounts.identities)

    def _exchange(self, asked: Asked, *, empty: bool) -> Reply:
        """The OAuth2 POST (distribution, oauth.md; errors by RFC 6749 §5.2)."""
        service, form = self._services[asked.form["service"]], asked.form
        if not form.get("client_id") or not form.get("grant_type"):
            return json_reply(400, {"error": "invalid_request"})
        if form["grant_type"] != "refresh_token":
            return json_reply(400, {"error": "unsupported_grant_type"})
        user = service.policy.accounts.identities.get(form.get("refresh_token", ""))
        if user is None:
            return json_reply(400, {"error": "invalid_grant"})
        reply = self._decide(service, user, asked.scopes, refused=False, empty=empty)
        if reply.status != 200:
            return reply
        said = json.loads(bytes(reply.body))
        said["access_token"], said["scope"] = said.pop("token"), " ".join(asked.scopes)
        if form.get("access_type") == "offline":
            said["refresh_token"] = form["refresh_token"]
        return json_reply(200, said)

    def _decide(
        self, service: Service, user: str | None, scopes: list[str], *, refused: bool, empty: bool
    ) -> Reply:
        names = [name for name in map(_pulled_name, scopes) if name is not None]
        rightful = [name for name in names if not refused and _allowed(service, user, name)]
        if len(rightful) < len(names) and not service.policy.harbor and not empty:
            return error_reply(403, "DENIED", "requested access to the resource is denied")
        granted = [] if empty else rightful
        return self._issue(service, user, names, granted, poisoned=len(granted) < len(rightful))

    def _issue(
        self,
        service: Service,
        user: str | None,
        names: list[str],
        granted: list[str],
        *,
        poisoned: bool,
    ) -> Reply:
        number, now = next(self._numbers), self._clock()
        grant = Grant(service.name, frozenset(granted), now + service.policy.ttl, poisoned)
        access = [_access(name, granted=name in granted) for name in names]
        token = (
            _signature(number)
            if service.policy.opaque
            else _jwt(service, user, access, number, now)
        )
        self._grants[token] = grant
        body = {"token": token, "expires_in": int(service.policy.ttl), "issued_at": _rfc3339(now)}
        return json_reply(200, body)

    def is_poisoned(self, asked: Asked) -> bool:
        """Whether a request carries a token that grants less than its holder's rights."""
        _, _, token = asked.headers.get("Authorization", "").partition(" ")
        grant = self._grants.get(token)
        return grant is not None and grant.poisoned

    def check(self, token: str, service: str, repository: str | None) -> str | None:
        """What is wrong with a token (an RFC 6750 §3.1 error code), or None."""
        grant = self._grants.get(token)
        if grant is None or grant.service != service or self._clock() >= grant.expires:
            return "invalid_token"
        if repository is not None and repository not in grant.repositories:
            return "insufficient_scope"
        return None


class Guard:
    """The registry's own door: lets a request in or answers with a challenge.

    `tokens` is the service that issued them and `realm` its URL; both None for Basic.
    """

    def __init__(self, service: Service, tokens: TokenService | None, realm: str | None) -> None:
        self._service = service
        self._tokens = tokens
        self._realm = realm

    def refusal(self, asked: Asked) -> Reply | None:
        """None when the request may pass, else the 401 or 403 that it gets."""
        header = asked.headers.get("Authorization")
        if self._is_lost(asked, header):
            project = _project(asked.repository or "")
            return harbor_refusal(f"project {project} not found", "")
        if self._tokens is None or (
            self._service.policy.harbor
            and header is not None
            and header.lower().startswith("basic ")
        ):
            return self._basic_refusal(asked, header)
        if header is None:
            return self._challenge(asked, None)
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer":
            return self._challenge(asked, None)
        wrong = self._tokens.check(token, self._service.name, asked.repository)
        return None if wrong is None else self._challenge(asked, wrong)

    def _basic_refusal(self, asked: Asked, header: str | None) -> Reply | None:
        try:
            user = self._service.policy.accounts.login(header)
        except WrongCredentials:
            user = None
        name = asked.repository
        denied = name is not None and not self._service.policy.accounts.may_pull(user, name)
        if self._service.policy.harbor and (user is None or denied):
            return harbor_denial(asked)
        if user is None:
            return _unauthorized('Basic realm="fake registry"')
        if denied:
            return error_reply(403, "DENIED", "requested access to the resource is denied")
        return None

    def challenge(self, asked: Asked) -> Mapping[str, str]:
        """The headers by which a request without login learns where to get one."""
        if self._tokens is None:
            return {"WWW-Authenticate": 'Basic realm="harbor"'}
        return {"WWW-Authenticate": self._bearer(asked, None)}

    def _challenge(self, asked: Asked, wrong: str | None) -> Reply:
        if self._service.policy.harbor and "Authorization" in asked.headers:
            return harbor_denial(asked)
        return _unauthorized(self._bearer(asked, wrong))

    def _bearer(self, asked: Asked, wrong: str | None) -> str:
        fields = {"realm": self._realm, "service": self._service.name}
        if asked.repository is not None:
            fields["scope"] = f"repository:{asked.repository}:pull"
        if wrong is not None:
            fields["error"] = wrong
        return "Bearer " + ",".join(f'{key}="{fields[key]}"' for key in fields)

    def _is_lost(self, asked: Asked, header: str | None) -> bool:
        """Whether Harbor says that there is no such project; a HEAD without login asks for one."""
        name = asked.repository
        if not self._service.policy.harbor or name is None:
            return False
        needs_login = header is None and asked.method == "HEAD"
        return not needs_login and not self._service.has_project(_project(name))


def harbor_denial(asked: Asked) -> Reply:
    """Harbor's refusal of whoever sent an Authorization header, truly or by mistake."""
    text = "unauthorized"
    if asked.repository is not None:
        text = f"unauthorized to access repository: {asked.repository}, action: pull"
    return harbor_refusal(text, 'Basic realm="harbor"')


def _project(name: str) -> str:
    return name.partition("/")[0]


def _unauthorized(challenge: str) -> Reply:
    headers = {"WWW-Authenticate": challenge}
    return error_reply(401, "UNAUTHORIZED", "authentication required", headers)


def _pulled_name(scope: str) -> str | None:
    """The repository of a scope that asks to pull (`repository:<name>:<actions>`)."""
    kind, _, rest = scope.partition(":")
    name, _, actions = rest.rpartition(":")
    return name if kind == "repository" and "pull" in actions.split(",") else None


def _allowed(service: Service, user: str | None, name: str) -> bool:
    # A project that does not exist grants nothing, even to an administrator.
    known = service.has_project(_project(name)) or not service.policy.harbor
    return known and service.policy.accounts.may_pull(user, name)


def _access(name: str, *, granted: bool) -> dict[str, object]:
    return {"type": "repository", "name": name, "actions": ["pull"] if granted else []}


def _jwt(
    service: Service, user: str | None, access: list[dict[str, object]], number: int, now: float
) -> str:
    """Three parts like a signed token; only the issuer could check the last, so it is noise."""
    head = {"typ": "JWT", "alg": "RS256"}
    claims = {
        "iss": "fake-token-issuer",
        "sub": user or "",
        "aud": service.name,
        "iat": int(now),
        "nbf": int(now),
        "exp": int(now + service.policy.ttl),
        "jti": str(number),
        "access": access,
    }
    return f"{_base64url(head)}.{_base64url(claims)}.{_signature(number)}"


def _base64url(value: object) -> str:
    text = json.dumps(value, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def _signature(number: int) -> str:
    digest = hashlib.sha256(f"token {number}".encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _rfc3339(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
