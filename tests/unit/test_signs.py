"""Denials and overloads told apart (DESIGN D5): every way in which Harbor answers."""

from __future__ import annotations

import pytest

from proxy.oci.challenge import parse_challenges
from proxy.upstream.signs import Refusal, Sign, read_sign

BEARER = 'Bearer realm="https://harbor.example.com/service/token",service="harbor-registry"'
BASIC = 'Basic realm="harbor"'
PLAIN = b'{"errors":[{"code":"UNAUTHORIZED","message":"unauthorized to access repository"}]}'


def refusal(
    *challenges: str,
    status: int = 401,
    body: bytes = PLAIN,
    scheme: str = "bearer",
    granted: bool | None = True,
) -> Refusal:
    return Refusal(status, parse_challenges(challenges), body, scheme, granted)


def sign_of(asked: Refusal) -> Sign:
    return read_sign(asked)[0]


@pytest.mark.parametrize("challenges", [(), ("",)])
def test_a_401_that_names_no_way_in_is_an_overload(challenges: tuple[str, ...]) -> None:
    assert sign_of(refusal(*challenges)) is Sign.OVERLOAD
    assert sign_of(refusal(*challenges, scheme="", granted=None)) is Sign.OVERLOAD


def test_an_unknown_project_is_a_denial_although_harbor_sends_an_empty_challenge() -> None:
    body = b'{"errors":[{"code":"UNAUTHORIZED","message":"project nowhere not found"}]}'
    assert sign_of(refusal("", body=body, scheme="", granted=None)) is Sign.DENIAL


@pytest.mark.parametrize(
    "words",
    [
        b"read tcp 172.18.0.7:55650->10.200.38.58:5432: read: connection reset by peer",
        b"Error 1040: Too many connections",
        b"pq: sorry, too many clients already",
        b"dial tcp 10.0.0.2:6379: i/o timeout",
        b"driver: bad connection",
        b'{"message":"redis: connection pool timeout"}',
    ],
)
@pytest.mark.parametrize("status", [401, 403])
def test_the_databases_words_are_an_overload_whatever_the_status(words: bytes, status: int) -> None:
    assert sign_of(refusal(BEARER, status=status, body=words)) is Sign.OVERLOAD


@pytest.mark.parametrize("name", ["team/mysql", "my-sql", "redis", "team/pgconn", "jdbc_driver"])
def test_a_repository_named_like_a_database_does_not_speak_for_one(name: str) -> None:
    body = f'{{"errors":[{{"code":"DENIED","message":"pull access to {name}: denied"}}]}}'
    assert sign_of(refusal(status=403, body=body.encode())) is Sign.DENIAL


def test_a_basic_challenge_to_a_token_that_has_the_access_is_an_overload() -> None:
    assert sign_of(refusal(BASIC)) is Sign.OVERLOAD


@pytest.mark.parametrize("challenge", [BASIC, BEARER])
def test_a_token_without_the_access_proves_nothing(challenge: str) -> None:
    assert sign_of(refusal(challenge, granted=False)) is Sign.UNPROVEN


def test_a_bearer_challenge_to_a_token_that_has_the_access_is_a_denial() -> None:
    assert sign_of(refusal(BEARER)) is Sign.DENIAL


def test_refused_basic_credentials_are_a_denial() -> None:
    assert sign_of(refusal(BASIC, scheme="basic", granted=None)) is Sign.DENIAL


def test_a_403_is_a_denial() -> None:
    assert sign_of(refusal(status=403)) is Sign.DENIAL


def test_the_reason_is_given_in_a_few_words() -> None:
    assert read_sign(refusal())[1] == "401 without a challenge"
