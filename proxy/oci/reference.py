"""Repository names, tags and references, as the distribution-spec writes them.

Everything that later becomes part of an upstream URL or a key of the index passes through one of
these types first, so that what is malformed never gets further than the parser.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from proxy.oci.digest import Digest
from proxy.oci.errors import NameInvalid, TagInvalid

# distribution-spec, "Pulling manifests": <name> and <reference> as a tag.
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")

# "Many clients impose a limit of 255 characters on the length of the concatenation of the registry
# hostname, /, and <name>"; registries refuse longer names.
MAX_NAME = 255


@dataclass(frozen=True, slots=True, order=True)
class Repository:
    """A repository name such as `team/app`. Raises NameInvalid outside the grammar."""

    name: str

    def __post_init__(self) -> None:
        if len(self.name) > MAX_NAME or not _NAME.fullmatch(self.name):
            raise NameInvalid(detail={"name": self.name[: MAX_NAME + 1]})

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the wire form. Raises NameInvalid."""
        return cls(text)

    @property
    def components(self) -> tuple[str, ...]:
        """The parts between the slashes; at least one."""
        return tuple(self.name.split("/"))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, order=True)
class Tag:
    """A tag such as `v1.2`. Raises TagInvalid outside the grammar."""

    name: str

    def __post_init__(self) -> None:
        if not _TAG.fullmatch(self.name):
            raise TagInvalid(detail={"tag": self.name[:200]})

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the wire form. Raises TagInvalid."""
        return cls(text)

    def __str__(self) -> str:
        return self.name


Reference = Digest | Tag


def parse_reference(text: str) -> Reference:
    """Read what stands after `/manifests/`: a digest if it has a colon, which no tag may have.

    Raises DigestInvalid or TagInvalid.
    """
    return Digest.parse(text) if ":" in text else Tag.parse(text)
