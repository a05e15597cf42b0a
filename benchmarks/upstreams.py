"""Registries that allow only so many connections, and what they counted while a crowd pulled.

Two kinds. A real one: docker-registry behind an nginx that answers 401 to every request beyond the
limit and lets each connection have a fixed rate; bytes and refusals come from its access log,
sockets from /proc/net/tcp. And the bundled fake, which counts sockets where it accepts them, so
that not even a short one goes unseen.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from benchmarks.images import MANIFEST_TYPE, Image, digest_of, push
from benchmarks.load import Want
from benchmarks.nginx import running_nginx
from benchmarks.parts import Part, await_http, free_port, request, running, shown, until
from benchmarks.setups import fill

QUIET_LOOKS = 5
QUIET_STEP = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class Tally:
    """What an upstream saw in one round: requests, those it refused, body bytes of the others.

    `peak` is the most sockets it had accepted at a time, None where it cannot tell.
    """

    requests: int
    refused: int
    size: int
    peak: int | None


class Upstream(Protocol):
    """A registry at its limit."""

    @property
    def port(self) -> int: ...

    @property
    def configuration(self) -> str: ...

    def begin(self) -> None:
        """Counts from here on."""

    def settle(self) -> None:
        """Returns once nothing is being answered any more."""

    def tally(self) -> Tally:
        """What was counted since `begin`."""


@dataclass(slots=True)
class LimitedRegistry:
    """docker-registry behind an nginx with a limit; `port` is nginx's."""

    port: int
    status_port: int
    log: Path
    configuration: str
    _mark: int = 0

    def begin(self) -> None:
        self._mark = self.log.stat().st_size

    def settle(self) -> None:
        # One request is "writing" while it asks: the question itself.
        quiet = 0

        def is_quiet() -> bool:
            nonlocal quiet
            quiet = quiet + 1 if self._writing() == 1 else 0
            return quiet >= QUIET_LOOKS

        until(is_quiet, "the upstream to fall quiet", patience=120)

    def _writing(self) -> int:
        words = request(self.status_port, "/").body.split()
        return int(words[words.index(b"Writing:") + 1])

    def tally(self) -> Tally:
        with self.log.open("rb") as file:
            file.seek(self._mark)
            rows = [line.split() for line in file]
        served = (int(size) for status, size in rows if status in (b"200", b"206"))
        refused = sum(status == b"401" for status, _ in rows)
        return Tally(requests=len(rows), refused=refused, size=sum(served), peak=None)


@contextlib.contextmanager
def limited_registry(
    directory: Path, images: Iterable[Image], *, limit: int, rate: int
) -> Iterator[LimitedRegistry]:
    """A registry that holds `images` and allows `limit` requests at a time, `rate` bytes/s each."""
    with _registry(directory) as backend:
        for image in images:
            push(backend, image)
        port, status_port = free_port(), free_port()
        log = directory / "access.log"
        http = fill(
            "nginx-limit.conf",
            backend=backend,
            port=port,
            status=status_port,
            directory=directory,
            limit=limit,
            rate=rate,
        )
        with running_nginx("limit", http, directory) as part:
            await_http(part, status_port, "/", ready=lambda status: status == 200)
            yield LimitedRegistry(port, status_port, log, shown(http, directory))


@contextlib.contextmanager
def _registry(directory: Path) -> Iterator[int]:
    """An empty docker-registry; gives its port."""
    port = free_port()
    config = directory / "registry.yml"
    config.write_text(registry_config(port, directory / "registry"))
    with running("registry", ("docker-registry", "serve", str(config)), directory) as part:
        await_http(part, port, "/v2/", ready=lambda status: status == 200)
        yield port


def registry_config(
    port: int, root: Path, *, proxied: str = "", tls: str = "", access_log: bool = False
) -> str:
    """docker-registry's configuration; with `proxied` (a URL) a pull-through cache.

    `tls` is the part of its http section that names certificate and key.
    """
    proxy = f"proxy:\n  remoteurl: {proxied}" if proxied else ""
    quiet = "false" if access_log else "true"
    return fill("registry.yml", port=port, root=root, proxy=proxy, tls=tls, quiet=quiet)


@dataclass(slots=True)
class FakeUpstream:
    """The bundled registry in a process of its own; `control` is the port that tells its counters.

    `pulls` holds one want for each of its images, `unique_size` the bytes of all of them once.
    """

    port: int
    control: int
    pulls: tuple[Want, ...]
    unique_size: int
    configuration: str

    def begin(self) -> None:
        request(self.control, "/_reset", method="POST")

    def settle(self) -> None:
        # It does not say whether it is answering; one that sends nothing for a while is not.
        sent, quiet = -1, 0
        while quiet < QUIET_LOOKS:
            before, sent = sent, int(self._counters()["bytes_sent"])
            quiet = quiet + 1 if sent == before else 0
            time.sleep(QUIET_STEP)

    def tally(self) -> Tally:
        counted = self._counters()
        return Tally(
            requests=sum(counted["requests"].values()),
            refused=counted["refused"],
            size=counted["bytes_sent"],
            peak=counted["peak_sockets"],
        )

    def _counters(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(request(self.control, "/_counters").body)
        return found


@contextlib.contextmanager
def fake_registry(
    directory: Path, *, images: int, layers: int, layer_size: int, limit: int, rate: int
) -> Iterator[FakeUpstream]:
    """The bundled registry with images of its own; allows `limit` sockets, `rate` bytes/s each."""
    command = (
        *(sys.executable, "-m", "proxy.testing", "registry", f"--limit={limit}", f"--rate={rate}"),
        *(f"--images={images}", f"--layers={layers}", f"--layer-size={layer_size}"),
    )
    with running("fake", command, directory) as part:
        ready = _announced(part)
        port, control = (_port(ready[name]) for name in ("url", "control"))
        found = [_pull(port, image["name"], image["tag"]) for image in ready["images"]]
        pulls, sizes = zip(*found, strict=True)
        yield FakeUpstream(port, control, pulls, sum(sizes), shown(" ".join(command), directory))


def _announced(part: Part) -> dict[str, Any]:
    """The line of JSON that the registry writes once it has made its images and listens."""

    def lines() -> list[str]:
        # Complete ones only: what follows the last line end may still grow.
        return [line for line in part.output.read_text().split("\n")[:-1] if line.startswith("{")]

    def has_spoken() -> bool:
        part.check()
        return bool(lines())

    until(has_spoken, "the bundled registry")
    said: dict[str, Any] = json.loads(lines()[0])
    return said


def _port(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None  # it listens on a free one, which no scheme implies
    return port


def _pull(port: int, repository: str, tag: str) -> tuple[Want, int]:
    """What a client wants that pulls this image, and the bytes of all that it gets."""
    path = f"/v2/{repository}/manifests/{tag}"
    manifest = request(port, path, headers={"Accept": MANIFEST_TYPE}).body
    document = json.loads(manifest)
    blobs = (document["config"], *document["layers"])
    want = Want("manifest", repository, tag, digest_of(manifest), len(manifest))
    return want, len(manifest) + sum(blob["size"] for blob in blobs)
