"""A supervisor and its workers: one cap, one scrape, deaths that nobody notices (DESIGN D15)."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from proxy.seat import Seat
from proxy.testing import FakeRegistry, Fault, Stall
from proxy.workers import GROWN, LONGEST_PAUSE, PAUSE, Place
from tests.unit.process_kit import ROOT, Child, child
from tests.unit.proxy_kit import IMAGE, NAME, RawClient, blob_path, manifest_path, until
from tests.unit.upstream_kit import MIB, noise

pytestmark = pytest.mark.one_loop

SIZE = 2 * MIB
#: Clients of which some are at either of two workers: the kernel deals them out by chance.
CROWD = 30

REQUESTS = "pullpool_http_requests_total"


def workers_of(supervisor: Child) -> dict[int, int]:
    """The process in each place, by the log."""
    return {line["worker"]: line["pid"] for line in supervisor.events("worker_started")}


def place() -> Place:
    return Place(Seat(0, 1, (), (), Path("/nowhere"), (-1, -1)))


def test_a_worker_that_dies_young_is_made_anew_after_ever_longer_pauses() -> None:
    one, now, pauses = place(), 0.0, []
    for _ in range(10):
        one.began = now
        one.ended(now + 1)
        assert one.due is not None
        pauses.append(one.due - (now + 1))
        now = one.due
    assert pauses[0] == pytest.approx(PAUSE)
    assert pauses[1] == pytest.approx(2 * PAUSE)
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE)
    one.began = now
    one.ended(now + GROWN)
    assert one.due == now + GROWN


async def test_two_workers_serve_one_address_with_one_cap_and_one_scrape(tmp_path: Path) -> None:
    async with FakeRegistry(limit=16) as fake, child(tmp_path, fake.url, workers=2) as both:
        blobs = [noise(MIB + number) for number in range(20)]
        digests = [fake.put_blob(NAME, data) for data in blobs]

        async def pull(number: int) -> None:
            # A connection each, so that both workers get some.
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{both.url}{blob_path(digests[number])}") as answer,
            ):
                assert await answer.read() == blobs[number]

        await asyncio.gather(*(pull(number) for number in range(len(blobs)) for _ in range(3)))
        assert fake.counters.refused == 0
        assert fake.counters.peak_sockets <= 16
        for data, digest in zip(blobs, digests, strict=True):
            assert fake.counters.bytes_by_digest[digest] == len(data)
        async with aiohttp.ClientSession() as session:
            samples = await both.samples(session)
            while samples["pullpool_store_blobs"] < len(blobs):  # the last one may be on its way
                samples = await both.samples(session)
            assert samples[REQUESTS] == 60
            assert samples["pullpool_http_response_bytes_total"] == 3 * sum(map(len, blobs))
            assert samples["pullpool_upstream_bytes_total"] == sum(map(len, blobs))
            assert samples["pullpool_upstream_connections_limit"] <= 16
            assert samples["pullpool_build_info"] == 1
            async with session.get(f"{both.admin_url}/readyz") as answer:
                assert answer.status == 200
            assert (await both.status(session))["followers"] == 1


async def test_each_worker_that_is_killed_is_replaced_and_the_sums_never_fall(
    tmp_path: Path,
) -> None:
    async with (
        FakeRegistry() as fake,
        child(tmp_path, fake.url, workers=2) as both,
    ):
        fake.push(IMAGE)
        for number in range(2):
            async with aiohttp.ClientSession() as session:
                for _ in range(6):
                    async with (
                        aiohttp.ClientSession() as fresh,
                        fresh.get(f"{both.url}{manifest_path('v1')}") as answer,
                    ):
                        assert await answer.read() == IMAGE.manifest
                before = await both.samples(session)
            os.kill(workers_of(both)[number], signal.SIGKILL)
            ended = await both.logged("worker_ended", number + 1)
            assert (ended["worker"], ended["code"]) == (number, -9)
            await both.logged("serving", 3 + number)
            async with aiohttp.ClientSession() as session:
                after = await both.samples(session)
                assert after[REQUESTS] >= before[REQUESTS] == 7 * number + 6
                async with session.get(f"{both.url}{manifest_path(IMAGE.digest)}") as answer:
                    assert await answer.read() == IMAGE.manifest
        assert len(workers_of(both)) == 2


async def test_a_killed_leader_among_workers_costs_the_others_clients_nothing(
    tmp_path: Path,
) -> None:
    size = 4 * MIB
    async with (
        FakeRegistry() as fake,
        child(tmp_path, fake.url, workers=2) as both,
        aiohttp.ClientSession() as session,
    ):
        digest = fake.put_blob(NAME, noise(size))
        fake.script(Fault(Stall(2 * MIB), kind="blob"))
        clients = []
        for _ in range(CROWD):
            client = RawClient.connected(both.address)
            clients.append((client, await client.__aenter__()))
            await clients[-1][1].ask(blob_path(digest))
        try:
            await fake.stalls.arrived()
            for _, raw in clients:
                await raw.until(lambda data: len(data) > MIB)
            [flight] = (await both.status(session))["flights"]
            assert flight["readers"] == CROWD
            pid = leader_of(tmp_path)
            os.kill(pid, signal.SIGKILL)
            whole = 0
            for _, raw in clients:
                try:
                    whole += await raw.rest(size) == noise(size)
                except ConnectionResetError:
                    continue  # it was the dead one's
                except AssertionError:
                    continue
            taken = await both.logged("fill_taken_over")
            assert taken["at"] >= MIB
            assert whole == (await both.samples(session))["pullpool_http_requests_total"]
            assert fake.counters.bytes_by_digest[digest] <= 2 * MIB + size - taken["at"]
        finally:
            fake.release()
            for client, _ in clients:
                await client.__aexit__(None, None, None)


def leader_of(directory: Path) -> int:
    """The process that holds the lock, by what it wrote."""
    return int((directory / "cache" / "LOCK").read_text())


async def test_sigterm_ends_all_with_exit_code_0(tmp_path: Path) -> None:
    async with child(tmp_path, "http://127.0.0.1:9", workers=3) as three:
        three.send(signal.SIGTERM)
        assert await three.process.wait() == 0
        await until(lambda: len(three.events("stopped")) == 3)


@contextlib.asynccontextmanager
async def half_way(both: Child, fake: FakeRegistry) -> AsyncIterator[RawClient]:
    """A client in the middle of a cold blob of SIZE bytes, until the fake lets its rest go."""
    digest = fake.put_blob(NAME, noise(SIZE))
    fake.script(Fault(Stall(MIB), kind="blob"))
    async with RawClient.connected(both.address) as client:
        await client.ask(blob_path(digest))
        await fake.stalls.arrived()
        yield client


async def test_a_signal_to_the_whole_group_lets_pulls_end(tmp_path: Path) -> None:
    """As by ^C, or by systemd: each worker is told once, and once more by the supervisor."""
    async with FakeRegistry() as fake, child(tmp_path, fake.url, workers=2) as both:
        async with half_way(both, fake) as client:
            await client.until(lambda data: len(data) > MIB // 2)
            for pid in workers_of(both).values():
                os.kill(pid, signal.SIGINT)
            await both.logged("draining", 2)
            both.send(signal.SIGINT)
            await both.logged("workers_ending")
            fake.release()
            assert await client.rest(SIZE) == noise(SIZE)
        assert await both.process.wait() == 0


async def test_no_client_waits_for_a_worker_that_has_ended_while_another_drains(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as fake, child(tmp_path, fake.url, workers=2) as both:
        async with half_way(both, fake) as client:
            both.send(signal.SIGTERM)
            await both.logged("worker_ended")
            for _ in range(12):  # each by a connection of its own
                async with (
                    aiohttp.ClientSession() as session,
                    session.get(f"{both.url}/v2/") as answer,
                ):
                    assert answer.status == 503
            fake.release()
            assert await client.rest(SIZE) == noise(SIZE)
        assert await both.process.wait() == 0


async def test_a_second_signal_to_the_supervisor_ends_all_at_once(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, child(tmp_path, fake.url, workers=2) as both:
        digest = fake.put_blob(NAME, noise(2 * MIB))
        fake.script(Fault(Stall(MIB), kind="blob"))
        async with RawClient.connected(both.address) as client:
            await client.ask(blob_path(digest))
            await fake.stalls.arrived()
            both.send(signal.SIGTERM)
            await both.logged("workers_ending")
            both.send(signal.SIGTERM)
            assert await both.process.wait() == 1
        fake.release()


async def test_workers_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    async with child(tmp_path, "http://127.0.0.1:9", workers=2) as both:
        both.send(signal.SIGKILL)
        await both.logged("stopped", 2)
    # Its log ends only when the last of them has: `child` has waited for that.
    assert len(both.events("draining")) == 2


SUPERVISOR = """
import asyncio, os, signal, sys, time
from pathlib import Path
from proxy.observe.logs import make_logger
from proxy.process import ending
from proxy.seat import Seat
from proxy.workers import Supervisor

