"""Each failure carries the answer it deserves, and the body is the one clients can read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci import errors
from proxy.oci.errors import ErrorCode, PullError


def _all_kinds(base: type[PullError] = PullError) -> list[type[PullError]]:
    return [kind for sub in base.__subclasses__() for kind in (sub, *_all_kinds(sub))]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.NameInvalid(), 400, "NAME_INVALID"),
        (errors.DigestInvalid(), 400, "DIGEST_INVALID"),
        (errors.TagInvalid(), 404, "MANIFEST_UNKNOWN"),
        (errors.NameUnknown(), 404, "NAME_UNKNOWN"),
        (errors.EndpointUnknown(), 404, "UNSUPPORTED"),
        (errors.MethodNotAllowed(), 405, "UNSUPPORTED"),
        (errors.RangeNotSatisfiable(7), 416, "SIZE_INVALID"),
        (errors.NotAcceptable(), 404, "MANIFEST_UNKNOWN"),
        (errors.RequestInvalid(), 400, "UNSUPPORTED"),
        (errors.NotFound("manifest"), 404, "MANIFEST_UNKNOWN"),
        (errors.NotFound("blob"), 404, "BLOB_UNKNOWN"),
        (errors.NotFound("name"), 404, "NAME_UNKNOWN"),
        (errors.NotFound("tags"), 404, "NAME_UNKNOWN"),
        (errors.NotFound("referrers"), 404, "MANIFEST_UNKNOWN"),
        (errors.Denied(), 403, "DENIED"),
        (errors.Throttled(3), 503, "TOOMANYREQUESTS"),
        (errors.Throttled(3, status=429), 429, "TOOMANYREQUESTS"),
        (errors.QueueFull(3), 503, "TOOMANYREQUESTS"),
        (errors.QueueTimeout(3), 503, "TOOMANYREQUESTS"),
        (errors.UpstreamUnavailable(), 502, "UNAVAILABLE"),
        (errors.UpstreamTimeout(), 504, "UNAVAILABLE"),
        (errors.DigestMismatch("sha256:a", "sha256:b"), 502, "DIGEST_INVALID"),
        (errors.SizeMismatch(5, 4), 502, "SIZE_INVALID"),
        (errors.TooLarge(8), 502, "SIZE_INVALID"),
        (errors.ManifestInvalid(), 502, "MANIFEST_INVALID"),
        (errors.RealmRefused(), 502, "UNAUTHORIZED"),
        (errors.RedirectRefused(), 502, "UNAVAILABLE"),
        (errors.TokenServiceFailed(), 502, "UNAVAILABLE"),
        (errors.StoreFailed(), 500, "UNKNOWN"),
        (errors.ShuttingDown(), 503, "UNAVAILABLE"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PullError) else "",
)
def test_every_failure_knows_its_status_and_code(error: PullError, status: int, code: str) -> None:
    assert (error.status, error.code) == (status, code)
    body = json.loads(error.body("r-1"))
    assert [entry["code"] for entry in body["errors"]] == [code]
    assert body["errors"][0]["message"] == error.message != ""
    assert body["errors"][0]["detail"]["request_id"] == "r-1"


def test_every_failure_has_a_reason_of_its_own() -> None:
    reasons = [kind.reason for kind in _all_kinds()]
    assert len(set(reasons)) == len(reasons)
    assert all(reason.replace("_", "").isalpha() and len(reason) < 30 for reason in reasons)


def test_there_are_three_families_and_nothing_beside_them() -> None:
    families = {errors.ClientError, errors.UpstreamError, errors.InternalError}
    assert set(PullError.__subclasses__()) == families
    assert all(400 <= kind.status < 500 for kind in _all_kinds(errors.ClientError))


def test_a_range_that_does_not_fit_names_the_size() -> None:
    assert errors.RangeNotSatisfiable(7).headers == {"Content-Range": "bytes */7"}


def test_a_refused_write_names_what_is_allowed() -> None:
    assert errors.MethodNotAllowed().headers == {"Allow": "GET, HEAD"}


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.2, "1"), (4.1, "5"), (30, "30")])
def test_retry_after_is_whole_seconds_and_never_zero(seconds: float, header: str) -> None:
    error = errors.QueueTimeout(seconds)
    assert error.headers["Retry-After"] == header
    assert error.retry_after == seconds


def test_a_throttled_answer_without_a_time_has_no_retry_after() -> None:
    assert "Retry-After" not in errors.Throttled(None).headers


def test_a_mismatch_says_what_was_expected_and_what_came() -> None:
    error = errors.DigestMismatch("sha256:aa", "sha256:bb")
    assert error.detail == {"expected": "sha256:aa", "actual": "sha256:bb"}
    assert "sha256:aa" in str(error)
    assert "sha256:bb" in str(error)
    assert errors.SizeMismatch(5, 4).detail == {"expected": 5, "actual": 4}
    assert errors.TooLarge(8).detail == {"limit": 8}


def test_no_failure_ever_carries_a_challenge() -> None:
    for error in (errors.Denied(), errors.RealmRefused(), errors.TokenServiceFailed()):
        assert "www-authenticate" not in {name.lower() for name in error.headers}


@given(message=st.text(), key=st.text(), value=st.text() | st.integers() | st.none())
def test_the_body_is_json_whatever_it_says(message: str, key: str, value: object) -> None:
    error = errors.RequestInvalid(message, detail={key: value, "object": object()})
    entry = json.loads(error.body("id"))["errors"][0]
    assert entry["message"] == message
    assert entry["detail"]["request_id"] == "id"
    assert ErrorCode(entry["code"]) is ErrorCode.UNSUPPORTED


def test_the_repr_says_what_the_client_will_see() -> None:
    assert repr(errors.Denied("no")) == "<Denied 403 DENIED: no>"
