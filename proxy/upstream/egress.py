"""The way out: which HTTP proxy, if any, a socket to an origin goes through.

``proxy`` and ``no_proxy`` of an upstream decide; where it has none, the variables that container
tools read do (HTTPS_PROXY, HTTP_PROXY, NO_PROXY). Those never apply to this machine itself: nobody
who sets them for the internet means the registry beside us. Plain http is then asked of the proxy
in absolute form, https by CONNECT; either way a lane has one socket, and the origin stays that of
the target.

The proxy's name and password are kept apart from its URL, so that they are in no message.

Pure: text in, values out.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from proxy.upstream.hosts import HostPattern, address_of, any_matches

_FORM = "must be the URL of a proxy, such as 'http://proxy.example.com:3128'"
#: What is read for each scheme, the first that is set. Go's order: upper case is looked at first.
_VARIABLES = {
    "https": ("HTTPS_PROXY", "https_proxy"),
    "http": ("HTTP_PROXY", "http_proxy"),
}
_NO_PROXY = ("NO_PROXY", "no_proxy")


@dataclass(frozen=True, slots=True)
class EgressProxy:
    """An HTTP proxy: its URL without credentials, and the header that shows them to it."""

    url: str
    authorization: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, value: object) -> EgressProxy:
        """Read ``http(s)://[user:password@]host[:port]``, the scheme optional as in the variables.

        Raises ``ValueError``, whose text has nothing of what was given.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise ValueError(_FORM)
        text = value.strip()
        try:
            # What it raises has the password in it.
            parts = urlsplit(text if "://" in text else f"http://{text}")
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ValueError(_FORM) from None
        if port == 0:
            raise ValueError("port 0 is nobody's")
        if parts.scheme not in ("http", "https"):
            raise ValueError("must begin with http:// or https://: no other proxies are known")
        if not host or not _is_host(host) or parts.path not in ("", "/") or parts.query:
            raise ValueError(_FORM)
        shown = f"[{host}]" if ":" in host else host
        # Always with a port: the default of an http:// proxy is 80, which surprises many.
        at = port if port is not None else {"http": 80, "https": 443}[parts.scheme]
        return cls(f"{parts.scheme}://{shown}:{at}", _authorization(parts.username, parts.password))

    @property
    def label(self) -> str:
        """Host and port, for messages."""
        return self.url.partition("://")[2]

    def __str__(self) -> str:
        """For people: the credentials are not shown."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://***@{rest}" if self.authorization else self.url


@dataclass(frozen=True, slots=True)
class Egress:
    """How one upstream's sockets leave: by the proxy of each scheme, except to some hosts."""

    http: EgressProxy | None = None
    https: EgressProxy | None = None
    no_proxy: tuple[HostPattern, ...] = ()
    spares_loopback: bool = False

    def proxy_for(self, scheme: str, host: str, port: int) -> EgressProxy | None:
        """The proxy for a target; ``host`` without brackets."""
        proxy = self.https if scheme == "https" else self.http
        if proxy is None or any_matches(self.no_proxy, host, port):
            return None
        return None if self.spares_loopback and _is_loopback(host) else proxy


DIRECT = Egress()


def choose_egress(
    proxy: EgressProxy | None, no_proxy: Sequence[HostPattern], environ: Mapping[str, str]
) -> Egress:
    """An upstream's own ``proxy``, else what the environment says; ``no_proxy`` counts for both.

    Raises ``ValueError`` as ``environment_faults`` would tell.
    """
    if proxy is not None:
        return Egress(proxy, proxy, tuple(no_proxy))
    for name, reason in environment_faults(environ):
        raise ValueError(f"{name}: {reason}")
    spared = _value(environ, _NO_PROXY)[1].split(",")
    inherited = tuple(HostPattern.parse(entry) for entry in spared if entry.strip())
    found = {scheme: _value(environ, names)[1] for scheme, names in _VARIABLES.items()}
    proxies = {scheme: EgressProxy.parse(text) for scheme, text in found.items() if text}
    no_proxies = (*no_proxy, *inherited)
    return Egress(proxies.get("http"), proxies.get("https"), no_proxies, spares_loopback=True)


def environment_faults(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Variables that cannot be used, each with the reason."""
    for names in _VARIABLES.values():
        name, text = _value(environ, names)
        try:
            if text:
                EgressProxy.parse(text)
        except ValueError as error:
            yield name, str(error)
    name, text = _value(environ, _NO_PROXY)
    for entry in filter(str.strip, text.split(",")):
        try:
            HostPattern.parse(entry)
        except ValueError as error:
            yield name, f"{error}, not {entry.strip()[:80]!r}"


def _value(environ: Mapping[str, str], names: Sequence[str]) -> tuple[str, str]:
    for name in names:
        if text := environ.get(name, "").strip():
            return name, text
    return names[0], ""


def _authorization(username: str | None, password: str | None) -> str | None:
    if username is None and password is None:
        return None
    pair = f"{unquote(username or '')}:{unquote(password or '')}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _is_host(host: str) -> bool:
    try:
        return HostPattern.parse(host).port is None
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    address = address_of(host)
    return address.is_loopback if address is not None else host.lower() == "localhost"
