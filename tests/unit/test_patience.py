"""How often a node asks the directory when nothing happens to it."""

from __future__ import annotations

import random

import pytest

from proxy.fleet.patience import (
    FIRST_LOOK,
    LAST_LOOK,
    LONGEST,
    LOOKERS,
    MOST_PATIENT,
    PEACE,
    PROMPT,
    Patience,
)


def patience(in_vain: int = 0, receiving: int = 0) -> Patience:
    """Of one that has asked so often in vain."""
    made = Patience(random.Random(1))
    for _ in range(in_vain):
        made.learned(is_news=False, receiving=receiving)
    return made


def longest(made: Patience, nodes: int = 6) -> float:
    return max(made.wait(nodes, 0.0) for _ in range(1000))


def test_each_question_in_vain_doubles_the_wait_and_news_halve_it() -> None:
    made = patience()
    assert longest(made) == pytest.approx(FIRST_LOOK, rel=0.01)
    made.learned(is_news=False, receiving=0)
    made.learned(is_news=False, receiving=0)
    assert longest(made) == pytest.approx(4 * FIRST_LOOK, rel=0.01)
    made.learned(is_news=True, receiving=0)
    assert longest(made) == pytest.approx(2 * FIRST_LOOK, rel=0.01)
    for _ in range(9):
        made.learned(is_news=True, receiving=0)
    assert longest(made) == pytest.approx(FIRST_LOOK, rel=0.01)


@pytest.mark.parametrize(
    ("receiving", "most"), [(0, LAST_LOOK), (1, 2 * LAST_LOOK), (5, MOST_PATIENT)]
)
def test_the_more_is_on_its_way_the_longer_news_may_wait(receiving: int, most: float) -> None:
    assert longest(patience(20, receiving)) == pytest.approx(most, rel=0.01)


def test_whose_stripes_have_all_come_is_impatient_again() -> None:
    made = patience(20, 5)
    made.learned(is_news=False, receiving=0)
    assert longest(made) <= LAST_LOOK


def test_nodes_that_began_together_do_not_ask_together() -> None:
    made = patience(20)
    waits = {made.wait(6, 0.0) for _ in range(100)}
    assert len(waits) == 100
    assert min(waits) >= LAST_LOOK / 2


def test_in_a_crowd_each_asks_less_often() -> None:
    assert longest(patience(), 16 * LOOKERS) == pytest.approx(16 * FIRST_LOOK, rel=0.01)
    assert longest(patience(), 1_000_000) == LONGEST


def test_a_directory_that_is_late_for_a_crowd_is_left_in_peace() -> None:
    made = patience()
    made.answered(PROMPT + 0.1, LOOKERS, 10.0)
    assert not made.is_over(10.0)
    assert made.wait(LOOKERS, 10.0) == pytest.approx(PEACE * 0.1)
    assert made.is_over(10.0 + PEACE * 0.1)
    made.answered(PROMPT + 0.1, LOOKERS - 1, 20.0)
    assert made.is_over(20.0)
