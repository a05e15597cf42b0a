"""Pieces of a stripe: what is hashed, whatever the chunks it comes in."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fleet.pieces import HASH, MOST, PIECE, Pieces, StripeHasher, count, piece_digest

#: Bytes that are worth trying: around the bounds of pieces.
LENGTHS = st.sampled_from([1, 2, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 7])


def stripe(length: int) -> bytes:
    return (b"0123456789abcdef!" * (length // 17 + 1))[:length]


@given(LENGTHS, st.lists(st.integers(1, 3 * PIECE), max_size=5))
def test_the_digests_are_those_of_each_mebibyte_however_the_bytes_come(
    length: int, cuts: list[int]
) -> None:
    data = stripe(length)
    hasher, at = StripeHasher(length), 0
    for cut in [*cuts, length]:
        hasher.update(data[at : at + cut])
        at = min(length, at + cut)
    right = [
        hashlib.sha256(data[start : start + PIECE]).digest() for start in range(0, length, PIECE)
    ]
    pieces = hasher.pieces()
    assert pieces.digests == b"".join(right)
    assert pieces.stripe_hash == hashlib.sha256(b"".join(right)).digest()
    assert [pieces.digest(n) for n in range(count(length))] == right


@given(LENGTHS)
def test_the_spans_from_a_piece_on_cover_the_rest(length: int) -> None:
    pieces = Pieces(length, bytes(HASH * count(length)))
    for start in range(0, length, PIECE):
        spans = list(pieces.spans(start))
        assert [at for at, _ in spans] == list(range(start, length, PIECE))
        assert sum(stop - at for at, stop in spans) == length - start


def test_a_piece_is_hashed_in_the_chunks_it_came_in() -> None:
    assert piece_digest([b"ab", memoryview(b"cd")]) == hashlib.sha256(b"abcd").digest()


@pytest.mark.parametrize("length", [0, -1, MOST + 1])
def test_no_stripe_is_empty_or_larger_than_stripes_are(length: int) -> None:
    with pytest.raises(ValueError, match="a stripe has"):
        count(length)
    with pytest.raises(ValueError, match="a stripe has"):
        StripeHasher(length)


def test_a_stripe_has_as_many_digests_as_pieces() -> None:
    with pytest.raises(ValueError, match="expected the digests of 2 pieces"):
        Pieces(PIECE + 1, bytes(HASH))


def test_a_hasher_takes_no_more_than_the_stripe_and_gives_no_less() -> None:
    hasher = StripeHasher(3)
    hasher.update(b"ab")
    with pytest.raises(ValueError, match="not complete"):
        hasher.pieces()
    with pytest.raises(ValueError, match="bytes more"):
        hasher.update(b"cd")
    hasher.update(b"c")
    assert hasher.pieces().digests == hashlib.sha256(b"abc").digest()
