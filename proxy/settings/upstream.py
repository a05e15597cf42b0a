"""[upstreams.NAME]: a registry to pull from, the public ones that are known, and their rules."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import Field

from proxy.settings.faults import Conflict, Fault, key_path
from proxy.settings.listener import unreadable
from proxy.settings.types import (
    NAME,
    Access,
    Account,
    Duration,
    EgressUrl,
    FilePath,
    Helper,
    Hosts,
    Limit,
    MaybeBytesInTime,
    MaybeRate,
    Name,
    Overload,
    Prefix,
    Secret,
    Section,
    Shown,
    StallRate,
    StallTime,
    Url,
    Variable,
)
from proxy.settings.values import ByteRate, origin, parse_registry_url, registry_name
from proxy.web.reload import Unusable
from proxy.web.tls import check_authorities, check_key_pair

# What `pullpool serve` offers when it is told of no upstream, and what an upstream of one of these
# names starts from.
KNOWN_REGISTRIES: Mapping[str, Mapping[str, Any]] = {
    "docker.io": {
        "url": "https://registry-1.docker.io",
        "aliases": ("index.docker.io", "registry-1.docker.io"),
        "library": True,
        "auth_realms": ("auth.docker.io",),
    },
    **{
        name: {"url": f"https://{name}"}
        for name in (
            "quay.io",
            "ghcr.io",
            "registry.k8s.io",
            "gcr.io",
            "public.ecr.aws",
            "mcr.microsoft.com",
        )
    },
}
_ROOT_REGISTRY = "docker.io"


class Upstream(Section):
    """[upstreams.NAME]: a registry to pull from."""

    url: Annotated[Url, Shown("URL", "https://NAME")] = Field(
        default="", description="Base URL of the registry."
    )
    fallback_urls: tuple[Url, ...] = Field(
        default=(),
        description="Base URLs of mirrors of the registry, tried in this order while those before"
        " them fail.",
    )
    aliases: tuple[Name, ...] = Field(
        default=(), description="Other names by which clients ask for this registry."
    )
    library: bool = Field(
        default=False,
        description="Put library/ before names of one component, as Docker Hub wants.",
    )
    max_connections: Annotated[Limit, Shown("number", "the top level's max_connections")] = Field(
        default_factory=lambda: 16, description="Most sockets that are ever open to this registry."
    )
    max_redirect_connections: Annotated[Limit, Shown("number", "4 times max_connections")] = Field(
        default_factory=lambda: 64,
        description="Most sockets to each other origin it redirects to, such as a CDN.",
    )
    rate: MaybeRate = Field(
        default=None, description="Most requests in a time, such as 100/s, 600/m or 100/6h."
    )
    max_rate: MaybeBytesInTime = Field(
        default=None,
        description="Most bytes in a time from this registry and where it redirects to, such as"
        " 50MiB/s.",
    )
    segments: Limit = Field(
        default=8,
        description="Most connections that one large blob is fetched over while nobody else waits"
        " for them; 1: no more than one.",
    )
    connect_timeout: Duration = Field(
        default=10.0, gt=0, description="Longest time for a connection to be made."
    )
    read_timeout: Duration = Field(
        default=60.0, gt=0, description="Longest silence of the upstream within an answer."
    )
    stall_rate: StallRate = Field(
        default=ByteRate(1024),
        description="An answer that comes slower than this for stall_time is asked for again; at"
        " most 10MiB/s and half of max_rate.",
    )
    stall_time: StallTime = Field(
        default=30.0,
        description="How long an answer may be slower than stall_rate; at least 1s.",
    )
    fast_receive: bool = Field(
        default=True,
        description="Receive large blobs from the socket into reused memory (off: by aiohttp).",
    )
    proxy: Annotated[EgressUrl | None, Shown("URL", "as the environment says")] = Field(
        default=None,
        description="HTTP proxy on the way to it: 'http://user:password@proxy.example.com:3128'.",
    )
    no_proxy: tuple[Hosts, ...] = Field(
        default=(),
        description="Hosts, .domains and networks (with or without :port) that are reached without"
        " the proxy.",
    )
    username: Annotated[Account | None, Shown("text")] = Field(
        default=None, description="Account to pull with; needs one password key."
    )
    password: Annotated[Secret | None, Shown("text")] = Field(
        default=None, description="The account's password."
    )
    password_env: Variable | None = Field(
        default=None, description="Environment variable that holds the password."
    )
    password_file: FilePath | None = Field(
        default=None, description="File that holds the password; read again when it changes."
    )
    docker_config: FilePath | None = Field(
        default=None, description="A docker config.json to take credentials from."
    )
    credential_helper: Helper | None = Field(
        default=None, description="NAME of a docker-credential-NAME program to ask."
    )
    auth_realms: tuple[Name, ...] = Field(
        default=(), description="Hosts of token services outside the registry's own domain."
    )
    redirect_hosts: tuple[Hosts, ...] = Field(
        default=(),
        description="Hosts and networks that redirects may lead to although they are nearer to us"
        " than the registry: private, loopback, link-local.",
    )
    repository_prefix: Prefix = Field(
        default="", description="Put before every repository name: 'dockerhub-proxy/'."
    )
    ca_file: FilePath | None = Field(
        default=None,
        description="PEM file of the authorities to trust for this registry; read again when it"
        " changes.",
    )
    client_cert_file: FilePath | None = Field(
        default=None,
        description="PEM file of the certificate to show to the registry; read again when it"
        " changes.",
    )
    client_key_file: FilePath | None = Field(
        default=None, description="PEM file of that certificate's key."
    )
    access: Annotated[Access, Shown("", "shared with credentials, else public")] = Field(
        default_factory=lambda: "public",
        description="Who may read what was pulled: 'public' needs no credentials, 'shared' gives"
        " every client what the credentials may pull.",
    )
    share_private: bool = Field(
        default=False,
        description="Lend what was pulled with credentials to the other nodes of the fleet, too.",
    )
    overload: Overload = Field(
        default="wait",
        description="When the queue is long: 'wait' keeps a pull's place, 'spill' sends it on to"
        " the client's next mirror.",
    )

    @property
    def urls(self) -> tuple[str, ...]:
        """Where it is reached, in the order of preference."""
        return (self.url, *self.fallback_urls)

    @property
    def credential_keys(self) -> tuple[str, ...]:
        """The keys that say where the credentials come from; more than one is a fault."""
        password = ("password", "password_env", "password_file")
        kinds = (*password, "docker_config", "credential_helper")
        return tuple(kind for kind in kinds if getattr(self, kind) is not None)

    def settled(self, name: str, max_connections: int) -> Self:
        """With everything that was left out filled in from the name and the limit of the whole."""
        given = self.model_fields_set
        limit = self.max_connections if "max_connections" in given else max_connections
        update: dict[str, Any] = {"url": self.url or f"https://{name}", "max_connections": limit}
        if "max_redirect_connections" not in given:
            update["max_redirect_connections"] = 4 * limit
        if "access" not in given:
            update["access"] = "shared" if self.credential_keys else "public"
        return self.model_copy(update=update)

    def conflicts(self, name: str) -> Iterator[Conflict]:
        """Rules between the keys of this table."""
        here = ("upstreams", name)
        kinds = self.credential_keys
        about = tuple((*here, key) for key in (*kinds, "username"))
        if not NAME.fullmatch(name):
            yield Conflict(here, "the name must be host or host:port, in lower case")
        elif _origin(self.url) is None:
            yield Conflict(here, "needs url, as its name is not the address of a host")
        if len(kinds) > 1:
            message = f"only one kind of credential can be used, and {' and '.join(kinds)} are set"
            yield Conflict((*here, kinds[1]), message, about)
        elif not kinds and self.username is not None:
            message = "needs password, password_env or password_file beside it"
            wanted = ("password", "password_env", "password_file")
            yield Conflict((*here, "username"), message, tuple((*here, key) for key in wanted))
        elif kinds and kinds[0].startswith("password") and self.username is None:
            yield Conflict((*here, kinds[0]), "needs username beside it", about)
        elif kinds and not kinds[0].startswith("password") and self.username is not None:
            yield Conflict((*here, "username"), f"comes from {kinds[0]}: leave it out", about)
        if (self.client_cert_file is None) != (self.client_key_file is None):
            has_cert = self.client_cert_file is not None
            pair = ("client_cert_file", "client_key_file")
            given, other = pair if has_cert else pair[::-1]
            yield Conflict((*here, given), f"needs {other} beside it", ((*here, other),))
        yield from self._impatience(here)
        yield from self._repeated_urls(here)
        if self.access == "passthrough":
            yield Conflict((*here, "access"), "'passthrough' is not available yet: use 'shared'")

    def _impatience(self, here: tuple[str, str]) -> Iterator[Conflict]:
        """All sockets share max_rate: no answer can be expected to have most of it."""
        given, most = self.stall_rate, self.max_rate
        if most is None or "stall_rate" not in self.model_fields_set:
            return  # only what comes while we wait for it counts: the default goes with any cap
        if 2 * given.per_second > most.per_second:
            message = f"must be at most half of max_rate ({most})"
            yield Conflict((*here, "stall_rate"), message, ((*here, "max_rate"),))

    def _repeated_urls(self, here: tuple[str, str]) -> Iterator[Conflict]:
        for place, url in enumerate(self.fallback_urls):
            if url in self.urls[: place + 1]:
                at = (*here, "fallback_urls", place)
                yield Conflict(at, "is there already", ((*here, "url"), (*here, "fallback_urls")))

    def missing(self, name: str, environ: Mapping[str, str]) -> Iterator[Fault]:
        """Files and variables that these keys name and that cannot be used."""
        table = key_path(("upstreams", name))
        unread = list(unreadable(self, table))
        yield from unread
        bad = {fault.path for fault in unread}
        authorities, pair = ("ca_file",), ("client_cert_file", "client_key_file")
        for keys, check in ((authorities, check_authorities), (pair, check_key_pair)):
            files = [getattr(self, key) for key in keys]
            if None in files or bad & {f"{table}.{key}" for key in keys}:
                continue
            try:
                check(*files)
            except Unusable as error:
                yield Fault(f"{table}.{keys[0]}", str(error))
        if self.password_env is not None and not environ.get(self.password_env):
            reason = "names an environment variable that is not set"
            yield Fault(key_path(("upstreams", name, "password_env")), reason)


def chosen_upstreams(data: Mapping[str, Any]) -> dict[str, Any]:
    """The upstreams and the default that follow from what was given."""
    given = dict(data.get("upstreams", {}))
    default = data.get("default_upstream")
    if data.get("upstream_url") is not None:
        try:
            url = parse_registry_url(data["upstream_url"])
        except ValueError:
            return {}  # its own field says what is wrong with it
        default = _known_by(url, given) or registry_name(url)
        if default not in given:
            given[default] = {"url": url}
    elif not given:
        given = {name: {} for name in KNOWN_REGISTRIES}
        default = default or _ROOT_REGISTRY
    elif len(given) == 1 and default is None:
        default = next(iter(given))
    return {
        "upstreams": {name: _from_known(name, one) for name, one in given.items()},
        "default_upstream": default,
    }


def _known_by(url: str, upstreams: Mapping[str, Any]) -> str | None:
    """The upstream that already has this URL: its credentials and limits are meant, then."""
    for name, one in upstreams.items():
        known = _from_known(name, one)
        theirs = known.get("url", f"https://{name}") if isinstance(known, Mapping) else None
        try:
            if theirs is not None and parse_registry_url(theirs) == url:
                return name
        except ValueError:
            continue
    return None


def _from_known(name: str, given: Any) -> Any:
    """What is known of a registry by this name, under what was given for it."""
    known = KNOWN_REGISTRIES.get(name)
    if known is None or not isinstance(given, dict):
        return given
    if "url" in given:
        # Somebody's own mirror of it: its names hold, but not where its tokens come from.
        known = {key: value for key, value in known.items() if key != "auth_realms"}
    return {**known, **given}


def clashing_names(upstreams: Mapping[str, Upstream]) -> Iterator[Conflict]:
    owners: dict[str, str] = dict(zip(upstreams, upstreams, strict=True))
    for name, upstream in upstreams.items():
        for alias in upstream.aliases:
            if owners.setdefault(alias, name) != name:
                message = f"'{alias}' already names the upstream '{owners[alias]}'"
                yield Conflict(("upstreams", name, "aliases"), message)


#: What belongs to the sockets of an origin.
_OF_THE_SOCKETS = ("max_connections", "proxy", "client_cert_file", "client_key_file")


def clashing_caps(upstreams: Mapping[str, Upstream]) -> Iterator[Conflict]:
    """Sockets belong to an origin, so upstreams that share one cannot differ in their keys."""
    first: dict[str, str] = {}
    for name, upstream in upstreams.items():
        for address in filter(None, map(_origin, upstream.urls)):
            other = first.setdefault(address, name)
            yield from _differences(name, upstream, other, upstreams[other])


def _differences(name: str, ours: Upstream, other: str, theirs: Upstream) -> Iterator[Conflict]:
    for key in _OF_THE_SOCKETS:
        meant = getattr(theirs, key)
        if getattr(ours, key) == meant:
            continue
        what = meant if key == "max_connections" else "the same"
        message = f"must be {what}, as '{other}' is at the same address"
        keys = ((other, key), *((one, place) for one in (name, other) for place in _PLACES))
        about = tuple(("upstreams", *one) for one in keys)
        yield Conflict(("upstreams", name, key), message, about)


_PLACES = ("url", "fallback_urls")


def _origin(url: str) -> str | None:
    """Where its sockets go; None while the URL, made of a name, is no URL."""
    try:
        return origin(parse_registry_url(url))
    except ValueError:
        return None
