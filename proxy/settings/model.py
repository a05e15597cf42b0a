"""The model of the configuration: every key, its default, and the rules between keys.

One frozen model. A key is checked by its own type; what involves several keys is a `Conflict`,
found after that, so that each is reported at the key a person would change.

Two things are settled while the model is built, so that its readers never see a hole: a registry
that is known by name brings its URL and aliases, and limits that an upstream leaves out are those
of the whole (`max_connections`) or follow from others (`max_redirect_connections`, `access`).
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from proxy.settings.faults import (
    Conflict,
    Fault,
    Location,
    key_path,
    raise_conflicts,
    suggestion,
)
from proxy.settings.fleet import Fleet
from proxy.settings.listener import Auth, Tls
from proxy.settings.types import (
    Address,
    Duration,
    FilePath,
    Limit,
    MaybeBytesInTime,
    Section,
    Share,
    Shown,
    Size,
    TrustedNetwork,
    Url,
)
from proxy.settings.upstream import Upstream, chosen_upstreams, clashing_caps, clashing_names
from proxy.settings.values import HostPort, format_duration
from proxy.upstream.egress import environment_faults

# containerd >= 2.3 gives up on a request after 30 s without headers, the kubelet's CRI client
# after 5 minutes without a byte: half a minute is left for the network and the client's own queue.
CONTAINERD_PATIENCE = 30.0
CRI_PATIENCE = 270.0


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """The user's cache directory by the XDG Base Directory rules, with our name below it."""
    cache = Path(environ.get("XDG_CACHE_HOME", ""))
    if cache.is_absolute():
        return cache / "pullpool"
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    # An account without a home (a container with a made-up user id): the system's place for it.
    return home / ".cache/pullpool" if home.is_absolute() else Path("/var/cache/pullpool")


class Cache(Section):
    """[cache]: where blobs are kept, and how many."""

    dir: Annotated[FilePath, Shown("path", "pullpool in the user's cache directory")] = Field(
        default_factory=lambda: default_cache_dir(os.environ),
        description="Directory of the cache; processes of one machine and one user may share it.",
    )
    max_size: Size = Field(default=50 * 2**30, gt=0, description="Most bytes that blobs may take.")
    min_free: Size = Field(
        default=2**30, description="Bytes that always stay free on the file system."
    )
    high_water: Share = Field(
        default=0.95, description="Share of max_size at which old images begin to be evicted."
    )
    low_water: Share = Field(default=0.85, description="Share of max_size at which eviction ends.")
    on_abandon: Literal["finish", "cancel"] = Field(
        default="finish", description="What becomes of a fill that nobody waits for any more."
    )
    durability: Literal["none", "file", "full"] = Field(
        default="full",
        description="What is synced to the disk before a blob counts as stored: its bytes and its"
        " name ('full'), its bytes ('file': a power cut may cost the blob), or nothing ('none':"
        " after a power cut, what was stored so is hashed before it is served).",
    )
    prefetch: Literal["off", "manifest"] = Field(
        default="off",
        description="With 'manifest' all blobs of an image begin to be fetched when its manifest is"
        " pulled, behind what clients have asked for.",
    )
    manifest_memory: Size = Field(
        default=64 * 2**20, description="Memory for manifests that are often asked for."
    )
    blob_memory: Size = Field(
        default=32 * 2**20, description="Memory for blobs up to 64KiB that are often asked for."
    )

    def conflicts(self) -> Iterator[Conflict]:
        """Rules between the keys of this table."""
        if self.low_water >= self.high_water:
            message = f"must be below high_water ({self.low_water:g} is not below "
            at, other = ("cache", "low_water"), ("cache", "high_water")
            yield Conflict(at, f"{message}{self.high_water:g})", (other,))


