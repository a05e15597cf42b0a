"""Marks: one for a fact, withdrawn for good, and none that nobody relies on."""

import gc
from functools import partial

from proxy.store.marks import Mark, Marks


def test_all_who_rely_on_a_fact_share_its_mark() -> None:
    marks: Marks[str] = Marks()
    assert marks.of("a") is (mark := marks.of("a"))
    assert marks.of("b") is not mark
    assert mark.holds


def test_a_withdrawn_mark_never_holds_again() -> None:
    marks: Marks[str] = Marks()
    before = marks.of("a")
    marks.withdraw("a")
    after = marks.of("a")
    assert not before.holds
    assert after.holds
    assert repr(before) == "<Mark withdrawn>"


def test_any_change_withdraws_the_mark_of_all() -> None:
    marks: Marks[str] = Marks()
    marks.of("a")
    for change in (partial(marks.withdraw, "a"), partial(marks.withdraw, "b"), marks.clear):
        everything = marks.all()
        assert everything is marks.all()
        assert everything.holds
        change()
        assert not everything.holds
    assert marks.all().holds


def test_what_nobody_relies_on_costs_nothing() -> None:
    marks: Marks[int] = Marks()
    kept: Mark = marks.of(0)
    for number in range(1, 100):
        marks.of(number)
    gc.collect()
    assert len(marks) == 1
    marks.withdraw(7)  # no mark, no harm
    assert kept.holds
