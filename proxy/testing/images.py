"""Images made of nothing but a seed: the same arguments give the same digests on every machine.

Layers are pseudo-random, so that a piece put at the wrong offset is always a wrong digest (a
repeated block would hide it). Tarred layers are real uncompressed archives with a true
configuration, so podman and containerd unpack them.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

from proxy.oci.digest import Digest

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class FakeBlob:
    """Bytes with their name and the media type a manifest gives them."""

    digest: Digest
    data: bytes
    media_type: str

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)

    def descriptor(self) -> dict[str, object]:
        """The image-spec descriptor of this blob."""
        return {"mediaType": self.media_type, "digest": str(self.digest), "size": self.size}

    def __repr__(self) -> str:
        return f"<FakeBlob {self.digest} {self.size} bytes>"


@dataclass(frozen=True, slots=True)
class FakeImage:
    """One image for one platform. `manifest` holds the exact bytes that `digest` names."""

    name: str
    tag: str
    manifest: bytes
    media_type: str
    digest: Digest
    config: FakeBlob
    layers: tuple[FakeBlob, ...]
    architecture: str = "amd64"

    @property
    def blobs(self) -> tuple[FakeBlob, ...]:
        """The configuration and the layers, in manifest order."""
        return (self.config, *self.layers)

    @property
    def size(self) -> int:
        """Bytes of all blobs, without the manifest."""
        return sum(blob.size for blob in self.blobs)

    def __repr__(self) -> str:
        return f"<FakeImage {self.name}:{self.tag} {self.digest} {len(self.layers)} layers>"


@dataclass(frozen=True, slots=True)
class FakeIndex:
    """A multi-platform image: an index over `images`."""

    name: str
    tag: str
    manifest: bytes
    media_type: str
    digest: Digest
    images: tuple[FakeImage, ...]

    def __repr__(self) -> str:
        return f"<FakeIndex {self.name}:{self.tag} {self.digest} {len(self.images)} images>"


def make_image(
    name: str,
    tag: str,
    *,
    layers: Sequence[int],
    seed: int,
    tarred: bool = True,
    algorithm: str = "sha256",
    architecture: str = "amd64",
) -> FakeImage:
    """Build an image whose layers have the given sizes in bytes.

    With `tarred` the size is that of the one file inside the layer's archive (which adds 1.5 to
    2 KiB); without, the layer is exactly that long and cannot be unpacked. Content depends on seed,
    position and size only: images of one seed share their layers under whatever name.
    """
    blobs = tuple(
        _layer(seed, position, size, tarred, algorithm) for position, size in enumerate(layers)
    )
    config = _blob(_config(blobs, architecture), CONFIG_TYPE, algorithm)
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": config.descriptor(),
            "layers": [blob.descriptor() for blob in blobs],
        }
    )
    digest = Digest.of(manifest, algorithm)
    return FakeImage(name, tag, manifest, MANIFEST_TYPE, digest, config, blobs, architecture)


def make_index(name: str, tag: str, images: Sequence[FakeImage]) -> FakeIndex:
    """Build an index that lists `images` with their platforms, in the given order."""
    entries = [
        {
            "mediaType": image.media_type,
            "digest": str(image.digest),
            "size": len(image.manifest),
            "platform": {"os": "linux", "architecture": image.architecture},
        }
        for image in images
    ]
    manifest = _json({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries})
    return FakeIndex(name, tag, manifest, INDEX_TYPE, Digest.of(manifest), tuple(images))


def pseudo_random(key: str, size: int) -> bytes:
    """`size` bytes that depend on `key` alone."""
    source = random.Random(key)
    whole, rest = divmod(size, _BLOCK)
    # Block by block: one call for all of it would build an integer of that many bits.
    return b"".join([source.randbytes(_BLOCK) for _ in range(whole)] + [source.randbytes(rest)])


def _layer(seed: int, position: int, size: int, tarred: bool, algorithm: str) -> FakeBlob:
    data = pseudo_random(f"layer {seed} {position} {size}", size)
    if tarred:
        data = _tar(f"layer-{seed}-{position}.bin", data)
    return _blob(data, LAYER_TYPE, algorithm)


def _tar(name: str, data: bytes) -> bytes:
    """A ustar archive with one file. POSIX ends an archive with two zero blocks of 512 bytes."""
    entry = tarfile.TarInfo(name)  # mtime, uid and gid are 0 unless set
    entry.size = len(data)
    padding = bytes(-len(data) % tarfile.BLOCKSIZE)
    header = entry.tobuf(tarfile.USTAR_FORMAT)
    return b"".join((header, data, padding, bytes(2 * tarfile.BLOCKSIZE)))


def _config(layers: Sequence[FakeBlob], architecture: str) -> bytes:
    # Layers are uncompressed, so a layer's diff_id is its digest (image-spec, "Layer DiffID").
    return _json(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": ["/bin/true"]},
            "rootfs": {"type": "layers", "diff_ids": [str(layer.digest) for layer in layers]},
            "history": [{"created_by": f"layer {n}"} for n in range(len(layers))],
        }
    )


def _blob(data: bytes, media_type: str, algorithm: str) -> FakeBlob:
    return FakeBlob(Digest.of(data, algorithm), data, media_type)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
