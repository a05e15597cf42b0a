"""The benchmarks measure what they say: small, once, from the command line to the page.

Never how fast. All scenarios run beside one another, two at a time, while their tests wait.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import SCENARIOS
from tests.integration.rig import has, run

ROOT = Path(__file__).parents[2]
#: Scenarios that play in one process, the longest first, and who plays beside pullpool: each rival
#: where it takes little time.
GROUPS = (
    (("scale", "manifests", "image", "segments"), ()),
    (("memory", "herd", "crowd"), ()),
    (("warm",), ("nginx",)),
    (("workers",), ("one",)),
    (("fleet",), ()),
    (("overload",), ("nothing",)),
    (("cold",), ("registry", "nginx", "varnish")),
)
NEEDS = {
    "warm": ("nginx", "wrk", "openssl"),
    "manifests": ("nginx", "wrk"),
    "cold": ("nginx",),
    "segments": ("nginx",),
    "herd": ("nginx", "docker-registry"),
    "crowd": ("nginx", "docker-registry"),
    "image": ("nginx", "containerd", "ctr"),
    "memory": ("nginx", "openssl"),
    "scale": ("nginx", "wrk"),
    "workers": ("nginx", "wrk"),
    "fleet": ("redis-server", "redis-cli", "ip", "tc"),
}
#: They make network namespaces, or start containerd.
AS_ROOT = frozenset({"fleet", "image"})


@dataclass(frozen=True, slots=True)
class Run:
    """What a fast run printed, and what it wrote."""

    said: str
    directory: Path

    def scenario(self, name: str) -> Any:
        return json.loads((self.directory / "results.json").read_text())[name]


def fast(names: Sequence[str], rivals: Sequence[str], directory: Path) -> Run:
    subjects = [f"--only={subject}" for subject in ("pullpool", *rivals)]
    flags = [*names, "--fast", *subjects, f"--into={directory}"]
    return Run(run([sys.executable, "-m", "benchmarks", *flags], cwd=ROOT), directory)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Future[Run]]]:
    """Each scenario's run, those of a group being one."""
    with ThreadPoolExecutor(2) as pool:
        started: dict[str, Future[Run]] = {}
        for group, rivals in GROUPS:
            names = list(filter(is_able, group))
            if names:
                directory = tmp_path_factory.mktemp(names[0])
                started |= dict.fromkeys(names, pool.submit(fast, names, rivals, directory))
        yield started


def is_able(name: str) -> bool:
    """Whether this machine has what a scenario needs; containerd needs root."""
    return has(*NEEDS.get(name, ())) and (name not in AS_ROOT or os.geteuid() == 0)


def found(runs: Mapping[str, Future[Run]], name: str) -> Run:
    if name not in runs:
        pytest.skip(f"needs {', '.join(NEEDS[name])}")
    return runs[name].result()


def kept(scenario: Any, *words: str) -> dict[str, bool]:
    """Which promises were kept, of those that have one of these words in their name."""
    promises = {each["what"]: each["kept"] for each in scenario["promises"]}
    return {what: kept for what, kept in promises.items() if any(word in what for word in words)}


def test_an_overloaded_upstream_breaks_and_pullpool_in_front_of_it_does_not(
    runs: Mapping[str, Future[Run]],
) -> None:
    ran = found(runs, "overload")
    straight, pullpool = ran.scenario("overload")["figures"]
    assert sum(straight["failures"].values()) > 0
    assert sum(straight["overload_kinds"].values()) > 0
    assert (pullpool["served"], pullpool["failures"]) == (pullpool["answers_expected"], {})
    assert pullpool["upstream_ratio"] <= 1.1
    assert "reached: fail no answer: 0" in ran.said
    assert "| fail no answer | 0 | 0 | yes |" in (ran.directory / "results.md").read_text()


def test_held_blobs_are_served_plain_and_over_tls(runs: Mapping[str, Future[Run]]) -> None:
    ran = found(runs, "warm")
    figures = ran.scenario("warm")["figures"]
    for subject in ("nginx", "pullpool"):
        (values,) = figures[subject]
        assert values["failed"] == 0
        assert min(values[key] for key in ("plain", "plain_cpu", "tls", "tls_cpu", "small")) > 0
    pictures = {path.name for path in (ran.directory / "results").iterdir()}
    assert pictures == {"warm-rate.svg", "warm-cpu.svg", "warm-tls.svg"}
    assert "](results/warm-rate.svg)" in (ran.directory / "results.md").read_text()


def test_held_manifests_are_served_with_repeated_and_with_unique_heads(
    runs: Mapping[str, Future[Run]],
) -> None:
    (values,) = found(runs, "manifests").scenario("manifests")["figures"]["pullpool"]
    assert values["failed"] == 0
    assert min(values[key] for key in ("cpu", "rate", "unique_cpu", "unique_rate")) > 0


