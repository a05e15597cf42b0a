"""The control law of the effective cap (DESIGN D6)."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.cap import BELIEVED, START, Cap, Learned


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
            cap = cap.succeeded(now, sent_at=sent_at, full=full)
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


def test_it_follows_a_limit_that_moves_all_the_time() -> None:
    """Up and down every half minute, as other clients of the upstream come and go."""

    def wall(now: float) -> int:
        return (6, 12, 4, 20)[int(now / 30) % 4]

    seen = simulate(wall, cap=Cap.starting(32), seconds=480)
    assert seen.early <= 0.10
    assert seen.later <= 0.02
    assert 4 <= seen.mean <= 12  # the least of the four, and more than their mean would break


def test_a_start_that_is_far_too_high_costs_a_few_answers_only() -> None:
    seen = simulate(lambda _now: 3, cap=Cap(64, 64))
    assert seen.limit <= 3
    assert seen.later <= 0.02


def test_after_an_outage_it_returns_to_what_it_knew() -> None:
    """All requests failed, the cap fell to one: that says nothing of what the upstream stands."""
    before = Cap(12, 32, ceiling=13)
    fallen = before
    for number in range(10):
        fallen = fallen.overloaded(float(number), sent_at=number - 0.5, reason="refused")
    assert fallen.limit == 1
    back = before.after_outage(20.0)
    assert (back.limit, back.ceiling, back.reason) == (START, 13, "back after an outage")
    slow = simulate(lambda _now: 12, cap=fallen, seconds=30)
    quick = simulate(lambda _now: 12, cap=back, seconds=30)
    assert quick.mean >= 10
    assert quick.mean > slow.mean
    assert quick.later <= 0.02


def test_an_upstream_without_a_limit_gets_the_configured_cap() -> None:
    seen = simulate(lambda _now: 1000, cap=Cap.starting(16))
    assert seen.limit == 16
    assert seen.early == seen.later == 0


def test_an_upstream_that_stands_only_one_is_tried_rarely() -> None:
    seen = simulate(lambda _now: 1, cap=Cap.starting(8), seconds=240)
    assert seen.later <= 0.02
    assert seen.limit <= 2


def learned(limit: int, ceiling: int | None = None, age: float = 60.0) -> Learned:
    return Learned(limit, ceiling, age)


def test_it_starts_at_what_an_earlier_process_learned() -> None:
    cap = Cap.starting(32, learned(6, ceiling=7))
    assert (cap.limit, cap.ceiling, cap.reason) == (6, 7, "learned before the restart")
    assert Cap.starting(32).limit == START
    assert Cap.starting(2).limit == 2


def test_what_was_learned_is_clipped_to_what_is_allowed_now() -> None:
    assert Cap.starting(4, learned(60, ceiling=61)) == Cap(
        4, 4, reason="learned before the restart"
    )
    assert Cap.starting(8, learned(6, ceiling=20)).ceiling is None
    assert Cap.starting(8, learned(0)).limit == 1


def test_what_was_learned_long_ago_is_not_believed() -> None:
    for age in (BELIEVED + 1, -3600.0):  # or in the future: the wall clock was set back
        cap = Cap.starting(32, learned(24, ceiling=25, age=age))
        assert (cap.limit, cap.ceiling) == (START, None)
        assert "too old" in cap.reason
    assert Cap.starting(32, learned(1, age=BELIEVED + 1)).limit == 1
    assert Cap.starting(32, learned(24, age=BELIEVED - 1)).limit == 24


def test_a_restart_at_a_limit_breaks_nothing() -> None:
    seen = simulate(lambda _now: 6, cap=Cap.starting(32, learned(6, ceiling=7)))
    assert seen.early <= 0.01
    assert 5 <= seen.mean <= 6.5


def test_a_learned_cap_that_is_too_low_by_now_is_outgrown() -> None:
    seen = simulate(lambda _now: 24, cap=Cap.starting(32, learned(3, ceiling=4)), seconds=120)
    assert seen.worst >= 24
    assert seen.later <= 0.02


def test_answers_to_requests_from_before_a_change_do_not_halve_again() -> None:
    cap = Cap(8, 8).overloaded(10.0, sent_at=9.0, reason="first")
    assert cap.limit == 4
    assert cap.overloaded(10.1, sent_at=9.5, reason="same burst").limit == 4
    assert cap.overloaded(11.0, sent_at=10.5, reason="another").limit == 2


def test_the_ceiling_is_the_first_level_of_a_row_that_broke() -> None:
    """What goes wrong until something goes well again may be the upstream recovering."""
    cap = Cap(8, 16)
    for second in (1.0, 2.0, 3.0):
        cap = cap.overloaded(second, sent_at=second - 0.1, reason="broke")
    assert (cap.limit, cap.ceiling) == (1, 8)
    late = cap.succeeded(3.1, sent_at=0.5, full=True)  # sent before the last change
    assert late.overloaded(4.0, sent_at=3.9, reason="broke").ceiling == 8
    well = cap.succeeded(3.2, sent_at=3.1, full=True)
    assert well.overloaded(4.0, sent_at=3.9, reason="broke").ceiling == 1


def test_an_upstream_that_takes_seconds_to_recover_gets_what_it_stands() -> None:
    """Beyond eight at once it answers nothing well, nor for two seconds after."""
    broken_until = 0.0
    cap, now, chance = Cap.starting(16), 0.0, random.Random(3)
    active: list[tuple[float, float, bool]] = []
    good = 0
    while now < 200:
        while len(active) < cap.limit:
            if len(active) + 1 > 8:
                broken_until = now + 2.0
            broke = now < broken_until
            lasts = 0.1 if broke else 0.2 * chance.uniform(0.8, 1.2)
            heapq.heappush(active, (now + lasts, now, broke))
        now, sent_at, broke = heapq.heappop(active)
        good += not broke
        if broke:
            cap = cap.overloaded(now, sent_at=sent_at, reason="broke")
        else:
            cap = cap.succeeded(now, sent_at=sent_at, full=True)
    assert good >= 200 / 0.2 * 8 / 2  # half of what a cap of eight would bring all the time


def test_what_was_charged_for_nothing_is_given_back() -> None:
    before = Cap(8, 16, ceiling=9)
    fallen = before.overloaded(1.0, sent_at=0.5, reason="status 500")
    back = fallen.cleared(before, 2.0)
    assert (back.limit, back.ceiling) == (8, 9)
    grown = replace(fallen, limit=12)
    assert grown.cleared(before, 2.0) is grown


def test_until_the_first_overload_as_many_as_fill_it_beside_the_kept_slot_double_it() -> None:
    cap = Cap.starting(64)
    for limit in (4, 4, 8, 8, 8, 8, 8, 8, 8, 16):
        cap = cap.succeeded(1.0, sent_at=0.5, full=True)
        assert cap.limit == limit


def test_a_round_of_successes_doubles_it() -> None:
    seen = simulate(lambda _now: 1000, cap=Cap.starting(64), seconds=0.8)
    assert 32 <= seen.limit <= 64  # four, eight, sixteen, … of 0.1 s each


def test_successes_below_the_cap_do_not_raise_it() -> None:
    cap = Cap.starting(32)
    for _ in range(1000):
        cap = cap.succeeded(1.0, sent_at=0.5, full=False)
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
            cap = cap.succeeded(now, sent_at=now - step / 2, full=full)
        else:
            cap = cap.overloaded(now, sent_at=now - step / 2, reason="broke")
        assert 1 <= cap.limit <= maximum
