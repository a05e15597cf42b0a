"""Structured logs: one line per event, safe to show to anybody.

The logger is built and passed in, never configured globally, so that two proxies in one process
keep their lines apart. Whatever a field holds, secrets are taken out on the way: by the name of
the field (`authorization`, `password`, …) and by shape inside text (URL userinfo, parameters of
signed URLs, authorization headers), because messages of foreign libraries quote URLs in full.

A log that cannot be written (closed stream, full disk) is dropped: a pull must not fail because
nobody can read about it.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

Logger = FilteringBoundLogger
LogFormat = Literal["console", "json"]

REDACTED = "[redacted]"

_SECRET_FIELDS = frozenset(
    {
        "authorization",
        "proxy_authorization",
        "cookie",
        "set_cookie",
        "credentials",
        "identitytoken",
        "password",
        "passwd",
        "secret",
        "token",
        "access_token",
        "refresh_token",
        "registrytoken",
        "id_token",
        "api_key",
    }
)

# `scheme://user:password@host`. The userinfo ends at the last "@" before the path.
_USERINFO = re.compile(r"(?<=://)[^\s/?#\"'<>]*@")

# Parameters that sign a URL (S3, Google, Azure, CloudFront) or carry a token. The whole value goes:
# for whoever holds it, it is as good as the blob's password.
_SIGNED_PARAMETER = re.compile(
    r"(?i)(?P<name>[?&](?:x-(?:amz|goog|oss|cos)-[^=&\s]*|sig|signature|sign|policy|key-pair-id"
    r"|awsaccesskeyid|googleaccessid|ossaccesskeyid|token|access_token|refresh_token|id_token"
    r"|password|secret|se|sp|sr|sv|skoid|sktid|ske|sks|skv|verify|hdnts?|__token__)=)"
    r"[^&#\s\"'<>]*"
)

# `Authorization: Basic …` and `Bearer <something long>`; a plain word after "Bearer" stays.
_HEADER = re.compile(
    r"(?i)(?P<name>\bauthorization['\"]?\s*[:=]\s*['\"]?)(?:[a-z0-9-]+ +)?[^\s'\",;]+"
)
_BEARER = re.compile(r"(?i)(?P<name>\b(?:bearer|basic) +)[a-z0-9._~+/-]{20,}=*")

_MAX_DEPTH = 6


def make_logger(log_format: LogFormat, stream: TextIO, level: str = "info") -> Logger:
    """A logger that writes lines to `stream`: "json" for machines, "console" for people.

    `level` is debug, info, warning, error or critical; anything else raises ValueError.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"unknown log level {level!r}")
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
        structlog.processors.format_exc_info,
        redact,
        *_renderers(log_format, stream),
    ]
    # Everything is given here, so nothing is taken from structlog's global configuration; `bind`
    # makes the logger now and not at its first use.
    logger: Logger = structlog.wrap_logger(
        _LineSink(stream, processors),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        context_class=dict,
    ).bind()
    return logger


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A structlog processor: the same event without its secrets."""
    return {name: _redact_field(name, value, _MAX_DEPTH) for name, value in event.items()}


def redact_text(text: str) -> str:
    """`text` without URL userinfo, signing parameters and authorization values."""
    if "://" in text:
        text = _USERINFO.sub(f"{REDACTED}@", text)
    if "=" in text:
        text = _SIGNED_PARAMETER.sub(rf"\g<name>{REDACTED}", text)
    text = _HEADER.sub(rf"\g<name>{REDACTED}", text)
    return _BEARER.sub(rf"\g<name>{REDACTED}", text)


def _redact_field(name: object, value: object, depth: int) -> object:
    if value is not None and str(name).lower().replace("-", "_") in _SECRET_FIELDS:
        return REDACTED
    return _redact_value(value, depth)


def _redact_value(value: object, depth: int) -> object:
    if isinstance(value, str):
        return redact_text(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth == 0:
        return REDACTED
    if isinstance(value, Mapping):
        return {str(k): _redact_field(k, v, depth - 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact_value(item, depth - 1) for item in value]
    return redact_text(str(value))


def _renderers(log_format: LogFormat, stream: TextIO) -> list[Processor]:
    if log_format == "json":
        return [structlog.processors.JSONRenderer(default=str)]
    console = structlog.dev.ConsoleRenderer(
        colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    return [_escape_controls, console]


# Client-made text (user agents, paths) must not move the cursor of whoever reads the log, nor forge
# a line. C0, DEL and C1; JSON escapes them by itself.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def _escape_controls(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {
        name: value.translate(_CONTROLS)
        if isinstance(value, str) and name not in ("exception", "stack")
        else value
        for name, value in event.items()
    }


class Lines:
    """The lines of a logger by another way, for those who write very many of a kind.

    What a logger does to each event takes tens of microseconds. Here it is done once, to an event
    with *holes* in the place of what differs; a line is then what came out, with the holes filled.
    So it is the line that the logger would have written, secrets taken out and all. Only the log's
    own processors are asked, nothing is known here of what they do.
    """

    def __init__(self, sink: _LineSink) -> None:
        self._sink = sink

    @classmethod
    def of(cls, log: Logger) -> Lines | None:
        """Those of a logger; None for one that ``make_logger`` has not made."""
        sink = getattr(log, "_logger", None)  # structlog has no public name for it
        return cls(sink) if isinstance(sink, _LineSink) else None

    def around(
        self,
        event: str,
        fields: Mapping[str, object],
        *,
        texts: Sequence[str],
        values: Sequence[str],
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The pieces of a line at level "info" around its holes, and which field belongs in each.

        The holes are the fields named: ``texts``, which need no escaping, and ``values``, which are
        to be filled in as ``value`` gives them. One more is ``timestamp``, for the time as
        ``isoformat`` writes it.
        """
        marks = {name: _hole() for name in (*texts, *values, "timestamp")}
        holes = {name: marks[name] for name in (*texts, *values)}
        line = self._render(event, {**fields, **holes}, marks["timestamp"])
        for name in values:  # text has quotes where the log is JSON
            line = line.replace(f'"{marks[name]}"', marks[name])
        # By hand: a pattern of marks that are new each time would be compiled each time.
        places = sorted((line.index(mark), name) for name, mark in marks.items())
        pieces, end = [], 0
        for start, name in places:
            pieces.append(line[end:start])
            end = start + len(marks[name])
        return (*pieces, line[end:]), tuple(name for _, name in places)

    def value(self, name: str, value: object) -> str:
        """How a field's value stands in a line, with its quotes if it has any."""
        hole = _hole()
        before, _, after = self._render("", {name: hole}, "").partition(hole)
        if before.endswith('"') and after.startswith('"'):
            before, after = before[:-1], after[1:]
        line = self._render("", {name: value}, "")
        return line[len(before) : len(line) - len(after)]

    def _render(self, event: str, fields: Mapping[str, object], timestamp: str) -> str:
        line: object = {**fields, "event": event}
        for processor in self._sink.processors:
            if isinstance(processor, structlog.processors.TimeStamper):
                line = {**_mapping(line), "timestamp": timestamp}
            else:
                line = processor(self._sink, "info", _mapping(line))
        return str(line)

    def write(self, lines: Iterable[str]) -> None:
        """Write whole lines, at once."""
        self._sink.msg("\n".join(lines))


def _hole() -> str:
    """Text that no other field holds, and that no processor changes."""
    return f"hole{secrets.token_hex(8)}"


def _mapping(event: object) -> dict[str, object]:
    if not isinstance(event, dict):
        raise TypeError(f"a processor has made no event but {event!r}")
    return event


class _LineSink:
    """Writes whole lines to a stream, one at a time: fills log from worker threads too."""

    def __init__(self, stream: TextIO, processors: Sequence[Processor]) -> None:
        self.processors = processors
        self._stream = stream
        self._lock = threading.Lock()

    def msg(self, line: str) -> None:
        try:
            with self._lock:
                self._stream.write(line + "\n")
                self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream is closed, or cannot encode it
            return

    debug = info = warning = warn = error = err = critical = fatal = exception = failure = log = msg
