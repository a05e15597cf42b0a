"""Docker Hub's pull quota: what its headers say, and how pulls are spent when it runs low."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.errors import Throttled
from proxy.testing import FakeClock
from proxy.upstream.quota import (
    LONGEST_SPACING,
    LONGEST_WAIT,
    USUAL_WINDOW,
    Pulls,
    Quota,
    read_quota,
)
from tests.unit.virtual import now, run_virtually


def headers(remaining: object, limit: object = 100, window: object = 21600) -> dict[str, str]:
    return {
        "ratelimit-limit": f"{limit};w={window}",
        "ratelimit-remaining": f"{remaining};w={window}",
    }


def test_the_headers_of_docker_hub_are_read() -> None:
    assert read_quota(headers(20), 7.0) == Quota(100, 20, 21600.0, 7.0)


@pytest.mark.parametrize(
    ("limit", "remaining", "expected"),
    [
        ("100", "99", Quota(100, 99, USUAL_WINDOW, 0.0)),
        (" 100 ; w = 60 ", "5;w=60", Quota(100, 5, 60.0, 0.0)),
        ("100;w=60", "5", Quota(100, 5, 60.0, 0.0)),
        ("100;w=60", "500;w=60", Quota(100, 100, 60.0, 0.0)),
        ("0;w=60", "0;w=60", Quota(0, 0, 60.0, 0.0)),
        ("100;w=60", "", None),
        ("", "5;w=60", None),
        ("100;w=60", "-5;w=60", None),
        ("100;w=60", "5;w=", None),
        ("100;w=60", "5;x=60", None),
        ("100;w=60", "\u0665;w=60", None),
        ("9" * 5000, "5;w=60", None),
    ],
)
def test_what_is_no_quota_is_none(limit: str, remaining: str, expected: Quota | None) -> None:
    said = {"ratelimit-limit": limit, "ratelimit-remaining": remaining}
    assert read_quota(said, 0.0) == expected


@given(st.text(max_size=40), st.text(max_size=40))
def test_whatever_an_upstream_says_is_read_without_a_fault(limit: str, remaining: str) -> None:
    quota = read_quota({"ratelimit-limit": limit, "ratelimit-remaining": remaining}, 0.0)
    assert quota is None or 0 <= quota.remaining <= quota.limit


def test_with_plenty_left_pulls_are_not_spaced() -> None:
    assert Quota(100, 21, 21600.0, 0.0).spacing(0.0) == 0.0


def test_what_is_low_is_spread_over_the_rest_of_the_window() -> None:
    assert Quota(100, 20, 21600.0, 0.0).spacing(0.0) == 1080.0
    assert Quota(100, 20, 21600.0, 0.0).spacing(21600.0 - 200.0) == 10.0
    assert Quota(100, 0, 21600.0, 0.0).spacing(21600.0 - 200.0) == 200.0
    assert Quota(100, 0, 21600.0, 0.0).spacing(21600.0) == 0.0


@given(
    st.integers(1, 200), st.integers(0, 200), st.floats(1, 1e5), st.floats(0, 2e5), st.floats(0, 10)
)
def test_spaced_pulls_last_until_the_window_ends(
    limit: int, remaining: int, window: float, now: float, later: float
) -> None:
    quota = Quota(limit, min(remaining, limit), window, 0.0)
    spacing = quota.spacing(now)
    assert 0 <= spacing <= window
    if spacing and quota.remaining:
        assert spacing * quota.remaining == pytest.approx(quota.rest(now))
    assert quota.spacing(now + later) <= spacing  # waiting never makes it longer


def test_the_window_begins_when_the_count_rises() -> None:
    first = Quota(100, 20, 60.0, 0.0)
    assert Quota(100, 19, 60.0, 10.0).after(first, 10.0).began == 0.0
    assert Quota(100, 99, 60.0, 10.0).after(first, 10.0).began == 10.0
    assert Quota(100, 19, 60.0, 70.0).after(first, 70.0).began == 70.0
    assert Quota(200, 19, 60.0, 10.0).after(first, 10.0).began == 10.0
    assert Quota(100, 19, 60.0, 10.0).after(None, 10.0).began == 10.0


class TestPulls:
    async def test_nothing_known_is_nothing_held_back(self) -> None:
        pulls = Pulls("hub", clock=FakeClock())
        for _ in range(100):
            await pulls.place()
        pulls.heed({"Content-Type": "text/plain"})
        assert not pulls.is_last
        assert "no quota" in repr(pulls)

    async def test_a_low_quota_spaces_pulls_but_never_for_long(self) -> None:
        clock = FakeClock()
        pulls = Pulls("hub", clock=clock)
        pulls.heed(headers(15))
        await pulls.place()  # the first one goes at once
        for _ in range(int(LONGEST_WAIT / LONGEST_SPACING)):
            clock.advance(LONGEST_SPACING)
            await pulls.place()
        assert "15 of 100 pulls left" in repr(pulls)

    async def test_a_herd_near_the_wall_is_told_when_to_come_again(self) -> None:
        clock = FakeClock()
        pulls = Pulls("hub", clock=clock)
        pulls.heed(headers(15))
        herd = [asyncio.create_task(pulls.place()) for _ in range(20)]
        done, waiting = await asyncio.wait(herd, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 18:
            await asyncio.sleep(0)
            done = {task for task in herd if task.done()}
        told = [task.exception() for task in herd if task.done()]
        refused = [error for error in told if isinstance(error, Throttled)]
        assert len(refused) == 17
        assert all((error.retry_after or 0) > LONGEST_WAIT for error in refused)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*herd, return_exceptions=True)

    def test_places_that_are_given_up_cost_nobody_anything(self) -> None:
        async def scenario() -> None:
            pulls = Pulls("hub", clock=now)
            pulls.heed(headers(15))
            await pulls.place()
            for _ in range(20):
                leaving = asyncio.create_task(pulls.place())
                await asyncio.sleep(0)
                leaving.cancel()
                await asyncio.wait([leaving])
            await pulls.place()
            assert now() == LONGEST_SPACING

        run_virtually(scenario(), grace=0)

    def test_who_stands_behind_one_that_leaves_moves_up(self) -> None:
        async def scenario() -> None:
            pulls = Pulls("hub", clock=now)
            pulls.heed(headers(15))
            left = []

            async def pull(name: str) -> None:
                await pulls.place()
                left.append((name, now()))

            tasks = [asyncio.create_task(pull(name)) for name in "abc"]
            await asyncio.sleep(1)
            tasks[1].cancel()
            await asyncio.wait(tasks)
            assert left == [("a", 0.0), ("c", LONGEST_SPACING)]

        run_virtually(scenario(), grace=0)

    def test_the_last_pulls_are_kept_until_the_window_ends(self) -> None:
        clock = FakeClock()
        pulls = Pulls("hub", clock=clock)
        pulls.heed(headers(6, window=60))
        assert not pulls.is_last
        pulls.heed(headers(5, window=60))
        assert pulls.is_last
        assert "5 of 100" in pulls.kept().message
        clock.advance(60)
        assert not pulls.is_last