def supervise(work, fork=os.fork):
    log = make_logger("json", sys.stderr, "info")
    seats = [Seat(0, 1, (), (), Path("/"), os.pipe())]
    sys.exit(Supervisor(seats, work, log, fork=fork).run())
"""

FAILS_ONCE = """
def is_first(what):
    mark = Path(sys.argv[1], what)
    known = mark.exists()
    mark.touch()
    return what == sys.argv[2] and not known

def fork():
    if is_first("fork"):
        raise OSError("no process is left")
    return os.fork()

def work(seat):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if is_first("worker"):
        raise RuntimeError("a defect")
    os.kill(os.getppid(), signal.SIGTERM)
    signal.sigwait({signal.SIGTERM})
    return 0

supervise(work, fork)
"""

TOLD_EARLY = """
def work(seat):
    os.kill(os.getppid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    while signal.sigpending() != {signal.SIGINT, signal.SIGTERM}:
        time.sleep(0.001)
    async def serve():
        async with ending(seat.lifeline[0]) as stop:
            await stop.wait()
    asyncio.run(serve())
    return 0

supervise(work)
"""

TOLD_LATE = """
def work(seat):
    async def serve():
        async with ending(seat.lifeline[0]) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            await stop.wait()
    asyncio.run(serve())
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # as in its threads
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    return 0

supervise(work)
"""

TOLD_IN_BETWEEN = """
def work(seat):
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal.pause()

supervise(work)
"""


async def supervised(script: str, *arguments: str) -> bytes:
    """The log of a supervisor whose only worker does what ``script`` says; it ends well."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", SUPERVISOR + script, *arguments),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    _, log = await process.communicate()
    assert process.returncode == 0, log
    return log


