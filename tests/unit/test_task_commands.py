"""`pullpool prefetch` and `pullpool tasks`, against real servers; restarts and kills of those."""

import asyncio
import io
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from rich.filesize import decimal

from proxy.cli.main import cli
from proxy.cli.task_client import Document, Refused, TaskServer
from proxy.cli.task_screen import Bars, Lines, screen_for
from proxy.config import HostPort
from proxy.testing import FakeRegistry, Fault, Stall
from tests.unit.process_kit import ROOT, child
from tests.unit.proxy_kit import IMAGE, LAYER, NAME, UPSTREAM, Served, blob_path, until
from tests.unit.task_kit import ask, done, prefetch
from tests.unit.test_workers import leader_of

TAG = f"{NAME}:v1"
SIZE = decimal(IMAGE.size)


async def command(*words: str) -> Result:
    """`pullpool …`, in a thread: it is a program of its own."""
    return await asyncio.to_thread(CliRunner().invoke, cli, words)


class TestPrefetch:
    async def test_it_prints_the_id_of_a_task_that_goes_on(self, served: Served) -> None:
        pool, _ = served
        result = await command("prefetch", f"--admin={pool.proxy.admin_address}", TAG)
        assert result.exit_code == 0
        [task] = (await ask(pool, "GET"))[1]["tasks"]
        assert result.stdout == f"{task['id']}\n"
        assert f"pullpool tasks wait {task['id']}" in result.stderr
        waited = await command("tasks", "wait", f"--admin={pool.proxy.admin_address}", task["id"])
        assert waited.exit_code == 0

    async def test_with_wait_each_image_has_a_line(self, served: Served) -> None:
        pool, _ = served
        admin = f"--admin={pool.proxy.admin_address}"
        result = await command("prefetch", admin, "--wait", TAG)
        [task] = (await ask(pool, "GET"))[1]["tasks"]
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.splitlines() == [
            f"{TAG}: {IMAGE.digest}, 3 blobs, {SIZE}",
            f"task {task['id']}: SUCCEEDED, 1 image, {SIZE}",
        ]

    async def test_one_that_fails_is_told_and_the_exit_code_is_1(self, served: Served) -> None:
        pool, _ = served
        admin = f"--admin={pool.proxy.admin_address}"
        names = (f"{UPSTREAM}/{TAG}", f"{NAME}:gone")
        result = await command("prefetch", admin, "--wait", *names)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"{NAME}:gone: MANIFEST_UNKNOWN: ")
        assert f"FAILED, 2 images, 1 failed, {SIZE}" in result.stdout

    async def test_a_platform_is_passed_on_and_a_wrong_one_told(self, served: Served) -> None:
        pool, _ = served
        admin = f"--admin={pool.proxy.admin_address}"
        words = (admin, TAG, "--platform=linux/amd64", "--platform=linux/arm64")
        assert (await command("prefetch", *words)).exit_code == 0
        [task] = (await ask(pool, "GET"))[1]["tasks"]
        assert task["platforms"] == ["linux/amd64", "linux/arm64"]
        result = await command("prefetch", admin, TAG, "--platform=linux")
        assert result.exit_code == 1
        assert "the server answered 400: a platform is written" in result.stderr

    async def test_a_server_that_is_not_there_or_is_another_one(self, served: Served) -> None:
        pool, _ = served
        for admin, words in [("127.0.0.1:1", "refused"), (str(pool.address), "405")]:
            result = await command("prefetch", f"--admin={admin}", TAG)
            assert result.exit_code == 1
            assert words in result.stderr
        assert (await command("prefetch")).exit_code == 2


class TestTasks:
    async def test_they_are_listed_newest_first_and_cancelled(self, served: Served) -> None:
        pool, fake = served
        admin = f"--admin={pool.proxy.admin_address}"
        first = await done(pool, TAG, f"{NAME}:gone")
        with fake.hold() as hold:
            second = await prefetch(pool, f"{NAME}:v2")
            await hold.arrived()
            result = await command("tasks", "ls", admin)
            newest, oldest = result.stdout.splitlines()
            assert newest.startswith(f"{second['id']}  RUNNING ")
            assert newest.endswith(f"0/0 bytes  {NAME}:v2")
            assert oldest.startswith(f"{first['id']}  FAILED ")
            assert oldest.endswith(f"bytes  {TAG} and 1 more")
            result = await command("tasks", "cancel", admin, second["id"], first["id"])
            assert result.stdout == f"{second['id']}: CANCELLED\n{first['id']}: FAILED\n"
        waited = await command("tasks", "wait", admin, second["id"])
        assert waited.exit_code == 1
        for words in (("cancel", "0" * 16), ("wait", "0" * 16)):
            result = await command("tasks", words[0], admin, words[1])
            assert result.exit_code == 1
            assert "the server answered 404: there is no such task" in result.stderr


