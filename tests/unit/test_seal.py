"""Seals: accepted once, by whom they are for, while their time is right; and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proxy.fleet.seal import (
    LEAST_SECRET,
    SKEW,
    Keys,
    Nonces,
    Said,
    Seal,
    Sealer,
    Unsealed,
    answer_said,
    request_said,
)
from proxy.testing import FakeClock

SECRET = b"a secret of the fleet"
TAKER, GIVER, OTHER = "a" * 16, "b" * 16, "c" * 16
SAID = request_said("GET", "/fleet/v2/blobs/x/stripes/0", "1", None)
HEX = "0123456789abcdef"


def sealers(skew: float = 0.0) -> tuple[Sealer, Sealer, FakeClock]:
    """Who takes, whose clock is ``skew`` seconds ahead, and who gives."""
    clock = FakeClock(1_000_000.0)
    taker = Sealer(SECRET, TAKER, wall=lambda: clock() + skew)
    return taker, Sealer(SECRET, GIVER, wall=clock), clock


def test_a_seal_is_accepted_by_whom_it_is_for() -> None:
    taker, giver, _ = sealers()
    seal = taker.seal(GIVER, SAID)
    accepted = giver.accept(str(seal), SAID)
    assert (accepted, accepted.taker) == (seal, TAKER)


def test_a_seal_is_accepted_once() -> None:
    taker, giver, _ = sealers()
    seal = str(taker.seal(GIVER, SAID))
    giver.accept(seal, SAID)
    with pytest.raises(Unsealed, match="used before"):
        giver.accept(seal, SAID)


def test_a_seal_for_another_node_is_refused() -> None:
    taker, giver, clock = sealers()
    with pytest.raises(Unsealed, match=f"for node {OTHER}"):
        giver.accept(str(taker.seal(OTHER, SAID)), SAID)
    # Nor has a node any use for what was sent to it in an earlier life.
    reborn = Sealer(SECRET, OTHER, wall=clock)
    with pytest.raises(Unsealed, match=f"for node {GIVER}"):
        reborn.accept(str(taker.seal(GIVER, SAID)), SAID)


@pytest.mark.parametrize("skew", [-SKEW, -1.0, 0.0, 1.0, SKEW])
def test_clocks_may_differ(skew: float) -> None:
    taker, giver, _ = sealers(skew)
    giver.accept(str(taker.seal(GIVER, SAID)), SAID)


@pytest.mark.parametrize(("skew", "words"), [(-SKEW - 1, "31.0 s behind"), (SKEW + 1, "ahead")])
def test_clocks_may_not_differ_by_more_and_the_log_says_so(skew: float, words: str) -> None:
    taker, giver, _ = sealers(skew)
    with pytest.raises(Unsealed, match=f"clock of node {TAKER} is .*{words}"):
        giver.accept(str(taker.seal(GIVER, SAID)), SAID)


@pytest.mark.parametrize(
    "said",
    [
        request_said("HEAD", "/fleet/v2/blobs/x/stripes/0", "1", None),
        request_said("GET", "/fleet/v2/blobs/x/stripes/1", "1", None),
        request_said("GET", "/fleet/v2/blobs/x/stripes/0", "2", None),
        request_said("GET", "/fleet/v2/blobs/x/stripes/0", "1", "bytes=1048576-"),
        request_said("GET", "/fleet/v2/blobs/x/stripes/0", None, "1"),
    ],
)
def test_a_seal_is_for_one_request_alone(said: Said) -> None:
    taker, giver, _ = sealers()
    seal = str(taker.seal(GIVER, SAID))
    with pytest.raises(Unsealed, match="seal is wrong"):
        giver.accept(seal, said)
    giver.accept(seal, SAID)  # and what failed has not used it up


@pytest.mark.parametrize("field", ["taker", "giver", "time", "nonce", "mac"])
def test_nothing_in_a_seal_can_be_changed(field: str) -> None:
    taker, giver, _ = sealers()
    seal = taker.seal(GIVER, SAID)
    changed = {name: getattr(seal, name) for name in ("taker", "giver", "time", "nonce", "mac")}
    old = changed[field]
    changed[field] = (
        old + 1 if isinstance(old, int) else old[:-1] + ("0" if old[-1] != "0" else "1")
    )
    with pytest.raises(Unsealed, match="seal is wrong"):
        giver.accept(str(Seal(**changed)), SAID)


def test_another_secret_seals_nothing() -> None:
    _, giver, clock = sealers()
    stranger = Sealer(b"another secret, as long", TAKER, wall=clock)
    with pytest.raises(Unsealed, match="another secret"):
        giver.accept(str(stranger.seal(GIVER, SAID)), SAID)
    assert "0 remembered" in repr(giver)  # strangers fill no memory


def test_an_answer_is_sealed_for_one_request_and_what_it_says() -> None:
    taker, giver, _ = sealers()
    asked = taker.seal(GIVER, SAID)
    said = answer_said(200, length="3", content_range=None, pieces="abc", retry_after=None)
    sealed = giver.seal_answer(giver.accept(str(asked), SAID), said)
    taker.check_answer(asked, sealed, said)
    for other in (
        answer_said(404, length="3", content_range=None, pieces="abc", retry_after=None),
        answer_said(200, length="4", content_range=None, pieces="abc", retry_after=None),
        answer_said(200, length="3", content_range=None, pieces="abd", retry_after=None),
        answer_said(200, length="3", content_range="abc", pieces=None, retry_after=None),
        answer_said(200, length="3", content_range=None, pieces="abc", retry_after="1"),
    ):
        with pytest.raises(Unsealed, match="answer is wrong"):
            taker.check_answer(asked, sealed, other)
    with pytest.raises(Unsealed, match="answer is wrong"):
        taker.check_answer(taker.seal(GIVER, SAID), sealed, said)
    with pytest.raises(Unsealed, match="no seal"):
        taker.check_answer(asked, None, said)


def test_the_seal_of_a_request_is_none_of_an_answer() -> None:
    keys = Keys(SECRET)
    said = Said(())
    seal = keys.seal(TAKER, GIVER, 1.0, "0" * 32, said)
    as_answer = Said((TAKER, GIVER, str(seal.time), seal.nonce))
    assert keys.seal_answer(seal, as_answer) != f"v1 mac={seal.mac}"


def test_a_secret_that_can_be_guessed_is_refused_and_none_is_shown() -> None:
    with pytest.raises(ValueError, match=f"at least {LEAST_SECRET} bytes"):
        Keys(SECRET[: LEAST_SECRET - 1])
    assert SECRET.decode() not in f"{Keys(SECRET)!r} {sealers()[0]!r}"


def test_what_is_sealed_has_no_line_breaks() -> None:
    with pytest.raises(ValueError, match="line breaks"):
        request_said("GET", "/a\n/b", None, None)


@given(
    st.text(HEX, min_size=16, max_size=16),
    st.integers(0, 10**15),
    st.text(HEX, min_size=32, max_size=32),
)
def test_a_seal_is_read_as_it_is_written(node: str, time: int, nonce: str) -> None:
    seal = Seal(node, GIVER, time, nonce, "0" * 64)
    assert Seal.parse(str(seal)) == seal


@given(st.one_of(st.none(), st.text(max_size=300), st.text("v1 fromtime=noncemac0123456789abcdef")))
def test_whatever_else_comes_is_no_seal(header: str | None) -> None:
    with pytest.raises(Unsealed):
        Seal.parse(header)


@given(st.integers(0, 400), st.characters())
def test_one_character_more_less_or_other_is_no_seal_of_ours(at: int, character: str) -> None:
    taker, giver, _ = sealers()
    right = str(taker.seal(GIVER, SAID))
    at = min(at, len(right))
    for text in (
        right[:at] + character + right[at:],
        right[:at] + right[at + 1 :],
        right[:at] + character + right[at + 1 :],
    ):
        if text != right:
            with pytest.raises(Unsealed):
                giver.accept(text, SAID)


def test_memory_is_bounded_and_a_flood_opens_no_door() -> None:
    clock = FakeClock(1_000_000.0)
    taker = Sealer(SECRET, TAKER, wall=clock)
    giver = Sealer(SECRET, GIVER, wall=clock, most=8)
    first = str(taker.seal(GIVER, SAID))
    giver.accept(first, SAID)
    for _ in range(100):
        clock.advance(0.01)
        giver.accept(str(taker.seal(GIVER, SAID)), SAID)  # honest ones go on being served
    assert "8 remembered" in repr(giver)
    with pytest.raises(Unsealed, match="older than what is remembered"):
        giver.accept(first, SAID)


def test_nonces_are_forgotten_when_their_time_is_over() -> None:
    taker, giver, clock = sealers()
    for _ in range(5):
        giver.accept(str(taker.seal(GIVER, SAID)), SAID)
    clock.advance(2 * SKEW + 1)
    giver.accept(str(taker.seal(GIVER, SAID)), SAID)
    assert "1 remembered" in repr(giver)


def test_who_remembers_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="remembers no nonce"):
        Sealer(SECRET, GIVER, wall=lambda: 0.0, most=0)


class NoReplay(RuleBasedStateMachine):
    """However clocks jump, seals come late, and memory fills: none is accepted twice."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000_000.0
        self.taken_at = 1_000_000.0
        self.giver = Sealer(SECRET, GIVER, wall=lambda: self.now, most=4)
        self.taker = Sealer(SECRET, TAKER, wall=lambda: self.taken_at)
        self.sealed: list[str] = []
        self.accepted: list[str] = []

    @rule(seconds=st.integers(-90, 90))
    def givers_clock_jumps(self, seconds: int) -> None:
        self.now += seconds

    @rule(seconds=st.integers(-90, 90))
    def takers_clock_jumps(self, seconds: int) -> None:
        self.taken_at += seconds

    @rule()
    def one_is_sealed(self) -> None:
        self.sealed.append(str(self.taker.seal(GIVER, SAID)))

    @rule(data=st.data())
    def one_arrives(self, data: st.DataObject) -> None:
        if self.sealed:
            self._arrive(data.draw(st.sampled_from(self.sealed)))

    def _arrive(self, seal: str) -> None:
        try:
            self.giver.accept(seal, SAID)
        except Unsealed:
            return
        self.accepted.append(seal)

    @rule()
    def all_arrive_again(self) -> None:
        for seal in self.sealed:
            self._arrive(seal)

    @invariant()
    def none_was_accepted_twice(self) -> None:
        assert len(set(self.accepted)) == len(self.accepted)


TestNoReplay = NoReplay.TestCase


def test_a_forgotten_nonce_is_not_new() -> None:
    nonces = Nonces(2)
    for time in (5, 3, 4):
        nonces.note(time, f"n{time}", 0)
    assert len(nonces) == 2
    for time in (3, 2):
        with pytest.raises(Unsealed, match="older"):
            nonces.note(time, f"n{time}", 0)
    with pytest.raises(Unsealed, match="before"):
        nonces.note(5, "n5", 0)
