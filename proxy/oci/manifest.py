"""Manifests: what they are, what they point to, and which of them a client accepts.

The bytes are never rewritten; they are read only to learn the children. That reading is a matter
of permission, not of taste: a blob may be served through a repository because a manifest fetched
through it names the blob. A registry checks, when a manifest is pushed, that the pusher has the
blobs it names, but only those of the manifest's own media type. So children are taken by
media type alone: what a document names in fields that its type does not have, nobody has checked,
and a document of a type we do not know has no children here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from proxy.oci.digest import Digest
from proxy.oci.errors import DigestInvalid, ManifestInvalid

# Clients and the spec stop at 4 MiB; twice that is room for a mistake, not for an attack.
MAX_MANIFEST = 8 * 1024 * 1024

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+json"
DOCKER_SCHEMA1_SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"

_IMAGES = frozenset({DOCKER_MANIFEST, OCI_MANIFEST})
_INDEXES = frozenset({DOCKER_LIST, OCI_INDEX})

# One list for every request upstream: the answer must not depend on which client asked first.
# Newer types first; schema 1 and the wildcard last, so that no registry converts when it need not.
MANIFEST_ACCEPT = ", ".join(
    (
        OCI_INDEX,
        OCI_MANIFEST,
        DOCKER_LIST,
        DOCKER_MANIFEST,
        DOCKER_SCHEMA1_SIGNED,
        DOCKER_SCHEMA1,
        "*/*",
    )
)

# What servers of plain files say when they do not know; then the document itself is asked.
_GENERIC = frozenset({"application/json", "application/octet-stream", "text/plain", "text/json"})


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a manifest points to. `size` in bytes."""

    media_type: str
    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest as it came, and what was read from it.

    `media_type` has no parameters. `children` are the config and layers of an image or the
    manifests of an index, each digest once, in order; foreign layers are not among them.
    """

    media_type: str
    raw: bytes
    digest: Digest
    children: tuple[Descriptor, ...] = ()
    is_index: bool = False
    subject: Descriptor | None = None

    def __repr__(self) -> str:
        return f"<Manifest {self.digest} {self.media_type}, {len(self.children)} children>"


def parse_manifest(raw: bytes, media_type: str | None, digest: Digest) -> Manifest:
    """Read a manifest's bytes. `media_type` is the Content-Type they came with, if any.

    That `raw` has this `digest` is the caller's to have checked. Fields nobody knows are left
    alone. Raises ManifestInvalid for what is no JSON object, has malformed descriptors, or is
    an image and an index at once (CVE-2021-41190).
    """
    document = _document(raw)
    kind = _media_type(media_type, document)
    _refuse_ambiguous(kind, document)
    return Manifest(
        media_type=kind,
        raw=raw,
        digest=digest,
        children=_children(kind, document),
        is_index=kind in _INDEXES,
        subject=_subject(kind, document),
    )


def acceptable(media_type: str, accept_lines: Iterable[str]) -> bool:
    """Whether a client that sent these Accept lines takes a manifest of this type.

    Lines are merged and split at commas (containers/image sends one line per type), weights are
    ignored as registries ignore them, and no Accept at all takes everything (RFC 9110 §12.5.1).
    """
    wanted = {
        accepted
        for line in accept_lines
        for item in line.split(",")
        if (accepted := _without_parameters(item))
    }
    return not wanted or not wanted.isdisjoint(
        {"*/*", "application/*", _without_parameters(media_type)}
    )


def _without_parameters(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _document(raw: bytes) -> Mapping[str, object]:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets by the thousand
        raise ManifestInvalid("the upstream sent a manifest that is not JSON") from error
    if not isinstance(document, dict):
        raise ManifestInvalid("the upstream sent a manifest that is not a JSON object")
    return document


def _media_type(header: str | None, document: Mapping[str, object]) -> str:
    """The header's type, else the document's own word, else what its shape says."""
    named = _without_parameters(header or "")
    if named and named not in _GENERIC:
        return named
    own = document.get("mediaType")
    if isinstance(own, str) and "/" in own and own.isascii() and own.isprintable():
        return _without_parameters(own)
    if document.get("schemaVersion") == 1:
        return DOCKER_SCHEMA1_SIGNED if "signatures" in document else DOCKER_SCHEMA1
    if "manifests" in document:
        return OCI_INDEX
    if "layers" in document or "config" in document:
        return OCI_MANIFEST
    raise ManifestInvalid("the upstream sent a document that is no manifest")


def _refuse_ambiguous(kind: str, document: Mapping[str, object]) -> None:
    """image-spec, "Backwards compatibility": one document must not read as two types."""
    is_both = document.get("manifests") and (document.get("layers") or document.get("config"))
    if kind in _IMAGES | _INDEXES and is_both:
        raise ManifestInvalid("the upstream sent a manifest that is an image and an index at once")


def _children(kind: str, document: Mapping[str, object]) -> tuple[Descriptor, ...]:
    if kind in _IMAGES:
        config = document.get("config")
        entries = [*([config] if config is not None else []), *_list(document, "layers")]
    elif kind in _INDEXES:
        entries = _list(document, "manifests")
    else:
        return ()
    found: dict[Digest, Descriptor] = {}
    for entry in entries:
        fields = _fields(entry)
        # Foreign layers are fetched from their own URLs; registries do not check that they exist.
        if not fields.get("urls"):
            child = _descriptor(fields)
            found.setdefault(child.digest, child)
    return tuple(found.values())


def _subject(kind: str, document: Mapping[str, object]) -> Descriptor | None:
    subject = document.get("subject")
    if subject is None or kind not in (OCI_MANIFEST, OCI_INDEX):
        return None
    return _descriptor(_fields(subject))


def _list(document: Mapping[str, object], name: str) -> list[object]:
    value = document.get(name)
    if value is None:  # absent, or the `null` Go writes for an empty list
        return []
    if not isinstance(value, list):
        raise ManifestInvalid(f"the manifest's {name} are not a list")
    return value


def _fields(entry: object) -> Mapping[str, object]:
    if not isinstance(entry, dict):
        raise ManifestInvalid("the manifest has a descriptor that is not a JSON object")
    return entry


def _descriptor(fields: Mapping[str, object]) -> Descriptor:
    media_type, digest, size = fields.get("mediaType"), fields.get("digest"), fields.get("size")
    if not isinstance(digest, str):
        raise ManifestInvalid("the manifest has a descriptor without a digest")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
        raise ManifestInvalid("the manifest has a descriptor without a size")
    try:
        parsed = Digest.parse(digest)
    except DigestInvalid as error:
        raise ManifestInvalid(
            "the manifest has a descriptor with a malformed digest", detail=error.detail
        ) from error
    return Descriptor(media_type if isinstance(media_type, str) else "", parsed, size)
