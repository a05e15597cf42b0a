"""What the benchmarks stand on: configurations, CPU of process trees, clients, the full gate."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import shaped
from benchmarks.carried import FAST as CARRIED_FAST
from benchmarks.carried import Carried, promises
from benchmarks.full_cache import hold_blobs, hold_manifests
from benchmarks.gate import FullGate
from benchmarks.holding import Errand, open_all, sip
from benchmarks.load import Plan, Want, crowd
from benchmarks.memory import FULL, within_limits
from benchmarks.parts import MIB, cpu_seconds, make_certificate, processes, resident_bytes
from benchmarks.scale import Stalls
from benchmarks.setups import DIRECTORY, fill
from benchmarks.wire import PACE_STEP, client_socket
from proxy.oci.digest import Digest
from proxy.testing import Cut, FakeRegistry, Fault
from tests.integration.rig import has
from tests.unit.fake_kit import IMAGE, LAYER
from tests.unit.store_kit import opened

WANT = Want("blob", IMAGE.name, str(LAYER.digest), str(LAYER.digest), LAYER.size)


# -- configurations ------------------------------------------------------------------------


def test_a_configuration_has_all_its_places_filled_and_empty_lines_left_out() -> None:
    text = fill("registry.yml", port=1, root="/r", proxy="", tls="", quiet="true")
    assert "addr: 127.0.0.1:1\n" in text
    assert not text.endswith("\n\n")
    assert "@" not in text


@pytest.mark.parametrize("values", [{}, {"upstream": 1, "port": 2}])
def test_a_place_without_a_value_or_a_value_without_a_place_is_a_mistake(
    values: dict[str, int],
) -> None:
    with pytest.raises(ValueError, match=r"varnish.vcl has places for \['UPSTREAM'\]"):
        fill("varnish.vcl", **values)


def test_every_configuration_lies_in_the_open() -> None:
    assert {path.name for path in DIRECTORY.iterdir()} >= {
        "nginx-cache.conf",
        "registry.yml",
        "varnish.vcl",
        "pullpool.toml",
    }


# -- processes -----------------------------------------------------------------------------

# A process with a child that has burnt CPU; both then wait for the end of their input.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
child.stdin.close()
child.wait()
"""
CHILD = """
import sys, time
while time.process_time() < 0.3:
    pass
print(flush=True)
sys.stdin.read()
"""


def test_cpu_and_memory_are_those_of_all_descendants() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert processes(parent.pid) == [parent.pid, child]
        assert cpu_seconds(parent.pid) >= cpu_seconds(child) >= 0.28
        assert resident_bytes(parent.pid) > resident_bytes(child) > 0
        parent.communicate()
    assert processes(parent.pid) == []
    assert cpu_seconds(parent.pid) == 0


