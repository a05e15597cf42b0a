"""The control law of the effective cap (DESIGN D6)."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.cap import START, Cap


@dataclass(frozen=True)
class Outcome:
    """A simulated run: shares of requests that broke, and where the cap was."""

    early: float  # in the first ten seconds
    later: float
    limit: int
    mean: float  # after the first ten seconds
    worst: int


def simulate(
    wall: Callable[[float], int], *, cap: Cap, seconds: float = 60, service: float = 0.1
) -> Outcome:
    """A crowd that always wants more than it gets, at an upstream that breaks beyond ``wall``
    requests at once: a request that breaks is answered quickly, as overloaded ones are."""
    chance, now = random.Random(7), 0.0
    active: list[tuple[float, float, bool, bool]] = []  # end, sent at, broke, cap was full
    counts = {True: [0, 0], False: [0, 0]}  # is early: requests, broken ones
    limits = [cap.limit]
    while now < seconds:
        while len(active) < cap.limit:
            broke = len(active) + 1 > wall(now)
            lasts = 0.02 if broke else service * chance.uniform(0.5, 1.5)
            full = len(active) + 1 >= cap.limit
            heapq.heappush(active, (now + lasts, now, broke, full))
        now, sent_at, broke, full = heapq.heappop(active)
        counts[now < 10][0] += 1
        counts[now < 10][1] += broke
        if broke:
            cap = cap.overloaded(now, sent_at=sent_at, reason="broke")
        else:
            cap = cap.succeeded(now, full=full)
        if now >= 10:
            limits.append(cap.limit)
    early, later = counts[True], counts[False]
    return Outcome(
        early=early[1] / max(1, early[0]),
        later=later[1] / max(1, later[0]),
        limit=cap.limit,
        mean=sum(limits) / len(limits),
        worst=max(limits),
    )


def test_it_starts_low_and_finds_a_limit_far_below_the_configured_one() -> None:
    seen = simulate(lambda _now: 6, cap=Cap.starting(32))
    assert seen.early <= 0.10
    assert seen.later <= 0.02
    assert 5 <= seen.mean <= 6.5
    assert seen.worst <= 7


def test_it_comes_down_from_a_start_that_is_too_high() -> None:
    seen = simulate(lambda _now: 6, cap=Cap(32, 32))
    assert seen.early <= 0.15
    assert seen.later <= 0.02
    assert 5 <= seen.mean <= 6.5


def test_it_rises_when_the_limit_rises() -> None:
    seen = simulate(lambda now: 6 if now < 20 else 24, cap=Cap.starting(32), seconds=120)
    assert seen.mean >= 15
    assert seen.worst >= 24
    assert seen.later <= 0.02


def test_it_falls_when_the_limit_falls() -> None:
    seen = simulate(lambda now: 24 if now < 30 else 3, cap=Cap.starting(32), seconds=120)
    assert seen.limit <= 4
    assert seen.later <= 0.02


def test_an_upstream_without_a_limit_gets_the_configured_cap() -> None:
    seen = simulate(lambda _now: 1000, cap=Cap.starting(16))
    assert seen.limit == 16
    assert seen.early == seen.later == 0


def test_an_upstream_that_stands_only_one_is_tried_rarely() -> None:
    seen = simulate(lambda _now: 1, cap=Cap.starting(8), seconds=240)
    assert seen.later <= 0.02
    assert seen.limit <= 2


def test_it_starts_at_what_an_earlier_process_learned() -> None:
    assert Cap.starting(32, learned=6).limit == 6
    assert Cap.starting(4, learned=60).limit == 4
    assert Cap.starting(32).limit == START
    assert Cap.starting(2).limit == 2


def test_answers_to_requests_from_before_a_change_do_not_halve_again() -> None:
    cap = Cap(8, 8).overloaded(10.0, sent_at=9.0, reason="first")
    assert cap.limit == 4
    assert cap.overloaded(10.1, sent_at=9.5, reason="same burst").limit == 4
    assert cap.overloaded(11.0, sent_at=10.5, reason="another").limit == 2


def test_successes_below_the_cap_do_not_raise_it() -> None:
    cap = Cap.starting(32)
    for _ in range(1000):
        cap = cap.succeeded(1.0, full=False)
    assert cap.limit == START


def test_it_says_why_it_is_what_it_is() -> None:
    assert Cap(8, 8).overloaded(1.0, sent_at=0.5, reason="status 503").reason == "status 503"


def test_a_cap_outside_its_bounds_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="limit"):
        Cap(9, 8)


@given(
    st.integers(1, 64),
    st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 1)), max_size=300),
)
def test_whatever_happens_it_stays_within_its_bounds(
    maximum: int, events: list[tuple[bool, bool, float]]
) -> None:
    cap, now = Cap.starting(maximum), 0.0
    for went_well, full, step in events:
        now += step
        if went_well:
            cap = cap.succeeded(now, full=full)
        else:
            cap = cap.overloaded(now, sent_at=now - step / 2, reason="broke")
        assert 1 <= cap.limit <= maximum
