"""Ranges select what slicing selects, and what cannot be read means the whole body."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.errors import RangeNotSatisfiable
from proxy.oci.ranges import ByteRange, Span, parse_content_range

positions = st.integers(0, 40)
contents = st.binary(max_size=30)


def _taken(header: str, content: bytes) -> bytes | None:
    """The bytes the header selects; None for a 416."""
    asked = ByteRange.parse(header)
    assert asked is not None
    try:
        span = asked.resolve(len(content))
    except RangeNotSatisfiable:
        return None
    assert span.size == len(content)
    assert span.length == span.stop - span.start > 0
    return content[span.start : span.stop]


@given(contents, positions, positions)
def test_a_closed_range_is_a_slice(content: bytes, one: int, other: int) -> None:
    first, last = sorted((one, other))
    assert _taken(f"bytes={first}-{last}", content) == (content[first : last + 1] or None)


@given(contents, positions)
def test_an_open_range_is_the_rest(content: bytes, first: int) -> None:
    assert _taken(f"bytes={first}-", content) == (content[first:] or None)


@given(contents, positions)
def test_a_suffix_is_the_end(content: bytes, length: int) -> None:
    expected = content[-length:] if length else b""
    assert _taken(f"bytes=-{length}", content) == (expected or None)


@given(positions | st.none(), positions | st.none())
def test_a_range_reads_what_it_writes(first: int | None, last: int | None) -> None:
    try:
        asked = ByteRange(first, last)
    except ValueError:
        return
    assert ByteRange.parse(str(asked)) == asked


@given(st.text(max_size=40) | st.text(alphabet="bytes=-0123, \t", max_size=20))
def test_any_text_is_a_range_or_none(text: str) -> None:
    for header in (text, f"bytes={text}"):
        asked = ByteRange.parse(header)
        assert asked is None or ByteRange.parse(str(asked)) == asked


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=,",
        "bytes=a-b",
        "bytes=5-2",
        "bytes=0-1,4-5",
        "bytes=0-0, -1",
        "bytes 0-1",
        "items=0-1",
        "bytes=0-1-2",
        "bytes=--1",
        "bytes=+1-2",
        "bytes=1 - 2",
        "bytes=0x1-2",
        "bytes=٣-٤",
        f"bytes={'9' * 5000}-",
    ],
)
def test_what_cannot_be_honoured_means_the_whole_body(header: str | None) -> None:
    assert ByteRange.parse(header) is None


@pytest.mark.parametrize("header", ["Bytes=1-2", "bytes= 1-2 ", "bytes=1-2,", " bytes=,1-2"])
def test_forms_that_the_grammar_allows_are_read(header: str) -> None:
    assert ByteRange.parse(header) == ByteRange(1, 2)


def test_the_largest_number_a_client_sends_for_the_end_is_understood() -> None:
    asked = ByteRange.parse(f"bytes=0-{2**64 - 1}")
    assert asked is not None
    assert asked.resolve(10) == Span(0, 10, 10)


def test_an_unsatisfiable_range_says_how_much_there_is() -> None:
    with pytest.raises(RangeNotSatisfiable) as caught:
        ByteRange(10, None).resolve(10)
    assert caught.value.headers["Content-Range"] == "bytes */10"


@pytest.mark.parametrize("bounds", [(None, None), (-1, None), (3, 2), (None, -1)])
def test_a_range_that_makes_no_sense_cannot_be_built(bounds: tuple[int | None, int | None]) -> None:
    with pytest.raises(ValueError, match=r"range|negative"):
        ByteRange(*bounds)


@pytest.mark.parametrize("bounds", [(-1, 2, 3), (2, 1, 3), (0, 4, 3), (2, 1, None)])
def test_a_span_outside_its_content_cannot_be_built(bounds: tuple[int, int, int | None]) -> None:
    with pytest.raises(ValueError, match="no such span"):
        Span(*bounds)


@given(st.integers(0, 99), st.integers(1, 99), st.integers(0, 99) | st.none())
def test_a_content_range_reads_what_it_writes(start: int, length: int, rest: int | None) -> None:
    stop = start + length
    span = Span(start, stop, None if rest is None else stop + rest)
    assert parse_content_range(span.content_range) == span


def test_an_empty_span_has_no_content_range() -> None:
    with pytest.raises(ValueError, match="empty"):
        _ = Span(0, 0, 0).content_range


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "bytes */10",
        "bytes 5-2/10",
        "bytes 0-10/10",
        "bytes 0-1",
        "bytes=0-1/2",
        "items 0-1/2",
        "bytes 0-1/x",
        "bytes -1/2",
        f"bytes 0-{'9' * 5000}/*",
    ],
)
def test_a_content_range_that_tells_nothing_is_none(header: str | None) -> None:
    assert parse_content_range(header) is None


@given(st.text(max_size=40))
def test_any_content_range_is_a_span_or_none(text: str) -> None:
    for header in (text, f"bytes {text}"):
        span = parse_content_range(header)
        assert span is None or parse_content_range(span.content_range) == span
