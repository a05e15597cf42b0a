"""What stands between the crowd and the registry: nothing, two rivals at their best, pullpool.

Each starts cold in an empty directory and is ready when its block begins.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.nginx import WORKERS, running_nginx
from benchmarks.parts import LOOPBACK, Part, PartFailed, await_http, free_port, running, shown
from benchmarks.scenario import Options
from benchmarks.upstreams import registry_config


@dataclass(frozen=True, slots=True)
class Front:
    """Where the crowd goes, and the program there (None when it is the upstream itself).

    `configuration` is how the program was set up, in its own words.
    """

    port: int
    part: Part | None
    configuration: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """One row of the table; `start(upstream's port, cap, directory)` runs it."""

    name: str
    title: str
    program: str  # what must be installed; "" for nothing
    start: Callable[[int, int, Path], AbstractContextManager[Front]]

    @property
    def is_installed(self) -> bool:
        return not self.program or shutil.which(self.program) is not None


@contextlib.contextmanager
def nothing(upstream: int, cap: int, directory: Path) -> Iterator[Front]:
    """The crowd meets the registry itself."""
    yield Front(upstream, None)


@contextlib.contextmanager
def registry_proxy(upstream: int, cap: int, directory: Path) -> Iterator[Front]:
    """docker-registry as a pull-through cache; it has no limit to set."""
    port = free_port()
    config = directory / "proxy.yml"
    url = f"http://{LOOPBACK}:{upstream}"
    text = registry_config(port, directory / "cache", proxied=url)
    config.write_text(text)
    with running("registry-proxy", ("docker-registry", "serve", str(config)), directory) as part:
        await_http(part, port, "/v2/", ready=lambda status: status == 200)
        yield Front(port, part, shown(text, directory))


@contextlib.contextmanager
def nginx_cache(upstream: int, cap: int, directory: Path) -> Iterator[Front]:
    """nginx as a cache with its lock tuned: one fetch per key, however long it takes.

    Its idle connections stay within the cap (the keepalive pool is per worker). `max_conns` would
    turn the upstream's 401 into nginx's own 502: the free edition has no queue.
    """
    port, status_port = free_port(), free_port()
    http = f"""
sendfile on;
tcp_nopush on;
access_log off;
keepalive_requests 100000;
proxy_cache_path {directory}/cache levels=1:2 keys_zone=blobs:16m max_size=20g inactive=7d
                 use_temp_path=off;
upstream registry {{ server {LOOPBACK}:{upstream}; keepalive {max(1, cap // WORKERS)}; }}
server {{
    listen {LOOPBACK}:{port} backlog=2048 reuseport;
    location / {{
        proxy_pass http://registry;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_buffer_size 64k;
        proxy_buffers 8 512k;
        proxy_busy_buffers_size 1m;
        proxy_cache blobs;
        proxy_cache_key $uri;
        proxy_cache_valid 200 7d;
        proxy_cache_lock on;
        proxy_cache_lock_timeout 1h;
        proxy_cache_lock_age 1h;
        proxy_read_timeout 1h;
    }}
}}
server {{
    listen {LOOPBACK}:{status_port};
    location / {{ stub_status; }}
}}
"""
    with running_nginx("nginx-cache", http, directory) as part:
        await_http(part, status_port, "/", ready=lambda status: status == 200)
        yield Front(port, part, shown(http, directory))


@contextlib.contextmanager
def pullpool(upstream: int, cap: int, directory: Path) -> Iterator[Front]:
    """The product, told the cap and otherwise as it comes."""
    port, admin = free_port(), free_port()
    command = (
        *(sys.executable, "-m", "proxy", "serve", f"http://{LOOPBACK}:{upstream}"),
        *("--listen", f"{LOOPBACK}:{port}", "--admin", f"{LOOPBACK}:{admin}"),
        *("--cache-dir", str(directory / "cache"), "--cache-size", "20GiB"),
        *("--max-connections", str(cap)),
    )
    with running("pullpool", command, directory) as part:
        await_http(part, admin, "/readyz", ready=lambda status: status == 200)
        yield Front(port, part, shown(" ".join(command), directory))


def chosen(subjects: Sequence[Subject], options: Options) -> list[Subject]:
    """Those that are asked for and that this machine can run; says which it cannot.

    Raises PartFailed when none is left.
    """
    found = [each for each in subjects if not options.only or each.name in options.only]
    for each in found:
        if not each.is_installed:
            options.log(f"without {each.title}: {each.program} is not installed")
    installed = [each for each in found if each.is_installed]
    if not installed:
        raise PartFailed(f"none of {', '.join(each.name for each in subjects)} is to be measured")
    return installed


SUBJECTS = (
    Subject("nothing", "nothing", "", nothing),
    Subject("registry", "docker-registry proxy", "docker-registry", registry_proxy),
    Subject("nginx", "nginx proxy_cache_lock, tuned", "nginx", nginx_cache),
    Subject("pullpool", "pullpool", "", pullpool),
)
