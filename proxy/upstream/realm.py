"""May the proxy talk to the token service that an upstream's challenge names?

`WWW-Authenticate: Bearer realm="…"` is a URL chosen by whoever answered. Following it blindly hands
the upstream's password to that host (CVE-2026-33540 in distribution) and lets it choose what the
proxy dials. So a realm is held to the upstream itself: the same host, or the same registrable
domain, or a host that the operator listed.

Realms are parsed by yarl because aiohttp dials what yarl understood: two parsers that disagree
about `https://a\\@b/` would be the hole again.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from publicsuffixlist import PSLFILE, PublicSuffixList
from yarl import URL

# The lines of the list that comes with the library: its rules, and comments, which no name is. Read
# while modules load, so that nothing reads a file under the event loop; constant. A name needs the
# rules for its own ends only; to make the library's set of all of them takes ten times as long.
RULES = frozenset(Path(PSLFILE).read_text("utf-8").split("\n"))
#: Characters of a host name, at most (RFC 1035, section 2.3.4).
MAX_HOST = 253
#: Labels of any rule of the list, at most.
MOST_LABELS = 8

_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")

# Long enough for any real token service; the rest is somebody filling the log.
_MAX_REALM = 2048


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Scheme, host (lower case, A-labels, no brackets, no trailing dot) and port of a URL."""

    scheme: str
    host: str
    port: int


def realm_allowed(realm: str, upstream_url: str, auth_realms: Sequence[str] = ()) -> bool:
    """Whether requests, and with them credentials, may go to `realm`.

    https only, unless the upstream itself is reached by http. Then: the upstream's host on any
    port; or a host of the same registrable domain by the public suffix list, which IP addresses,
    `localhost` and names under private top-level domains do not have; or one that `auth_realms`
    lists as `host` (any port) or `host:port`.
    """
    asked = endpoint(realm) if _is_plain(realm) else None
    home = endpoint(upstream_url)
    if asked is None or home is None:
        return False
    if asked.scheme == "http" and home.scheme == "https":
        return False
    if asked.host == home.host or any(_lists(entry, asked) for entry in auth_realms):
        return True
    domain = registrable_domain(asked.host)
    return domain is not None and domain == registrable_domain(home.host)


def realm_listed(realm: str, auth_realms: Sequence[str]) -> bool:
    """Whether the operator named the host of `realm`."""
    asked = endpoint(realm)
    return asked is not None and any(_lists(entry, asked) for entry in auth_realms)


def _is_plain(realm: str) -> bool:
    """No user names, backslashes, spaces, control or non-ASCII characters.

    Real token services have none of them, and parsers disagree about them.
    """
    if len(realm) > _MAX_REALM or not realm.isascii() or not realm.isprintable():
        return False
    return not set(realm) & set(" \\") and "@" not in _authority(realm)


def endpoint(url: str) -> Endpoint | None:
    """What would be dialled for `url`; None for what is not an absolute http(s) URL."""
    try:
        parsed = URL(url)
        host, port = parsed.raw_host, parsed.port
    except ValueError:
        return None
    if parsed.scheme not in ("http", "https") or not host or port is None:
        return None
    host = host.lower().removesuffix(".")
    if not _is_address(host) and not _HOST_NAME.fullmatch(host):
        return None
    return Endpoint(parsed.scheme, host, port)


def registrable_domain(host: str) -> str | None:
    """`example.co.uk` for `auth.example.co.uk`; None for addresses, bare suffixes, unknown ones."""
    if _is_address(host) or len(host) > MAX_HOST:
        return None
    # Suffixes that the list does not know make no domain: by its default rule `cluster.local` would
    # be one, and every tenant's service in a Kubernetes cluster of the registry's own family.
    known = PublicSuffixList(_rules_for(host), accept_unknown=False, accept_encoded_idn=False)
    domain = known.privatesuffix(host)
    return domain if isinstance(domain, str) else None


def _rules_for(host: str) -> list[str]:
    """The rules of the list that speak of an end of this name, as it is spelled here."""
    labels = host.split(".")
    # Decoding takes the longer the more labels there are, and others choose the name.
    first = max(0, len(labels) - MOST_LABELS)
    ends = [".".join(labels[at:]) for at in range(first, len(labels))]
    return [
        sign + end
        for end, spelled in [(end, _in_unicode(end)) for end in ends]
        for sign in ("", "*.", "!")
        if not RULES.isdisjoint((sign + end, sign + spelled))
    ]


def _in_unicode(name: str) -> str:
    """As the list spells a name with A-labels; any other as it is."""
    if "xn--" not in name:
        return name
    try:
        return name.encode("ascii").decode("idna")
    except UnicodeError:
        return name


def _lists(entry: str, asked: Endpoint) -> bool:
    """Whether an `auth_realms` entry means this endpoint."""
    listed = endpoint(entry if "://" in entry else f"{asked.scheme}://{entry}")
    if listed is None or listed.host != asked.host:
        return False
    return not _names_port(entry) or listed.port == asked.port


def _names_port(entry: str) -> bool:
    return re.search(r":\d+$", _authority(entry)) is not None


def _authority(url: str) -> str:
    return re.split("[/?#]", url.partition("://")[2] or url, maxsplit=1)[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