class TestFollowing:
    @pytest.mark.one_loop
    async def test_a_server_that_ends_is_asked_again_when_it_is_back(self, tmp_path: Path) -> None:
        """The server is killed in the middle of a blob, and another one takes its place."""
        async with FakeRegistry() as fake:
            fake.push(IMAGE)
            fake.script(Fault(Stall(100_000), kind="blob", reference=str(LAYER.digest)))
            async with child(tmp_path, fake.url) as first, aiohttp.ClientSession() as session:
                address = HostPort.parse(first.admin_url.removeprefix("http://"))
                order = {"kind": "prefetch", "images": [TAG]}
                async with session.post(f"{first.admin_url}/api/v1/tasks", json=order) as answer:
                    task = (await answer.json())["id"]
                seen = list[Document]()
                moved = Moving(address)
                following = asyncio.create_task(asyncio.to_thread(moved.follow, task, seen))
                await fake.stalls.arrived()
                await until(lambda: bool(seen))
                first.send(signal.SIGKILL)
                await first.process.wait()
            fake.release()
            async with child(tmp_path, fake.url) as second, aiohttp.ClientSession() as session:
                moved.address = HostPort.parse(second.admin_url.removeprefix("http://"))
                await following
                assert seen[-1]["state"] == "SUCCEEDED"
                async with session.get(f"{second.url}{blob_path()}") as got:
                    assert got.headers["X-Pullpool-Cache"] == "hit"
                    assert await got.read() == LAYER.data
            # What had come when it was killed did not come again.
            assert fake.counters.bytes_by_digest[LAYER.digest] <= LAYER.size + 100_000

    @pytest.mark.one_loop
    async def test_workers_take_orders_and_go_on_when_their_leader_is_killed(
        self, tmp_path: Path
    ) -> None:
        async with FakeRegistry() as fake, child(tmp_path, fake.url, workers=2) as both:
            fake.push(IMAGE)
            fake.script(Fault(Stall(100_000), kind="blob", reference=str(LAYER.digest)))
            admin = f"--admin={both.admin_url.removeprefix('http://')}"
            ordered = [await command("prefetch", admin, TAG) for _ in range(6)]  # at either
            assert [one.exit_code for one in ordered] == [0] * 6
            await fake.stalls.arrived()
            os.kill(leader_of(tmp_path), signal.SIGKILL)
            await both.logged("worker_ended")
            fake.release()
            for one in ordered:
                waited = await command("tasks", "wait", admin, one.stdout.strip())
                assert (waited.exit_code, waited.stderr) == (0, ""), waited.output
            assert fake.counters.gets[IMAGE.digest] == 1

    @pytest.mark.one_loop
    async def test_an_interrupt_ends_the_waiting_and_not_the_task(self, served: Served) -> None:
        pool, fake = served
        with fake.hold(kind="blob") as hold:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "proxy", "prefetch", "--wait", TAG),
                f"--admin={pool.proxy.admin_address}",
                cwd=ROOT,
                stderr=PIPE,
                stdout=PIPE,
            )
            await hold.arrived(len(IMAGE.blobs))
            await until(lambda: len(pool.proxy.tasks._listeners) == 1)
            process.send_signal(signal.SIGINT)
            out, err = await process.communicate()
            assert process.returncode == 130
            [task] = (await ask(pool, "GET", "?state=RUNNING"))[1]["tasks"]
            assert out == b""
            assert f"task {task['id']} goes on" in err.decode()
            assert "Traceback" not in err.decode()
        waited = await command("tasks", "wait", f"--admin={pool.proxy.admin_address}", task["id"])
        assert waited.exit_code == 0

    def test_a_server_that_stays_away_is_given_up(self) -> None:
        now, server = [0.0], TaskServer(HostPort("127.0.0.1", 1), 10.0)

        def sleep(seconds: float) -> None:
            now[0] += seconds

        with pytest.raises(ConnectionRefusedError):
            list(server.follow("0", sleep=sleep, clock=lambda: now[0]))
        assert now[0] == 10.0

    async def test_a_refusal_is_no_reason_to_try_again(self, served: Served) -> None:
        server = TaskServer(served[0].proxy.admin_address, 10.0)
        with pytest.raises(Refused, match="404"):
            await asyncio.to_thread(list, server.follow("0"))


