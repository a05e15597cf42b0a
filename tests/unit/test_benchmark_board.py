"""Subjects side by side: whose turn it is, medians, ratios round by round, and what is promised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.board import Board, Measure, Played, count, play_in_turn, seconds
from benchmarks.parts import TIMES, PartFailed
from benchmarks.scenario import Options
from benchmarks.subjects import Subject, nothing

TITLES = {"nginx": "nginx, tuned", "varnish": "varnish", "pullpool": "pullpool"}
WALL = seconds("wall", "done")


def board(**rounds: list[Mapping[str, float]]) -> Board:
    return Board(TITLES, {name: [Played(one) for one in found] for name, found in rounds.items()})


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    # The second round was slow for both: their medians would say 10 / 2.
    found = board(
        nginx=[{"wall": 1.0}, {"wall": 20.0}, {"wall": 2.0}],
        pullpool=[{"wall": 0.5}, {"wall": 10.0}, {"wall": 10.0}],
    )
    assert found.median("nginx", "wall") == 2.0
    assert found.ratio("pullpool", "wall") == 0.5


def test_a_round_in_which_one_has_no_number_says_nothing_of_the_ratio() -> None:
    found = board(
        nginx=[{}, {"wall": 4.0}, {"wall": 0.0}],
        pullpool=[{"wall": 9.0}, {"wall": 2.0}, {"wall": 1.0}],
    )
    assert found.ratio("pullpool", "wall") == 0.5
    assert board(nginx=[{}], pullpool=[{"wall": 1.0}]).ratio("pullpool", "wall") is None


def test_the_table_names_those_that_are_not_installed_and_those_that_failed() -> None:
    found = board(nginx=[{}], pullpool=[{"wall": 1.5, "failed": 0}])
    sheet = found.sheet("a title", (WALL, count("failed", "failed")))
    assert sheet.columns == ("in front", "done", f"{TIMES} nginx", "failed")
    assert sheet.rows == (
        ("nginx, tuned", "failed", "-", "-"),
        ("varnish", "not installed", "-", "-"),
        ("pullpool", "1.50 s", "-", "0"),
    )


def test_a_table_may_compare_with_another_rival_than_nginx() -> None:
    found = board(varnish=[{"wall": 2.0}], pullpool=[{"wall": 1.0}])
    sheet = found.sheet("a title", (WALL,), rival="varnish")
    assert sheet.columns == ("in front", "done", f"{TIMES} varnish")
    assert sheet.rows[2] == ("pullpool", "1.00 s", f"0.50 {TIMES}")


def test_the_table_counts_what_must_not_happen_in_the_worst_round() -> None:
    found = board(pullpool=[{"failed": 0.0}, {"failed": 3.0}, {"failed": 0.0}])
    assert found.sheet("", (count("failed", "failed"),)).rows[2] == ("pullpool", "3")


@pytest.mark.parametrize(
    ("sign", "limit", "kept"),
    [("≤", 0.5, True), ("≤", 0.49, False), ("≥", 0.5, True), ("≥", 0.51, False)],
)
def test_a_promise_compares_with_a_rival(sign: str, limit: float, kept: bool) -> None:
    found = board(nginx=[{"wall": 2.0}], pullpool=[{"wall": 1.0}])
    (promise,) = found.promise("be done", "wall", sign, limit)
    assert (promise.what, promise.measured) == ("be done, beside nginx", f"0.50 {TIMES}")
    assert promise.wanted == f"{sign} {limit:g} {TIMES}"
    assert promise.kept is kept


def test_nothing_is_promised_beside_a_rival_that_did_not_run() -> None:
    found = board(pullpool=[{"wall": 1.0}])
    assert list(found.promise("be done", "wall", "≤", 1.0)) == []


def test_a_bound_is_judged_by_the_worst_round() -> None:
    found = board(pullpool=[{"wall": 1.0}, {"wall": 3.0}, {"wall": 1.0}])
    (promise,) = found.bound(WALL, "be done", 2.0)
    assert (promise.wanted, promise.measured, promise.kept) == ("≤ 2.00 s", "3.00 s", False)


def test_a_bound_of_nothing_is_wanted_as_nothing() -> None:
    (promise,) = board(pullpool=[{"failed": 0}]).bound(count("failed", ""), "fail", 0)
    assert (promise.wanted, promise.measured, promise.kept) == ("0", "0", True)


def test_a_chart_has_a_bar_for_each_that_has_a_number() -> None:
    measure = Measure("wall", "done", "ms", 1e-3, 0)
    found = board(nginx=[{}], pullpool=[{"wall": 0.001}, {"wall": 0.004}, {"wall": 0.002}])
    (bar,) = found.chart("name", "title", measure, better="less").bars
    assert (bar.label, bar.value, bar.text, bar.least, bar.most) == ("pullpool", 2, "2 ms", 1, 4)
    assert bar.ours


def subject(name: str) -> Subject:
    return Subject(name, name.upper(), "", nothing)


ABC = [subject("a"), subject("b"), subject("c")]


def test_each_round_is_begun_by_another_and_everybody_has_an_empty_directory() -> None:
    order: list[str] = []

    def play(each: Subject, directory: Path) -> Played:
        assert list(directory.iterdir()) == []
        (directory / "left").touch()
        order.append(each.name)
        return Played({"at": float(len(order))})

    options = Options(rounds=3, log=lambda _text: None)
    found = play_in_turn("test", ABC, options, play)
    assert "".join(order) == "abcbcacab"
    assert found.all("a", "at") == [1.0, 6.0, 8.0]
    assert found.titles == {"a": "A", "b": "B", "c": "C"}


def test_a_rival_that_fails_loses_its_round_and_pullpool_the_scenario() -> None:
    def play(each: Subject, _directory: Path) -> Played:
        if each.name != "a":
            raise PartFailed("it fell over")
        return Played({"wall": 1.0})

    said: list[str] = []
    options = Options(fast=True, log=said.append)
    found = play_in_turn("test", ABC[:2], options, play)
    assert found.plays["b"] == [Played({})]
    assert "B failed: it fell over" in said
    with pytest.raises(PartFailed, match="it fell over"):
        play_in_turn("test", [subject("pullpool")], options, play)


def test_what_is_not_installed_has_a_row_and_no_plays() -> None:
    missing = Subject("x", "X", "no-such-program", nothing)
    options = Options(fast=True, log=lambda _text: None)
    found = play_in_turn("test", [ABC[0], missing], options, lambda _s, _d: Played({"wall": 1.0}))
    assert list(found.titles) == ["a", "x"]
    assert list(found.plays) == ["a"]