# Says a line when its child has burnt CPU, is dead, and is buried; waits for one after each.
BURIER = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)
child.stdout.readline()
print(flush=True)
sys.stdin.readline()
child.kill()
os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
print(flush=True)
sys.stdin.readline()
child.wait()
print(flush=True)
sys.stdin.readline()
"""


def test_cpu_of_a_child_that_was_killed_is_not_lost() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BURIER, CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        spent = 0.28
        for alive in (2, 2, 1):  # a dead one that nobody has buried is still there
            assert parent.stdout.readline() == "\n"
            assert len(processes(parent.pid)) == alive
            assert cpu_seconds(parent.pid) >= spent
            spent = cpu_seconds(parent.pid)
            parent.stdin.write("\n")


# -- clients -------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True])
async def test_a_client_with_a_slow_line_gets_everything_no_faster_than_that(verify: bool) -> None:
    async with FakeRegistry() as registry:
        registry.push(IMAGE)
        rate = LAYER.size * 2
        plan = Plan(registry.host, registry.port, (WANT,), verify, rate=rate)
        began = time.monotonic()
        (answer,) = (await crowd(plan)).answers
        assert answer.is_served
        assert answer.size == LAYER.size
        assert time.monotonic() - began >= 0.4  # it may begin with a burst


def test_a_client_with_a_slow_line_has_room_for_all_that_comes_between_two_looks() -> None:
    with client_socket(shaped.LINE) as sock:
        # Half of it is for the kernel's own needs (socket(7), SO_RCVBUF).
        room = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
        assert room >= min(shaped.LINE * PACE_STEP, kernel_limit())


def kernel_limit() -> int:
    return int(Path("/proc/sys/net/core/rmem_max").read_text())


async def test_a_body_that_ends_early_fails_a_client_with_a_slow_line() -> None:
    async with FakeRegistry() as registry:
        registry.push(IMAGE)
        registry.script(Fault(Cut(after=100)))
        plan = Plan(registry.host, registry.port, (WANT,), verify=False, rate=1 << 30)
        (answer,) = (await crowd(plan)).answers
        assert answer.fault in {"short", "reset"}


async def test_connections_are_held_open_and_those_that_get_no_answer_are_counted() -> None:
    async with FakeRegistry(limit=3) as registry:
        registry.push(IMAGE)
        idle = Errand(registry.port, "/v2/", connections=5, whole=True)
        served, held = await asyncio.to_thread(open_all, idle)
        try:
            assert (held.open, held.refused, len(served)) == (3, 2, 3)
        finally:
            for sock in served:
                sock.close()


async def test_a_slow_reader_has_the_head_and_takes_little_of_the_rest() -> None:
    async with FakeRegistry() as registry:
        registry.push(IMAGE)
        slow = Errand(registry.port, WANT.path, connections=2, whole=False)
        served, held = await asyncio.to_thread(open_all, slow)
        try:
            assert held.refused == 0
            sip(served[0])
        finally:
            for sock in served:
                sock.close()


def test_as_many_connections_are_held_as_the_limit_of_files_allows() -> None:
    size = within_limits(FULL)
    assert 0 < size.readers <= FULL.readers
    assert size.tls_readers <= size.readers
    assert 0 < size.idle <= FULL.idle


# -- a full cache and a full gate ----------------------------------------------------------


async def test_a_full_cache_is_what_the_store_takes_for_its_own(tmp_path: Path) -> None:
    wants = await asyncio.to_thread(hold_manifests, tmp_path, 3)
    await asyncio.to_thread(hold_blobs, tmp_path, 4)
    async with opened(tmp_path) as store:
        assert store.state().blobs == 7
        for want in wants:
            digest = Digest.parse(want.digest)
            raw = await store.read(digest)
            assert raw is not None
            assert len(raw) == want.size
            assert await store.manifest_type(digest) is not None


def test_stalls_are_told_apart_by_when_all_readers_were_there() -> None:
    stalls = Stalls(port=0, asked=[(1.0, 0.5), (2.0, 0.1), (3.0, 0.2)])
    assert stalls.worst(1.5) == (0.5, 0.2)
    # Nothing was asked before or after: the worst of all is no flattery.
    assert stalls.worst(0.5) == stalls.worst(9.0) == (0.5, 0.5)


@pytest.mark.parametrize(("later", "kept"), [(140 * MIB, True), (149 * MIB, False)])
def test_memory_is_flat_when_it_does_not_grow_after_the_first_tenth(later: int, kept: bool) -> None:
    seen = (60 * MIB, 100 * MIB, *(later,) * 18)
    carried = Carried(CARRIED_FAST, CARRIED_FAST.blob, True, 1.0, seen)
    assert [promise.kept for promise in promises(carried)] == [True, kept]


async def test_a_full_gate_stays_full_while_turns_end() -> None:
    async with FullGate(20) as gate:
        assert all([await gate.turn() >= 0 for _ in range(50)])
        assert "20 blob" in repr(gate)


@pytest.mark.skipif(not has("openssl"), reason="openssl is not installed")
def test_a_certificate_is_made_for_a_listener_on_loopback(tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    assert "BEGIN CERTIFICATE" in made.cert.read_text()
    assert "PRIVATE KEY" in made.key.read_text()
