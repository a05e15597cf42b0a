"""Token answers are read strictly where a header line is at stake and leniently elsewhere."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.errors import TokenServiceFailed
from proxy.oci.token import Access, TokenReply, grants, jwt_access, parse_token_reply

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def _jwt(claims: object) -> str:
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"eyJhbGciOiJub25lIn0.{payload}.c2ln"


def _reply(**fields: object) -> TokenReply:
    return parse_token_reply(json.dumps(fields).encode())


def test_a_token_is_taken_under_either_name() -> None:
    assert _reply(token="abc", expires_in=300) == TokenReply("abc", 300)
    assert _reply(access_token="abc", expires_in=300) == TokenReply("abc", 300)
    assert _reply(token="", access_token="abc") == TokenReply("abc", 60)
    assert _reply(token="one", access_token="two").token == "one"


@pytest.mark.parametrize(
    ("given_value", "seconds"),
    [
        (300, 300),
        (5, 5),
        (0.25, 1),
        (0, 1),
        (-5, 1),
        (None, 60),
        ("300", 60),
        (True, 60),
        ([], 60),
        (float("inf"), 60),
        (float("nan"), 60),
        (10**400, 60),
    ],
)
def test_a_lifetime_is_taken_as_given_or_by_default(given_value: object, seconds: float) -> None:
    assert _reply(token="t", expires_in=given_value).expires_in == seconds


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"token"',
        b"{}",
        b"\xff",
        b"<html>busy</html>",
        b'{"token": null}',
        b'{"token": 5}',
        b'{"token": "a b"}',
        b'{"token": "a\\r\\nX-Evil: 1"}',
        b'{"token": "\\u00e9"}',
        b"[" * 60_000,
        b'{"token": "a", "expires_in": ' + b"9" * 5000 + b"}",
    ],
)
def test_an_answer_without_a_usable_token_is_a_failure(body: bytes) -> None:
    with pytest.raises(TokenServiceFailed):
        parse_token_reply(body)


@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_answer_gives_a_token_or_the_one_failure(body: bytes) -> None:
    try:
        reply = parse_token_reply(body)
    except TokenServiceFailed:
        return
    assert reply.token.isascii()
    assert reply.expires_in >= 1


def test_a_token_is_not_shown_by_its_repr() -> None:
    assert "secret" not in repr(_reply(token="secret"))


def test_the_access_of_a_jwt_is_read() -> None:
    token = _jwt({"access": [{"type": "repository", "name": "a/b", "actions": ["pull"]}]})
    assert jwt_access(token) == (Access("repository", "a/b", frozenset({"pull"})),)


@pytest.mark.parametrize("empty", [[], None])
def test_a_jwt_that_allows_nothing_is_told_from_an_opaque_token(empty: object) -> None:
    assert jwt_access(_jwt({"access": empty})) == ()
    assert not grants(_jwt({"access": empty}), "a/b", "pull")


@pytest.mark.parametrize(
    "token",
    [
        "opaque",
        "a.b",
        "a.b.c",
        "a.!!!!.c",
        "a.é.c",
        "..",
        _jwt([]),
        _jwt({}),
        _jwt({"access": "yes"}),
        f"a.{base64.urlsafe_b64encode(b'[' * 60_000).decode()}.c",
    ],
)
def test_a_token_that_cannot_be_read_gets_the_benefit_of_the_doubt(token: str) -> None:
    assert jwt_access(token) is None
    assert grants(token, "a/b", "pull")


@pytest.mark.parametrize(
    ("entry", "granted"),
    [
        ({"type": "repository", "name": "a/b", "actions": ["pull", "push"]}, True),
        ({"type": "repository", "name": "a/b", "actions": ["*"]}, True),
        ({"type": "repository", "name": "a/b", "actions": ["push"]}, False),
        ({"type": "repository", "name": "a/b", "actions": []}, False),
        ({"type": "repository", "name": "a/b", "actions": None}, False),
        ({"type": "repository", "name": "a/bb", "actions": ["pull"]}, False),
        ({"type": "registry", "name": "a/b", "actions": ["pull"]}, False),
        ({"type": "repository", "actions": ["pull"]}, False),
        ("repository:a/b:pull", False),
        (None, False),
    ],
)
def test_a_grant_is_for_this_repository_and_action(entry: object, granted: bool) -> None:
    assert grants(_jwt({"access": [entry]}), "a/b", "pull") is granted


@given(json_values)
def test_any_claims_can_be_read(claims: object) -> None:
    jwt_access(_jwt(claims))
    access = jwt_access(_jwt({"access": claims}))
    assert access is None or isinstance(access, tuple)


@given(st.text(max_size=60))
def test_any_text_may_be_a_token(text: str) -> None:
    assert grants(text, "a/b", "pull") in (True, False)
