"""Names and tags follow the grammar of the distribution-spec to the letter."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.digest import Digest
from proxy.oci.errors import DigestInvalid, NameInvalid, TagInvalid
from proxy.oci.reference import MAX_NAME, Repository, Tag, parse_reference

# Written down a second time, as the spec prints it.
SPEC_NAME = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*"
SPEC_TAG = r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}"

# Drawn from parts: much quicker than from the expression, and these are used in many tests.
_words = st.text(alphabet="abyz059", min_size=1, max_size=4)
_joints = st.sampled_from([".", "_", "__", "-", "---", "/"])
names = st.builds(
    lambda first, rest: first + "".join(joint + word for joint, word in rest),
    _words,
    st.lists(st.tuples(_joints, _words), max_size=6),
)
tags = st.builds(
    str.__add__,
    st.sampled_from("aZ0_"),
    st.text(alphabet="aZ0_.-", max_size=12),
)
near_names = st.text(alphabet="aB0._-/:@% \n", max_size=12)


@given(names | st.from_regex(SPEC_NAME, fullmatch=True).filter(lambda name: len(name) <= MAX_NAME))
def test_every_name_of_the_spec_is_read_and_written_back(name: str) -> None:
    assert str(Repository.parse(name)) == name
    assert "/".join(Repository.parse(name).components) == name


@given(tags | st.from_regex(SPEC_TAG, fullmatch=True))
def test_every_tag_of_the_spec_is_read_and_written_back(tag: str) -> None:
    assert str(Tag.parse(tag)) == tag
    assert parse_reference(tag) == Tag(tag)


@given(near_names | st.text(max_size=40))
def test_a_name_is_accepted_exactly_when_the_spec_does(text: str) -> None:
    try:
        Repository.parse(text)
    except NameInvalid:
        assert not re.fullmatch(SPEC_NAME, text)
    else:
        assert re.fullmatch(SPEC_NAME, text)


@given(near_names | st.text(max_size=40))
def test_a_tag_is_accepted_exactly_when_the_spec_does(text: str) -> None:
    try:
        Tag.parse(text)
    except TagInvalid:
        assert not re.fullmatch(SPEC_TAG, text)
    else:
        assert re.fullmatch(SPEC_TAG, text)


@given(st.binary(max_size=8), st.sampled_from(["sha256", "sha512"]))
def test_a_digest_is_a_reference(data: bytes, algorithm: str) -> None:
    digest = Digest.of(data, algorithm)
    assert parse_reference(str(digest)) == digest


@given(st.text(max_size=80))
def test_a_reference_that_is_read_is_written_back_unchanged(text: str) -> None:
    try:
        reference = parse_reference(text)
    except (DigestInvalid, TagInvalid):
        return
    assert str(reference) == text


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        "..",
        "../a",
        "a/../b",
        "a/./b",
        "A",
        "a b",
        "a___b",
        "a..b",
        "a.",
        "-a",
        "a_",
        "é",
        "a\n",
        "a\0",
        "a%2fb",
        "a:b",
        "a\\b",
    ],
)
def test_names_outside_the_grammar_are_refused(name: str) -> None:
    with pytest.raises(NameInvalid):
        Repository.parse(name)


@pytest.mark.parametrize("name", ["a", "0", "a.b_c__d---e/f", "library/ubuntu", "a/b/c/d/e"])
def test_names_inside_the_grammar_are_taken(name: str) -> None:
    assert Repository.parse(name).name == name


def test_a_name_may_have_255_characters_and_no_more() -> None:
    assert Repository.parse("a" * 255).name == "a" * 255
    with pytest.raises(NameInvalid):
        Repository.parse("a" * 256)


def test_a_tag_may_have_128_characters_and_no_more() -> None:
    assert Tag.parse("a" * 128).name == "a" * 128
    with pytest.raises(TagInvalid):
        Tag.parse("a" * 129)


def test_a_colon_makes_it_a_digest_and_a_broken_one_is_told_so() -> None:
    with pytest.raises(DigestInvalid):
        parse_reference("sha256:abc")


def test_a_hostile_name_is_judged_in_one_pass() -> None:
    with pytest.raises(NameInvalid) as caught:
        Repository.parse("a-" * 120 + "!")
    assert len(caught.value.body("id")) < 1000
