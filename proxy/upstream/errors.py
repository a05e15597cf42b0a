"""The border to aiohttp and to the upstream's status codes: their failures in our words.

Everything foreign is translated here and nowhere else, so that the layers above know three
families of errors only (``proxy.oci.errors``). What clients may see is written here too: aiohttp's
own texts name whole URLs, and those of a CDN are signed.
"""

from __future__ import annotations

import email.utils
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC

import aiohttp

from proxy.observe.metrics import Metrics
from proxy.oci.errors import (
    Denied,
    EgressFailed,
    EgressRefused,
    NotFound,
    PullError,
    Throttled,
    UnexpectedAnswer,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from proxy.oci.paths import Kind

#: The longest Retry-After that is believed, in seconds.
MAX_RETRY_AFTER = 3600.0
#: Kinds of failures in which there was no connection.
UNREACHABLE = frozenset({"dns", "tls", "connect"})


@contextmanager
def translated(label: str, metrics: Metrics) -> Iterator[None]:
    """Turn what aiohttp raises about the origin ``label`` into an ``UpstreamError``, counted."""
    try:
        yield
    except PullError:
        raise
    except (aiohttp.ClientError, OSError, ValueError) as error:
        kind, said = sort_failure(error)
        metrics.upstream_errors.labels(label, kind).inc()
        failure: type[UpstreamError] = UpstreamTimeout if kind == "timeout" else UpstreamUnavailable
        if kind in UNREACHABLE:
            failure = UpstreamUnreachable
        raise failure(f"{label}: {said}") from error


#: What a proxy answers to CONNECT by its rules: the next try would hear the same.
_REFUSALS_OF_PROXIES = frozenset({401, 403, 405, 407})


def egress_refusal(label: str, proxy: str, status: int) -> EgressRefused:
    """The egress proxy has refused us with ``status``: its operator's or ours to set right."""
    expected = "access to this upstream"
    if status == 407:
        expected = "it to accept the name and password in the configured proxy URL"
    return EgressRefused(f"{label}: expected of the egress proxy {proxy} {expected}, got {status}")


def egress_failure(
    error: aiohttp.ClientError, label: str, proxy: str
) -> EgressFailed | EgressRefused | None:
    """The failure that an egress proxy is to blame for; ``None`` if it is not about the proxy."""
    match error:
        case aiohttp.ClientHttpProxyError() if error.status in _REFUSALS_OF_PROXIES:
            return egress_refusal(label, proxy, error.status)
        case aiohttp.ClientHttpProxyError():
            said = f"answers {error.status} to CONNECT"
        case aiohttp.ConnectionTimeoutError():
            said = "makes no connection in time"
        case aiohttp.ClientConnectorError() if _is_at(proxy, error):
            said = (
                sort_failure(error)[1].removeprefix("its name is ").removeprefix("cannot connect: ")
            )
            said = f"cannot be reached: {said}"
        case _:
            return None
    return EgressFailed(f"the egress proxy {proxy} {said}", upstream=label)


def _is_at(place: str, error: aiohttp.ClientConnectorError) -> bool:
    host = f"[{error.host}]" if ":" in error.host else error.host
    return f"{host}:{error.port}" == place


def sort_failure(error: Exception) -> tuple[str, str]:
    """The kind of a failure, for metrics, and a sentence for people. Order matters: many are
    several things at once."""
    match error:
        case aiohttp.ClientConnectorDNSError():
            return "dns", f"its name is not resolved: {_said(error.os_error)}"
        case aiohttp.ClientConnectorCertificateError():
            return "tls", f"TLS failed: {_said(error.certificate_error)}"
        case aiohttp.ClientSSLError():
            return "tls", f"TLS failed: {_said(error.os_error)}"
        case ssl.SSLError():
            return "tls", f"TLS failed: {_said(error)}"
        case aiohttp.ConnectionTimeoutError():
            return "timeout", "no connection in time"
        case TimeoutError():
            return "timeout", "no answer in time"
        case aiohttp.ClientConnectorError():
            return "connect", f"cannot connect: {_said(error.os_error)}"
        case aiohttp.ClientPayloadError():
            return "body", f"the body broke off: {_said(error)}"
        case aiohttp.ServerDisconnectedError():
            return "reset", "it closed the connection without an answer"
        case aiohttp.ClientConnectionError() | OSError():
            return "reset", f"the connection broke: {_said(error)}"
        case aiohttp.ClientResponseError():
            return "protocol", f"not an HTTP answer: {error.message[:200]}"
        case _:
            return "protocol", f"not an HTTP answer: {type(error).__name__}"


def _said(error: BaseException) -> str:
    """What a foreign exception says, or its name if it says nothing."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said or type(error).__name__


def refusal(
    label: str, status: int, headers: Mapping[str, str], kind: Kind, name: str
) -> PullError:
    """The error for an upstream's answer that is not what was asked for.

    ``name`` says what was asked for, in words that may be shown to the client.
    """
    if status == 404:
        return NotFound(kind, f"{label} has no {name}")
    if status in (401, 403):
        return Denied(f"{label} denies {name} (status {status})")
    if status == 429:
        return Throttled(retry_after(headers), message=f"{label} asks to wait (status 429)")
    if status < 500:
        return UnexpectedAnswer(f"{label} answered {status} to {name}")
    after = retry_after(headers) if status == 503 else None
    return UpstreamUnavailable(f"{label} answered {status} to {name}", retry_after=after)


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds from a Retry-After header (RFC 9110 §10.2.3: seconds or a date), or ``None``."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return min(float(value), MAX_RETRY_AFTER)
    try:
        date = email.utils.parsedate_to_datetime(value)
        if date.tzinfo is None:  # "-0000" says UTC and nothing of where
            date = date.replace(tzinfo=UTC)
        wait = date.timestamp() - (time.time() if now is None else now)
    except (ValueError, OverflowError):
        return None
    return min(max(0.0, wait), MAX_RETRY_AFTER)
