"""Digests have one wire form, and a verifier agrees with the whole however the bytes arrive."""

import hashlib
from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.digest import Digest
from proxy.oci.errors import DigestInvalid

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

algorithms = st.sampled_from(["sha256", "sha512"])
digests = st.builds(Digest.of, st.binary(max_size=64), algorithms)


@given(digests)
def test_parse_reads_what_str_writes(digest: Digest) -> None:
    assert Digest.parse(str(digest)) == digest
    assert hash(Digest.parse(str(digest))) == hash(digest)


@given(st.text(max_size=200))
def test_what_parses_is_written_back_unchanged(text: str) -> None:
    try:
        digest = Digest.parse(text)
    except DigestInvalid:
        return
    assert str(digest) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "sha256",
        "sha256:",
        EMPTY,
        f"sha256:{EMPTY[:-1]}",
        f"sha256:{EMPTY}0",
        f"sha256:{EMPTY.upper()}",
        f"SHA256:{EMPTY}",
        f" sha256:{EMPTY}",
        f"sha256:{EMPTY}\n",
        f"sha256:sha256:{EMPTY}",
        f"sha512:{EMPTY}",
        f"md5:{EMPTY[:32]}",
        f"sha384:{EMPTY}{EMPTY[:32]}",
        f"sha256:{'٣' * 64}",
        f"sha256:{EMPTY[:-3]}/..",
    ],
)
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(DigestInvalid):
        Digest.parse(text)


@given(st.lists(st.one_of(digests.map(str), st.text("sha256:\n0f", max_size=80)), max_size=8))
def test_many_are_read_as_each_of_them_is(texts: list[str]) -> None:
    assert Digest.parse_all(texts) == [one(text) for text in texts]


@pytest.mark.parametrize(
    "texts",
    [
        [],
        [f"sha256:{EMPTY}"],
        [f"sha256:{EMPTY}"] * 3,
        [f"sha256:{EMPTY}", f"sha256:{EMPTY}\n"],
        [f"sha256:{EMPTY}\nsha256:{EMPTY}", ""],  # as many lines as texts
        [f"sha256:{EMPTY}\nsha256:{EMPTY}", f"sha256:{EMPTY}", "sha256:no"],
        [f"sha256:{EMPTY}", f"sha512:{EMPTY}{EMPTY}", f"sha512:{EMPTY}", f"SHA256:{EMPTY}"],
    ],
)
def test_a_wrong_one_among_many_does_not_shift_the_others(texts: list[str]) -> None:
    found = Digest.parse_all(texts)
    assert found == [one(text) for text in texts]
    assert [hash(digest) for digest in found] == [hash(one(text)) for text in texts]


def one(text: str) -> Digest | None:
    try:
        return Digest.parse(text)
    except DigestInvalid:
        return None


def test_a_wrong_value_cannot_be_built_at_all() -> None:
    with pytest.raises(DigestInvalid):
        Digest("sha256", "../../etc/passwd")


def test_the_detail_of_a_refusal_is_bounded() -> None:
    with pytest.raises(DigestInvalid) as caught:
        Digest.parse("sha256:" + "f" * 100_000)
    assert len(caught.value.body("id")) < 1000


def test_the_digest_of_nothing_is_the_known_one() -> None:
    assert str(Digest.of(b"")) == f"sha256:{EMPTY}"


def test_an_unknown_algorithm_is_not_hashed() -> None:
    with pytest.raises(DigestInvalid):
        Digest.of(b"", "md5")


@given(data=st.binary(max_size=512), algorithm=algorithms, cuts=st.lists(st.integers(0, 512)))
def test_a_verifier_agrees_however_the_bytes_are_cut(
    data: bytes, algorithm: Literal["sha256", "sha512"], cuts: list[int]
) -> None:
    verifier = Digest.of(data, algorithm).verifier()
    bounds = [0, *sorted(cuts), len(data)]
    for start, stop in pairwise(bounds):
        verifier.update(memoryview(data)[start:stop])
    assert verifier.matches()
    assert verifier.count == len(data)
    assert verifier.actual() == Digest(algorithm, hashlib.new(algorithm, data).hexdigest())


@given(data=st.binary(min_size=1, max_size=64), position=st.integers(0, 63))
def test_one_changed_byte_does_not_match(data: bytes, position: int) -> None:
    verifier = Digest.of(data).verifier()
    changed = bytearray(data)
    changed[position % len(data)] ^= 1
    verifier.update(changed)
    assert not verifier.matches()


def test_a_verifier_may_be_asked_midway_and_goes_on() -> None:
    verifier = Digest.of(b"abc").verifier()
    verifier.update(b"ab")
    assert not verifier.matches()
    assert "after 2 bytes" in repr(verifier)
    verifier.update(b"c")
    assert verifier.matches()


def test_a_wide_memoryview_is_counted_in_bytes() -> None:
    data = bytes(16)
    verifier = Digest.of(data).verifier()
    verifier.update(memoryview(data).cast("Q"))
    assert (verifier.count, verifier.matches()) == (16, True)
