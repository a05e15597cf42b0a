"""The PROXY protocol: headers of both versions in pieces of any size, and what is none."""

import ipaddress
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.web.proxyline import (
    MAX_HEADER,
    MAX_LINE,
    SIGNATURE,
    NotProxied,
    Proxied,
    parse_header,
)
from tests.unit.proxy_kit import RawClient, running


def binary(address: str, *, command: int = 0x21, extra: bytes = b"") -> bytes:
    packed = ipaddress.ip_address(address).packed
    family = 0x11 if len(packed) == 4 else 0x21
    body = packed + packed + b"\x00\x01\x00\x02" + extra
    return SIGNATURE + struct.pack("!BBH", command, family, len(body)) + body


HEADERS = [
    (b"PROXY TCP4 198.51.100.7 10.0.0.1 4711 5050\r\n", "198.51.100.7"),
    (b"PROXY TCP6 2001:db8::7 fd00::1 4711 5050\r\n", "2001:db8::7"),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ff::1 ff::2 1 2\r\n", None),
    (binary("198.51.100.7"), "198.51.100.7"),
    (binary("2001:db8::7", extra=b"\x03\x00\x01x"), "2001:db8::7"),
    (binary("198.51.100.7", command=0x20), None),
    (SIGNATURE + b"\x20\x00\x00\x00", None),
    (SIGNATURE + b"\x21\x31\x00\x00", None),
]


@pytest.mark.parametrize(("header", "address"), HEADERS)
def test_a_header_is_read_in_pieces_of_any_size(header: bytes, address: str | None) -> None:
    for length in range(len(header)):
        assert parse_header(header[:length]) is None
    assert parse_header(header) == Proxied(len(header), address)
    assert parse_header(header + b"GET / HTTP/1.1\r\n") == Proxied(len(header), address)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /v2/ HTTP/1.1\r\n",
        b"\x16\x03\x01",
        b"PROXY\r\n",
        b"PROXY \r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP4 198.51.100.7 10.0.0.1 4711\r\n",
        b"PROXY TCP4 2001:db8::7 fd00::1 1 2\r\n",
        b"PROXY TCP6 fe80::1%eth0 fd00::1 1 2\r\n",
        b"PROXY TCP4 anna bert 1 2\r\n",
        b"PROXY " + b"x" * MAX_LINE,
        SIGNATURE + b"\x11\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x11\x00\x04" + bytes(4),
        SIGNATURE + b"\x21\x11" + struct.pack("!H", MAX_HEADER),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(NotProxied):
        parse_header(data)


@given(st.binary() | st.binary().map(SIGNATURE.__add__) | st.binary().map(b"PROXY ".__add__))
def test_no_bytes_break_it_or_make_it_wait_for_ever(data: bytes) -> None:
    try:
        header = parse_header(data)
    except NotProxied:
        return
    if header is None:
        assert len(data) < MAX_HEADER
    else:
        assert 0 < header.length <= len(data)


URL = "http://127.0.0.1:1"
REQUEST = "GET /v2/ HTTP/1.1\nHost: pullpool\n\n"


@pytest.mark.parametrize("pieces", [1, 3])
async def test_the_log_names_whom_the_connection_is_from(tmp_path: Path, pieces: int) -> None:
    async with running(tmp_path, URL, trusted_proxies=["127.0.0.1"], proxy_protocol=True) as pool:
        async with RawClient.connected(pool.address) as client:
            text = f"PROXY TCP4 198.51.100.7 10.0.0.1 1 2\n{REQUEST}{REQUEST}"
            step = -(-len(text) // pieces)
            for start in range(0, len(text), step):
                await client.send(text[start : start + step])
            await client.until(lambda data: data.count(b"HTTP/1.1 200") == 2)
        assert [line["client"] for line in pool.access_log] == ["198.51.100.7"] * 2


async def test_a_trusted_proxy_that_leaves_the_header_out_is_cut_off(tmp_path: Path) -> None:
    async with running(tmp_path, URL, trusted_proxies=["127.0.0.1"], proxy_protocol=True) as pool:
        async with RawClient.connected(pool.address) as client:
            await client.send(REQUEST)
            await client.ending()
            assert not client.received
        assert not pool.access_log
        [line] = pool.events("connection_refused")
        assert line["client"] == "127.0.0.1"


async def test_a_stranger_speaks_plain_http_and_is_not_believed(tmp_path: Path) -> None:
    async with running(tmp_path, URL, trusted_proxies=["192.0.2.1"], proxy_protocol=True) as pool:
        async with RawClient.connected(pool.address) as client:
            await client.send(f"PROXY TCP4 198.51.100.7 10.0.0.1 1 2\n{REQUEST}")
            assert " 400 " in await client.head()
        assert [line["client"] for line in pool.access_log] == ["127.0.0.1"]
