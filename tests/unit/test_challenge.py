"""Challenges are scanned, not split: commas are everywhere in them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.challenge import (
    BearerChallenge,
    Challenge,
    offers_basic,
    parse_challenges,
    pick_bearer,
)

words = st.from_regex(r"[a-z][a-z0-9._-]{0,8}", fullmatch=True)
values = st.text(
    alphabet=st.sampled_from("ab:/,=\"\\ \t.;?&'-") | st.characters(min_codepoint=0x20), max_size=20
)
challenges = st.builds(Challenge, words, st.dictionaries(words, values, max_size=4))


def _quote(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _format(challenge: Challenge, equals: str, comma: str) -> str:
    params = comma.join(
        f"{name}{equals}{_quote(value)}" for name, value in challenge.params.items()
    )
    return (
        f"{challenge.scheme} {params}".rstrip(" ") if not params else f"{challenge.scheme} {params}"
    )


@given(
    st.lists(challenges, max_size=4),
    st.sampled_from(["=", " = ", "= "]),
    st.sampled_from([",", ", ", " ,\t", ", ,"]),
)
def test_what_is_written_is_read_back_from_one_header_or_many(
    expected: list[Challenge], equals: str, comma: str
) -> None:
    written = [_format(challenge, equals, comma) for challenge in expected]
    assert parse_challenges(written) == tuple(expected)
    assert parse_challenges([comma.join(written)]) == tuple(expected)


@given(st.lists(st.text(max_size=60) | st.text(alphabet='aB=," \\;/', max_size=40), max_size=3))
def test_no_header_makes_it_raise(headers: list[str]) -> None:
    found = parse_challenges(headers)
    pick_bearer(found)
    offers_basic(found)
    assert all(challenge.scheme == challenge.scheme.lower() != "" for challenge in found)


def test_the_challenge_of_a_hub_with_commas_in_its_scope() -> None:
    header = (
        'Bearer realm="https://auth.example.com/token",service="registry.example.com",'
        'scope="repository:library/ubuntu:pull,push",error="insufficient_scope"'
    )
    assert pick_bearer(parse_challenges([header])) == BearerChallenge(
        realm="https://auth.example.com/token",
        service="registry.example.com",
        scope="repository:library/ubuntu:pull,push",
        error="insufficient_scope",
    )


def test_several_challenges_in_one_header_are_kept_apart() -> None:
    header = 'Newauth realm="apps", type=1, title="Login to \\"apps\\"", Basic realm="simple"'
    assert parse_challenges([header]) == (
        Challenge("newauth", {"realm": "apps", "type": "1", "title": 'Login to "apps"'}),
        Challenge("basic", {"realm": "simple"}),
    )


def test_a_token68_belongs_to_its_scheme_and_hides_nothing() -> None:
    found = parse_challenges(['Negotiate YII/abc==, Bearer realm="https://a.example.com/t"'])
    assert [challenge.scheme for challenge in found] == ["negotiate", "bearer"]
    assert pick_bearer(found) == BearerChallenge("https://a.example.com/t")


def test_schemes_without_parameters_follow_one_another() -> None:
    found = parse_challenges(["Negotiate, NTLM , Basic"])
    assert [challenge.scheme for challenge in found] == ["negotiate", "ntlm", "basic"]


def test_scheme_and_names_are_read_in_any_case() -> None:
    found = parse_challenges(['BEARER Realm="https://a.example.com/t",SERVICE="s"'])
    assert pick_bearer(found) == BearerChallenge("https://a.example.com/t", "s")


def test_the_first_of_two_equal_names_counts() -> None:
    found = parse_challenges(['Bearer realm="https://a.example.com",realm="https://evil.example"'])
    assert pick_bearer(found) == BearerChallenge("https://a.example.com")


def test_a_realm_without_quotes_is_understood() -> None:
    found = parse_challenges(["Bearer realm=https://a.example.com/t,service=s"])
    assert pick_bearer(found) == BearerChallenge("https://a.example.com/t", "s")


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        [","],
        ["Bearer"],
        ["Bearer "],
        ['Bearer realm=""'],
        ["Bearer realm="],
        ['Bearer realm="https://a.example.com'],
        ['realm="https://a.example.com"'],
        ['Basic realm="https://a.example.com"'],
        ['Bearer service="s"'],
    ],
)
def test_a_challenge_that_names_no_realm_cannot_be_answered(headers: list[str]) -> None:
    assert pick_bearer(parse_challenges(headers)) is None


def test_a_bearer_without_realm_does_not_hide_one_with() -> None:
    found = parse_challenges(["Bearer", 'Bearer realm="https://a.example.com"'])
    assert pick_bearer(found) == BearerChallenge("https://a.example.com")


def test_basic_is_found_beside_bearer() -> None:
    assert offers_basic(parse_challenges(['Bearer realm="x"', 'bAsIc realm="y"']))
    assert not offers_basic(parse_challenges(['Bearer realm="Basic"']))


def test_a_string_that_never_ends_swallows_the_rest_of_its_header_only() -> None:
    found = parse_challenges(['Basic realm="x, Bearer realm=y', 'Bearer realm="z"'])
    assert found == (Challenge("basic", {}), Challenge("bearer", {"realm": "z"}))


def test_many_unfinished_strings_are_read_without_delay() -> None:
    assert parse_challenges(['Bearer a="' + '\\"' * 20_000]) == (Challenge("bearer", {}),)
    assert parse_challenges(['Bearer ,"' + '\\"' * 20_000]) == (Challenge("bearer", {}),)
