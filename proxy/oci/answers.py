"""Small decisions about what an answer says: overload by client, entity tags, warnings."""

from __future__ import annotations

import re

from proxy.oci.digest import Digest

# containers/image retries 429 with Retry-After, five times, and nothing else. containerd retries
# 429 at once and without pause, dockerd gives up on TOOMANYREQUESTS: both do better with 503.
_CONTAINERS = ("libpod/", "skopeo/", "buildah/", "cri-o/", "containers/")

_ENTITY_TAG = re.compile(r'(?:W/)?"(?P<quoted>[^"]*)"|(?P<bare>[^\s,"]+)')

# distribution-spec, "Warnings": the header's value is at most 4096 bytes.
_MAX_WARNING = 4096


def overload_status(user_agent: str | None) -> int:
    """429 for the family of podman, skopeo, Buildah and CRI-O; 503 for everybody else."""
    return 429 if _is_of_containers(user_agent) else 503


def waits_for_a_body(user_agent: str | None) -> bool:
    """Does this client wait for the bytes of a body as long as it takes, and give the pull up when
    it ends early? podman and its family do; others come back."""
    return _is_of_containers(user_agent)


def _is_of_containers(user_agent: str | None) -> bool:
    return (user_agent or "").lower().startswith(_CONTAINERS)


def etag(digest: Digest) -> str:
    """The strong entity tag of content, quoted as RFC 9110 §8.8.3 asks."""
    return f'"{digest}"'


def etag_matches(if_none_match: str | None, digest: Digest) -> bool:
    """Whether If-None-Match names this content: then the answer is 304 (RFC 9110 §13.1.2).

    Lists, weak tags and `*` are understood. Bare digests too: some registries send their
    entity tags without quotes, and clients send them back as they came.
    """
    if if_none_match is None:
        return False
    if if_none_match.strip() == "*":
        return True
    wanted = str(digest)
    return any(
        wanted in (tag["quoted"], tag["bare"]) for tag in _ENTITY_TAG.finditer(if_none_match)
    )


def warning(text: str) -> str:
    """A Warning header that podman and containerd show to people: `299 - "text"`.

    Control characters become spaces and what is not ASCII a question mark, so the text cannot
    leave its header; it is cut where the value would exceed 4096 bytes.
    """
    room = _MAX_WARNING - len('299 - ""')
    escaped: list[str] = []
    for character in text:
        piece = _warn_escape(character)
        room -= len(piece)
        if room < 0:
            break
        escaped.append(piece)
    return f'299 - "{"".join(escaped)}"'


def _warn_escape(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if not character.isascii():
        return "?"
    return character if character.isprintable() else " "
