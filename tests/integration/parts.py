"""The servers of the suite: registries of every kind, and pullpool itself.

Each takes the rig it lives in, picks its own port and directory, and is ready when its constructor
returns.
"""

import json
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.parts import free_port
from tests.integration.rig import Daemon, Rig, debian, listens

NAME = "harbor.example.com"
"""The name under which the clients know the upstream, whatever address it has here."""

ROBOT = ("robot$pull", "correct horse battery staple")
"""The account that may pull private images."""

# bcrypt of the password above; registries read nothing else, and Python has no bcrypt of its own.
_HTPASSWD = "robot$pull:$2b$05$/UkWfdNWxykU11rV7gdZHuEn5S.D//CdlD/fkWBHq2esu.Rk/ZoMC\n"


@dataclass(frozen=True, slots=True)
class TokenAuth:
    """How a registry asks for tokens: where, for which service, and signed by whom (PEM file)."""

    realm: str
    service: str
    issuer: str
    roots: Path


class Registry:
    """docker-registry over a directory; several may share one, with other doors to it."""

    def __init__(
        self,
        rig: Rig,
        *,
        storage: Path,
        tokens: TokenAuth | None = None,
        password: bool = False,
    ) -> None:
        place = rig.place("registry")
        self.port = free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"
        configuration = {
            "version": 0.1,
            "log": {"level": "warn"},
            "storage": {"filesystem": {"rootdirectory": str(storage)}},
            "http": {"addr": self.host, "secret": "one secret for every door"},
            **_auth(tokens, password, place),
        }
        # Every JSON text is a YAML text.
        (place / "config.yml").write_text(json.dumps(configuration))
        self._daemon = Daemon(
            "registry",
            [debian("docker-registry"), "serve", place / "config.yml"],
            directory=place,
            ready=lambda: listens(self.port),
        )
        rig.start(self._daemon)


def _auth(tokens: TokenAuth | None, password: bool, place: Path) -> dict[str, object]:
    if tokens is not None:
        token = {
            "realm": tokens.realm,
            "service": tokens.service,
            "issuer": tokens.issuer,
            "rootcertbundle": str(tokens.roots),
        }
        return {"auth": {"token": token}}
    if password:
        (place / "htpasswd").write_text(_HTPASSWD)
        return {"auth": {"htpasswd": {"realm": "registry", "path": str(place / "htpasswd")}}}
    return {}


@dataclass(frozen=True, slots=True)
class Serving:
    """How pullpool is to serve an upstream."""

    url: str
    max_connections: int = 8
    segments: int = 8
    on_abandon: str = "finish"
    credentials: tuple[str, str] | None = None
    ca_file: Path | None = None
    tag_ttl: str = "1h"
    cache: Path | None = None
    min_free: str = "1GiB"
    tables: str = ""
    """More tables of the configuration file."""


def _toml(serving: Serving, cache: Path, port: int, admin: int) -> str:
    # A JSON string is a TOML basic string.
    upstream: dict[str, object] = {
        "url": serving.url,
        "max_connections": serving.max_connections,
        "segments": serving.segments,
    }
    if serving.credentials is not None:
        upstream["username"], upstream["password"] = serving.credentials
    if serving.ca_file is not None:
        upstream["ca_file"] = str(serving.ca_file)
    return "\n".join(
        [
            f'listen = "127.0.0.1:{port}"',
            f'admin = "127.0.0.1:{admin}"',
            f'default_upstream = "{NAME}"',
            "[cache]",
            f"dir = {json.dumps(str(cache))}",
            'max_size = "4GiB"',
            f'min_free = "{serving.min_free}"',
            f'on_abandon = "{serving.on_abandon}"',
            "[tags]",
            f'ttl = "{serving.tag_ttl}"',
            f'[upstreams."{NAME}"]',
            *(f"{key} = {json.dumps(value)}" for key, value in upstream.items()),
            serving.tables,
        ]
    )


class Pullpool:
    """The thing under test: `python -m proxy serve`, ready when its admin listener says so."""

    def __init__(self, rig: Rig, serving: Serving) -> None:
        place = rig.place("pullpool")
        self.cache = serving.cache or place / "cache"
        self.port = free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"
        self.admin = f"http://127.0.0.1:{free_port()}"
        configuration = place / "pullpool.toml"
        admin_port = int(self.admin.rpartition(":")[2])
        configuration.write_text(_toml(serving, self.cache, self.port, admin_port))
        self._daemon = Daemon(
            "pullpool",
            [sys.executable, "-m", "proxy", "serve", "--config", configuration],
            directory=place,
            ready=self.is_ready,
        )
        rig.start(self._daemon)

    def is_ready(self) -> bool:
        """Whether /readyz says that it would serve."""
        try:
            with urllib.request.urlopen(f"{self.admin}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels; 0 when there is none."""
        with urllib.request.urlopen(f"{self.admin}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def stop(self) -> int | None:
        """Ask it to end; its exit status."""
        return self._daemon.stop()

    def start(self) -> None:
        """Start it again on the same cache and the same ports."""
        self._daemon.start()
