"""Values that a person writes in a configuration: addresses, rates, sizes, durations, URLs.

Pure and free of pydantic, so that a command which needs one address (the health check) starts
without loading the whole model. Every parser takes what TOML, an environment variable or a flag
may hold, and raises ValueError with a message that shows the right form.
"""

import ipaddress
import math
import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

# RFC 952 / RFC 1123 host names and dotted IPv4; underscores occur in compose service names.
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
# Few enough digits that nothing overflows, more than anybody needs.
_NUMBER = r"[0-9]{1,18}(?:\.[0-9]{1,9})?"
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION_PART = re.compile(rf"({_NUMBER})\s*(ms|s|m|h|d)")
_DURATION = re.compile(rf"(?:{_NUMBER}\s*(?:ms|s|m|h|d)\s*)+")
_BYTES = {"b": 1} | {
    f"{prefix}{unit}": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for unit, base in (("ib", 1024), ("b", 1000))
}
_SIZE = re.compile(rf"({_NUMBER})\s*([A-Za-z]*)")
_BYTE_RATE = re.compile(rf"({_NUMBER}\s*[A-Za-z]+)\s*/\s*([smh])")
_RATE = re.compile(r"([0-9]{1,9})\s*/\s*([0-9]{0,9})\s*([smh])")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True, order=True)
class HostPort:
    """An address to listen on or to call; port 0 lets the system choose one."""

    host: str
    port: int

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read "host:port", "127.0.0.1:port" or "[::1]:port"; raise ValueError otherwise."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise ValueError("must be an address such as '127.0.0.1:5050'")
        host, colon, port = value.strip().rpartition(":")
        if not colon:
            raise ValueError("must be host:port, such as '127.0.0.1:5050'")
        if not host:
            raise ValueError(f"must name the host too: '0.0.0.0:{port}' for every interface")
        if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
            raise ValueError("must end in a port between 0 and 65535")
        return cls(_host(host), int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_network(value: object) -> Network:
    """A network such as "10.0.0.0/8", or one address; raise ValueError otherwise."""
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a network such as '10.0.0.0/8' or an address")
    try:
        network = ipaddress.ip_network(value.strip(), strict=False)
    except ValueError:
        raise ValueError("must be a network such as '10.0.0.0/8' or an address") from None
    if network.network_address != ipaddress.ip_interface(value.strip()).ip:
        raise ValueError(f"must end where the network does: '{network}'")
    return network


def _host(text: str) -> str:
    if text.startswith("[") and text.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(text[1:-1]))
        except ValueError:
            raise ValueError("must have an IPv6 address between the brackets") from None
    if ":" in text:
        raise ValueError("must have an IPv6 address in brackets, such as '[::1]:5050'")
    if not _HOST.fullmatch(text):
        raise ValueError("must begin with a host name or an IP address")
    return text


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `count` requests in `seconds`."""

    count: int
    seconds: float

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read "100/s", "600/m", "5000/h" or "100/6h"; raise ValueError otherwise."""
        if isinstance(value, cls):
            return value
        match = _RATE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            raise ValueError("must be a rate such as '100/s', '600/m' or '100/6h'")
        count, every, unit = int(match[1]), int(match[2] or 1), match[3]
        if not count or not every:
            raise ValueError("must be above zero; leave the key out for no limit")
        return cls(count, every * _SECONDS[unit])

    def __str__(self) -> str:
        for unit in ("h", "m"):
            every, rest = divmod(self.seconds, _SECONDS[unit])
            if every and not rest:
                return f"{self.count}/{'' if every == 1 else int(every)}{unit}"
        return f"{self.count}/{'' if self.seconds == 1 else _plain(self.seconds)}s"


