"""What stands between the clients and the registry: nothing, three rivals at their best, pullpool.

Each starts cold in an empty directory and is ready when its block begins. How each is set up is in
`setups/`.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.nginx import WORKERS, running_nginx
from benchmarks.parts import (
    LOOPBACK,
    Certificate,
    Part,
    PartFailed,
    await_http,
    free_port,
    is_listening,
    running,
    shown,
    until,
)
from benchmarks.scenario import Options, Sheet
from benchmarks.setups import fill
from benchmarks.upstreams import registry_config


@dataclass(frozen=True, slots=True)
class Front:
    """Where the clients go, and the program there (None when it is the upstream itself).

    `configuration` is how the program was set up, in its own words; `admin` the port on which it
    tells of itself, where it does.
    """

    port: int
    part: Part | None
    configuration: str = ""
    admin: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a subject runs: before which upstream (its port), with how many connections to it
    where that can be said, and in which directory. With a certificate it speaks TLS. `settings` are
    further lines of pullpool's configuration."""

    upstream: int
    cap: int
    directory: Path
    certificate: Certificate | None = None
    access_log: bool = False
    cache_size: str = "20GiB"
    settings: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """One row of the table; `start(place)` runs it."""

    name: str
    title: str
    program: str  # what must be installed; "" for nothing
    start: Callable[[Place], AbstractContextManager[Front]]
    speaks_tls: bool = True

    @property
    def is_installed(self) -> bool:
        return not self.program or shutil.which(self.program) is not None


@contextlib.contextmanager
def nothing(place: Place) -> Iterator[Front]:
    """The crowd meets the registry itself."""
    yield Front(place.upstream, None)


@contextlib.contextmanager
def registry_proxy(place: Place) -> Iterator[Front]:
    """docker-registry as a pull-through cache; it has no limit to set."""
    port, directory, files = free_port(), place.directory, place.certificate
    config = directory / "proxy.yml"
    text = registry_config(
        port,
        directory / "cache",
        proxied=f"http://{LOOPBACK}:{place.upstream}",
        tls=f"  tls:\n    certificate: {files.cert}\n    key: {files.key}" if files else "",
        access_log=place.access_log,
    )
    config.write_text(text)
    with running("registry-proxy", ("docker-registry", "serve", str(config)), directory) as part:
        tls = files is not None
        await_http(part, port, "/v2/", ready=lambda status: status == 200, tls=tls)
        yield Front(port, part, shown(text, directory))


@contextlib.contextmanager
def nginx_cache(place: Place) -> Iterator[Front]:
    """nginx as a cache with its lock tuned."""
    port, status_port = free_port(), free_port()
    directory, files = place.directory, place.certificate
    certificate = f"ssl_certificate {files.cert}; ssl_certificate_key {files.key};" if files else ""
    log = f"{directory}/access.log combined buffer=64k flush=1s" if place.access_log else "off"
    http = fill(
        "nginx-cache.conf",
        port=port,
        status=status_port,
        upstream=place.upstream,
        keepalive=max(1, place.cap // WORKERS),
        directory=directory,
        access_log=log,
        tls="ssl" if files else "",
        certificate=certificate,
    )
    with running_nginx("nginx-cache", http, directory) as part:
        await_http(part, status_port, "/", ready=lambda status: status == 200)
        yield Front(port, part, shown(http, directory))


@contextlib.contextmanager
def varnish(place: Place) -> Iterator[Front]:
    """varnish with its cache in memory; it speaks no TLS and has no limit that makes one wait."""
    port, directory = free_port(), place.directory
    vcl = directory / "varnish.vcl"
    text = fill("varnish.vcl", upstream=place.upstream)
    vcl.write_text(text)
    command = (
        *("varnishd", "-F", "-j", "none", "-n", f"{directory}/varnish", "-f", str(vcl)),
        *("-a", f"{LOOPBACK}:{port}", "-s", "malloc,4g"),
        *("-p", "thread_pool_min=100", "-p", "thread_pool_max=2000", "-p", "listen_depth=4096"),
        *("-p", "fetch_chunksize=1m", "-p", "timeout_idle=3600"),
    )
    with running("varnish", command, directory) as part:
        await_http(part, port, "/__ready", ready=lambda status: status == 200)
        yield Front(port, part, shown(" ".join(command) + "\n\n" + text, directory))


@contextlib.contextmanager
def pullpool(place: Place, *, turns: Path | None = None) -> Iterator[Front]:
    """The product, told the cap, where to log what, and otherwise as it comes; or with a watch on
    its loop, which writes long ``turns`` there (`watched.py`)."""
    port, admin = free_port(), free_port()
    directory, files = place.directory, place.certificate
    tls = f'[tls]\ncert_file = "{files.cert}"\nkey_file = "{files.key}"\n' if files else ""
    text = fill(
        "pullpool.toml",
        port=port,
        admin=admin,
        log="" if place.access_log else 'log_level = "warning"',
        settings=place.settings,
        tls=tls,
        directory=directory,
        size=place.cache_size,
        upstream=place.upstream,
        cap=place.cap,
    )
    config = directory / "pullpool.toml"
    config.write_text(text)
    serve = ("proxy", "serve", "--config")
    program = serve if turns is None else ("benchmarks.watched", str(turns))
    command = (sys.executable, "-m", *program, str(config))
    # An installed package has its bytecode; one that may not keep it compiles at each start.
    compiled = {"PYTHONDONTWRITEBYTECODE": ""}
    with running("pullpool", command, directory, environment=compiled) as part:
        await_http(part, admin, "/readyz", ready=lambda status: status == 200)
        yield Front(port, part, shown(text, directory), admin)


def two_workers(place: Place) -> AbstractContextManager[Front]:
    """The product in two processes, as many as nginx has here."""
    return pullpool(replace(place, settings=f"workers = 2\n{place.settings}"))


@contextlib.contextmanager
def bare(place: Place, *, processes: int = 1) -> Iterator[Front]:
    """A protocol on pullpool's loop that only writes prepared bytes and a log (`bare.py`)."""
    port, log = free_port(), place.directory / "access.log"
    program = (sys.executable, "-m", "benchmarks.bare")
    command = (*program, str(port), str(place.upstream), str(log), str(processes))
    with running("bare", command, place.directory) as part:
        # Its first answer would be everybody's.
        until(lambda: not part.is_running or is_listening(port), "bare to listen")
        part.check()
        yield Front(port, part, shown(" ".join(command), place.directory))


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


def with_absent(sheet: Sheet, subjects: Sequence[Subject], options: Options) -> Sheet:
    """The same table, which also says who was asked for and is not installed."""
    asked = [each for each in subjects if not options.only or each.name in options.only]
    absent = [f"{each.title} is not installed" for each in asked if not each.is_installed]
    return replace(sheet, caption="; ".join(filter(None, (sheet.caption, *absent))))


NOTHING = Subject("nothing", "nothing", "", nothing)
REGISTRY = Subject("registry", "docker-registry proxy", "docker-registry", registry_proxy)
NGINX = Subject("nginx", "nginx proxy_cache, tuned", "nginx", nginx_cache)
VARNISH = Subject("varnish", "varnish", "varnishd", varnish, speaks_tls=False)
PULLPOOL = Subject("pullpool", "pullpool", "", pullpool)
CACHES = (REGISTRY, NGINX, VARNISH, PULLPOOL)
SUBJECTS = (NOTHING, *CACHES)
