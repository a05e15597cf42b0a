"""The composition root: start, drain and end, in this process and as one of its own."""

import asyncio
import contextlib
import io
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.app import Proxy, serve
from proxy.config import HostPort
from proxy.observe.logs import make_logger
from proxy.testing import FakeRegistry, Fault, Stall
from proxy.wiring import CannotTrust
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    UPSTREAM,
    RawClient,
    Served,
    blob_path,
    manifest_path,
    pulling,
    settings_for,
)
from tests.unit.store_kit import stored_files

UNUSED = "http://127.0.0.1:1"


def silent_proxy(directory: Path, **changes: Any) -> Proxy:
    settings = settings_for(directory, UNUSED, **changes)
    return Proxy(settings, log=make_logger("json", io.StringIO()))


class TestDrain:
    async def test_running_pulls_end_well_and_new_ones_are_sent_away(self, served: Served) -> None:
        pool, fake = served
        await pool.get(manifest_path("v1"))
        fake.script(Fault(Stall(after=1000), kind="blob"))
        running_pull = asyncio.create_task(pool.get(blob_path()))
        await fake.stalls.arrived()
        pool.proxy.drain()
        for path in ("/v2/", manifest_path("v1"), blob_path()):
            answer = await pool.get(path)
            assert (answer.status, answer.code) == (503, "UNAVAILABLE")
            assert int(answer.headers["Retry-After"]) > 0
            assert answer.headers["Connection"] == "close"
        finished = asyncio.create_task(pool.proxy.finish(60))
        await asyncio.sleep(0)
        assert not finished.done()
        fake.release()
        assert (await running_pull).body == LAYER.data
        assert await finished

    async def test_without_pulls_there_is_nothing_to_wait_for(self, served: Served) -> None:
        pool, _ = served
        await pool.get("/v2/")
        pool.proxy.drain()
        assert await pool.proxy.finish(60)

    async def test_pulls_that_do_not_end_in_time_are_cut_off(self, served: Served) -> None:
        pool, fake = served
        fake.script(Fault(Stall(after=1000), kind="blob"))
        async with RawClient.connected(pool.address) as client:
            await client.ask(blob_path())
            await fake.stalls.arrived()
            pool.proxy.drain()
            assert not await pool.proxy.finish(0)
            await pool.proxy.__aexit__()
            assert await client.ending() in ("FIN", "RST")
        assert len(client.body) < LAYER.size
        assert len(pool.access_log) == 1

    async def test_the_end_leaves_no_socket_and_no_task(self, tmp_path: Path) -> None:
        async with contextlib.AsyncExitStack() as clients:
            async with pulling(tmp_path) as (pool, fake):
                fake.script(Fault(Stall(after=1000), kind="blob"))
                pulls = [RawClient.connected(pool.address) for _ in range(5)]
                crowd = [await clients.enter_async_context(pull) for pull in pulls]
                for client in crowd:
                    await client.ask(blob_path())
                await fake.stalls.arrived()
            # The guard of all unit tests looks for tasks; here for what clients saw.
            for client in crowd:
                assert await client.ending() in ("FIN", "RST")
                assert len(client.body) < LAYER.size
        assert fake.counters.sockets_now == 0