def parse_duration(value: object) -> float:
    """Seconds in "20s", "250ms", "3m", "1h30m", or in a plain number of seconds."""
    form = "must be a duration such as '20s', '250ms', '3m', '1h30m', or a number of seconds"
    if isinstance(value, str):
        text = value.strip()
        if _DURATION.fullmatch(text):
            parts = _DURATION_PART.findall(text)
            return math.fsum(float(number) * _SECONDS[unit] for number, unit in parts)
        if not re.fullmatch(_NUMBER, text):
            raise ValueError(form)
        value = float(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(form)
    if not math.isfinite(value) or value < 0:
        raise ValueError("must be a finite time, not below zero")
    return float(value)


def format_duration(seconds: float) -> str:
    """The shortest form that `parse_duration` reads back: 86400 → "24h", 0.25 → "250ms"."""
    if 0 < seconds < 1:
        return f"{_plain(seconds * 1000)}ms"
    for unit in ("h", "m"):
        if seconds > _SECONDS[unit] and seconds % _SECONDS[unit] == 0:
            return f"{_plain(seconds / _SECONDS[unit])}{unit}"
    return f"{_plain(seconds)}s"


def _plain(number: float) -> str:
    # Not %g, which turns to exponents at a million.
    return f"{number:.6f}".rstrip("0").rstrip(".")


def parse_size(value: object) -> int:
    """Bytes in "50GiB", "500 MB", "1.5TiB", or in a plain whole number of bytes."""
    form = "must be a size such as '50GiB', '500MB', or a whole number of bytes"
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        unit = _BYTES.get((match[2] or "b").lower()) if match else None
        if match is None or unit is None or (unit == 1 and "." in match[1]):
            raise ValueError(form)
        # Whole numbers stay integers: a float would lose bytes above 2^53.
        return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(form)
    if value < 0:
        raise ValueError("must not be below zero")
    return value


def format_size(size: int) -> str:
    """The shortest form that `parse_size` reads back: 53687091200 → "50GiB"."""
    for prefix in ("t", "g", "m", "k"):
        unit = _BYTES[f"{prefix}ib"]
        if size and size % unit == 0:
            return f"{size // unit}{prefix.upper()}iB"
    return str(size)


@dataclass(frozen=True, slots=True, order=True)
class ByteRate:
    """At most so many bytes a second."""

    per_second: int

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read "50MiB/s", "400 kB/s" or "6GiB/h"; raise ValueError otherwise.

        Both units have to be written: "100/s" is a rate of requests, "100MB" an amount.
        """
        if isinstance(value, cls):
            return value
        form = "must be bytes in a time, such as '50MiB/s' or '400kB/s'"
        match = _BYTE_RATE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            raise ValueError(form)
        try:
            rate = int(parse_size(match[1]) / _SECONDS[match[2]])
        except ValueError:
            raise ValueError(form) from None
        if rate < 1:
            raise ValueError("must be at least one byte a second; leave the key out for no limit")
        return cls(rate)

    def __str__(self) -> str:
        size = format_size(self.per_second)
        return f"{size}{'B' if size.isdigit() else ''}/s"


def parse_registry_url(value: object) -> str:
    """A registry's base URL, host in lower case, no slash at the end; ValueError otherwise.

    A user name, a password, a query or a fragment have no place in it: it is shown in logs and
    metrics, and credentials have keys of their own.
    """
    if not isinstance(value, str):
        raise ValueError("must be a URL such as 'https://harbor.example.com'")
    try:
        parts = urlsplit(value.strip())
        port = parts.port
    except ValueError:
        raise ValueError("must be a URL such as 'https://harbor.example.com:8443'") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("must begin with https:// or http://")
    if "@" in parts.netloc:
        raise ValueError("must not hold a user name or password: use the keys for credentials")
    if parts.query or parts.fragment or value.rstrip().endswith(("?", "#")):
        raise ValueError("must not have a query or a fragment")
    if port == 0:
        raise ValueError("must not have port 0: nothing can be reached there")
    host = _url_host(parts.hostname or "")
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{_url_path(parts.path)}"


def _url_host(host: str) -> str:
    if ":" in host:
        return f"[{_host(f'[{host}]')}]"
    if not _HOST.fullmatch(host):
        raise ValueError("must name a host, such as 'https://harbor.example.com'")
    return host


def _url_path(path: str) -> str:
    path = path.rstrip("/")
    if path == "/v2" or path.endswith("/v2"):
        raise ValueError("must not end in /v2: the protocol adds that itself")
    if not re.fullmatch(r"[A-Za-z0-9._~%/-]*", path) or ".." in path or "//" in path:
        raise ValueError("must have a plain path, or none")
    return path


def registry_name(url: str) -> str:
    """The name that clients know a registry by: host[:port] of its (parsed) URL."""
    return urlsplit(url).netloc


def origin(url: str) -> str:
    """Scheme, host and port of a (parsed) URL, the port always given."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{HostPort(parts.hostname or '', port)}"
