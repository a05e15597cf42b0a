"""The retry budget: how many tries after the first an origin gets, and who waits for them."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.observe.metrics import Metrics
from proxy.oci.errors import ShuttingDown
from proxy.testing import FakeClock
from proxy.upstream.budget import RESERVE, SHARE, WINDOW, Retries, RetryBudget
from tests.unit.upstream_kit import sample, until


def test_a_quiet_proxy_may_retry_a_little() -> None:
    budget = RetryBudget(reserve=3)
    assert [budget.take(0.0) is not None for _ in range(5)] == [True] * 3 + [False] * 2


def test_retries_are_a_fifth_of_requests() -> None:
    budget = RetryBudget(reserve=0)
    for _ in range(100):
        budget.request(1.0)
    taken = [budget.take(1.0) for _ in range(100)]
    assert sum(place is not None for place in taken) == 20


def test_what_is_older_than_the_window_counts_no_more() -> None:
    budget = RetryBudget(reserve=1)
    assert budget.take(0.0) is not None
    assert budget.take(5.0) is None
    assert 0 < budget.wait(5.0) <= WINDOW
    assert budget.take(5.0 + budget.wait(5.0)) is not None


def test_a_retry_that_went_well_gives_its_place_back() -> None:
    budget = RetryBudget(reserve=1)
    for now in range(5):
        place = budget.take(float(now))
        assert place is not None
        budget.give_back(place)
    late = budget.take(5.0)
    assert late is not None
    assert budget.take(100.0) is not None  # a place that has left the window …
    budget.give_back(late)  # … is not given back twice
    assert budget.take(100.0) is None


@given(
    st.lists(
        st.tuples(st.sampled_from(["request", "retry", "good retry"]), st.floats(0, 3)),
        max_size=300,
    )
)
def test_failed_retries_stay_within_the_budget_whatever_happens(
    events: list[tuple[str, float]],
) -> None:
    budget, now = RetryBudget(reserve=2), 0.0
    requests: list[float] = []
    failed: list[float] = []
    for kind, step in events:
        now += step
        if kind == "request":
            budget.request(now)
            requests.append(now)
            continue
        place = budget.take(now)
        if place is None:
            assert budget.wait(now) > 0
        elif kind == "good retry":
            budget.give_back(place)
        else:
            failed.append(now)
            # Steps are whole: a count may last a step less than the window, never longer.
            recent = sum(at > now - WINDOW for at in requests)
            retries = sum(at > now - WINDOW * 0.9 for at in failed)
            assert retries <= SHARE * recent + 2


class Line:
    """Retries of one origin, and the metrics they leave."""

    def __init__(self, reserve: int) -> None:
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.retries = Retries(
            "hub", metrics=self.metrics, clock=self.clock, budget=RetryBudget(reserve=reserve)
        )

    def retry(self) -> asyncio.Task[int | None]:
        return asyncio.create_task(self.retries.take("reset"))


async def test_first_tries_never_wait() -> None:
    line = Line(reserve=0)
    for _ in range(1000):
        assert await line.retries.take("") is None


async def test_a_retry_that_is_held_back_goes_on_when_there_are_requests_enough() -> None:
    line = Line(reserve=0)
    first, second = line.retry(), line.retry()
    await until(lambda: line.retries.waiting == 2)
    for _ in range(5):
        await line.retries.take("")
    await first
    assert not second.done()
    assert sample(line.metrics, "upstream_retries_held_total", upstream="hub") == 2
    assert sample(line.metrics, "upstream_retries_total", upstream="hub", reason="reset") == 1
    for _ in range(5):
        await line.retries.take("")
    await second


async def test_each_success_lets_the_next_one_go() -> None:
    """After an outage: a crowd of retries gets through although one place is all there is."""
    line = Line(reserve=1)
    going = [line.retry() for _ in range(50)]
    for waiter in going:
        line.retries.give_back(await waiter)
    assert line.retries.waiting == 0


async def test_while_retries_fail_nobody_else_goes() -> None:
    line = Line(reserve=2)
    going = [line.retry() for _ in range(50)]
    await asyncio.wait(going[:2])
    for _ in range(50):
        await asyncio.sleep(0)
    assert [task.done() for task in going] == [True] * 2 + [False] * 48
    line.retries.close()
    outcomes = await asyncio.gather(*going[2:], return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ShuttingDown}


async def test_time_lets_a_retry_go() -> None:
    """By the event loop's own clock, with a window of a moment."""
    loop = asyncio.get_running_loop()
    budget = RetryBudget(reserve=1, window=0.1)
    retries = Retries("hub", metrics=Metrics(), clock=loop.time, budget=budget)
    await retries.take("reset")
    began = loop.time()
    await retries.take("reset")
    assert loop.time() - began >= 0.05
    retries.close()


@pytest.mark.parametrize("granted", [False, True])
async def test_whoever_leaves_the_line_leaves_nothing_behind(granted: bool) -> None:
    line = Line(reserve=0)
    leaver, stayer = line.retry(), line.retry()
    await until(lambda: line.retries.waiting == 2)
    if granted:  # and cancelled in the same loop turn
        for _ in range(5):
            await line.retries.take("")
    leaver.cancel()
    await asyncio.wait([leaver])
    assert leaver.cancelled()
    if not granted:
        assert line.retries.waiting == 1
        for _ in range(5):
            await line.retries.take("")
    await stayer
    line.retries.close()


async def test_it_says_how_it_stands() -> None:
    line = Line(reserve=1)
    await line.retries.take("")
    await line.retries.take("reset")
    assert repr(line.retries) == "<Retries hub 0 held back, <RetryBudget 1 retries to 1 requests>>"
    assert RetryBudget().left(0.0) == RESERVE


@pytest.mark.parametrize("place", [None, 0])
async def test_giving_back_a_first_try_changes_nothing(place: int | None) -> None:
    line = Line(reserve=1)
    line.retries.give_back(place)
    assert line.retries.budget.left(0.0) == 1
