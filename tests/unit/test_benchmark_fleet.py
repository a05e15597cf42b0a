"""The fleet in virtual time, and the directory's benchmark in the small."""

from __future__ import annotations

import pytest

from benchmarks import fleet_directory, fleet_sim
from benchmarks.charts import draw
from benchmarks.fleet_model import RATE, Fleet
from benchmarks.fleet_time import LATENCY, SERVICE, Directory, Time
from benchmarks.scenario import Options
from proxy.fleet.stripes import PIECE
from tests.unit.redis_kit import needs_redis

SMALL = 32 * PIECE


def test_one_node_takes_what_the_upstream_takes() -> None:
    play = fleet_sim.one_blob(1, SMALL)
    played = fleet_sim.Played(play, Fleet(1, spread=0.0).play(play.layers))
    assert played.upstream == 1.0
    assert played.last == pytest.approx(1.0, abs=0.05)  # a few calls of the directory


def test_a_crowd_fetches_each_byte_once_and_no_link_carries_more_than_it_can() -> None:
    play = fleet_sim.one_blob(12, SMALL)
    fleet = Fleet(play.nodes)
    outcome = fleet.play(play.layers)
    assert outcome.upstream == SMALL
    assert sum(node.sent for node in fleet.nodes.values()) * PIECE == 11 * SMALL
    longest = fleet.time.now
    assert all(node.sent * PIECE <= RATE * longest for node in fleet.nodes.values())
    assert min(outcome.seconds) >= SMALL / RATE * 0.99


def test_a_directory_does_one_call_after_the_other() -> None:
    time = Time()
    directory = Directory(time)
    answered: list[tuple[str, float]] = []

    async def call(name: str) -> str:
        return name

    for name in ("first", "second", "third"):
        directory.ask("take", call(name), lambda said: answered.append((said, time.now)))
    time.run()
    service = SERVICE["take"]
    assert [said for said, _ in answered] == ["first", "second", "third"]
    assert [at for _, at in answered] == pytest.approx([LATENCY + n * service for n in (1, 2, 3)])
    assert directory.longest_wait == pytest.approx(2 * service)
    assert directory.calls == {"take": 3}


def test_a_crowd_asks_the_directory_less_for_each_node_than_a_few_do() -> None:
    few, many = (fleet_sim.played(fleet_sim.one_blob(nodes, SMALL)) for nodes in (16, 150))
    assert many.operations < few.operations
    assert many.upstream == 1.0


def test_those_who_come_later_ask_the_upstream_for_nothing() -> None:
    played = fleet_sim.played(fleet_sim.one_blob(10, SMALL, fleet_sim.WAVES))
    assert played.upstream == 1.0
    assert played.outcome.operations["fill"] == 1


def test_the_same_fleet_plays_the_same_again() -> None:
    first, again = (fleet_sim.played(fleet_sim.one_blob(6, SMALL)) for _ in range(2))
    assert first.outcome == again.outcome


def test_a_scenario_says_what_it_found() -> None:
    told: list[str] = []
    findings = fleet_sim.measure(Options(fast=True, log=told.append))
    assert len(findings.sheets[0].rows) == len(told) == len(fleet_sim.plays(fast=True))
    assert all(draw(chart).startswith("<svg") for chart in findings.charts)


def test_what_is_promised_is_judged() -> None:
    play = fleet_sim.one_blob(16, SMALL)
    found = fleet_sim.played(play)
    good, upstream = fleet_sim.promised([found])
    assert good.kept == (found.last <= 1.3)
    assert upstream.kept
    assert not fleet_sim.promised([fleet_sim.Played(fleet_sim.one_blob(16, PIECE), found.outcome)])[
        0
    ].kept


@needs_redis
def test_a_directory_is_filled_and_measured() -> None:
    findings = fleet_directory.measure(Options(fast=True, log=lambda _line: None))
    figures = findings.figures
    assert isinstance(figures, dict)
    assert figures["memory"] > 20 * 64 * 16  # a node id for each holder, at least
    assert set(figures["microseconds"]) >= {"look", "take", "publish", "take, in a crowd"}
    assert all(spent > 0 for spent in figures["microseconds"].values())
