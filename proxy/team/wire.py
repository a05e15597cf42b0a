"""What leader and follower say to one another, as the fields of frames; pure.

What arrives is parsed by the same types as a client's request, so that a field cannot mean what no
request could. Raises ``BadFrame`` for what does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.oci.digest import Digest
from proxy.oci.errors import ErrorCode, InternalError, PullError
from proxy.oci.paths import Kind
from proxy.oci.ranges import ByteRange, Span
from proxy.oci.reference import Repository, parse_reference
from proxy.pull.asks import Ask, CacheWord, ManifestAnswer, Timing
from proxy.store.store import LinkKey
from proxy.team.frames import BadFrame
from proxy.upstream.client import Page
from proxy.upstream.routing import Route, Upstream

Fields = Mapping[str, Any]

#: Characters of a client's name, at most: an htpasswd name or a certificate's subject.
MAX_CLIENT = 1024


class LeaderGone(Exception):
    """The leader went, or stopped answering, before it said what was asked for."""


def ask_fields(ask: Ask, now: float) -> dict[str, Any]:
    """Who asks, where it goes, and how old the request is: each process has a clock of its own."""
    return {
        "upstream": ask.upstream,
        "repository": ask.repository,
        "client": ask.client,
        "age": max(0.0, now - ask.arrived),
        "patient": ask.is_patient,
    }


def read_ask(fields: Fields, upstreams: Mapping[str, Upstream], now: float) -> Ask:
    """The same request here. Raises ``BadFrame``, ``NameInvalid``."""
    upstream = upstreams.get(_text(fields, "upstream"))
    if upstream is None:
        raise BadFrame("an upstream that is not configured here")
    repository = str(Repository.parse(_text(fields, "repository")))
    client, age = _text(fields, "client"), fields.get("age")
    if len(client) > MAX_CLIENT or not isinstance(age, int | float) or age < 0:
        raise BadFrame("a request without client or age")
    # What the client called it is the follower's business, and so is the echo of ns.
    route = Route(upstream, repository, repository, None)
    return Ask(route, client, now - age, fields.get("patient") is True)


@dataclass(frozen=True, slots=True)
class BlobHead:
    """A blob's answer without its pieces."""

    size: int | None
    span: Span | None
    cache: CacheWord
    warning: str | None
    has_pieces: bool


def blob_fields(head: BlobHead) -> dict[str, Any]:
    span = head.span
    return {
        "size": head.size,
        "span": None if span is None else [span.start, span.stop, span.size],
        "cache": head.cache.value,
        "warning": head.warning,
        "pieces": head.has_pieces,
    }


def read_blob(fields: Fields) -> BlobHead:
    try:
        span = None if fields["span"] is None else Span(*fields["span"])
        word = CacheWord(fields["cache"])
        return BlobHead(fields["size"], span, word, fields["warning"], fields["pieces"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadFrame(f"an answer that is none: {error}") from error


def manifest_fields(answer: ManifestAnswer) -> dict[str, Any]:
    """Without the bytes, which go as the frame's data."""
    return {
        "digest": str(answer.digest),
        "type": answer.media_type,
        "size": answer.size,
        "cache": answer.cache.value,
        "warning": answer.warning,
        "whole": answer.manifest is not None,
    }


def page_fields(page: Page) -> dict[str, Any]:
    return {"type": page.media_type, "link": page.link, "filters": page.filters}


def timing_fields(timing: Timing) -> dict[str, Any]:
    return {"queue": timing.queue, "waited": timing.upstream}


def range_fields(wanted: ByteRange | None) -> list[int | None] | None:
    return None if wanted is None else [wanted.first, wanted.last]


def read_range(value: object) -> ByteRange | None:
    match value:
        case None:
            return None
        case [int() | None as first, int() | None as last]:
            try:
                return ByteRange(first, last)
            except ValueError as error:
                raise BadFrame(f"a range that is none: {error}") from error
    raise BadFrame("a range that is none")


def read_digest(fields: Fields) -> Digest:
    return Digest.parse(_text(fields, "digest"))


def read_tail(fields: Fields) -> tuple[Kind, str]:
    """Which listing is asked for."""
    kind, tail = _text(fields, "what"), _text(fields, "tail")
    if kind == Kind.TAGS and tail == "tags/list":
        return Kind.TAGS, tail
    name, _, reference = tail.partition("/")
    if kind == Kind.REFERRERS and name == "referrers":
        return Kind.REFERRERS, f"referrers/{parse_reference(reference)}"
    raise BadFrame("a listing that there is not")


def read_query(fields: Fields) -> tuple[tuple[str, str], ...]:
    try:
        pairs = tuple((str(key), str(value)) for key, value in fields["query"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadFrame(f"a query that is none: {error}") from error
    return pairs


def image_keys(images: Iterable[LinkKey]) -> list[list[str]]:
    """Manifests that were pulled, and through which repository."""
    return [[upstream, repository, str(digest)] for upstream, repository, digest in images]


def read_images(fields: Fields, upstreams: Mapping[str, Upstream]) -> list[LinkKey]:
    """The same images here."""
    images: list[LinkKey] = []
    try:
        for upstream, repository, digest in fields["images"]:
            if upstream not in upstreams:
                raise BadFrame("an upstream that is not configured here")
            images.append((upstream, str(Repository.parse(repository)), Digest.parse(digest)))
    except (PullError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadFrame(f"images that are none: {error}") from error
    return images


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise BadFrame(f"no {name}")
    return value


# -- errors ---------------------------------------------------------------------------------------


def error_fields(error: PullError) -> dict[str, Any]:
    """A refusal, so that the other side can raise the same."""
    return {
        "error": type(error).__name__,
        "message": error.message,
        "status": error.status,
        "code": error.code.value,
        "after": error.retry_after,
        "headers": dict(error.headers),
        "detail": None if error.detail is None else {k: _plain(v) for k, v in error.detail.items()},
        "about": getattr(error, "kind", None),
    }


def read_error(fields: Fields) -> PullError:
    """The error that ``fields`` tell of; one that nobody here knows is our own failure."""
    kinds = {kind.__name__: kind for kind in _all_kinds(PullError)}
    kind = kinds.get(str(fields.get("error")), InternalError)
    try:
        message = str(fields["message"])
        error = kind.__new__(kind, message)
        error.__dict__.update(
            message=message,
            status=int(fields["status"]),
            code=ErrorCode(fields["code"]),
            retry_after=fields["after"],
            headers={str(k): str(v) for k, v in fields["headers"].items()},
            detail=fields["detail"],
        )
        if fields.get("about") is not None:
            error.__dict__["kind"] = str(fields["about"])
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise BadFrame(f"an error that is none: {fault}") from fault
    return error


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | None) else str(value)


def _all_kinds(kind: type[PullError]) -> list[type[PullError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in _all_kinds(below))]
