"""Faults in a configuration, all of them at once, each with the key it sits at.

pydantic stops at the first layer of trouble: rules that compare keys run only when every key is
right by itself. `collect` goes on: it notes the wrong keys, takes them out, and validates again,
so that one look shows everything. Rules that involve a key already found wrong keep silent. What is
left then comes with the error (`Rest`), for whoever looks at the files that it names.

What was given is shown beside a fault, except where it may be a secret.
"""

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

Location = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
# User name and password before a host, and the query of a URL.
_PERHAPS_SECRET = re.compile(r".+(?=@)|(?<=\?).+", re.DOTALL)
_SECRET_KEY = re.compile(r"^password|_password|^secret")
_CONFLICTS = "conflicts"
_BUILT = "built"
_TABLE = "must be a table (in an environment variable: a JSON object)"
# pydantic speaks Python; the person who reads this writes TOML.
_WORDS = {
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), _TABLE),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    "tuple_type": "must be a list",
    "string_type": "must be text",
    **dict.fromkeys(("string_too_short", "too_short"), "must not be empty"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: where, why, what was given, and which source gave it."""

    path: str
    message: str
    got: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        where = f"{self.path} (from {self.source})" if self.source else self.path
        return f"{where}: {self.message}" + (f", got {self.got}" if self.got else "")


@dataclass(frozen=True, slots=True)
class Rest:
    """What could be built once the keys that are `wrong` were taken out."""

    built: BaseModel
    wrong: tuple[Location, ...]


class ConfigError(Exception):
    """The configuration cannot be used; `faults` holds every reason."""

    def __init__(self, faults: Sequence[Fault], rest: Rest | None = None) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = tuple(faults)
        self.rest = rest


@dataclass(frozen=True, slots=True)
class Layer:
    """The values of one source, nested as in the file, and where each came from.

    `sources` names the origin of a location, or of everything below it, for the person who has to
    mend it. What has no name comes from the file that is being read.
    """

    values: dict[str, Any]
    sources: Mapping[Location, str] = field(default_factory=dict)

    def source_of(self, location: Location) -> str | None:
        """The name of the source that gave this location its value, if this layer did."""
        lengths = range(len(location), -1, -1)
        return next(
            (self.sources[at] for n in lengths if (at := location[:n]) in self.sources), None
        )


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two or more keys, each right by itself, that do not go together.

    `at` is the key to show; `about` are the others that the rule looked at.
    """

    at: Location
    message: str
    about: tuple[Location, ...] = ()

    def touches(self, wrong: Iterable[Location]) -> bool:
        """Whether the rule looked at a key that is wrong (and was therefore taken out)."""
        looked_at = (self.at, *self.about)
        return any(key[: len(loc)] == loc for loc in wrong for key in looked_at)


def raise_conflicts(built: BaseModel, conflicts: Iterable[Conflict]) -> None:
    """For a validator of `built`: raise the pydantic error that carries all conflicts, if any."""
    found = tuple(conflicts)
    if found:
        text = "; ".join(f"{key_path(one.at)}: {one.message}" for one in found)
        raise PydanticCustomError(
            _CONFLICTS, "{text}", {"text": text, _CONFLICTS: found, _BUILT: built}
        )


def key_path(location: Location) -> str:
    """A location as TOML would write it: `upstreams."harbor.example.com".rate`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        key = part if _BARE_KEY.fullmatch(part) else f'"{part}"'
        path = f"{path}.{key}" if path else key
    return path


def read_toml(path: Path) -> dict[str, Any]:
    """The document in a TOML file; ConfigError (with line and column) when there is none."""
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        fault = Fault(str(path), f"cannot be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        fault = Fault(str(path), f"is not UTF-8 text (byte {error.start})")
    except tomllib.TOMLDecodeError as error:
        fault = Fault(str(path), f"is not valid TOML: {error}")
    raise ConfigError([fault])


def suggestion(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean '{near[0]}'?" if near else ""


def collect(
    model: type[Model], layers: Sequence[Layer], build: Callable[[Sequence[Layer]], Model]
) -> Model:
    """Build the model from its layers, the strongest first; ConfigError with every fault.

    The layers are changed: keys that are wrong are taken out of them.
    """
    faults: list[Fault] = []
    wrong: list[Location] = []
    while True:
        try:
            built = build(layers)
        except ValidationError as error:
            details = error.errors(include_url=False)
        else:
            if faults:
                raise ConfigError(faults, Rest(built, tuple(wrong)))
            return built
        faults += _faults(details, model, layers, wrong)
        plain = [detail["loc"] for detail in details if detail["type"] != _CONFLICTS]
        taken = [taken for loc in plain if (taken := _take_out(loc, layers))]
        if not taken:
            # Only conflicts are left, and those come last.
            parts = [detail["ctx"][_BUILT] for detail in details if detail["type"] == _CONFLICTS]
            raise ConfigError(faults, Rest(parts[0], tuple(wrong)) if parts else None)
        wrong += taken


def _faults(
    details: Iterable[ErrorDetails],
    model: type[BaseModel],
    layers: Sequence[Layer],
    wrong: Sequence[Location],
) -> Iterator[Fault]:
    for detail in details:
        if detail["type"] != _CONFLICTS:
            yield _fault(detail, model, layers)
            continue
        for conflict in detail["ctx"][_CONFLICTS]:
            if not conflict.touches(wrong):
                yield Fault(key_path(conflict.at), conflict.message)


def _fault(detail: ErrorDetails, model: type[BaseModel], layers: Sequence[Layer]) -> Fault:
    location = detail["loc"]
    source = next((name for layer in layers if (name := layer.source_of(location))), None)
    if detail["type"] == "extra_forbidden":
        # The value of a misspelt key may be a password.
        message = "is not a known key" + suggestion(str(location[-1]), _keys(model, location[:-1]))
        return Fault(key_path(location), message, source=source)
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
    else:
        message = _WORDS.get(detail["type"], detail["msg"].replace("Input should be", "must be"))
    got = None if message == _TABLE else _shown(location, detail["input"])
    return Fault(key_path(location), message, got, source)


def _shown(location: Location, value: object) -> str | None:
    """What was given, if it is short and cannot be a secret."""
    if any(part == "proxy" or _SECRET_KEY.search(str(part)) for part in location):
        return None
    if not isinstance(value, str | int | float):
        return None
    return repr(_PERHAPS_SECRET.sub("***", value)[:80]) if isinstance(value, str) else repr(value)


def _keys(model: type[BaseModel], location: Location) -> Iterable[str]:
    """The keys that the table at `location` may hold."""
    inside: Any = model
    for part in location:
        if _is_model(inside):
            inside = inside.model_fields[part].annotation if part in inside.model_fields else None
        elif get_args(inside):
            inside = get_args(inside)[-1]
    return inside.model_fields if _is_model(inside) else ()


def _is_model(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _take_out(location: Location, layers: Iterable[Layer]) -> Location | None:
    """Remove the key that a fault is about from every layer; where it was, or None."""
    taken = None
    for layer in layers:
        table = layer.values
        for depth, part in enumerate(location, start=1):
            if not isinstance(table, dict) or part not in table:
                break
            inner = table[str(part)]
            if depth == len(location) or not isinstance(inner, dict):
                del table[str(part)]
                taken = location[:depth]
                break
            table = inner
    return taken
