"""The border: every foreign failure becomes one of ours, counted, and says nothing secret."""

from __future__ import annotations

import asyncio
import email.utils
import errno
import ssl
from collections.abc import Mapping

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from proxy.observe.metrics import Metrics
from proxy.oci.errors import (
    Denied,
    NotFound,
    PullError,
    Throttled,
    UnexpectedAnswer,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.oci.paths import Kind
from proxy.upstream.errors import MAX_RETRY_AFTER, refusal, retry_after, translated
from tests.unit.upstream_kit import sample

LABEL = "cdn.example.com"
SIGNED = URL("https://cdn.example.com/blob?X-Amz-Signature=5ec4e7", encoded=True)
KEY = ConnectionKey(LABEL, 443, True, ssl.create_default_context(), None, None, None)


def response_error() -> aiohttp.ClientResponseError:
    headers = CIMultiDictProxy(CIMultiDict[str]())
    request = aiohttp.RequestInfo(SIGNED, "GET", headers, SIGNED)
    return aiohttp.ClientResponseError(request, (), status=400, message="bad status line")


REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            aiohttp.ClientConnectorDNSError(KEY, OSError(-2, "Name not known")),
            "dns",
            "Name not known",
        ),
        (aiohttp.ClientConnectorError(KEY, REFUSED), "connect", "Connection refused"),
        (
            aiohttp.ClientConnectorCertificateError(KEY, ssl.CertificateError("expired")),
            "tls",
            "expired",
        ),
        (aiohttp.ClientConnectorSSLError(KEY, ssl.SSLError(1, "wrong version")), "tls", "version"),
        (ssl.SSLError(1, "bad record mac"), "tls", "bad record mac"),
        (aiohttp.ServerDisconnectedError(), "reset", "closed the connection"),
        (aiohttp.ClientOSError(errno.ECONNRESET, "Reset by peer"), "reset", "Reset by peer"),
        (aiohttp.ClientConnectionResetError("Cannot write"), "reset", "Cannot write"),
        (ConnectionResetError(), "reset", "ConnectionResetError"),
        (aiohttp.ClientPayloadError("not completed"), "body", "not completed"),
        (response_error(), "protocol", "bad status line"),
        (aiohttp.InvalidURL(SIGNED), "protocol", "InvalidURL"),
        (ValueError(), "protocol", "ValueError"),
    ],
)
def test_a_failure_of_the_connection_is_an_upstream_that_cannot_be_reached(
    error: Exception, kind: str, says: str
) -> None:
    metrics = Metrics()
    with pytest.raises(UpstreamUnavailable) as caught, translated(LABEL, metrics):
        raise error
    assert caught.value.message.startswith(f"{LABEL}: ")
    assert says in caught.value.message
    assert caught.value.status == 502
    assert caught.value.__cause__ is error
    assert sample(metrics, "upstream_errors_total", upstream=LABEL, kind=kind) == 1
    is_harmless(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ConnectionTimeoutError(f"Connection timeout to host {SIGNED}"),
        aiohttp.SocketTimeoutError("Timeout on reading data from socket"),
        TimeoutError(),
    ],
)
def test_a_failure_to_answer_in_time_is_a_time_out(error: Exception) -> None:
    metrics = Metrics()
    with pytest.raises(UpstreamTimeout) as caught, translated(LABEL, metrics):
        raise error
    assert caught.value.status == 504
    assert sample(metrics, "upstream_errors_total", upstream=LABEL, kind="timeout") == 1
    is_harmless(caught.value)


def is_harmless(error: PullError) -> None:
    """It names neither a signed URL nor an object in memory."""
    for word in ("Amz", "5ec4e7", "0x", "SSLContext"):
        assert word not in error.message


@pytest.mark.parametrize("error", [Denied(), asyncio.CancelledError(), KeyError("ours")])
def test_what_is_not_the_upstreams_failure_passes_unchanged(error: BaseException) -> None:
    metrics = Metrics()
    with pytest.raises(type(error)) as caught, translated(LABEL, metrics):
        raise error
    assert caught.value is error
    assert b"pullpool_upstream_errors_total{" not in metrics.render()


@pytest.mark.parametrize(
    ("status", "expected", "answer"),
    [
        (404, NotFound, 404),
        (401, Denied, 403),
        (403, Denied, 403),
        (429, Throttled, 503),
        (500, UpstreamUnavailable, 502),
        (503, UpstreamUnavailable, 502),
        (304, UnexpectedAnswer, 502),
        (204, UnexpectedAnswer, 502),
    ],
)
def test_a_status_that_was_not_hoped_for_is_a_refusal(
    status: int, expected: type[PullError], answer: int
) -> None:
    error = refusal("harbor", status, {}, Kind.BLOB, "blob sha256:1 in team/app")
    assert type(error) is expected
    assert error.status == answer
    assert "harbor" in error.message
    assert "WWW-Authenticate" not in error.headers


@pytest.mark.parametrize(("status", "expected"), [(429, 7.0), (503, 7.0), (500, None), (404, None)])
def test_a_wish_to_wait_is_kept_where_it_means_something(
    status: int, expected: float | None
) -> None:
    error = refusal("harbor", status, {"Retry-After": "7"}, Kind.MANIFEST, "manifest a:b")
    assert error.retry_after == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("99999999999999999999", MAX_RETRY_AFTER),
        ("9" * 5000, MAX_RETRY_AFTER),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:28:30 -0000", 30.0),
        ("Wed, 21 Oct 2015 09:28:30 +0200", 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("Wed, 21 Oct 2065 07:28:30 GMT", MAX_RETRY_AFTER),
        ("", None),
        ("-5", None),
        ("1.5", None),
        ("٣", None),
        ("soon", None),
        ("Wed, 99 Oct 99999 07:28:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, expected: float | None) -> None:
    now = email.utils.parsedate_to_datetime("Wed, 21 Oct 2015 07:28:00 GMT").timestamp()
    assert retry_after({"Retry-After": value}, now) == expected


def test_without_a_header_nobody_asks_to_wait() -> None:
    headers: Mapping[str, str] = {}
    assert retry_after(headers) is None


@given(st.text())
def test_whatever_retry_after_says_it_is_bounded(value: str) -> None:
    wait = retry_after({"Retry-After": value}, 1e9)
    assert wait is None or 0 <= wait <= MAX_RETRY_AFTER
