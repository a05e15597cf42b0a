"""The one request between nodes, and the head of its answer: each is read as it is written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fleet.answer import END, Malformed, parse_head
from proxy.fleet.pieces import MOST, PIECE
from proxy.fleet.protocol import StripeAsk, read_pieces, written
from proxy.oci.digest import Digest
from proxy.oci.errors import ClientError, EndpointUnknown, RequestInvalid
from proxy.testing.peer import pieces_of

DIGEST = Digest.of(b"a blob")
STRONG = Digest.of(b"a blob", "sha512")
PATH = f"/fleet/v2/blobs/{DIGEST}/stripes/"

ASKS = st.builds(
    StripeAsk,
    st.sampled_from([DIGEST, STRONG]),
    st.integers(0, 9_999_999),
    st.integers(1, 9_999_999_999),
    st.integers(0, MOST // PIECE - 1).map(lambda n: n * PIECE),
)


@given(ASKS)
def test_a_request_is_read_as_it_is_written(ask: StripeAsk) -> None:
    assert StripeAsk.parse(ask.path, str(ask.rank), ask.range) == ask


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v2/",
        f"{PATH}",
        f"{PATH}00",
        f"{PATH}01",
        f"{PATH}-1",
        f"{PATH}+1",
        f"{PATH}1/",
        f"{PATH}1?x=1",
        f"{PATH}1#x",
        f"{PATH}1%20",
        f"{PATH}1\n",
        f"{PATH}10000000",
        f"{PATH}\u0661",  # a digit, but none of ours
        f"/{PATH}1",
        f"/fleet//v1/blobs/{DIGEST}/stripes/1",
        f"/fleet/v2/blobs/../blobs/{DIGEST}/stripes/1",
        f"/fleet/v2/blobs/{str(DIGEST).upper()}/stripes/1",
        f"/fleet/v2/blobs/{str(DIGEST).replace(':', '%3A')}/stripes/1",
        f"/fleet/v2/blobs/sha512:{DIGEST.hex}/stripes/1",
        f"/fleet/v2/blobs/md5:{DIGEST.hex[:32]}/stripes/1",
        f"http://127.0.0.1/fleet/v2/blobs/{DIGEST}/stripes/1",
        "/fleet/v2/blobs/../../etc/passwd/stripes/1",
    ],
)
def test_any_other_path_is_none(path: str) -> None:
    with pytest.raises(EndpointUnknown):
        StripeAsk.parse(path, "1", None)


@given(st.text(max_size=200))
def test_no_path_is_read_in_two_ways(path: str) -> None:
    try:
        ask = StripeAsk.parse(PATH + path, "1", None)
    except ClientError:
        return
    assert ask.path == PATH + path


@given(st.one_of(st.none(), st.text(max_size=20), st.text("bytes=-0123456789, ", max_size=30)))
def test_no_range_is_read_in_two_ways(header: str | None) -> None:
    try:
        ask = StripeAsk.parse(f"{PATH}0", "1", header)
    except ClientError:
        return
    assert ask.range == header


@pytest.mark.parametrize(
    "header",
    [
        "bytes=0-",
        "bytes=1-",
        f"bytes={PIECE}-{2 * PIECE - 1}",
        f"bytes=0{PIECE}-",
        f"bytes=-{PIECE}",
        f"bytes={PIECE}-,0-",
        f"Bytes={PIECE}-",
        f"bytes={PIECE + 1}-",
        f"bytes={MOST}-",
        "bytes=9999999999-",
    ],
)
def test_a_range_begins_where_a_piece_does(header: str) -> None:
    with pytest.raises(RequestInvalid):
        StripeAsk.parse(f"{PATH}0", "1", header)


@pytest.mark.parametrize("rank", [None, "", "0", "-1", "01", "1.0", " 1", "10000000000", "\u0661"])
def test_a_rank_is_a_number_from_one_on(rank: str | None) -> None:
    with pytest.raises(RequestInvalid, match="Pullpool-Rank"):
        StripeAsk.parse(f"{PATH}0", rank, None)


def test_digests_are_read_as_they_are_written() -> None:
    pieces = pieces_of(b"x" * (PIECE + 1))
    assert read_pieces(written(pieces), PIECE + 1) == pieces


@given(st.text(max_size=100))
def test_no_header_of_digests_is_a_crash(header: str) -> None:
    with pytest.raises(ValueError, match=r"expected the digests|base64|ASCII"):
        read_pieces(header, 16 * PIECE)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nPullpool-Pieces: YWJj\r\nServer: pullpool"


def test_a_head_is_read() -> None:
    head = parse_head(HEAD)
    assert (head.status, head.length, head.get("pullpool-PIECES")) == (200, 5, "YWJj")
    assert not head.ends_connection
    assert parse_head(HEAD + b"\r\nConnection: close").ends_connection


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"", "status line"),
        (HEAD.replace(b"1.1", b"1.0"), "status line"),
        (HEAD.replace(b"1.1", b"2"), "status line"),
        (HEAD.replace(b"200", b"100"), "status line"),
        (HEAD.replace(b"200", b"2000"), "status line"),
        (HEAD.replace(b"200 OK", b"20\x00"), "status line"),
        (HEAD.replace(b"Content-Length: 5\r\n", b""), "length"),
        (HEAD.replace(b": 5", b": -5"), "length"),
        (HEAD.replace(b": 5", b": +5"), "length"),
        (HEAD.replace(b": 5", b": 5, 5"), "length"),
        (HEAD.replace(b": 5", b": 05"), "length"),
        (HEAD.replace(b": 5", b": 0x5"), "length"),
        (HEAD.replace(b": 5", b": " + b"9" * 13), "length"),
        (HEAD + b"\r\ncontent-length: 5", "twice"),
        (HEAD + b"\r\nPULLPOOL-PIECES: YWJj", "twice"),
        (HEAD + b"\r\nTransfer-Encoding: chunked", "no length"),
        (HEAD + b"\r\n folded", "no header"),
        (HEAD + b"\r\nX : 1", "no header"),
        (HEAD + b"\r\n: 1", "no header"),
        (HEAD + b"\r\nX: a\nb", "no header"),
        (HEAD + b"\r\nX: a\rb", "no header"),
        (HEAD + b"\r\nX: \xc3\xa4", "ASCII"),
    ],
)
def test_any_other_head_is_none(head: bytes, words: str) -> None:
    with pytest.raises(Malformed, match=words):
        parse_head(head)


@given(st.binary(max_size=300))
def test_no_bytes_are_a_crash(data: bytes) -> None:
    try:
        head = parse_head(data.partition(END)[0])
    except Malformed:
        return
    assert head.length >= 0
