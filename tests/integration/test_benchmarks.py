"""The benchmarks measure what they say: small, once, from the command line to the page."""

import json
import sys
from pathlib import Path

from tests.integration.rig import run

ROOT = Path(__file__).parents[2]


def test_a_fast_run_shows_an_overloaded_upstream_and_pullpool_in_front_of_it(
    tmp_path: Path,
) -> None:
    flags = ["overload", "--fast", "--only=nothing", "--only=pullpool", f"--into={tmp_path}"]
    said = run([sys.executable, "-m", "benchmarks", *flags], cwd=ROOT)

    scenario = json.loads((tmp_path / "results.json").read_text())["overload"]
    straight, pullpool = scenario["figures"]
    assert sum(straight["failures"].values()) > 0
    assert sum(straight["overload_kinds"].values()) > 0
    assert (pullpool["served"], pullpool["failures"]) == (pullpool["answers_expected"], {})
    assert pullpool["upstream_ratio"] <= 1.1
    assert "reached: fail no answer: 0" in said
    assert "| fail no answer | 0 | 0 | yes |" in (tmp_path / "results.md").read_text()
