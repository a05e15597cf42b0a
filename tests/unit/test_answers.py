"""Small decisions in answers: overload by client, entity tags, warnings."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.answers import etag, etag_matches, overload_status, waits_for_a_body, warning
from proxy.oci.digest import Digest

from .test_digest import digests

DIGEST = Digest.of(b"this")
OTHER = Digest.of(b"other")


@pytest.mark.parametrize(
    "user_agent",
    [
        "libpod/4.3.1",
        "skopeo/1.13.3",
        "Buildah/1.33.2",
        "cri-o/1.29.0 go/go1.21 os/linux arch/amd64",
        "containers/5.29.0 (github.com/containers/image)",
    ],
)
def test_clients_that_retry_429_are_told_429(user_agent: str) -> None:
    assert overload_status(user_agent) == 429
    assert waits_for_a_body(user_agent)


@pytest.mark.parametrize(
    "user_agent",
    [
        None,
        "",
        "containerd/2.1.0",
        "docker/27.0 go/go1.21 UpstreamClient(skopeo/1.0)",
        "curl/8.0",
        "Go-http-client/1.1",
    ],
)
def test_everybody_else_is_told_503(user_agent: str | None) -> None:
    assert overload_status(user_agent) == 503
    assert not waits_for_a_body(user_agent)


@given(digests)
def test_an_entity_tag_is_quoted_and_matches_itself(digest: Digest) -> None:
    assert etag(digest) == f'"{digest}"'
    assert etag_matches(etag(digest), digest)


@pytest.mark.parametrize(
    "header",
    [
        "*",
        " * ",
        f'"{DIGEST}"',
        f'W/"{DIGEST}"',
        f'"x", W/"y" ,"{DIGEST}"',
        str(DIGEST),
        f"{OTHER}, {DIGEST}",
    ],
)
def test_what_the_client_holds_is_recognised(header: str) -> None:
    assert etag_matches(header, DIGEST)


@pytest.mark.parametrize(
    "header",
    [None, "", '""', f'"{OTHER}"', f'"a,{DIGEST},b"', f'"{DIGEST}0"', '"*"'],
)
def test_what_the_client_does_not_hold_is_sent(header: str | None) -> None:
    assert not etag_matches(header, DIGEST)


@given(st.text(max_size=60))
def test_any_header_can_be_compared(header: str) -> None:
    assert etag_matches(header, DIGEST) is (header.strip() == "*")


def test_a_warning_is_what_clients_show() -> None:
    assert warning("queued, 12 ahead") == '299 - "queued, 12 ahead"'
    assert warning('a "b" \\c') == '299 - "a \\"b\\" \\\\c"'
    assert warning("a\r\nX: é") == '299 - "a  X: ?"'


@given(st.text(max_size=100) | st.text(alphabet='"\\é\n', min_size=4000, max_size=4200))
def test_a_warning_stays_in_its_header_and_its_size(text: str) -> None:
    value = warning(text)
    assert len(value.encode()) <= 4096
    assert re.fullmatch(r'299 - "(?:[ !#-\[\]-~]|\\["\\])*"', value)