class TestStart:
    async def test_a_taken_address_leaves_nothing_open(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            for key in ("listen", "admin"):
                with pytest.raises(OSError, match="address already in use"):
                    async with silent_proxy(tmp_path, **{key: address}):
                        pass
        # The lock of the cache directory was given back, twice.
        async with silent_proxy(tmp_path):
            pass

    async def test_a_file_of_authorities_that_is_none_stops_the_start(self, tmp_path: Path) -> None:
        file = tmp_path / "ca.pem"
        await asyncio.to_thread(file.write_text, "not a certificate")
        upstreams = {UPSTREAM: {"url": "https://harbor.example.com", "ca_file": str(file)}}
        with pytest.raises(CannotTrust, match=r"ca\.pem"):
            async with silent_proxy(tmp_path / "cache", upstreams=upstreams):
                pass

    async def test_ports_that_the_system_chose_are_told(self, tmp_path: Path) -> None:
        async with silent_proxy(tmp_path) as proxy:
            assert proxy.address.port
            assert proxy.admin_address.port
            assert proxy.url == f"http://127.0.0.1:{proxy.address.port}"

    async def test_what_cannot_start_is_a_line_and_an_exit_code(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async with silent_proxy(tmp_path):
            code = await serve(settings_for(tmp_path, f"{UNUSED}0", log_format="json"))
        assert code == 1
        line = json.loads(capsys.readouterr().err.splitlines()[-1])
        assert line["event"] == "cannot_start"
        assert "its upstreams are configured otherwise" in line["error"]


class Process:
    """`pullpool serve` as a process, and what it logs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def serving(
        cls, directory: Path, url: str, *, files: int | None = None, **variables: str
    ) -> AsyncIterator["Process"]:
        """`files`: how many it may have open."""
        limited = [] if files is None else ["prlimit", f"--nofile={files}:{files}"]
        process = await asyncio.create_subprocess_exec(
            *(*limited, sys.executable, "-m", "proxy", "serve", url, f"--cache-dir={directory}"),
            *("--listen=127.0.0.1:0", "--admin=127.0.0.1:0", "--log-format=json"),
            env={**os.environ, **variables},
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            yield cls(process)
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    async def line(self, event: str) -> dict[str, Any]:
        """The next line about an event."""
        assert self.process.stderr is not None
        while text := await self.process.stderr.readline():
            self.lines.append(json.loads(text))
            if self.lines[-1]["event"] == event:
                return self.lines[-1]
        raise AssertionError(f"ended without {event}: {self.lines}")


@pytest.mark.one_loop
async def test_sigterm_drains_and_ends_with_0(tmp_path: Path) -> None:
    async with (
        FakeRegistry() as fake,
        Process.serving(tmp_path, fake.url) as pullpool,
        aiohttp.ClientSession() as session,
    ):
        fake.push(IMAGE)
        started = await pullpool.line("serving")
        url, admin = f"http://{started['listen']}", f"http://{started['admin']}"
        fake.script(Fault(Stall(after=1000), kind="blob"))
        async with session.get(f"{url}{blob_path()}") as pull:
            assert pull.status == 200
            await fake.stalls.arrived()
            pullpool.process.send_signal(signal.SIGTERM)
            await pullpool.line("draining")
            async with session.get(f"{admin}/readyz") as ready:
                assert ready.status == 503
            async with session.get(f"{admin}/livez") as alive:
                assert alive.status == 200
            async with session.get(f"{url}{manifest_path('v1')}") as refused:
                assert (refused.status, "Retry-After" in refused.headers) == (503, True)
            fake.release()
            assert await pull.read() == LAYER.data
        assert (await pullpool.line("stopped"))["pulls_cut_off"] is False
        assert await pullpool.process.wait() == 0


@pytest.mark.one_loop
async def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, Process.serving(tmp_path, fake.url) as pullpool:
        fake.push(IMAGE)
        started = await pullpool.line("serving")
        address = HostPort.parse(started["listen"])
        fake.script(Fault(Stall(after=1000), kind="blob"))
        async with RawClient.connected(address) as client:
            await client.ask(blob_path())
            await fake.stalls.arrived()
            pullpool.process.send_signal(signal.SIGTERM)
            await pullpool.line("draining")
            pullpool.process.send_signal(signal.SIGTERM)
            assert await pullpool.process.wait() == 1


@pytest.mark.one_loop
async def test_a_served_process_may_open_as_many_files_as_it_may_have(tmp_path: Path) -> None:
    async with (
        Process.serving(tmp_path, UNUSED) as pullpool,
        aiohttp.ClientSession() as session,
    ):
        started = await pullpool.line("serving")
        async with session.get(f"http://{started['admin']}/metrics") as answer:
            text = await answer.text()
        [line] = [line for line in text.splitlines() if line.startswith("process_max_fds ")]
        assert float(line.split()[1]) == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


class Crowd:
    """Clients of a process, as many as are wanted."""

    def __init__(self, started: Mapping[str, Any], stack: contextlib.AsyncExitStack) -> None:
        self.address, self.admin = HostPort.parse(started["listen"]), started["admin"]
        self._stack = stack

    async def client(self) -> RawClient:
        return await self._stack.enter_async_context(RawClient.connected(self.address))

    async def figure(self, name: str) -> float:
        """A metric without labels, read on a connection of its own."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{self.admin}/metrics") as answer,
        ):
            lines = (await answer.text()).splitlines()
        [line] = [line for line in lines if line.startswith(f"pullpool_http_{name} ")]
        return float(line.split()[1])


@contextlib.asynccontextmanager
async def crowded(pullpool: Process) -> AsyncIterator[Crowd]:
    async with contextlib.AsyncExitStack() as stack:
        yield Crowd(await pullpool.line("serving"), stack)


async def pulled(client: RawClient) -> bytes:
    """A blob, on a connection that stays."""
    client.received.clear()
    await client.ask(blob_path())
    return await client.rest(LAYER.size)