class Queue(Section):
    """[queue]: how long a pull may wait for its turn."""

    header_deadline: Duration = Field(
        default=20.0, gt=0, description="Longest time from a request to its first header byte."
    )
    blob_deadline: Duration = Field(
        default=180.0, gt=0, description="Longest wait of a blob for its first byte."
    )
    manifest_deadline: Duration = Field(
        default=20.0, gt=0, description="Longest wait of a manifest for its turn."
    )
    max_waiting: Limit = Field(
        default=10_000, description="Most requests that may wait for one origin at a time."
    )

    def conflicts(self) -> Iterator[Conflict]:
        """Rules between the keys of this table."""
        if self.header_deadline > self.blob_deadline:
            blob = format_duration(self.blob_deadline)
            message = f"must not be above blob_deadline ({blob})"
            yield Conflict(("queue", "header_deadline"), message, (("queue", "blob_deadline"),))

    def warnings(self) -> Iterator[str]:
        """Waits that are longer than clients are known to be patient."""
        if self.header_deadline >= CONTAINERD_PATIENCE:
            yield "queue.header_deadline: containerd gives up after 30 s without a header"
        if self.manifest_deadline >= CONTAINERD_PATIENCE:
            yield "queue.manifest_deadline: containerd gives up after 30 s without a header"
        if self.blob_deadline > CRI_PATIENCE:
            yield "queue.blob_deadline: Kubernetes gives up after 5 minutes without a byte"


class Tags(Section):
    """[tags]: how fresh the answer to "which digest has this tag" must be."""

    ttl: Duration = Field(
        default=30.0, description="How long a tag is answered from the cache without a question."
    )
    stale_if_error: Duration = Field(
        default=86400.0, description="How long an old answer may stand in for a failing upstream."
    )
    stale_while_revalidate: Duration = Field(
        default=0.0,
        description="How long after ttl an old answer is given while a new one is fetched.",
    )
    negative_ttl: Duration = Field(
        default=10.0, description="How long 'there is no such manifest' is remembered."
    )
    immutable: tuple[re.Pattern[str], ...] = Field(
        default=(),
        description="Regular expressions; a tag that one matches as a whole is asked for once.",
    )
    upstream_timeout: Duration = Field(
        default=2.0,
        gt=0,
        description="How long a pull that could be answered from the cache waits for the check.",
    )


