"""A registry of plain files behind nginx: the upstream that costs the machine least."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.images import Image, digest_of
from benchmarks.load import Want
from benchmarks.nginx import running_nginx
from benchmarks.parts import MIB, await_http, free_port, shown
from benchmarks.setups import fill


@dataclass(frozen=True, slots=True)
class StaticRegistry:
    """Where it is, and how it was set up."""

    port: int
    configuration: str


@dataclass(frozen=True, slots=True)
class Shelf:
    """The files of a static registry. Images have to be there before it starts, because of their
    tags; blobs may come later."""

    directory: Path

    def blob(self, repository: str, size: int) -> Want:
        """A new blob of random bytes."""
        place = self._place(repository, "blobs")
        path, hasher = place / "new", hashlib.sha256()
        with path.open("wb") as file:
            for at in range(0, size, MIB):
                piece = os.urandom(min(MIB, size - at))
                hasher.update(piece)
                file.write(piece)
        digest = f"sha256:{hasher.hexdigest()}"
        path.rename(place / digest)
        return Want("blob", repository, digest, digest, size)

    def image(self, image: Image) -> Want:
        """Puts an image there; what a client wants that asks for its manifest by digest."""
        digest = digest_of(image.manifest)
        for kept, data in image.blobs.items():
            (self._place(image.repository, "blobs") / kept).write_bytes(data)
        manifests = self._place(image.repository, "manifests")
        for reference in (digest, image.tag):
            (manifests / reference).write_bytes(image.manifest)
        with (self.directory / "tags.map").open("a") as tags:
            tags.write(f"/v2/{image.repository}/manifests/{image.tag} {digest};\n")
        return Want("manifest", image.repository, digest, digest, len(image.manifest))

    def _place(self, repository: str, kind: str) -> Path:
        place = self.directory / "www" / "v2" / repository / kind
        place.mkdir(parents=True, exist_ok=True)
        return place


@contextlib.contextmanager
def static_registry(
    directory: Path, images: Sequence[Image] = (), *, rate: int | None = None
) -> Iterator[tuple[StaticRegistry, Shelf]]:
    """Runs one in an empty directory; `rate` is in bytes a second for each connection."""
    (directory / "www").mkdir()
    (directory / "tags.map").touch()
    shelf = Shelf(directory)
    for image in images:
        shelf.image(image)
    port, status = free_port(), free_port()
    pace = f"limit_rate {rate};\nsendfile_max_chunk 512k;" if rate else ""
    http = fill("nginx-static.conf", port=port, status=status, directory=directory, pace=pace)
    with running_nginx("static", http, directory) as part:
        await_http(part, status, "/", ready=lambda answer: answer == 200)
        yield StaticRegistry(port, shown(http, directory)), shelf