@pytest.mark.one_loop
async def test_at_the_limit_of_descriptors_pulls_go_on_and_others_wait(tmp_path: Path) -> None:
    async with (
        FakeRegistry() as fake,
        Process.serving(tmp_path, fake.url, files=128) as pullpool,
        crowded(pullpool) as crowd,
    ):
        fake.push(IMAGE)
        clients = [await crowd.client()]
        while not await crowd.figure("accept_paused") or len(clients) < 100:
            clients += [await crowd.client() for _ in range(8)]
        held = int(await crowd.figure("connections"))
        assert 0 < held < len(clients)
        last = await crowd.client()
        await last.ask(blob_path())
        # What is kept from clients does for the upstream's socket, the fill and the admin listener.
        for client in clients[: held // 2]:
            assert await pulled(client) == LAYER.data
        # A scrape that ends lets one in, now and then; a listener that spins counts thousands.
        assert await crowd.figure("accept_pauses_total") <= len(clients)
        for client in clients:
            client.close()
        assert await last.rest(LAYER.size) == LAYER.data
        assert not await crowd.figure("accept_paused")


@pytest.mark.one_loop
async def test_without_any_descriptor_the_listener_waits_for_one(tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    async with (
        FakeRegistry() as fake,
        Process.serving(tmp_path, fake.url) as pullpool,
        crowded(pullpool) as crowd,
    ):
        fake.push(IMAGE)
        here = await crowd.client()
        await pulled(here)
        resource.prlimit(pullpool.process.pid, resource.RLIMIT_NOFILE, (4, hard))
        there = await crowd.client()
        await there.ask(blob_path())
        assert (await pullpool.line("accept_paused"))["cause"] == "Too many open files"
        await here.send("GET /v2/ HTTP/1.1\nHost: pullpool\n\n")
        await here.until(lambda data: data.endswith(b"{}"))
        resource.prlimit(pullpool.process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        assert await there.rest(LAYER.size) == LAYER.data
        # Once for a queue that nobody could look at, not once in every turn of the loop.
        pauses = [line for line in pullpool.lines if line["event"] == "accept_paused"]
        assert len(pauses) == await crowd.figure("accept_pauses_total") == 1


@pytest.mark.one_loop
async def test_a_fill_that_a_kill_has_cut_is_no_blob_and_goes_on_at_its_byte(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as fake:
        fake.push(IMAGE)
        async with Process.serving(tmp_path, fake.url) as pullpool:
            started = await pullpool.line("serving")
            fake.script(Fault(Stall(after=100_000), kind="blob"))
            async with RawClient.connected(HostPort.parse(started["listen"])) as client:
                await client.ask(blob_path())
                await client.rest(64 << 10)  # the first of them are shown before they are in a file
                pullpool.process.kill()
                await pullpool.process.wait()
        async with pulling(tmp_path) as (pool, other):
            assert await asyncio.to_thread(stored_files, tmp_path) == set()
            assert (await pool.get(blob_path())).body == LAYER.data
            [taken] = pool.events("fill_taken_over")
            assert taken["at"] > 0
            assert other.counters.bytes_by_digest[LAYER.digest] == LAYER.size - taken["at"]
            assert await pool.stored() == {str(LAYER.digest)}


@pytest.mark.one_loop
async def test_it_starts_and_serves_its_cache_while_the_upstream_is_down(tmp_path: Path) -> None:
    async with aiohttp.ClientSession() as session:

        async def get(started: dict[str, Any], path: str) -> tuple[bytes, str]:
            async with session.get(f"http://{started['listen']}{path}") as answer:
                assert answer.status == 200
                return await answer.read(), answer.headers["X-Pullpool-Cache"]

        paths = [blob_path(blob.digest) for blob in IMAGE.blobs]
        async with FakeRegistry() as fake, Process.serving(tmp_path, fake.url) as pullpool:
            fake.push(IMAGE)
            started = await pullpool.line("serving")
            for path in (manifest_path("v1"), *paths):
                await get(started, path)
            stored = 0
            while stored < len(IMAGE.blobs) + 1:
                async with session.get(f"http://{started['admin']}/api/v1/status") as status:
                    stored = (await status.json())["cache"]["blobs"]
            pullpool.process.send_signal(signal.SIGTERM)
            assert await pullpool.process.wait() == 0
        async with Process.serving(tmp_path, fake.url) as pullpool:
            started = await pullpool.line("serving")
            assert await get(started, manifest_path("v1")) == (IMAGE.manifest, "stale")
            assert await get(started, manifest_path(IMAGE.digest)) == (IMAGE.manifest, "hit")
            for path, blob in zip(paths, IMAGE.blobs, strict=True):
                assert await get(started, path) == (blob.data, "hit")