async def test_a_worker_that_is_told_to_end_while_it_starts_ends_well() -> None:
    log = await supervised(TOLD_EARLY)
    assert b"Traceback" not in log
    assert b'"code": 0' in log


async def test_a_worker_that_is_told_to_end_when_it_has_drained_does_not_hear_it() -> None:
    log = await supervised(TOLD_LATE)
    assert b"Traceback" not in log
    assert b'"code": 0' in log


async def test_a_worker_whose_handlers_are_gone_when_it_is_told_to_end_has_ended_well() -> None:
    log = await supervised(TOLD_IN_BETWEEN)
    assert b'"code": -15' in log


async def test_a_worker_that_crashes_is_replaced_even_if_no_other_has_died(tmp_path: Path) -> None:
    log = await supervised(FAILS_ONCE, str(tmp_path), "worker")
    assert b"RuntimeError: a defect" in log
    assert log.count(b"worker_started") == 2


async def test_a_worker_that_cannot_be_forked_is_tried_again(tmp_path: Path) -> None:
    log = await supervised(FAILS_ONCE, str(tmp_path), "fork")
    assert log.count(b"worker_not_started") == log.count(b"worker_started") == 1


async def test_workers_that_cannot_start_end_the_supervisor_with_exit_code_1(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "proxy", "serve", "http://127.0.0.1:9", "--workers", "2"),
        *("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"),
        *("--cache-dir", str(tmp_path / "file" / "cache"), "--log-format", "json"),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    _, log = await process.communicate()
    assert process.returncode == 1
    assert b"cannot_start" in log
