"""Platforms, ``os/architecture[/variant]``, and which images of an index are for one; pure.

The names are Go's, as the image-spec wants them. Where a variant is left out the usual one is meant
by who builds (arm64 is v8), but "any" by who asks: ``linux/arm`` is for v6 and v7. What an index
lists for ``unknown/unknown`` are attestations beside its images, which nobody runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from proxy.oci.digest import Digest
from proxy.oci.errors import DigestInvalid, RequestInvalid
from proxy.oci.manifest import Descriptor, Manifest

_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
#: What is meant where an architecture has no variant written.
_USUAL = {"arm64": "v8", "arm": "v7"}


@dataclass(frozen=True, slots=True, order=True)
class Platform:
    """What an image runs on. ``variant`` is empty where none was written."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``linux/amd64`` or ``linux/arm/v7``. Raises ``RequestInvalid``."""
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(_PART.fullmatch(part) for part in parts):
            shown = ascii(text[:100])
            raise RequestInvalid(f"a platform is written os/architecture[/variant], not {shown}")
        return cls(*parts)

    @property
    def is_known(self) -> bool:
        """Is it one that something runs on?"""
        return (self.os, self.architecture) != ("unknown", "unknown")

    def covers(self, other: Platform) -> bool:
        """Is an image for ``other`` what somebody wants who asks for this one?"""
        if (self.os, self.architecture) != (other.os, other.architecture):
            return False
        usual = _USUAL.get(other.architecture, "")
        return not self.variant or self.variant == (other.variant or usual)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def platforms_of(index: Manifest) -> Mapping[Digest, Sequence[Platform]]:
    """What the manifests of an index are for, as far as it says so. Of what cannot be read it says
    nothing."""
    found: dict[Digest, list[Platform]] = {}
    for entry in _entries(index):
        try:
            digest = Digest.parse(str(entry.get("digest")))
        except DigestInvalid:
            continue
        platform = _platform(entry.get("platform"))
        if platform is not None:
            found.setdefault(digest, []).append(platform)
    return found


def wanted_of(index: Manifest, wanted: Sequence[Platform]) -> list[Descriptor]:
    """The manifests of an index that are for one of the ``wanted`` platforms; for none: all that
    something runs on. One of which the index does not say what it is for may be, so it is wanted.
    """
    platforms = platforms_of(index)

    def is_wanted(child: Descriptor) -> bool:
        its = platforms.get(child.digest)
        if its is None:
            return True
        if not wanted:
            return any(one.is_known for one in its)
        return any(asked.covers(one) for asked in wanted for one in its)

    return [child for child in index.children if is_wanted(child)]


def missing_of(index: Manifest, wanted: Sequence[Platform]) -> list[Platform]:
    """Which of the ``wanted`` platforms an index has nothing for, if it says what it has."""
    platforms = platforms_of(index)
    if any(child.digest not in platforms for child in index.children):
        return []
    its = [one for entries in platforms.values() for one in entries]
    return [asked for asked in wanted if not any(asked.covers(one) for one in its)]


def _entries(index: Manifest) -> list[Mapping[str, object]]:
    document = json.loads(index.raw)  # it was parsed before: an object with a list, or without
    entries = document.get("manifests") if isinstance(document, dict) else None
    return [entry for entry in entries or () if isinstance(entry, dict)]


def _platform(value: object) -> Platform | None:
    if not isinstance(value, dict):
        return None
    os, architecture, variant = value.get("os"), value.get("architecture"), value.get("variant")
    if not isinstance(os, str) or not isinstance(architecture, str):
        return None
    return Platform(os, architecture, variant if isinstance(variant, str) else "")
