"""Puts images into a registry over its HTTP API, and tells what a right pull of them leaves.

`proxy.testing.images` makes the images; this module only knows how they get into a registry that
is a process of its own (distribution specification, "Pushing a blob monolithically").
"""

import platform
import urllib.request
from urllib.parse import urlencode, urljoin

from proxy.oci.digest import Digest
from proxy.testing.images import FakeImage, FakeIndex, pseudo_random

MIB = 2**20

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
"""This machine's architecture in the words of images, since clients pull the one that fits."""


def digests(image: FakeImage) -> frozenset[str]:
    """What a client holds that pulled this image: manifest, configuration and layers.

    The layers are not compressed, so it makes no difference whether a client names them as they
    came or as they were unpacked.
    """
    return frozenset({str(image.digest), *sizes(image)})


def sizes(image: FakeImage) -> dict[str, int]:
    """Digest and length in bytes of the blobs of this image."""
    return {str(blob.digest): blob.size for blob in image.blobs}


def push_image(registry: str, image: FakeImage, *, tagged: bool = True) -> FakeImage:
    """Upload an image; `registry` is the URL without `/v2/`. HTTPError when it is refused."""
    for blob in image.blobs:
        _push_blob(registry, image.name, blob.digest, blob.data)
    reference = image.tag if tagged else str(image.digest)
    _push_manifest(registry, image.name, reference, image.manifest, image.media_type)
    return image


def push_index(registry: str, index: FakeIndex) -> FakeIndex:
    """Upload a multi-platform image: its images by digest, the index by its tag."""
    for image in index.images:
        push_image(registry, image, tagged=False)
    _push_manifest(registry, index.name, index.tag, index.manifest, index.media_type)
    return index


def push_large_blob(registry: str, repository: str, size: int) -> Digest:
    """Upload a blob of that many bytes that belongs to no image."""
    data = pseudo_random(f"large {size}", size)
    digest = Digest.of(data)
    _push_blob(registry, repository, digest, data)
    return digest


def _push_blob(registry: str, repository: str, digest: Digest, data: bytes) -> None:
    opened = urllib.request.Request(
        f"{registry}/v2/{repository}/blobs/uploads/", data=b"", method="POST"
    )
    with urllib.request.urlopen(opened) as answer:
        location = urljoin(opened.full_url, answer.headers["Location"])
    joint = "&" if "?" in location else "?"
    query = urlencode({"digest": str(digest)})
    _put(f"{location}{joint}{query}", data, "application/octet-stream")


def _push_manifest(
    registry: str, repository: str, reference: str, data: bytes, media_type: str
) -> None:
    _put(f"{registry}/v2/{repository}/manifests/{reference}", data, media_type)


def _put(url: str, data: bytes, content_type: str) -> None:
    request = urllib.request.Request(
        url, data=data, method="PUT", headers={"Content-Type": content_type}
    )
    with urllib.request.urlopen(request):
        pass
