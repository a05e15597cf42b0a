"""Frames survive any cutting of the stream, and nonsense is refused before it costs anything."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.team.frames import MAX_DATA, MAX_FIELDS, BadFrame, Frame, Frames

VALUES = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())
FRAMES = st.builds(
    Frame,
    kind=st.text(min_size=1),
    call=st.integers(0, 2**64 - 1),
    fields=st.dictionaries(st.text().filter(lambda key: key != "kind"), VALUES),
    data=st.binary(max_size=300),
    fds=st.integers(0, 1),
)


@given(st.lists(FRAMES, max_size=6), st.data())
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(
    frames: list[Frame], data: st.DataObject
) -> None:
    stream = b"".join(frame.encode() for frame in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    decoder, found = Frames(), list[Frame]()
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += decoder.feed(stream[start:stop])
    assert found == frames
    assert len(decoder) == 0


@given(st.lists(FRAMES, min_size=1, max_size=3), st.data())
def test_a_stream_that_ends_early_gives_the_frames_before_its_end(
    frames: list[Frame], data: st.DataObject
) -> None:
    stream = b"".join(frame.encode() for frame in frames)
    end = data.draw(st.integers(0, len(stream) - 1))
    found = list(Frames().feed(stream[:end]))
    assert found == frames[: len(found)]
    assert len(found) < len(frames)


@given(st.binary(min_size=17, max_size=200))
def test_any_bytes_are_frames_or_refused(noise: bytes) -> None:
    decoder = Frames()
    try:
        for frame in decoder.feed(noise):
            assert isinstance(frame, Frame)
    except BadFrame:
        return
    fields, data, _, fds = struct.unpack_from("!IIQB", noise)
    assert fields <= MAX_FIELDS
    assert data <= MAX_DATA
    assert fds <= 1


@pytest.mark.parametrize(
    ("fields", "data", "fds"), [(MAX_FIELDS + 1, 0, 0), (0, MAX_DATA + 1, 0), (2, 0, 2)]
)
def test_a_frame_beyond_the_bounds_is_refused_by_its_head(fields: int, data: int, fds: int) -> None:
    with pytest.raises(BadFrame):
        list(Frames().feed(struct.pack("!IIQB", fields, data, 1, fds)))


@pytest.mark.parametrize("text", [b"[]", b"{}", b"{", b'{"kind":1}', b"\xff", b"[" * 90_000])
def test_fields_that_are_no_object_with_a_kind_are_refused(text: bytes) -> None:
    with pytest.raises(BadFrame):
        list(Frames().feed(struct.pack("!IIQB", len(text), 0, 1, 0) + text))


def test_a_frame_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match="too long"):
        Frame("x", data=bytes(MAX_DATA + 1)).encode()
