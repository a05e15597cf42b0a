"""What leader and follower say to one another means the same on both sides."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.digest import Digest
from proxy.oci.errors import (
    Denied,
    DigestMismatch,
    NotFound,
    PullError,
    QueueTimeout,
    RangeNotSatisfiable,
    SizeMismatch,
    UpstreamBusy,
)
from proxy.oci.paths import Kind
from proxy.oci.ranges import ByteRange, Span
from proxy.pull.asks import Ask, CacheWord
from proxy.team import wire
from proxy.team.frames import MAX_IMAGES, BadFrame, Frame
from proxy.upstream.routing import Route, Upstream

UP = Upstream("harbor.example.com", "https://harbor.example.com")
KNOWN = {UP.name: UP}
DIGEST = Digest.of(b"x")


def over_the_wire(fields: object) -> dict[str, object]:
    return dict(json.loads(json.dumps(fields)))


def test_a_request_keeps_its_client_its_place_and_its_age() -> None:
    ask = Ask(Route(UP, "team/app", "proxy/team/app", "ns"), "user/ann", 90.0, is_patient=True)
    other = wire.read_ask(over_the_wire(wire.ask_fields(ask, 100.0)), KNOWN, 7.0)
    assert (other.upstream, other.repository, other.client) == (UP.name, "team/app", "user/ann")
    assert (other.arrived, other.is_patient) == (-3.0, True)


@pytest.mark.parametrize(
    "change",
    [
        {"upstream": "other.example.com"},
        {"upstream": None},
        {"client": "x" * 1025},
        {"client": 3},
        {"age": -1},
        {"age": "1"},
        {"repository": None},
    ],
)
def test_a_request_that_no_follower_would_make_is_refused(change: dict[str, object]) -> None:
    ask = Ask(Route(UP, "team/app", "team/app", None), "10.0.0.1", 0.0)
    with pytest.raises(BadFrame):
        wire.read_ask({**wire.ask_fields(ask, 1.0), **change}, KNOWN, 1.0)


@pytest.mark.parametrize(
    "error",
    [
        NotFound("manifest"),
        NotFound("tags", detail={"name": "team/app"}),
        Denied(),
        DigestMismatch(DIGEST, Digest.of(b"y")),
        SizeMismatch(4, 5),
        RangeNotSatisfiable(10),
        QueueTimeout(10.0, message="later"),
        UpstreamBusy(3.2, status=429),
        PullError("odd", status=418),
    ],
)
def test_a_refusal_is_the_same_refusal(error: PullError) -> None:
    other = wire.read_error(over_the_wire(wire.error_fields(error)))
    assert type(other) is type(error)
    assert other.body("id") == error.body("id")
    assert (str(other), other.status, other.code) == (str(error), error.status, error.code)
    assert (other.retry_after, other.headers) == (error.retry_after, error.headers)
    assert getattr(other, "kind", None) == getattr(error, "kind", None)
    assert type(other.bare()) is type(error)


@pytest.mark.parametrize("fields", [{}, {"error": "NotFound", "message": "x", "status": "y"}])
def test_an_error_that_is_none_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(BadFrame):
        wire.read_error(fields)


@given(
    st.none() | st.integers(0, 2**40),
    st.none() | st.tuples(st.integers(0, 99), st.integers(100, 200)),
    st.sampled_from(CacheWord),
    st.none() | st.text(),
    st.booleans(),
)
def test_an_answer_is_the_same_answer(
    size: int | None,
    span: tuple[int, int] | None,
    word: CacheWord,
    warning: str | None,
    has_pieces: bool,
) -> None:
    part = None if span is None else Span(*span, 300)
    head = wire.BlobHead(size, part, word, warning, has_pieces)
    assert wire.read_blob(over_the_wire(wire.blob_fields(head))) == head


@pytest.mark.parametrize("wanted", [None, ByteRange(0, None), ByteRange(None, 5), ByteRange(3, 9)])
def test_a_range_is_the_same_range(wanted: ByteRange | None) -> None:
    assert wire.read_range(wire.range_fields(wanted)) == wanted


@pytest.mark.parametrize("value", [3, [1], [1, 2, 3], ["1", None], [None, None], [5, 1], [True]])
def test_a_range_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(BadFrame):
        wire.read_range(value)


def test_images_are_the_same_images() -> None:
    images = [(UP.name, "team/app", DIGEST), (UP.name, "library/x", Digest.of(b"y"))]
    fields = over_the_wire({"images": wire.image_keys(images)})
    assert wire.read_images(fields, KNOWN) == images
    longest = [("u" * 253, "r" * 255, Digest("sha512", "0" * 128))] * MAX_IMAGES
    Frame("pulled", 1, {"images": wire.image_keys(longest)}).encode()


@pytest.mark.parametrize(
    "image",
    [
        3,
        [],
        [UP.name, "team/app"],
        [UP.name, "team/app", "sha256:no"],
        [UP.name, "team/app", 3],
        [UP.name, "../app", str(DIGEST)],
        [UP.name, 3, str(DIGEST)],
        ["other.example.com", "team/app", str(DIGEST)],
        [[], "team/app", str(DIGEST)],
    ],
)
def test_images_that_are_none_are_refused(image: object) -> None:
    good = [UP.name, "team/app", str(DIGEST)]
    for fields in ({}, {"images": 3}, {"images": [good, image]}):
        with pytest.raises(BadFrame):
            wire.read_images(fields, KNOWN)


def test_only_listings_that_there_are_can_be_asked_for() -> None:
    referrers = f"referrers/{DIGEST}"
    assert wire.read_tail({"what": "tags", "tail": "tags/list"}) == (Kind.TAGS, "tags/list")
    assert wire.read_tail({"what": "referrers", "tail": referrers}) == (Kind.REFERRERS, referrers)
    for what, tail in (("tags", "../x"), ("blob", "tags/list"), ("referrers", "tags/list")):
        with pytest.raises(BadFrame):
            wire.read_tail({"what": what, "tail": tail})
