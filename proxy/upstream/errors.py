"""The border to aiohttp and to the upstream's status codes: their failures in our words.

Everything foreign is translated here and nowhere else, so that the layers above know three
families of errors only (``proxy.oci.errors``).
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import aiohttp

from proxy.observe.metrics import Metrics
from proxy.oci.errors import (
    Denied,
    NotFound,
    PullError,
    Throttled,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.oci.paths import Kind

#: The longest Retry-After that is believed, in seconds.
MAX_RETRY_AFTER = 3600.0


@contextmanager
def translated(label: str, metrics: Metrics) -> Iterator[None]:
    """Turn what aiohttp raises about the origin ``label`` into an ``UpstreamError``, counted."""
    try:
        yield
    except PullError:
        raise
    except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError) as error:
        metrics.upstream_errors.labels(label, "tls").inc()
        raise UpstreamUnavailable(f"{label}: TLS failed: {error}") from error
    except (TimeoutError, aiohttp.ServerTimeoutError) as error:
        metrics.upstream_errors.labels(label, "timeout").inc()
        raise UpstreamTimeout(f"{label}: no answer in time: {_said(error)}") from error
    except aiohttp.ClientConnectorError as error:
        metrics.upstream_errors.labels(label, "connect").inc()
        raise UpstreamUnavailable(f"{label}: cannot connect: {error}") from error
    except aiohttp.ClientPayloadError as error:
        metrics.upstream_errors.labels(label, "body").inc()
        raise UpstreamUnavailable(f"{label}: the body broke off: {_said(error)}") from error
    except (aiohttp.ClientConnectionError, OSError) as error:
        metrics.upstream_errors.labels(label, "reset").inc()
        raise UpstreamUnavailable(f"{label}: the connection broke: {_said(error)}") from error
    except (aiohttp.ClientError, ValueError) as error:
        metrics.upstream_errors.labels(label, "protocol").inc()
        raise UpstreamUnavailable(f"{label}: not an HTTP answer: {_said(error)}") from error


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
    after = retry_after(headers) if status == 503 else None
    return UpstreamUnavailable(f"{label} answered {status} to {name}", retry_after=after)


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds from a Retry-After header (RFC 9110 §10.2.3: seconds or a date), or ``None``."""
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), MAX_RETRY_AFTER)
    try:
        at = email.utils.parsedate_to_datetime(value).timestamp()
    except ValueError:
        return None
    return min(max(0.0, at - (time.time() if now is None else now)), MAX_RETRY_AFTER)


def _said(error: BaseException) -> str:
    """What a foreign exception says, or its name if it says nothing."""
    return str(error) or type(error).__name__
