"""The well-behaved half of the fake: from a request and the content to the right answer. Pure.

Rules are those of the OCI distribution-spec; ranges and validators follow RFC 9110.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from proxy.oci.digest import Digest
from proxy.testing.content import Content, parse_digest
from proxy.testing.images import INDEX_TYPE
from proxy.testing.pattern import Pattern
from proxy.testing.wire import Asked, Kind, Reply, error_reply, json_reply

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True, slots=True)
class Manners:
    """Choices that upstreams make differently.

    `ranges`: whether Range is served; `page_size`: most entries of a list, None for no bound.
    """

    ranges: bool = True
    page_size: int | None = None


def answer(asked: Asked, content: Content, manners: Manners) -> Reply:
    """The answer to a GET or HEAD for anything under /v2/; a HEAD's body is left out later."""
    if asked.method not in {"GET", "HEAD"}:
        return error_reply(405, "UNSUPPORTED", "only GET and HEAD", {"Allow": "GET, HEAD"})
    if asked.kind is Kind.PING:
        return json_reply(200, {})
    if asked.kind is Kind.OTHER:
        return error_reply(404, "UNSUPPORTED", "no such endpoint")
    if asked.repository is not None and content.repository(asked.repository) is None:
        return error_reply(404, "NAME_UNKNOWN", "repository name not known to registry")
    if asked.kind is Kind.TAGS:
        return _tags(asked, content, manners)
    if asked.kind is Kind.REFERRERS:
        return _referrers(asked, content, manners)
    if asked.kind is Kind.MANIFEST:
        return _manifest(asked, content)
    return blob_answer(asked, content, manners)


def blob_answer(asked: Asked, content: Content, manners: Manners) -> Reply:
    """A blob, whole or in part; `asked.repository` None means by signed URL."""
    digest = parse_digest(asked.reference or "")
    if digest is None:
        return error_reply(400, "DIGEST_INVALID", "provided digest is not one")
    data = content.blob(asked.repository, digest)
    if data is None:
        return error_reply(404, "BLOB_UNKNOWN", "blob unknown to registry")
    headers = {"Content-Type": "application/octet-stream", **_validators(digest)}
    if manners.ranges:
        headers["Accept-Ranges"] = "bytes"
    if _is_unchanged(asked, digest):
        return Reply(304, b"", headers)
    if manners.ranges and asked.headers.get("If-Range", f'"{digest}"') == f'"{digest}"':
        return _ranged(Reply(200, data, headers, content=digest), asked.headers.get("Range"))
    return Reply(200, data, headers, content=digest)


def meant_digest(asked: Asked, content: Content) -> Digest | None:
    """The digest of what a manifest or blob request is about, whether it can be had or not."""
    if asked.kind not in {Kind.MANIFEST, Kind.BLOB} or asked.reference is None:
        return None
    if asked.kind is Kind.MANIFEST:
        manifest = content.resolve(asked.repository, asked.reference)
        if manifest is not None:
            return manifest.digest
    return parse_digest(asked.reference)


def _manifest(asked: Asked, content: Content) -> Reply:
    manifest = content.resolve(asked.repository, asked.reference or "")
    if manifest is None:
        return error_reply(404, "MANIFEST_UNKNOWN", "manifest unknown to registry")
    headers = {"Content-Type": manifest.media_type, **_validators(manifest.digest)}
    if _is_unchanged(asked, manifest.digest):
        return Reply(304, b"", headers)
    return Reply(200, manifest.data, headers, content=manifest.digest)


def _validators(digest: Digest) -> Mapping[str, str]:
    return {"Docker-Content-Digest": str(digest), "ETag": f'"{digest}"'}


def _is_unchanged(asked: Asked, digest: Digest) -> bool:
    """RFC 9110 §13.1.2: weak comparison with each listed entity tag, or `*`."""
    listed = asked.headers.get("If-None-Match")
    if listed is None:
        return False
    tags = {tag.strip().removeprefix("W/") for tag in listed.split(",")}
    return "*" in tags or f'"{digest}"' in tags


def _ranged(whole: Reply, header: str | None) -> Reply:
    """One satisfiable range is a 206; several, or a malformed one, are ignored (RFC 9110 §14.2)."""
    wanted = _RANGE.fullmatch(header or "")
    if wanted is None or wanted.group(0) == "bytes=-":
        return whole
    size = len(whole.body)
    first, last = wanted.groups()
    if first:
        start, stop = int(first), min(int(last) + 1 if last else size, size)
        if last and int(last) < int(first):
            return whole
    else:
        start, stop = max(0, size - int(last)), size
    if start >= stop:
        return error_reply(
            416, "SIZE_INVALID", "range not satisfiable", {"Content-Range": f"bytes */{size}"}
        )
    # A view, because a copy per request would double the memory of 200 concurrent readers.
    body = whole.body if isinstance(whole.body, Pattern) else memoryview(whole.body)
    part = body[start:stop]
    headers = {**whole.headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return Reply(206, part, headers, content=whole.content)


def _tags(asked: Asked, content: Content, manners: Manners) -> Reply:
    repository = content.repository(asked.repository)
    tags = sorted(repository.tags) if repository is not None else []
    page = _page(asked, tags, manners)
    if page is None:
        return error_reply(400, "UNSUPPORTED", "n is not a number")
    shown, link = page
    return json_reply(200, {"name": asked.repository, "tags": shown}, link)


def _referrers(asked: Asked, content: Content, manners: Manners) -> Reply:
    subject = parse_digest(asked.reference or "")
    if subject is None:
        return error_reply(400, "DIGEST_INVALID", "provided digest is not one")
    wanted = asked.query.get("artifactType")
    entries = {
        str(manifest.digest): manifest.descriptor()
        for manifest in content.referrers(asked.repository, subject)
        if wanted is None or manifest.artifact_type == wanted
    }
    page = _page(asked, list(entries), manners)
    if page is None:
        return error_reply(400, "UNSUPPORTED", "n is not a number")
    shown, link = page
    headers = {"Content-Type": INDEX_TYPE, **link}
    if wanted is not None:
        headers["OCI-Filters-Applied"] = "artifactType"
    listed = [entries[digest] for digest in shown]
    return json_reply(
        200, {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": listed}, headers
    )


def _page(
    asked: Asked, entries: Sequence[str], manners: Manners
) -> tuple[list[str], Mapping[str, str]] | None:
    """The entries after `last`, at most `n`, and a Link to what follows. None: `n` is no number."""
    limit = asked.query.get("n")
    if limit is not None and not limit.isdecimal():
        return None
    sizes = [size for size in (manners.page_size, limit and int(limit)) if isinstance(size, int)]
    size = min(sizes, default=len(entries))
    last = asked.query.get("last")
    rest = [entry for entry in entries if last is None or entry > last]
    shown = rest[:size]
    if not shown or len(rest) <= size:
        return shown, {}
    following = {**asked.query, "n": str(size), "last": shown[-1]}
    target = f"{quote(asked.path, safe='/%:')}?{urlencode(following)}"
    return shown, {"Link": f'<{target}>; rel="next"'}
