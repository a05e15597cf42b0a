"""Where the directory is: one server, a service that Sentinels know, or a Cluster. Pure.

redis://redis:6379/0                       one server; rediss:// with TLS, so too below
redis+sentinel://s1:26379,s2/fleet/0       what the Sentinels call "fleet", database 0
redis+cluster://r1:6379,r2:6379            a Cluster, found by any of its servers
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

Kind = Literal["server", "sentinel", "cluster"]

FORM = (
    "must be the URL of a Redis or Valkey, such as 'redis://redis:6379/0',"
    " 'redis+sentinel://s1:26379,s2:26379/SERVICE/0' or 'redis+cluster://r1:6379,r2:6379'"
    " (rediss for TLS)"
)
_URL = re.compile(r"(redis|rediss)(?:\+([a-z]+))?://([^/?#]*)(/[^?#]*)?", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]", re.ASCII)
_DATABASE = re.compile(r"[0-9]{1,4}", re.ASCII)
_SERVICE = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_PORTS = {"server": 6379, "sentinel": 26379, "cluster": 6379}


class Address(NamedTuple):
    """Where one server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Place:
    """A directory's URL, taken apart."""

    kind: Kind
    tls: bool
    addresses: tuple[Address, ...]
    service: str = ""
    database: int = 0

    @classmethod
    def parse(cls, value: object) -> Self:
        """Raises ValueError, whose words show the right form."""
        if isinstance(value, cls):
            return value
        match = _URL.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None or match[2] not in (None, "sentinel", "cluster"):
            raise ValueError(FORM)
        kind: Kind = "server" if match[2] is None else match[2]  # type: ignore[assignment]  # above
        if "@" in match[3]:
            raise ValueError("must not hold a user name or password: they have keys of their own")
        addresses = tuple(_address(text, _PORTS[kind]) for text in match[3].split(","))
        if kind == "server" and len(addresses) > 1:
            raise ValueError(
                "must name one server; several are redis+sentinel://… or redis+cluster://…"
            )
        parts = (match[4] or "").strip("/").split("/")
        service = parts.pop(0) if kind == "sentinel" else ""
        if kind == "sentinel" and not _SERVICE.fullmatch(service):
            raise ValueError("must name the service that the Sentinels know: '…:26379/SERVICE/0'")
        database = "/".join(parts) or "0"
        if not _DATABASE.fullmatch(database):
            raise ValueError("must end in the number of a database, or in none")
        if kind == "cluster" and int(database):
            raise ValueError("must have database 0, or none: a Cluster has no other")
        return cls(kind, match[1] == "rediss", addresses, service, int(database))

    @property
    def is_loopback(self) -> bool:
        """Whether nothing that is said to it leaves this machine, by what it is called."""
        return all(
            one.host in ("localhost", "::1") or re.fullmatch(r"127(\.[0-9]{1,3}){3}", one.host)
            for one in self.addresses
        )

    def __str__(self) -> str:
        scheme = ("rediss" if self.tls else "redis") + (
            "" if self.kind == "server" else f"+{self.kind}"
        )
        path = f"/{self.service}/{self.database}" if self.service else f"/{self.database}"
        tail = "" if self.kind == "cluster" else path
        return f"{scheme}://{','.join(map(str, self.addresses))}{tail}"


def _address(text: str, default: int) -> Address:
    host, colon, port = text, "", ""
    if not text.endswith("]"):
        head, colon, tail = text.rpartition(":")
        if colon:
            host, port = head, tail
    if not _HOST.fullmatch(host):
        raise ValueError(f"must name hosts, and {text[:60]!r} is none")
    if colon and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise ValueError(f"must have ports between 1 and 65535, and {port[:10]!r} is none")
    return Address(host.strip("[]"), int(port) if colon else default)