def test_a_cold_blob_comes_right_through_every_cache(runs: Mapping[str, Future[Run]]) -> None:
    scenario = found(runs, "cold").scenario("cold")
    here = {"pullpool", "nginx"} | ({"registry"} if has("docker-registry") else set())
    here |= {"varnish"} if has("varnishd") else set()
    assert scenario["figures"].keys() == here
    for (values,) in scenario["figures"].values():
        assert values["failed"] == 0  # the clients of a fast run hash what they get
        assert values["rate"] > 0
    assert "proxy_cache_lock on;" in scenario["configurations"]["nginx proxy_cache, tuned"]


def test_blobs_come_right_from_an_upstream_that_gives_each_connection_little(
    runs: Mapping[str, Future[Run]],
) -> None:
    (values,) = found(runs, "segments").scenario("segments")["figures"]["pullpool"]
    assert values["failed"] == 0
    assert {"small", "large", "many"} <= values.keys()


@pytest.mark.parametrize("name", ["herd", "crowd"])
def test_a_crowd_is_served_and_every_byte_fetched_once(
    runs: Mapping[str, Future[Run]], name: str
) -> None:
    promises = kept(found(runs, name).scenario(name), "answer", "once", "cap", "failed")
    assert len(promises) >= 4
    assert all(promises.values()), promises


def test_containerd_gets_a_whole_image_twice(runs: Mapping[str, Future[Run]]) -> None:
    (values,) = found(runs, "image").scenario("image")["figures"]["pullpool"]
    assert values["cold"] > 0
    assert values["warm"] > 0


def test_connections_are_held_and_a_blob_larger_than_the_cache_is_served(
    runs: Mapping[str, Future[Run]],
) -> None:
    scenario = found(runs, "memory").scenario("memory")
    promises = kept(scenario, "refused", "served")
    assert promises == {"connections refused": True, "a blob larger than the cache is served": True}
    (carried,) = scenario["figures"]["carried"]
    assert carried["most"] >= carried["early"] > 0


def test_little_and_much_are_measured_alike(runs: Mapping[str, Future[Run]]) -> None:
    (values,) = found(runs, "scale").scenario("scale")["figures"]["pullpool"]
    for measure in ("images", "arrival", "stall", "start", "first", "turn"):
        assert min(values[f"{measure}_little"], values[f"{measure}_much"]) > 0
    assert values.keys() >= {"readers_little", "readers_much"}


def test_two_workers_answer_as_one_does_and_a_killed_leader_fails_no_pull(
    runs: Mapping[str, Future[Run]],
) -> None:
    scenario = found(runs, "workers").scenario("workers")
    loads, takeover = scenario["figures"]["loads"], scenario["figures"]["takeover"]
    for subject in ("one", "pullpool"):
        (values,) = loads[subject]
        assert values["failed"] == 0
        for load in ("hot", "handler", "blob"):
            assert min(values[f"{load}_{key}"] for key in ("rate", "economy", "cores")) > 0
    assert "workers = 2\nhot_path = false" in scenario["configurations"]["pullpool, two workers"]
    assert "workers = " not in scenario["configurations"]["pullpool, one worker"]
    assert takeover.keys() == {"cap 1", "cap 8"}
    for rounds in takeover.values():
        (values,) = rounds["pullpool"]
        assert (values["failed"], values["refused"]) == (0, 0)
        assert min(values["leads"], values["goes_on"]) > 0
        assert 1 <= values["upstream"] < 2  # resumed; from the start it would be fetched anew


def test_a_fleet_fetches_an_image_once_and_no_pull_fails(runs: Mapping[str, Future[Run]]) -> None:
    scenario = found(runs, "fleet").scenario("fleet")
    plays = {each["kind"]: each for each in scenario["figures"]}
    assert plays.keys() == {"alone", "fleet", "star", "own", "rolling", "killed"}
    for kind in ("alone", "fleet", "rolling", "killed"):
        assert plays[kind]["failed"] == 0
    for kind in ("fleet", "rolling"):
        assert plays[kind]["upstream_bytes"] == plays[kind]["unique_bytes"]
        assert plays[kind]["directory_operations"] > 0
    assert plays["own"]["upstream_bytes"] > plays["own"]["unique_bytes"]
    assert all(kept(scenario, "sockets").values())


def test_every_scenario_has_a_fast_run_here() -> None:
    """`fairness` has a test of its own, which plays it with two proxies; so have the scenarios of
    the fleet that need no fleet."""
    played = {name for names, _ in GROUPS for name in names}
    assert played | {"fairness", "fleet_sim", "fleet_directory"} == set(SCENARIOS)


def test_the_micro_benchmarks_run() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "benchmarks.micro", "--benchmark-disable"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    assert " passed" in ended.stdout