class Settings(BaseSettings):
    """Everything that can be configured.

    Built by itself it reads nothing but its arguments; `proxy.config.load_settings` adds the
    environment and the file.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, case_sensitive=True
    )

    listen: Address = Field(
        default=HostPort("127.0.0.1", 5050), description="Where clients pull from."
    )
    admin: Address = Field(
        default=HostPort("127.0.0.1", 5051), description="Where health and metrics are served."
    )
    upstream_url: Annotated[Url | None, Shown("URL")] = Field(
        default=None,
        description="A registry that answers at the root path; named by its host (and port).",
    )
    default_upstream: Annotated[str | None, Shown("text", "the only upstream, else none")] = Field(
        default=None,
        description="Upstream that answers when neither ns nor a path prefix names one.",
    )
    max_connections: Limit = Field(
        default=16, description="Most sockets to an upstream that sets no limit of its own."
    )
    workers: Limit = Field(
        default=1, description="How many processes serve; one of them asks the upstreams."
    )
    client_rate: MaybeBytesInTime = Field(
        default=None, description="Most bytes in a time to each client, such as 20MiB/s."
    )
    proxy_from_env: bool = Field(
        default=True,
        description="Reach upstreams without a proxy of their own as HTTPS_PROXY, HTTP_PROXY and"
        " NO_PROXY say.",
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="Form of log lines: for people, or for machines."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level that is logged."
    )
    allow_anonymous: bool = Field(
        default=False,
        description="Serve what credentials may pull to everybody who reaches the listener.",
    )
    trusted_proxies: tuple[TrustedNetwork, ...] = Field(
        default=(),
        description="Networks of proxies in front of pullpool whose X-Forwarded-For is believed.",
    )
    proxy_protocol: bool = Field(
        default=False,
        description="Connections from trusted_proxies begin with the PROXY protocol (v1 or v2).",
    )
    fast_transport: bool = Field(
        default=True, description="Send files by aiofastnet's transports (off: uvloop's own)."
    )
    hot_path: bool = Field(
        default=True,
        description="Answer plain hits from prepared bytes (off: all by the full handler).",
    )
    shutdown_grace: Duration = Field(
        default=30.0, description="How long running pulls may go on after SIGTERM."
    )
    cache: Cache = Field(default_factory=Cache)
    queue: Queue = Field(default_factory=Queue)
    tags: Tags = Field(default_factory=Tags)
    tls: Tls = Field(default_factory=Tls)
    auth: Auth = Field(default_factory=Auth)
    fleet: Fleet = Field(default_factory=Fleet)
    upstreams: Mapping[str, Upstream] = Field(
        default_factory=dict,
        description="Registries to pull from. None: the well-known public ones.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments only, so that what is built in code is the same on every machine."""
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _with_upstreams(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("upstreams", {}), Mapping):
            return data
        return data | chosen_upstreams(data)

    @field_validator("upstreams")
    @classmethod
    def _settle(
        cls, upstreams: Mapping[str, Upstream], info: ValidationInfo
    ) -> Mapping[str, Upstream]:
        limit = info.data.get("max_connections", 16)
        return {name: one.settled(name, limit) for name, one in upstreams.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_conflicts(self, self._conflicts())
        return self

    def _conflicts(self) -> Iterator[Conflict]:
        yield from self.cache.conflicts()
        yield from self.queue.conflicts()
        yield from self.tls.conflicts()
        yield from self.fleet.conflicts(self.listen, self.admin)
        about = (("trusted_proxies",), ("tls",))
        if self.proxy_protocol and not self.trusted_proxies:
            yield Conflict(("proxy_protocol",), "needs trusted_proxies beside it", about)
        if self.proxy_protocol and self.tls.files is not None:
            message = "is not available together with tls yet"
            yield Conflict(("proxy_protocol",), message, about)
        for name, upstream in self.upstreams.items():
            yield from upstream.conflicts(name)
            yield from self._exposure(name, upstream)
        yield from clashing_names(self.upstreams)
        yield from clashing_caps(self.upstreams)
        if self.listen == self.admin and self.listen.port:
            yield Conflict(("admin",), "must not be the same address as listen", (("listen",),))
        if self.default_upstream is not None and self.default_upstream not in self.upstreams:
            message = f"'{self.default_upstream}' is not one of upstreams"
            hint = suggestion(self.default_upstream, self.upstreams)
            yield Conflict(("default_upstream",), message + hint, (("upstreams",),))

    def _exposure(self, name: str, upstream: Upstream) -> Iterator[Conflict]:
        lent = upstream.access == "shared" and bool(upstream.credential_keys)
        keys = (self.tls.client_ca_file, self.auth.htpasswd_file)
        is_meant = self.allow_anonymous or any(key is not None for key in keys)
        if not lent or self.listen.is_loopback or is_meant:
            return
        here = ("upstreams", name)
        yield Conflict(
            (*here, "access"),
            f"everybody who reaches {self.listen} could pull what these credentials may pull:"
            " listen on 127.0.0.1, or let clients show who they are (auth.htpasswd_file,"
            " tls.client_ca_file),"
            " or set allow_anonymous = true if that is meant,"
            " or access = 'public' if all of it is public anyway",
            (
                ("listen",),
                ("allow_anonymous",),
                ("tls",),
                ("auth",),
                *((*here, key) for key in upstream.credential_keys),
            ),
        )

    def warnings(self) -> list[str]:
        """What is allowed but is likely to be regretted; one line of text each."""
        found = [*self.queue.warnings(), *self.fleet.warnings()]
        if self.default_upstream is None:
            found.append(
                "default_upstream: not set, so a request without ns or path prefix is answered 404"
            )
        for name, upstream in self.upstreams.items():
            plain = [url for url in upstream.urls if url.startswith("http://")]
            if upstream.credential_keys and plain:
                key = "url" if upstream.url in plain else "fallback_urls"
                path = key_path(("upstreams", name, key))
                found.append(f"{path}: credentials go over http, which anybody can read")
        if self.auth.htpasswd_file and not self.tls.files and not self.listen.is_loopback:
            found.append(
                "auth.htpasswd_file: passwords of clients come over http, which anybody can read,"
                " unless something in front of pullpool speaks TLS"
            )
        return found

    def missing(self, environ: Mapping[str, str], wrong: Iterable[Location] = ()) -> list[Fault]:
        """Files and variables that the settings name and that cannot be used (looks at disk).

        Keys that are ``wrong`` have been taken out: what follows from their absence is not told.
        """
        named = self.upstreams.items()
        found = [fault for name, one in named for fault in one.missing(name, environ)]
        if self._heeds_environment(frozenset(wrong)):
            found += [Fault(variable, why) for variable, why in environment_faults(environ)]
        return [*self.tls.missing(), *self.auth.missing(), *self.fleet.missing(environ), *found]

    def _heeds_environment(self, wrong: frozenset[Location]) -> bool:
        """Does an upstream go through the proxy that the environment names, for all we know?"""
        if not self.proxy_from_env or wrong & {("proxy_from_env",), ("upstreams",)}:
            return False
        return any(
            one.proxy is None and ("upstreams", name, "proxy") not in wrong
            for name, one in self.upstreams.items()
        )
