"""Registries that allow only so many connections, and what they counted while a crowd pulled.

Two kinds. A real one: docker-registry behind an nginx that answers 401 to every request beyond the
limit and lets each connection have a fixed rate; bytes and refusals come from its access log,
sockets from /proc/net/tcp. And the bundled fake, which counts sockets where it accepts them, so
that not even a short one goes unseen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.images import Image, push
from benchmarks.nginx import running_nginx
from benchmarks.parts import LOOPBACK, await_http, free_port, request, running, until

QUIET_LOOKS = 5


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
        http = _limiting(backend, port, status_port, log, limit=limit, rate=rate)
        with running_nginx("limit", http, directory) as part:
            await_http(part, status_port, "/", ready=lambda status: status == 200)
            yield LimitedRegistry(port, status_port, log)


@contextlib.contextmanager
def _registry(directory: Path) -> Iterator[int]:
    """An empty docker-registry; gives its port."""
    port = free_port()
    config = directory / "registry.yml"
    config.write_text(registry_config(port, directory / "registry"))
    with running("registry", ("docker-registry", "serve", str(config)), directory) as part:
        await_http(part, port, "/v2/", ready=lambda status: status == 200)
        yield port


def registry_config(port: int, root: Path, *, proxied: str = "") -> str:
    """docker-registry's configuration, quiet; with `proxied` (a URL) a pull-through cache."""
    proxy = f"proxy:\n  remoteurl: {proxied}\n" if proxied else ""
    return f"""version: 0.1
log:
  level: error
  accesslog:
    disabled: true
storage:
  cache:
    blobdescriptor: inmemory
  filesystem:
    rootdirectory: {root}
http:
  addr: {LOOPBACK}:{port}
{proxy}"""


def _limiting(
    backend: int, port: int, status_port: int, log: Path, *, limit: int, rate: int
) -> str:
    # limit_rate pauses after each write for as long as its bytes should have taken, in whole
    # milliseconds: with small buffers that is no pause at all.
    return f"""
log_format tally '$status $body_bytes_sent';
sendfile on;
keepalive_requests 100000;
limit_conn_zone $server_port zone=all:1m;
limit_conn_log_level info;
upstream backend {{ server {LOOPBACK}:{backend}; keepalive 16; }}
server {{
    listen {LOOPBACK}:{port} backlog=2048;
    access_log {log} tally;
    limit_conn all {limit};
    limit_conn_status 401;
    limit_rate {rate};
    location / {{
        proxy_pass http://backend;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $http_host;
        proxy_buffering on;
        proxy_buffer_size 64k;
        proxy_buffers 8 512k;
        proxy_busy_buffers_size 1m;
        proxy_max_temp_file_size 0;
    }}
}}
server {{
    listen {LOOPBACK}:{status_port};
    access_log off;
    location / {{ stub_status; }}
}}
"""
