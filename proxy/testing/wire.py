"""What arrives and what leaves, as values: the fake decides in these before anything is written.

The path grammar is deliberately the fake's own and a loose one. Were it the proxy's, a fault in the
proxy's grammar would be invisible to every test that runs against the fake.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from aiohttp import web
from multidict import CIMultiDictProxy, MultiMapping

from proxy.oci.digest import Digest
from proxy.testing.pattern import Pattern

TOKEN_PATH = "/service/token"
SIGNED_PATH = "/signed/"

_CONTENT = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs|referrers)/(?P<reference>[^/]+)")
_TAGS = re.compile(r"/v2/(?P<name>.+)/tags/list")


class Kind(StrEnum):
    """What a request asks for."""

    PING = "ping"
    MANIFEST = "manifest"
    BLOB = "blob"
    TAGS = "tags"
    REFERRERS = "referrers"
    TOKEN = "token"
    OTHER = "other"


_KINDS = {"manifests": Kind.MANIFEST, "blobs": Kind.BLOB, "referrers": Kind.REFERRERS}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the fake understands it.

    `path` is the raw path without query; `reference` a tag or digest as written; `signed` says that
    a blob was asked for by a signed URL, in which case `repository` is None; `form` what was posted
    to the token service.
    """

    kind: Kind
    method: str
    path: str
    query: MultiMapping[str]
    headers: CIMultiDictProxy[str]
    repository: str | None = None
    reference: str | None = None
    signed: bool = False
    form: Mapping[str, str] = field(default_factory=dict)

    @property
    def scopes(self) -> list[str]:
        """What a token is asked for."""
        given = self.query.getall("scope", ())
        return " ".join([*given, self.form.get("scope", "")]).split()


def read_request(request: web.BaseRequest) -> Asked:
    """Sort a request by its path; never raises."""
    base = Asked(
        Kind.OTHER, request.method, request.rel_url.raw_path, request.query, request.headers
    )
    path = request.path
    if path in {"/v2", "/v2/"}:
        return replace(base, kind=Kind.PING)
    if path == TOKEN_PATH:
        return replace(base, kind=Kind.TOKEN)
    if path.startswith(SIGNED_PATH):
        digest = path.removeprefix(SIGNED_PATH)
        return replace(base, kind=Kind.BLOB, reference=digest, signed=True)
    if match := _TAGS.fullmatch(path):
        return replace(base, kind=Kind.TAGS, repository=match["name"])
    if match := _CONTENT.fullmatch(path):
        kind = _KINDS[match["kind"]]
        return replace(base, kind=kind, repository=match["name"], reference=match["reference"])
    return base


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer before it is written.

    `declared` is the Content-Length when it is not the body's; `content` names the blob or manifest
    that the body is (part of), for the byte counters.
    """

    status: int
    body: bytes | memoryview | Pattern = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    declared: int | None = None
    content: Digest | None = None

    @property
    def length(self) -> int:
        """The Content-Length to announce."""
        return len(self.body) if self.declared is None else self.declared

    def with_headers(self, **changes: str) -> Reply:
        """The same answer with headers set; `Docker_Content_Digest` is `Docker-Content-Digest`."""
        named = {name.replace("_", "-"): value for name, value in changes.items()}
        return replace(self, headers={**self.headers, **named})


def json_reply(status: int, value: object, headers: Mapping[str, str] | None = None) -> Reply:
    """A JSON answer; the content type may be overridden by `headers`."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return Reply(status, body, {"Content-Type": "application/json", **(headers or {})})


def error_reply(
    status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> Reply:
    """An answer with the distribution-spec's error body."""
    return json_reply(status, {"errors": [{"code": code, "message": message}]}, headers)


def harbor_refusal(text: str, challenge: str) -> Reply:
    """A 401 of Harbor's v2auth middleware, which says everything twice."""
    headers = {"WWW-Authenticate": challenge, "Docker-Distribution-Api-Version": "registry/2.0"}
    return error_reply(401, "UNAUTHORIZED", f"{text}: {text}", headers)
