"""Images that are the same on every run, seeded and incompressible; and how to push them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from benchmarks.load import Want
from benchmarks.parts import PartFailed, request

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
PIECE = 1 << 20
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Image:
    """One image with one tag; `blobs` are its config and layers by digest, in that order."""

    repository: str
    tag: str
    manifest: bytes
    blobs: Mapping[str, bytes]

    @property
    def size(self) -> int:
        """Bytes of the manifest and all blobs: what one full pull transfers."""
        return len(self.manifest) + sum(len(blob) for blob in self.blobs.values())

    def wanted(self) -> Want:
        """What a client asks for that pulls the image by its tag."""
        digest = digest_of(self.manifest)
        return Want("manifest", self.repository, self.tag, digest, len(self.manifest))

    def wanted_layer(self) -> Want:
        """What a client asks for that already knows the digest of the last layer."""
        digest, data = list(self.blobs.items())[-1]
        return Want("blob", self.repository, digest, digest, len(data))


def make_image(repository: str, *, layers: int, layer_size: int) -> Image:
    """An image of random layers of `layer_size` bytes each; the repository's name is the seed."""
    source = random.Random(repository)
    bodies = [_noise(source, layer_size) for _ in range(layers)]
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(body) for body in bodies]},
        }
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _descriptor(CONFIG_TYPE, config),
        "layers": [_descriptor(LAYER_TYPE, body) for body in bodies],
    }
    blobs = {digest_of(blob): blob for blob in (config, *bodies)}
    return Image(repository, "v1", json.dumps(manifest).encode(), blobs)


def _noise(source: random.Random, size: int) -> bytes:
    # In pieces: randbytes() makes one number of all bits, and 2^31 of them are too many.
    return b"".join(source.randbytes(min(PIECE, size - at)) for at in range(0, size, PIECE))


def _descriptor(media_type: str, data: bytes) -> dict[str, str | int]:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


def push(port: int, image: Image) -> None:
    """Pushes an image to the registry on 127.0.0.1:`port`. Raises PartFailed when it refuses."""
    root = f"/v2/{image.repository}"
    for digest, data in image.blobs.items():
        begun = request(port, f"{root}/blobs/uploads/", method="POST", body=b"")
        _expect(202, begun.status, "an upload to begin")
        place = urlsplit(begun.headers["location"])
        path = f"{place.path}?{place.query}&digest={quote(digest)}"
        stored = request(port, path, method="PUT", body=data)
        _expect(201, stored.status, f"{digest} to be stored")
    named = request(
        port,
        f"{root}/manifests/{image.tag}",
        method="PUT",
        body=image.manifest,
        headers={"Content-Type": MANIFEST_TYPE},
    )
    _expect(201, named.status, f"{image.tag} to be stored")


def _expect(wanted: int, got: int, what: str) -> None:
    if got != wanted:
        raise PartFailed(f"expected {what} with {wanted}, the registry said {got}")
