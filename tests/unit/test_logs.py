"""Log lines are whole, readable by machines and people, and free of secrets."""

import io
import json
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from proxy.observe.logs import REDACTED, LogFormat, make_logger, redact_text


def _logged(**fields: object) -> dict[str, Any]:
    stream = io.StringIO()
    make_logger("json", stream).info("event", **fields)
    line = json.loads(stream.getvalue())
    assert isinstance(line, dict)
    return line


def test_a_json_line_has_event_level_time_and_fields() -> None:
    line = _logged(bytes=5, repository="team/app")
    assert (line["event"], line["level"], line["bytes"]) == ("event", "info", 5)
    assert line["timestamp"].endswith("Z")


def test_a_console_line_is_for_people() -> None:
    stream = io.StringIO()
    make_logger("console", stream).warning("queue is long", waiting=31)
    assert "queue is long" in stream.getvalue()
    assert "waiting=31" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_bound_fields_are_in_every_line() -> None:
    stream = io.StringIO()
    log = make_logger("json", stream).bind(request_id="r-1")
    log.info("one")
    log.info("two")
    assert [json.loads(line)["request_id"] for line in stream.getvalue().splitlines()] == [
        "r-1",
        "r-1",
    ]


def test_lines_below_the_level_are_not_written() -> None:
    stream = io.StringIO()
    log = make_logger("json", stream, level="warning")
    log.info("quiet")
    log.error("loud")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud"]


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="log level"):
        make_logger("json", io.StringIO(), level="chatty")


def test_two_loggers_do_not_share_anything() -> None:
    one, other = io.StringIO(), io.StringIO()
    make_logger("json", one).info("a")
    make_logger("console", other).info("b")
    assert json.loads(one.getvalue())["event"] == "a"
    assert "b" in other.getvalue()
    assert not structlog.is_configured()


@pytest.mark.parametrize(
    "name", ["authorization", "Authorization", "Proxy-Authorization", "password", "token", "Cookie"]
)
def test_a_field_that_is_a_secret_by_name_is_not_written(name: str) -> None:
    assert _logged(**{name: "hunter2"})[name] == REDACTED
    assert _logged(headers={name: ["hunter2"]})["headers"][name] == REDACTED
    assert _logged(**{name: None})[name] is None


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@registry.example.com/v2/",
        "https://user:p@hunter2@registry.example.com/v2/",
        "redis://:hunter2@redis:6379/0",
        "GET https://cdn.example.com/b?X-Amz-Algorithm=A&X-Amz-Signature=hunter2 failed",
        "https://cdn.example.com/b?x-goog-signature=hunter2",
        "https://cdn.example.com/b?sv=2020&sig=hunter2&sp=r",
        "https://cdn.example.com/b?Expires=1&Signature=hunter2&Key-Pair-Id=K",
        "https://auth.example.com/t?token=hunter2",
        "Authorization: Basic hunter2",
        "{'authorization': 'Bearer hunter2'}",
        "authorization=hunter2",
        "sent Bearer hunter2abcdefghijklmnopqrstuvwxyz.abc",
    ],
)
def test_a_secret_inside_text_is_not_written(text: str) -> None:
    assert "hunter2" not in redact_text(text)
    assert "hunter2" not in json.dumps(_logged(error=text, nested=[{"x": (text,)}]))
    assert "hunter2" not in json.dumps(_logged(error=OSError(text)))
    stream = io.StringIO()
    make_logger("console", stream).error(text)
    assert "hunter2" not in stream.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "https://registry.example.com/v2/team/app/tags/list?n=5&last=v1",
        "the upstream asks for Bearer authentication",
        "user@example.com",
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    ],
)
def test_what_is_no_secret_stays_readable(text: str) -> None:
    assert redact_text(text) == text


def test_the_rest_of_a_signed_url_stays_readable() -> None:
    shown = redact_text("https://u:p@cdn.example.com/blob?X-Amz-Signature=abc&n=1")
    assert shown == f"https://{REDACTED}@cdn.example.com/blob?X-Amz-Signature={REDACTED}&n=1"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_is_written_without_its_secrets(log_format: LogFormat) -> None:
    stream = io.StringIO()
    log = make_logger(log_format, stream)
    try:
        raise OSError("cannot reach https://user:hunter2@registry.example.com")
    except OSError:
        log.exception("fetch failed")
    assert "Traceback" in stream.getvalue()
    assert "hunter2" not in stream.getvalue()


@given(st.text(max_size=40))
def test_a_client_cannot_forge_a_line(text: str) -> None:
    for log_format in ("json", "console"):
        stream = io.StringIO()
        log = make_logger("json" if log_format == "json" else "console", stream)
        log.info("request", user_agent=text, path=f"\n{text}\x1b[2J")
        log.info(text)
        assert stream.getvalue().count("\n") == 2
        assert "\x1b" not in stream.getvalue()


def test_fields_of_any_depth_are_bounded() -> None:
    deep: dict[str, object] = {}
    deep["again"] = deep
    assert REDACTED in json.dumps(_logged(field=deep))


def test_a_log_that_cannot_be_written_fails_nobody() -> None:
    class FullDisk(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    make_logger("json", FullDisk()).info("lost")
    closed = io.StringIO()
    closed.close()
    make_logger("json", closed).info("lost")
