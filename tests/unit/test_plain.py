"""Plain requests: what the strict reading takes, aiohttp's parser reads in the same way."""

import asyncio

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser, RawRequestMessage
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.web.plain import (
    MAX_HEAD,
    Head,
    Stencil,
    has_secret,
    is_plain_line,
    parse_head,
    settled,
)

END = b"\r\n\r\n"


def head(*lines: bytes) -> bytes:
    return b"".join(b"\r\n" + line for line in (b"Host: pullpool", *lines)) + END


def by_aiohttp(data: bytes) -> list[RawRequestMessage]:
    loop = asyncio.new_event_loop()
    try:
        parser = HttpRequestParser(BaseProtocol(loop), loop, 1 << 16)
        messages, upgraded, tail = parser.feed_data(data)
    finally:
        loop.close()
    assert (upgraded, tail) == (False, b"")
    return [message for message, _ in messages]


def test_what_the_answer_depends_on_is_read() -> None:
    found = parse_head(
        head(
            b"user-agent:  containerd/2.1.0\t",
            b"Accept: a/b",
            b"ACCEPT: c/d, e/f",
            b'If-None-Match: "x"',
            b"X-Forwarded-For: 198.51.100.1",
            b"Connection: Keep-Alive",
            b"X-Else: 1",
        )
    )
    expected = Head("containerd/2.1.0", '"x"', ("a/b", "c/d, e/f"), ("198.51.100.1",))
    assert found == expected


@pytest.mark.parametrize(
    "lines",
    [
        (b"Host: another",),
        (b"User-Agent: a", b"user-agent: b"),
        (b"If-None-Match: a", b"If-None-Match: b"),
        (b"Connection: close",),
        (b"Connection: upgrade",),
        (b"Connection: keep-alive, upgrade",),
        (b"Upgrade: websocket",),
        (b"Content-Length: 0",),
        (b"Transfer-Encoding: chunked",),
        (b"Content-Type: text/plain",),
        (b"Expect: 100-continue",),
        (b"Range: bytes=0-1",),
        (b"If-Range: x",),
        (b"Proxy-Connection: close",),
        (b"Sec-WebSocket-Key1: x",),
        (b" folded",),
        (b"\tfolded",),
        (b"Name : x",),
        (b"Bad Name: x",),
        (b"GET /v2/a/blobs/sha256:0 HTTP/1.1",),
        (b": x",),
        (b"x",),
        (b"X: a\nb",),
        (b"X: a\rb",),
        (b"X: a\x00",),
        (b"X: \xe9",),
        (b"X: \x7f",),
        (b"X: " + b"a" * MAX_HEAD,),
        tuple(b"X: a" for _ in range(65)),
    ],
)
def test_what_may_be_read_in_two_ways_is_not_plain(lines: tuple[bytes, ...]) -> None:
    rest = head(*lines)
    assert parse_head(rest) is None
    left = settled(rest)
    assert left is None or parse_head(left) is None


@pytest.mark.parametrize("rest", [END, b"\r\nHost:" + END, b"\r\nTea: a" + END, b"Host: a" + END])
def test_one_host_is_needed(rest: bytes) -> None:
    assert parse_head(rest) is None


def test_lines_that_do_not_matter_are_taken_out() -> None:
    lines = (b"X-Unique: 17", b"Accept: a/b", b"Authorization: Basic eA==", b"Cookie:", b"Te-St: 1")
    assert settled(head(*lines)) == head(b"Accept: a/b")


@pytest.mark.parametrize("name", [b"Authorization", b"cookie", b"PROXY-authorization"])
def test_secrets_are_seen(name: bytes) -> None:
    assert has_secret(head(b"X: 1", name + b": x"))
    assert not has_secret(head(b"X-" + name + b": x"))


@pytest.mark.parametrize(
    "line",
    [
        b"GET /v2/ HTTP/1.0",
        b"get /v2/ HTTP/1.1",
        b"POST /v2/ HTTP/1.1",
        b"GET  /v2/ HTTP/1.1",
        b"GET /v2/ HTTP/1.1 ",
        b" GET /v2/ HTTP/1.1",
        b"GET /v2/#a HTTP/1.1",
        b"GET * HTTP/1.1",
        b"GET http://a/v2/ HTTP/1.1",
        b"GET /\xe9 HTTP/1.1",
        b"GET /a\tb HTTP/1.1",
        b"",
    ],
)
def test_other_request_lines_are_not_plain(line: bytes) -> None:
    assert is_plain_line(b"GET /v2/a?b=%20 HTTP/1.1")
    assert not is_plain_line(line)


