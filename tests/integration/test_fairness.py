"""The fairness benchmark's small mode is right: everybody is served, whatever the clock says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.fairness import CAP, FAST, main

pytestmark = pytest.mark.integration


def test_everybody_is_served_alone_and_beside_a_client_that_wants_much(tmp_path: Path) -> None:
    target = tmp_path / "fairness.json"
    result = CliRunner().invoke(main, ["--fast", "--json", str(target)])
    assert result.exit_code == 0, result.output
    alone, beside = json.loads(target.read_text())["fairness"]
    assert (alone["name"], beside["name"]) == ("alone", "beside")
    for played in (alone, beside):
        assert played["served"] == played["expected"] == 3 * FAST.clients
        assert played["peak_sockets"] <= CAP
    assert beside["heavy_served"] == FAST.blobs
    assert beside["heavy_bytes"] == FAST.blobs * FAST.blob_size
