"""Names of images as people write them: ``alpine``, ``quay.io/team/app:v1``, ``localhost:5000/a``.

The rule is that of docker, podman and containerd: what stands before the first slash is a registry
if it has a dot or a port, or is ``localhost``. What the name leaves out is
not filled in here: which registry is meant without one is for routing to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from proxy.oci.digest import Digest
from proxy.oci.errors import NameInvalid
from proxy.oci.reference import Reference, Repository, Tag

DEFAULT_TAG = Tag("latest")
# Of a URL that was taken for a name, or of a transport of skopeo's.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,31}://")


@dataclass(frozen=True, slots=True)
class ImageName:
    """An image's name, validated. ``registry`` is None where none was written."""

    registry: str | None
    repository: Repository
    reference: Reference

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ``NameInvalid``, ``TagInvalid`` and ``DigestInvalid``. Of a tag and a digest the
        digest counts, as with every client."""
        if scheme := _SCHEME.match(text):
            raise NameInvalid(f"the name of an image does not begin with {scheme[0]}: leave it out")
        name, at, digest = text.partition("@")
        first, slash, rest = name.partition("/")
        registry = first.lower() if slash and _is_registry(first) else None
        path = name if registry is None else rest
        # The last component only: what is before it has no colon.
        head, colon, tag = path.rpartition(":")
        repository = Repository.parse(head if colon else path)
        reference: Reference = Tag.parse(tag) if colon else DEFAULT_TAG
        return cls(registry, repository, Digest.parse(digest) if at else reference)

    def __str__(self) -> str:
        separator = "@" if isinstance(self.reference, Digest) else ":"
        registry = "" if self.registry is None else f"{self.registry}/"
        return f"{registry}{self.repository}{separator}{self.reference}"


def _is_registry(component: str) -> bool:
    host, colon, port = component.rpartition(":")
    if colon:
        return bool(host) and port.isdecimal()
    return "." in component or component == "localhost"
