"""The types of single keys: how each is read, described in the JSON Schema, and shown."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
)

from proxy.settings.values import (
    ByteRate,
    HostPort,
    Network,
    Rate,
    parse_duration,
    parse_network,
    parse_registry_url,
    parse_size,
)
from proxy.upstream.egress import EgressProxy
from proxy.upstream.hosts import HostPattern

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


def _home_expanded(value: object) -> object:
    return os.path.expanduser(value) if isinstance(value, str) else value


def _pattern(expression: str, message: str) -> AfterValidator:
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


def _text_schema(*examples: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "examples": list(examples)})


def _amount_schema(number: str, *examples: str) -> WithJsonSchema:
    either = [{"type": number, "minimum": 0}, {"type": "string", "examples": list(examples)}]
    return WithJsonSchema({"anyOf": either})


Address = Annotated[
    HostPort,
    PlainValidator(HostPort.parse),
    PlainSerializer(str),
    _text_schema("127.0.0.1:5050", "[::1]:5050"),
    Shown("host:port"),
]
TrustedNetwork = Annotated[
    Network,
    PlainValidator(parse_network),
    PlainSerializer(str),
    _text_schema("10.0.0.0/8", "192.0.2.7"),
]
Size = Annotated[
    int, BeforeValidator(parse_size), _amount_schema("integer", "50GiB"), Shown("size")
]
EgressUrl = Annotated[
    EgressProxy,
    PlainValidator(EgressProxy.parse),
    PlainSerializer(str),
    _text_schema("http://proxy.example.com:3128", "http://user:password@proxy.example.com:3128"),
]
Hosts = Annotated[
    HostPattern,
    PlainValidator(HostPattern.parse),
    PlainSerializer(str),
    _text_schema("harbor.example.com", ".example.com", "10.0.0.0/8", "minio:9000"),
]
Duration = Annotated[
    float, BeforeValidator(parse_duration), _amount_schema("number", "20s"), Shown("duration")
]
Limit = Annotated[int, Field(ge=1), BeforeValidator(_no_boolean), Shown("number")]
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(_no_boolean), Shown("number")]
MaybeRate = Annotated[
    Annotated[Rate, PlainValidator(Rate.parse), PlainSerializer(str), _text_schema("100/s")] | None,
    Shown("rate"),
]
BytesInTime = Annotated[
    ByteRate,
    PlainValidator(ByteRate.parse),
    PlainSerializer(str),
    _text_schema("50MiB/s"),
    Shown("byte rate"),
]
MaybeBytesInTime = Annotated[BytesInTime | None, Shown("byte rate")]
Url = Annotated[
    str, BeforeValidator(parse_registry_url), _text_schema("https://harbor.example.com")
]
FilePath = Annotated[Path, BeforeValidator(_home_expanded)]
Variable = Annotated[str, _pattern(r"[A-Za-z_][A-Za-z0-9_]*", "must be a variable's name")]
Helper = Annotated[
    str, _pattern(r"[A-Za-z0-9][A-Za-z0-9._-]*", "must be NAME of docker-credential-NAME")
]
Prefix = Annotated[str, AfterValidator(_prefix)]
Name = Annotated[str, _pattern(NAME.pattern, "must be host or host:port, in lower case")]

Access = Literal["public", "shared", "passthrough"]
Overload = Literal["wait", "spill"]


class Section(BaseModel):
    """A table of the file: frozen, and without keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
