"""Whom a node leaves alone, and for how long."""

from __future__ import annotations

import pytest

from proxy.fleet.shunned import Shunned, Why


@pytest.mark.parametrize("why", list(Why))
def test_a_fault_is_left_alone_for_its_time(why: Why) -> None:
    shunned = Shunned()
    shunned.mark("x", why, 100.0)
    assert shunned.avoided(100.0 + why.first - 0.01) == {"x"}
    assert shunned.avoided(100.0 + why.first) == frozenset()


def test_every_fault_is_a_kind_of_its_own() -> None:
    assert len(Why) == 5


def test_who_fails_again_soon_is_left_for_twice_as_long_up_to_a_limit() -> None:
    shunned, now, spans = Shunned(), 0.0, []
    for _ in range(9):
        shunned.mark("x", Why.DIED, now)
        start = now
        while shunned.avoided(now):
            now += 0.5
        spans.append(now - start)
    assert spans[:3] == [5.0, 10.0, 20.0]
    assert spans[-1] == Why.DIED.most


def test_who_fails_again_much_later_is_as_new() -> None:
    shunned = Shunned()
    shunned.mark("x", Why.DIED, 0.0)
    assert not shunned.avoided(2 * Why.DIED.first)
    shunned.mark("x", Why.DIED, 20.0)
    assert not shunned.avoided(20.0 + Why.DIED.first)


def test_who_gives_well_is_forgiven_but_not_a_lie() -> None:
    shunned = Shunned()
    shunned.mark("x", Why.BUSY, 0.0)
    shunned.mark("y", Why.LIED, 0.0)
    for node in "xyz":
        shunned.praise(node)
    assert shunned.avoided(0.1) == {"y"}


def test_a_lie_is_not_covered_by_a_lesser_fault() -> None:
    shunned = Shunned()
    shunned.mark("x", Why.LIED, 0.0)
    shunned.mark("x", Why.BUSY, 1.0)
    assert shunned.avoided(599.0) == {"x"}
    assert shunned.liars(599.0) == {"x"}


def test_only_who_lied_is_a_liar() -> None:
    shunned = Shunned()
    for node, why in zip("abcde", Why, strict=True):
        shunned.mark(node, why, 0.0)
    assert shunned.avoided(0.1) == set("abcde")
    assert shunned.liars(0.1) == {"a"}
