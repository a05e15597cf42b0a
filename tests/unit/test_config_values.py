"""Addresses, durations, sizes, rates and URLs as a person writes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.settings.values import (
    ByteRate,
    HostPort,
    Rate,
    format_duration,
    format_size,
    origin,
    parse_duration,
    parse_registry_url,
    parse_size,
    registry_name,
)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:5050", "127.0.0.1", 5050),
        ("[::1]:5050", "::1", 5050),
        ("[::]:0", "::", 0),
        ("registry_1.internal:80", "registry_1.internal", 80),
    ],
)
def test_an_address_is_read_and_written_back(text: str, host: str, port: int) -> None:
    address = HostPort.parse(text)
    assert address == HostPort(host, port)
    assert str(address) == text


@pytest.mark.parametrize(
    "text", ["5050", ":5050", "::1:5050", "h:", "h:65536", "h:-1", "h:٣", "[::g]:1", "a b:1", 5050]
)
def test_what_is_no_address_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="must"):
        HostPort.parse(text)


def test_only_this_machine_reaches_a_loopback_address() -> None:
    loopback = ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "LOCALHOST:1"]
    public = ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "localhost.example.com:1"]
    assert all(HostPort.parse(text).is_loopback for text in loopback)
    assert not any(HostPort.parse(text).is_loopback for text in public)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20s", 20),
        ("250ms", 0.25),
        ("3m", 180),
        ("1h30m", 5400),
        (" 1 h ", 3600),
        ("2d", 172800),
        ("1.5", 1.5),
        (7, 7),
        (0, 0),
    ],
)
def test_a_duration_is_read_in_seconds(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "20 apples", "-1s", -1, True, None, float("nan"), float("inf"), "1e3", "٣s"]
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("50GiB", 50 << 30),
        ("1 kb", 1000),
        ("1.5MiB", 3 << 19),
        ("2TiB", 2 << 40),
        ("7", 7),
        (9, 9),
        ("64 B", 64),
        ("1TB", 10**12),
    ],
)
def test_a_size_is_read_in_bytes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1.5", "1.5B", "-1", -1, True, 1.5, "5 apples"])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100/s", Rate(100, 1)),
        ("600 / m", Rate(600, 60)),
        ("5000/h", Rate(5000, 3600)),
        ("100/6h", Rate(100, 21600)),
    ],
)
def test_a_rate_is_read_as_a_count_in_seconds(text: str, rate: Rate) -> None:
    assert Rate.parse(text) == rate
    assert str(rate) == text.replace(" ", "")


@pytest.mark.parametrize("text", ["100", "100/d", "0/s", "1/0s", "-1/s", "1.5/s", 100])
def test_what_is_no_rate_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="must"):
        Rate.parse(text)


@pytest.mark.parametrize(
    ("text", "rate", "shown"),
    [
        ("50MiB/s", 50 << 20, "50MiB/s"),
        ("400 kB / s", 400_000, "400000B/s"),
        ("6gib/h", (6 << 30) // 3600, "1789569B/s"),
        ("1.5KiB/s", 1536, "1536B/s"),
        ("60B/m", 1, "1B/s"),
    ],
)
def test_a_byte_rate_is_read_as_bytes_a_second(text: str, rate: int, shown: str) -> None:
    assert ByteRate.parse(text) == ByteRate(rate)
    assert str(ByteRate(rate)) == shown


@pytest.mark.parametrize("text", ["100/s", "100MB", "8Mbit/s", "1MB/d", "-1B/s", "1.5B/s", 100])
def test_what_is_no_byte_rate_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="bytes in a time, such as '50MiB/s'"):
        ByteRate.parse(text)


@pytest.mark.parametrize("text", ["0B/s", "59B/m"])
def test_a_byte_rate_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="at least one byte a second"):
        ByteRate.parse(text)


def test_a_registry_url_is_normalised() -> None:
    assert parse_registry_url("HTTPS://Harbor.Example.com/") == "https://harbor.example.com"
    assert parse_registry_url("http://[::1]:5000/base/") == "http://[::1]:5000/base"
    assert registry_name("http://[::1]:5000/base") == "[::1]:5000"
    assert origin("https://h/base") == origin("https://h:443") == "https://h:443"


@pytest.mark.parametrize(
    "text",
    [
        "harbor.example.com",
        "ftp://h",
        "https://",
        "https://u:p@h",
        "https://h?x=1",
        "https://h?",
        "https://h/v2/",
        "https://h/a/../b",
        "https://h:99999",
        "https://h h",
        "https://[::g]",
        3,
    ],
)
def test_what_is_no_registry_url_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_registry_url(text)


@given(st.one_of(st.integers(0, 10**12), st.integers(0, 10**6).map(lambda ms: ms * 1000)))
def test_a_duration_that_was_written_reads_back(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds)


@given(st.integers(0, 10**17))
def test_a_size_that_was_written_reads_back(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.integers(1, 10**9 - 1), st.integers(1, 999), st.sampled_from("smh"))
def test_a_rate_that_was_written_reads_back(count: int, every: int, unit: str) -> None:
    rate = Rate.parse(f"{count}/{every}{unit}")
    assert Rate.parse(str(rate)) == rate


@given(st.integers(1, 10**15))
def test_a_byte_rate_that_was_written_reads_back(rate: int) -> None:
    assert ByteRate.parse(str(ByteRate(rate))) == ByteRate(rate)


@given(st.one_of(st.text(), st.from_regex(r"[0-9.]+ ?[a-zA-Z/:@\[\]]*[0-9]*")))
def test_a_parser_answers_any_text_with_a_value_or_a_value_error(text: str) -> None:
    parsers = (HostPort.parse, ByteRate.parse, Rate.parse, parse_duration, parse_size)
    for parse in (*parsers, parse_registry_url):
        try:
            parse(text)
        except ValueError:
            continue
