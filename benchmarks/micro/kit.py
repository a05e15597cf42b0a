"""What the micro-benchmarks share: the fixture's type, and texts as clients send them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

from benchmarks.images import make_image

P = ParamSpec("P")
T = TypeVar("T")

DIGEST = f"sha256:{'0123456789abcdef' * 4}"
BLOB_PATH = f"/v2/library/team/application/blobs/{DIGEST}"
CHALLENGE = (
    'Bearer realm="https://harbor.example.com/service/token",service="harbor-registry",'
    'scope="repository:library/application:pull,push"'
)
ACCEPT = (
    "application/vnd.docker.distribution.manifest.v2+json, "
    "application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*"
)
IMAGE = make_image("bench/micro", layers=12, layer_size=10)


class Benchmark(Protocol):
    """pytest-benchmark's fixture, as it is used here."""

    def __call__(self, timed: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...
