"""nginx as the front of an upstream: it holds the limit, sets the pace, ends TLS and counts bytes.

Its access log is the suite's witness. It is written by somebody who is not under test, one line for
each request at the moment it ends, and says how many bytes of body were sent, also when the other
side hung up half-way.
"""

import json
import re
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

from benchmarks.parts import free_port
from tests.integration.rig import Daemon, PartFailed, Rig, debian, listens

_BLOB = re.compile(r"/blobs/(?P<digest>sha(?:256|512):[0-9a-f]+)")

_LOG_LINE = (
    """'{"status":$status,"method":"$request_method","path":"$uri","""
    """"bytes":$body_bytes_sent,"range":"$http_range","connection":$connection}'"""
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request that nginx answered: status, method, path, body bytes sent, Range asked."""

    status: int
    method: str
    path: str
    bytes: int
    range: str
    connection: int

    @property
    def blob(self) -> str | None:
        """The digest of the blob that was asked for, if it was one."""
        found = _BLOB.search(self.path)
        return found["digest"] if found else None


class AccessLog:
    """The requests that ended so far."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[Exchange]:
        for line in self._path.read_text().splitlines():
            yield Exchange(**json.loads(line))

    def refused(self) -> int:
        """How often the limit answered."""
        return sum(exchange.status == 401 and "/v2/" in exchange.path for exchange in self)

    def blob_bytes(self) -> Counter[str]:
        """Body bytes sent of each blob, by digest."""
        sent: Counter[str] = Counter()
        for exchange in self:
            if exchange.blob and exchange.status in (200, 206):
                sent[exchange.blob] += exchange.bytes
        return sent


@dataclass(frozen=True, slots=True)
class Front:
    """What nginx does in front of a registry.

    `connections`: requests in progress at once, 401 beyond (it does not count idle connections).
    `rate`: bytes a second of one answer, as nginx writes it ("20m").
    `ranges`: whether it heeds Range; else every answer is the whole blob.
    `certificate`: PEM file of key and chain, for TLS. `token_port`: where `/token` is answered.
    """

    connections: int | None = None
    rate: str | None = None
    ranges: bool = True
    certificate: Path | None = None
    token_port: int | None = None
    port: int = field(default_factory=free_port)


def _limits(front: Front) -> str:
    lines = []
    if front.connections is not None:
        lines += [f"limit_conn upstream {front.connections};", "limit_conn_status 401;"]
    if front.rate is not None:
        lines.append(f"limit_rate {front.rate};")
    return "\n".join(lines)


def _ranges(front: Front) -> str:
    # max_ranges is for what nginx cuts itself; the registry behind it must not be asked to cut.
    return "" if front.ranges else 'max_ranges 0; proxy_set_header Range "";'


def _token(front: Front) -> str:
    if front.token_port is None:
        return ""
    return f"location = /token {{ proxy_pass http://127.0.0.1:{front.token_port}; }}"


def _configuration(front: Front, registry_port: int, status_port: int, place: Path) -> str:
    tls = front.certificate
    # limit_rate holds only for what nginx buffers; without a bound on the temporary file it would
    # read the whole body ahead of the client that it feeds slowly.
    return f"""
        daemon off;
        master_process off;
        pid {place}/nginx.pid;
        error_log stderr warn;
        events {{ worker_connections 1024; }}
        http {{
            log_format exchange escape=json {_LOG_LINE};
            access_log {place}/access.log exchange;
            client_body_temp_path {place}/body;
            proxy_temp_path {place}/proxy;
            fastcgi_temp_path {place}/fastcgi;
            uwsgi_temp_path {place}/uwsgi;
            scgi_temp_path {place}/scgi;
            limit_conn_zone $server_name zone=upstream:1m;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-Proto $scheme;
            {_ranges(front)}
            proxy_buffering on;
            proxy_max_temp_file_size 0;
            server {{
                server_name registry;
                listen 127.0.0.1:{front.port} {"ssl" if tls else ""};
                {f"ssl_certificate {tls}; ssl_certificate_key {tls};" if tls else ""}
                {_token(front)}
                location /v2/ {{
                    {_limits(front)}
                    proxy_pass http://127.0.0.1:{registry_port};
                }}
            }}
            server {{
                listen 127.0.0.1:{status_port};
                location = /progress {{ stub_status; access_log off; }}
            }}
        }}
    """


class Nginx:
    """nginx in front of a registry, on a port of its own that survives a stop and a start."""

    def __init__(self, rig: Rig, front: Front, *, registry_port: int) -> None:
        place = rig.place("nginx")
        self.port = front.port
        self.host = f"127.0.0.1:{front.port}"
        self.url = f"{'https' if front.certificate else 'http'}://{self.host}"
        self._status = free_port()
        self.log = AccessLog(place / "access.log")
        configuration = place / "nginx.conf"
        configuration.write_text(_configuration(front, registry_port, self._status, place))
        self._daemon = Daemon(
            "nginx",
            [debian("nginx"), "-p", place, "-c", configuration, "-e", "stderr"],
            directory=place,
            ready=lambda: listens(front.port),
        )
        rig.start(self._daemon)

    def answering(self) -> int:
        """How many requests it is sending answers to at this moment."""
        with urlopen(f"http://127.0.0.1:{self._status}/progress") as answer:
            text = answer.read().decode()
        # "Reading: 0 Writing: 3 Waiting: 1", and one of those written is this very answer.
        writing = re.search(r"Writing: (\d+)", text)
        if writing is None:
            raise PartFailed(f"not a status page of nginx: {text}")
        return int(writing[1]) - 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The upstream says nothing: what is under way stays so."""
        self._daemon.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self._daemon.send(signal.SIGCONT)

    def stop(self) -> None:
        """The upstream is gone: connections to it are refused."""
        self._daemon.stop()

    def start(self) -> None:
        """The upstream is back, at the same address."""
        self._daemon.start()
