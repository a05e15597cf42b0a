"""What the fake holds: repositories with manifests, tags and links to blobs.

Plain dictionaries in memory. Blobs are kept once and linked by repository, as a registry does, so a
digest that exists elsewhere is still unknown to a repository that nobody pushed it to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from proxy.oci.digest import Digest
from proxy.oci.errors import DigestInvalid
from proxy.testing.images import FakeBlob, FakeImage, FakeIndex
from proxy.testing.pattern import Pattern


@dataclass(frozen=True, slots=True)
class Manifest:
    """Stored manifest bytes; `subject` is the digest of the manifest that it refers to."""

    data: bytes
    media_type: str
    digest: Digest
    subject: Digest | None
    artifact_type: str | None

    def descriptor(self) -> dict[str, object]:
        """As a referrers list shows it."""
        shown: dict[str, object] = {
            "mediaType": self.media_type,
            "digest": str(self.digest),
            "size": len(self.data),
        }
        return (
            shown if self.artifact_type is None else {**shown, "artifactType": self.artifact_type}
        )


@dataclass(slots=True)
class Contents:
    """One repository."""

    manifests: dict[Digest, Manifest] = field(default_factory=dict)
    tags: dict[str, Digest] = field(default_factory=dict)
    blobs: set[Digest] = field(default_factory=set)


class Content:
    """All repositories of one fake registry."""

    def __init__(self) -> None:
        self._repositories: dict[str, Contents] = {}
        self._blobs: dict[Digest, bytes | Pattern] = {}

    def push(self, image: FakeImage | FakeIndex, name: str, tag: str) -> None:
        """Store an image, or an index with all its images, and point the tag at it."""
        if isinstance(image, FakeIndex):
            for child in image.images:
                self._store_image(child, name)
        else:
            self._store_image(image, name)
        self.put_manifest(name, image.manifest, image.media_type, image.digest, tag)

    def put_blob(self, name: str, data: bytes | Pattern, digest: Digest) -> None:
        """Store bytes and link them to a repository."""
        self._blobs[digest] = data
        self._at(name).blobs.add(digest)

    def put_manifest(
        self, name: str, data: bytes, media_type: str, digest: Digest, tag: str | None
    ) -> None:
        """Store manifest bytes, and point the tag at them if there is one."""
        repository = self._at(name)
        repository.manifests[digest] = _read_manifest(data, media_type, digest)
        if tag is not None:
            repository.tags[tag] = digest

    def remove(self, name: str, reference: str | None) -> None:
        """Forget a tag, a manifest (with its tags), a blob's link, or the whole repository.

        Raises KeyError when there is nothing of that name.
        """
        if reference is None:
            del self._repositories[name]
            return
        repository = self._repositories[name]
        if reference in repository.tags:
            del repository.tags[reference]
            return
        digest = Digest.parse(reference)
        if digest in repository.manifests:
            del repository.manifests[digest]
            repository.tags = {tag: d for tag, d in repository.tags.items() if d != digest}
            return
        repository.blobs.remove(digest)

    def repository(self, name: str | None) -> Contents | None:
        """A repository, if anything was ever pushed to it."""
        return None if name is None else self._repositories.get(name)

    def has_project(self, project: str) -> bool:
        """Whether there is a repository whose name begins with this component."""
        return any(name.partition("/")[0] == project for name in self._repositories)

    def resolve(self, name: str | None, reference: str) -> Manifest | None:
        """The manifest that a tag or digest names in a repository."""
        repository = self.repository(name)
        if repository is None:
            return None
        digest = repository.tags.get(reference)
        if digest is None:
            digest = parse_digest(reference)
        return None if digest is None else repository.manifests.get(digest)

    def blob(self, name: str | None, digest: Digest) -> bytes | Pattern | None:
        """A blob's bytes, if the repository has it; with no repository, if anyone has."""
        repository = self.repository(name)
        if name is not None and (repository is None or digest not in repository.blobs):
            return None
        return self._blobs.get(digest)

    def referrers(self, name: str | None, subject: Digest) -> Iterator[Manifest]:
        """Manifests of a repository that refer to `subject`, in the order of their digests."""
        repository = self.repository(name)
        if repository is not None:
            for _, manifest in sorted(repository.manifests.items()):
                if manifest.subject == subject:
                    yield manifest

    def _at(self, name: str) -> Contents:
        return self._repositories.setdefault(name, Contents())

    def _store_image(self, image: FakeImage, name: str) -> None:
        for blob in image.blobs:
            self._store_blob(blob, name)
        self.put_manifest(name, image.manifest, image.media_type, image.digest, None)

    def _store_blob(self, blob: FakeBlob, name: str) -> None:
        self.put_blob(name, blob.data, blob.digest)


def parse_digest(text: str) -> Digest | None:
    """A digest, or None for anything else."""
    try:
        return Digest.parse(text)
    except DigestInvalid:
        return None


def _read_manifest(data: bytes, media_type: str, digest: Digest) -> Manifest:
    """Tolerant: a test may want to store something that is no manifest at all."""
    try:
        fields = json.loads(data)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        fields = {}
    subject = fields.get("subject")
    config = fields.get("config")
    artifact_type = fields.get("artifactType")
    if artifact_type is None and isinstance(config, dict):
        # distribution-spec, "Listing Referrers": the config's media type stands in for it.
        artifact_type = config.get("mediaType")
    named = subject.get("digest") if isinstance(subject, dict) else None
    return Manifest(
        data=data,
        media_type=media_type,
        digest=digest,
        subject=parse_digest(named) if isinstance(named, str) else None,
        artifact_type=artifact_type if isinstance(artifact_type, str) else None,
    )
