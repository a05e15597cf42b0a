"""The page of results: what a run found is kept, shown, and replaced by the next run."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks.__main__ import SCENARIOS, Processors, main, show
from benchmarks.overload import FAST, Round, promises
from benchmarks.parts import PROJECT, PartFailed, shown
from benchmarks.results import entry, read_document, render, write
from benchmarks.scenario import Findings, Options, Promise, Sheet
from benchmarks.subjects import Subject, chosen, nothing, with_absent

SHEET = Sheet("a crowd", ("in front", "served"), (("nothing", "1 of 2"), ("a|b", "2 of 2")), "note")
MACHINE = {"date": "today", "meanwhile": "0.0 of 2 cores busy with other work"}


def findings(about: str = "What it is about.") -> Findings:
    return Findings(
        about=about,
        sheets=(SHEET,),
        promises=(Promise("serve", "2", "2 of 2", True), Promise("be quick", "1 s", "2 s", False)),
        configurations={"rival": "listen 1;\n"},
        figures={"rounds": [1, 2]},
    )


def played(about: str = "What it is about.") -> dict[str, Any]:
    return entry(findings(about), MACHINE, "python -m benchmarks one")


def test_the_page_shows_tablespromises_machine_and_configurations(tmp_path: Path) -> None:
    write(tmp_path, {"one": played()}, ["one"])
    page = (tmp_path / "results.md").read_text()
    assert "## one\n\nWhat it is about.\n" in page
    assert "**a crowd**\n\n| in front | served |\n| --- | ---: |\n| nothing | 1 of 2 |\n" in page
    assert "| a\\|b | 2 of 2 |\n\nnote\n" in page
    assert "| serve | 2 | 2 of 2 | yes |\n| be quick | 1 s | 2 s | **no** |" in page
    assert "Measured by `python -m benchmarks one`:\n" in page
    assert "| meanwhile | 0.0 of 2 cores busy with other work |" in page
    assert "rival:\n\n```\nlisten 1;\n```\n" in page


def test_every_figure_is_in_the_document(tmp_path: Path) -> None:
    write(tmp_path, {"one": played()}, ["one"])
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["one"]["figures"] == {"rounds": [1, 2]}
    assert document["one"]["environment"] == MACHINE
    assert document["one"]["sheets"][0]["rows"] == [["nothing", "1 of 2"], ["a|b", "2 of 2"]]


def test_a_run_replaces_what_it_played_and_keeps_the_rest_in_order(tmp_path: Path) -> None:
    order = ["one", "two"]
    write(tmp_path, {"two": played("two, first")}, order)
    write(tmp_path, {"one": played("one")}, order)
    write(tmp_path, {"two": played("two, again")}, order)
    assert [each["about"] for each in read_document(tmp_path).values()] == ["one", "two, again"]
    page = (tmp_path / "results.md").read_text()
    assert page.index("## one") < page.index("## two")
    assert "two, first" not in page


def test_the_page_is_made_again_of_its_document(tmp_path: Path) -> None:
    write(tmp_path, {"overload": played()}, SCENARIOS)
    page = (tmp_path / "results.md").read_text()
    (tmp_path / "results.md").unlink()
    ended = CliRunner().invoke(main, ["--page", f"--into={tmp_path}"])
    assert ended.exit_code == 0
    assert (tmp_path / "results.md").read_text() == page


def test_the_page_of_this_project_is_what_its_document_says() -> None:
    document = read_document(PROJECT / "docs")
    assert list(document) == [name for name in SCENARIOS if name in document]
    assert (PROJECT / "docs/results.md").read_text() == render(document)


def test_the_terminal_shows_which_figures_were_missed() -> None:
    said = io.StringIO()
    show(Console(file=said, width=100), findings(), MACHINE)
    assert "2 of 2" in said.getvalue()
    assert "reached: serve: 2 of 2, wanted 2\nMISSED: be quick: 2 s, wanted 1 s" in said.getvalue()


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_is_a_module_that_can_measure(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{name}").measure)


def test_an_unknown_scenario_is_named() -> None:
    ended = CliRunner().invoke(main, ["nonsense"])
    assert ended.exit_code == 2
    assert "nonsense" in ended.output


def test_a_scenario_that_fails_does_not_keep_the_others_from_playing() -> None:
    ended = CliRunner().invoke(main, ["herd", "overload", "--fast", "--only=nobody"])
    assert ended.exit_code == 1
    assert "herd: none of nothing, registry, nginx, varnish, pullpool" in ended.output
    assert "overload: none of nothing, registry, pullpool" in ended.output


def test_a_table_says_who_is_not_installed() -> None:
    here, missing = Subject("a", "A", "", nothing), Subject("b", "B", "no-such-program", nothing)
    sheet = with_absent(SHEET, [here, missing], Options())
    assert sheet.caption == "note; B is not installed"
    assert with_absent(SHEET, [here, missing], Options(only=frozenset("a"))) == SHEET


def test_subjects_are_those_asked_for_and_installed() -> None:
    here, missing = Subject("a", "A", "", nothing), Subject("b", "B", "no-such-program", nothing)
    said: list[str] = []
    assert chosen([here, missing], Options(log=said.append)) == [here]
    assert said == ["without B: no-such-program is not installed"]
    with pytest.raises(PartFailed, match="none of a, b"):
        chosen([here, missing], Options(only=frozenset("b"), log=said.append))


def test_the_time_of_others_is_what_the_machine_was_busy_with_and_we_were_not() -> None:
    before = Processors(at=100.0, machine=50.0, own=10.0)
    after = Processors(at=110.0, machine=65.0, own=20.0)
    assert after.told_since(before).startswith("0.5 of ")
    # Two clocks: ours may have counted what the machine's has not yet.
    assert Processors(110.0, 59.0, 20.0).told_since(before).startswith("0.0 of ")
    now = Processors.now()
    assert now.machine > now.own > 0


def test_a_configuration_is_shown_without_the_places_of_its_run(tmp_path: Path) -> None:
    assert shown(f"\nroot {tmp_path}/cache;\n", tmp_path) == "root DIRECTORY/cache;"


def overloaded(served: int, broken: int, requests: int) -> Round:
    timeline = [(11.0, "500" if number < broken else None) for number in range(requests)]
    return Round("pullpool", (), FAST.answers - served, timeline, 110, 100, 1, 1)


@pytest.mark.parametrize(
    ("rounds", "kept"),
    [
        ([overloaded(0, 0, 50)], [False, True, True, True]),
        ([overloaded(FAST.answers, 1, 50)], [True, True, True, True]),
        (
            [overloaded(FAST.answers, 1, 50), overloaded(FAST.answers, 2, 50)],
            [True, True, False, True],
        ),
    ],
)
def test_a_promise_is_judged_by_the_worst_round(rounds: list[Round], kept: list[bool]) -> None:
    assert [promise.kept for promise in promises(rounds)] == kept
