"""The configuration: one frozen model, from flags, environment, file and defaults, in this order.

    settings = load_settings(Path("pullpool.toml"), {"listen": "0.0.0.0:5050"})

Everything that is wrong is reported at once (`ConfigError.faults`), each fault at its key. Only the
composition root and the commands know `Settings`; the parts take plain arguments.

Every key outside [upstreams.NAME] has a variable: `queue.blob_deadline` is
PULLPOOL_QUEUE_BLOB_DEADLINE. Variables are looked up by name, never by prefix, because Kubernetes
sets PULLPOOL_PORT and the like beside a service called pullpool.
"""

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticUndefined
from pydantic_settings import InitSettingsSource

from proxy.settings.faults import (
    ConfigError,
    Fault,
    Layer,
    Location,
    Rest,
    collect,
    read_toml,
)
from proxy.settings.fleet import Fleet
from proxy.settings.listener import Auth, Tls
from proxy.settings.model import Cache, Queue, Settings, Tags, default_cache_dir
from proxy.settings.types import Access, Overload, Shown
from proxy.settings.upstream import Upstream
from proxy.settings.values import ByteRate, HostPort, Rate, format_duration, format_size

__all__ = [
    "Access",
    "Auth",
    "ByteRate",
    "Cache",
    "ConfigError",
    "Fault",
    "Fleet",
    "HostPort",
    "Overload",
    "Queue",
    "Rate",
    "Row",
    "Settings",
    "Tags",
    "Tls",
    "Upstream",
    "json_schema",
    "load_settings",
    "load_usable",
    "settings_table",
    "unknown_variables",
]

_PREFIX = "PULLPOOL_"
# Named after its flag, as people look for it there.
_ALIASES: Mapping[str, Location] = {f"{_PREFIX}CACHE_SIZE": ("cache", "max_size")}
# A variable holds a JSON array for them, or one element.
_LISTS: frozenset[Location] = frozenset({("tags", "immutable"), ("trusted_proxies",)})
# Read by the command line itself.
_OF_THE_COMMANDS = (f"{_PREFIX}CONFIG",)


def load_settings(
    config: Path | None,
    overrides: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Settings from flags (`overrides`, nested as in the file) > environment > file > defaults.

    `environ` stands in for the process's environment. Raises ConfigError with every fault.
    """
    environ = os.environ if environ is None else environ
    document = {} if config is None else read_toml(config)
    flags = deepcopy(dict(overrides))
    defaults = {"cache": {"dir": str(default_cache_dir(environ))}}
    layers = (
        Layer(flags, dict.fromkeys(_leaves(flags), "the command line")),
        _environment(environ),
        Layer(document),
        Layer(defaults),
    )
    return collect(Settings, layers, _build)


def load_usable(
    config: Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str]
) -> Settings:
    """`load_settings`, and then a look at the files and variables that the settings name.

    Raises ConfigError with every fault of both kinds: what is right by itself is looked at whatever
    else is wrong.
    """
    faults: tuple[Fault, ...] = ()
    rest: Rest | None = None
    try:
        settings = load_settings(config, overrides, environ)
    except ConfigError as error:
        faults, rest = error.faults, error.rest
        if rest is None or not isinstance(rest.built, Settings):
            raise
        settings = rest.built
    found = (*faults, *settings.missing(environ, () if rest is None else rest.wrong))
    if found:
        raise ConfigError(found, rest)
    return settings


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A line of text for each PULLPOOL_ variable that looks like a misspelt one of ours."""
    known = [*_variables(), *_OF_THE_COMMANDS]
    words = {name.removeprefix(_PREFIX): name for name in known}
    found = []
    for name in sorted(environ):
        if name.startswith(_PREFIX) and name not in known:
            near = difflib.get_close_matches(name.removeprefix(_PREFIX), words, n=1, cutoff=0.8)
            found += [f"{name}: not a variable of ours, did you mean {words[one]}?" for one in near]
    return found


def _build(layers: Sequence[Layer]) -> Settings:
    sources = tuple(InitSettingsSource(Settings, layer.values) for layer in layers)
    arguments: dict[str, Any] = {"_build_sources": (sources, {})}
    return Settings(**arguments)


def _leaves(values: Mapping[str, Any], above: Location = ()) -> Iterator[Location]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key)


def _variables() -> dict[str, Location]:
    """Every variable that is read, and the key it sets."""
    names: dict[str, Location] = dict(_ALIASES)
    for key, field in Settings.model_fields.items():
        section = _section(field)
        inner = [(key, name) for name in section.model_fields] if section else [(key,)]
        names.update({_PREFIX + "_".join(at).upper(): at for at in inner})
    return names


def _environment(environ: Mapping[str, str]) -> Layer:
    values: dict[str, Any] = {}
    sources: dict[Location, str] = {}
    for variable, location in _variables().items():
        text = environ.get(variable, "")
        if not text:
            continue  # compose files pass variables on that are empty
        table = values
        for part in location[:-1]:
            table = table.setdefault(str(part), {})
        table[str(location[-1])] = _decoded(text, location)
        sources[location] = variable
    return Layer(values, sources)


def _decoded(text: str, location: Location) -> object:
    """The text, or for a key that holds a table or an array the JSON value in it."""
    if location != ("upstreams",) and location not in _LISTS:
        return text
    try:
        return json.loads(text)
    except ValueError:
        # One of a list may stand by itself; text is never a table, and is reported as such.
        return [text] if location in _LISTS else text


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the settings table."""

    key: str
    type: str
    default: str
    meaning: str


def settings_table() -> list[Row]:
    """Every key with its type, default and meaning, in the order of the file."""
    return list(_rows(Settings, ""))


def _rows(model: type[BaseModel], above: str) -> Iterator[Row]:
    for name, field in model.model_fields.items():
        key = f"{above}{name}"
        if section := _section(field):
            yield from _rows(section, f"{key}.")
        elif key == "upstreams":
            yield from _rows(Upstream, "upstreams.NAME.")
        else:
            yield Row(key, _kind(field), _default(field), field.description or "")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _shown(field: FieldInfo) -> Shown:
    # An alias carries a general word; what a field adds to it comes later and counts.
    words = [one for one in field.metadata if isinstance(one, Shown)]
    return words[-1] if words else Shown("")


def _kind(field: FieldInfo) -> str:
    return _shown(field).kind or _kind_of(field.annotation)


def _kind_of(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list"
    inner = [one for one in get_args(annotation) if one is not type(None)]
    if inner:
        return _kind_of(inner[0])
    return {bool: "true or false", Path: "path"}.get(annotation, "text")


def _default(field: FieldInfo) -> str:
    shown = _shown(field)
    if shown.default is not None:
        return shown.default
    value = field.default
    if value is None or value is PydanticUndefined or value in ("", ()):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if shown.kind in ("size", "duration"):
        return format_size(value) if shown.kind == "size" else format_duration(value)
    return f"{value}"


class _Schema(GenerateJsonSchema):
    """Writes our value types as the text that the file holds."""

    def encode_default(self, dft: Any) -> Any:
        is_ours = isinstance(dft, ByteRate | HostPort | Rate)
        return str(dft) if is_ours else super().encode_default(dft)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the configuration file (draft 2020-12)."""
    schema = Settings.model_json_schema(schema_generator=_Schema)
    return {"$schema": _Schema.schema_dialect, **schema, "title": "pullpool.toml"}