names = st.sampled_from(
    ["Accept", "Host", "User-Agent", "If-None-Match", "Connection", "X-Unique", "Cookie", "TE"]
) | st.text(alphabet="ABcd-_ :\t", max_size=8)
colons = st.sampled_from([":", ": ", " : ", ""])
values = st.text(alphabet='ab*/,;"= \t\r\n\x00\x7f\xe9', max_size=12) | st.just("keep-alive")


@given(lines=st.lists(st.tuples(names, colons, values), max_size=6))
@example(lines=[("Connection", ":", "keep-alive")])
def test_what_is_plain_is_one_request_to_aiohttp_too(lines: list[tuple[str, str, str]]) -> None:
    named = [f"{name}{colon}{value}".encode("latin-1") for name, colon, value in lines]
    rest = head(*named)
    left = settled(rest)
    found = None if left is None else parse_head(left)
    if found is None:
        return
    line = b"GET /v2/a HTTP/1.1"
    [message] = by_aiohttp(line + rest)
    assert (message.method, message.path) == ("GET", "/v2/a")
    assert not any((message.should_close, message.upgrade, message.chunked, message.compression))
    assert message.headers.get("User-Agent", "-") == found.agent
    assert message.headers.get("If-None-Match") == found.if_none_match
    assert tuple(message.headers.getall("Accept", ())) == found.accept
    assert parse_head(rest) == found


def test_a_stencil_fits_whatever_differs_in_the_same_value() -> None:
    stencil = Stencil.of(head(b"X-Id: 1", b"Accept: a/b"), head(b"X-Id: 22", b"Accept: a/b"))
    assert stencil is not None
    for value in (b"", b"3", b": ~\t", b"traceparent"):
        assert stencil.fits(head(b"X-Id:" + value, b"Accept: a/b"))
    for other in (
        head(b"X-Id: 1", b"Accept: a/c"),
        head(b"X-Id: 1\r\nRange: bytes=0-1", b"Accept: a/b"),
        head(b"X-Id: 1\n", b"Accept: a/b"),
        head(b"X-Id: \xe9", b"Accept: a/b"),
        head(b"X-Ids: 1", b"Accept: a/b")[: -len(END)],
        head(b"X-Id: " + b"1" * MAX_HEAD, b"Accept: a/b"),
        head(b"X-Id: 1", b"Accept: a/b") + head(b"X-Id: 1", b"Accept: a/b"),
    ):
        assert not stencil.fits(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((b"X-Id: 1", b"X-More: 1"), (b"X-Id: 2", b"X-More: 2")),
        ((b"X-Id: 1",), (b"X-Id: 2", b"X-More: 2")),
        ((b"X-Id: 1",), (b"X-Di: 1",)),
        ((b"X-Id: 1",), (b"X-Id: 1",)),
        ((b"Authorization: Basic eA==",), (b"Authorization: Basic eQ==",)),
        ((b"Cookie: a", b"X-Id: 1"), (b"Cookie: a", b"X-Id: 2")),
    ],
)
def test_there_is_no_stencil_of_heads_that_differ_in_more_or_hold_a_secret(
    one: tuple[bytes, ...], other: tuple[bytes, ...]
) -> None:
    assert Stencil.of(head(*one), head(*other)) is None


lines_of_ids = st.lists(st.tuples(names, colons, values), max_size=3)
ids = st.text(alphabet="a:\t ~", max_size=4)


@given(
    before=lines_of_ids,
    after=lines_of_ids,
    name=names | st.just("X-Id"),
    three=st.tuples(ids, ids, ids | values),
)
def test_what_fits_a_stencil_settles_to_the_same(
    before: list[tuple[str, str, str]],
    after: list[tuple[str, str, str]],
    name: str,
    three: tuple[str, str, str],
) -> None:
    """And nothing else is asked of it: what is left is what the answer depends on."""

    def with_id(value: str) -> bytes:
        lines = [*before, (name, ":", value), *after]
        return head(*(f"{name}{colon}{text}".encode("latin-1") for name, colon, text in lines))

    one, other, third = map(with_id, three)
    left = settled(one)
    if left is None or left != settled(other) or parse_head(left) is None:
        return
    stencil = Stencil.of(one, other)
    if stencil is not None and stencil.fits(third):
        assert settled(third) == left
