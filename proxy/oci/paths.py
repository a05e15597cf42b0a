"""Which endpoint a request path names: the only door into the registry.

The path arrives raw, its percent-escapes are decoded exactly once, and what comes out is matched
against the grammar of names, tags and digests. Nothing is normalised: `..`, `//` and anything
encoded twice do not fit the grammar and are refused, so no two layers can ever disagree about what
a path means. The URL sent upstream is built from the parsed values, never from this path.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import unquote

from proxy.oci.digest import Digest
from proxy.oci.errors import EndpointUnknown
from proxy.oci.reference import Reference, Repository, parse_reference


class Kind(StrEnum):
    """The read endpoints of the distribution-spec; the words are those of metrics and logs."""

    PING = "ping"
    MANIFEST = "manifest"
    BLOB = "blob"
    TAGS = "tags"
    REFERRERS = "referrers"


@dataclass(frozen=True, slots=True)
class Target:
    """What a path names. PING has no repository; PING and TAGS have no reference."""

    kind: Kind
    repository: Repository | None = None
    reference: Reference | None = None


def parse_path(raw_path: str) -> Target:
    """Read a raw request path (percent-encoded, without the query).

    Raises NameInvalid, DigestInvalid or TagInvalid where an endpoint is named with a malformed
    part (the name is judged first), EndpointUnknown for everything else, the endpoints of writes
    and `_catalog` among it.
    """
    # Latin-1 maps every byte to a character, so undecodable input ends at the grammar, not here.
    path = unquote(raw_path, encoding="latin-1")
    if path in ("/v2", "/v2/"):
        return Target(Kind.PING)
    if not path.startswith("/v2/"):
        raise EndpointUnknown
    # Names may themselves have components like "blobs": only the last two parts decide.
    parts = path.removeprefix("/v2/").rsplit("/", 2)
    if len(parts) != 3:
        raise EndpointUnknown
    name, endpoint, last = parts
    return _endpoint(name, endpoint, last)


def _endpoint(name: str, endpoint: str, last: str) -> Target:
    match endpoint:
        case "manifests":
            return Target(Kind.MANIFEST, Repository.parse(name), parse_reference(last))
        case "blobs" if last != "uploads":
            return Target(Kind.BLOB, Repository.parse(name), Digest.parse(last))
        case "referrers":
            return Target(Kind.REFERRERS, Repository.parse(name), Digest.parse(last))
        case "tags" if last == "list":
            return Target(Kind.TAGS, Repository.parse(name))
        case _:
            raise EndpointUnknown
