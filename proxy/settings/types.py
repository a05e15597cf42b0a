"""The types of single keys: how each is read, described in the JSON Schema, and shown."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    WithJsonSchema,
)

from proxy.settings.values import (
    ByteRate,
    HostPort,
    Network,
    Rate,
    format_duration,
    parse_duration,
    parse_network,
    parse_registry_url,
    parse_size,
)
from proxy.upstream.egress import EgressProxy
from proxy.upstream.hosts import HostPattern

# Each socket gets at least this long before it is given up for another: whatever the rate, most of
# the time goes into bytes and not into new connections, so that an answer ends some day.
MIN_STALL_TIME = 1.0
# Above it, lines that are merely not very fast count as broken.
MAX_STALL_RATE = ByteRate(10 * 2**20)

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY_PREFIX = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*/?")
NAME = re.compile(r"(?:[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:]+\])(?::\d{1,5})?")


@dataclass(frozen=True, slots=True)
class Shown:
    """How a type appears in the settings table: its name, and the text of a default."""

    kind: str
    default: str | None = None


def _no_boolean(value: object) -> object:
    # Python counts True as 1; in a file it is a slip.
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _file_path(value: object) -> object:
    if not isinstance(value, str):
        return value
    if "\0" in value:
        raise ValueError("must be a path, and none holds a NUL character")
    return os.path.expanduser(value)


def _egress(value: object) -> EgressProxy:
    form = "must be the URL of a proxy, such as 'http://proxy.example.com:3128'"
    if isinstance(value, str):
        try:
            urlsplit(value.strip())
        except ValueError:  # in Python's words
            raise ValueError(form) from None
    proxy = EgressProxy.parse(value)
    if urlsplit(proxy.url).port == 0:
        raise ValueError(f"{form}: no proxy listens on port 0")
    return proxy


def _account(value: str) -> str:
    if ":" in value:
        raise ValueError("must not hold a colon: HTTP Basic ends the name at the first one")
    return _printable(value)


def _secret(value: SecretStr) -> SecretStr:
    _printable(value.get_secret_value())
    return value


def _printable(value: str) -> str:
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in value):
        raise ValueError("must not hold control characters: HTTP Basic cannot carry them")
    return value


def _patient_rate(value: ByteRate) -> ByteRate:
    if value > MAX_STALL_RATE:
        raise ValueError(
            f"must be at most {MAX_STALL_RATE}: every answer that is slower is cut off"
        )
    return value


def _patient_time(value: float) -> float:
    if value < MIN_STALL_TIME:
        least = format_duration(MIN_STALL_TIME)
        raise ValueError(f"must be at least {least}: less shows nothing of a connection")
    return value


def pattern(expression: str, message: str) -> AfterValidator:
    compiled = re.compile(expression)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(message)
        return value

    return AfterValidator(check)


def _prefix(value: str) -> str:
    if value and not _REPOSITORY_PREFIX.fullmatch(value):
        raise ValueError("must be the beginning of a repository name, such as 'dockerhub-proxy/'")
    return value if not value or value.endswith("/") else f"{value}/"


def text_schema(*examples: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "examples": list(examples)})


def _amount_schema(number: str, *examples: str) -> WithJsonSchema:
    either = [{"type": number, "minimum": 0}, {"type": "string", "examples": list(examples)}]
    return WithJsonSchema({"anyOf": either})


Address = Annotated[
    HostPort,
    PlainValidator(HostPort.parse),
    PlainSerializer(str),
    text_schema("127.0.0.1:5050", "[::1]:5050"),
    Shown("host:port"),
]
TrustedNetwork = Annotated[
    Network,
    PlainValidator(parse_network),
    PlainSerializer(str),
    text_schema("10.0.0.0/8", "192.0.2.7"),
]
Size = Annotated[
    int, BeforeValidator(parse_size), _amount_schema("integer", "50GiB"), Shown("size")
]
EgressUrl = Annotated[
    EgressProxy,
    PlainValidator(_egress),
    PlainSerializer(str),
    text_schema("http://proxy.example.com:3128", "http://user:password@proxy.example.com:3128"),
]
Hosts = Annotated[
    HostPattern,
    PlainValidator(HostPattern.parse),
    PlainSerializer(str),
    text_schema("harbor.example.com", ".example.com", "10.0.0.0/8", "minio:9000"),
]
Duration = Annotated[
    float, BeforeValidator(parse_duration), _amount_schema("number", "20s"), Shown("duration")
]
Limit = Annotated[int, Field(ge=1), BeforeValidator(_no_boolean), Shown("number")]
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(_no_boolean), Shown("number")]
MaybeRate = Annotated[
    Annotated[Rate, PlainValidator(Rate.parse), PlainSerializer(str), text_schema("100/s")] | None,
    Shown("rate"),
]
BytesInTime = Annotated[
    ByteRate,
    PlainValidator(ByteRate.parse),
    PlainSerializer(str),
    text_schema("50MiB/s"),
    Shown("byte rate"),
]
StallRate = Annotated[BytesInTime, AfterValidator(_patient_rate)]
StallTime = Annotated[Duration, AfterValidator(_patient_time)]
MaybeBytesInTime = Annotated[BytesInTime | None, Shown("byte rate")]
Url = Annotated[str, BeforeValidator(parse_registry_url), text_schema("https://harbor.example.com")]
FilePath = Annotated[Path, BeforeValidator(_file_path)]
Account = Annotated[str, Field(min_length=1), AfterValidator(_account)]
Secret = Annotated[SecretStr, Field(min_length=1), AfterValidator(_secret)]
Variable = Annotated[str, pattern(r"[A-Za-z_][A-Za-z0-9_]*", "must be a variable's name")]
Helper = Annotated[
    str, pattern(r"[A-Za-z0-9][A-Za-z0-9._-]*", "must be NAME of docker-credential-NAME")
]
Prefix = Annotated[str, AfterValidator(_prefix)]
Name = Annotated[str, pattern(NAME.pattern, "must be host or host:port, in lower case")]

Access = Literal["public", "shared", "passthrough"]
Overload = Literal["wait", "spill"]


class Section(BaseModel):
    """A table of the file: frozen, and without keys that nobody reads."""

    # Deferred: each is read as a part of the whole, which would build its rules a second time.
    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True
    )