class Moving:
    """Follows a task at a server whose port changes."""

    def __init__(self, address: HostPort) -> None:
        self.address = address

    def follow(self, task: str, seen: list[Document]) -> None:
        server = TaskServer(self.address, 600.0)

        def sleep(_seconds: float) -> None:
            server._address = self.address

        seen.extend(server.follow(task, sleep=sleep))  # one by one


def a_task(state: str = "RUNNING", *results: Document) -> Document:
    keys = ("blobs", "blobs_done", "bytes", "bytes_done")
    return {
        "id": "0" * 16,
        "state": state,
        "ended": None if state == "RUNNING" else 1.0,
        "images": [result["image"] for result in results],
        "failed": sum(result["state"] == "FAILED" for result in results),
        "results": results,
        **{key: sum(result[key] for result in results) for key in keys},
    }


def a_result(image: str, state: str, done: int, of: int) -> Document:
    error = {"code": "DENIED", "message": "no"} if state == "FAILED" else None
    return {
        "image": image,
        "state": state,
        "digest": "sha256:x",
        "blobs": 2,
        "blobs_done": 1,
        "bytes": of,
        "bytes_done": done,
        "error": error,
    }


class TestScreens:
    def test_lines_where_there_is_no_terminal_and_bars_where_there_is(self) -> None:
        plain = Console(file=io.StringIO())
        terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
        assert isinstance(screen_for(plain, plain), Lines)
        assert isinstance(screen_for(terminal, plain), Bars)

    def test_bars_show_every_image_and_the_sum(self) -> None:
        text, errors = io.StringIO(), io.StringIO()
        out = Console(file=text, force_terminal=True, width=120, color_system=None)
        err = Console(file=errors, width=20)
        with Bars(out, err) as bars:
            first = a_result("team/[app]:v1", "RUNNING", 5_000_000, 10_000_000)
            bars.show(a_task("RUNNING", first, a_result("b", "PENDING", 0, 0)))
            first = a_result("team/[app]:v1", "SUCCEEDED", 10_000_000, 10_000_000)
            bars.show(a_task("FAILED", first, a_result("b", "FAILED", 0, 0)))
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
        frames = shown.split("\r")
        assert any("team/[app]:v1" in frame and "SUCCEEDED" in frame for frame in frames)
        assert "2 images" in shown
        assert "10.0 MB/10.0 MB" in shown
        assert shown.splitlines()[-1] == f"task {'0' * 16}: FAILED, 2 images, 1 failed, 10.0 MB"
        assert errors.getvalue() == "b: DENIED: no\n"

    def test_bars_show_every_node_and_what_a_task_waits_for(self) -> None:
        text, errors = io.StringIO(), io.StringIO()
        out = Console(file=text, force_terminal=True, width=120, color_system=None)
        nodes = [
            {**a_result("", state, 5, 10), "node": name, "gone": gone, "error": None}
            for name, state, gone in [("n1", "RUNNING", False), ("n2", "PENDING", True)]
        ]
        task = {**a_task("RUNNING", a_result("a", "RUNNING", 5, 20)), "nodes": "all"}
        with Bars(out, Console(file=errors, width=20)) as bars:
            bars.show({**task, "by_node": nodes, "note": "waits: for the directory"})
            bars.show({**task, "by_node": nodes, "note": None})
            nodes[0]["state"] = "SUCCEEDED"
            bars.show({**task, "by_node": nodes, "note": None, "state": "SUCCEEDED", "ended": 1.0})
        shown = text.getvalue()
        assert shown.count("waits: for the directory") == 1
        assert "node n1" in shown
        assert "SUCCEEDED, 1 image on 2 nodes" in shown
        assert errors.getvalue().splitlines()[-1] == "node n2: gone"

    def test_of_many_images_only_those_on_their_way_are_shown(self) -> None:
        text = io.StringIO()
        out = Console(file=text, force_terminal=True, width=120, height=60, color_system=None)
        results = [a_result(f"done{n}", "SUCCEEDED", 1, 1) for n in range(30)]
        with Bars(out, out) as bars:
            bars.show(a_task("RUNNING", *results, a_result("busy", "RUNNING", 0, 1)))
        assert "busy" in text.getvalue()
        assert "done" not in text.getvalue()
        assert "31 images" in text.getvalue()
