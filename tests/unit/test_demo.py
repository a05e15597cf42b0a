"""The demonstration: it serves everybody, it tells the truth, and it leaves nothing behind."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from rich.console import Console

from proxy.cli.demo.children import Child, ChildFailed
from proxy.cli.demo.crowd import Image, Tally, run_crowd
from proxy.cli.demo.figures import Outcome, outcome_table
from proxy.cli.demo.screen import Screen, Sight
from proxy.testing.images import FakeImage, make_image

IMAGE = make_image("team/app", "v1", layers=(5000, 300), seed=1)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


# --- the whole of it --------------------------------------------------------------------------


def start(tmp_path: Path, *arguments: str) -> "subprocess.Popen[str]":
    """`pullpool demo`, with everything that it makes below `tmp_path`."""
    return subprocess.Popen(
        [sys.executable, "-m", "proxy", "demo", *arguments],
        env={**os.environ, "TMPDIR": str(tmp_path), "PULLPOOL_LISTEN": "nonsense"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def descendants(tmp_path: Path) -> list[str]:
    """The processes that have the demonstration's environment, its own and its children's."""
    mark = f"TMPDIR={tmp_path}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended, or is somebody else's
    return found


def cells(output: str, title: str) -> list[str]:
    """A row of the table that a run printed, without its title."""
    (line,) = (line for line in output.splitlines() if line.startswith(title))
    return re.split(r"\s{2,}", line.strip())[1:]


def test_every_pull_is_served_through_pullpool_within_the_limit(tmp_path: Path) -> None:
    small = ("--clients=12", "--limit=3", "--images=3", "--layer-size=64KiB", "--rate=1MiB")
    with start(tmp_path, *small) as demo:
        output, errors = demo.communicate()

    assert (demo.returncode, errors) == (0, "")
    assert cells(output, "pulls served")[1] == "12 of 12"
    assert cells(output, "answers refused")[1] == "none"
    assert 1 < int(cells(output, "peak connections at the registry (limit 3)")[1]) <= 3
    assert cells(output, "upstream bytes per image byte")[1] == "1.00"
    assert "401" in cells(output, "answers refused")[0]
    assert "pullpool serve https://harbor.example.com" in output
    assert max(len(line) for line in output.splitlines()) <= 80
    assert descendants(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_children_and_removes_the_cache(
    tmp_path: Path, number: signal.Signals
) -> None:
    slow = ("--clients=4", "--images=2", "--layer-size=1MiB", "--rate=10KiB")
    with start(tmp_path, *slow) as demo:
        assert demo.stdout is not None
        while "direct: begins" not in demo.stdout.readline():
            pass
        assert len(descendants(tmp_path)) == 3
        demo.send_signal(number)
        demo.communicate()

    assert demo.returncode == 128 + number
    assert descendants(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_reader_who_leaves_ends_it_quietly(tmp_path: Path) -> None:
    slow = ("--clients=4", "--images=2", "--layer-size=1MiB", "--rate=1MiB")
    with start(tmp_path, *slow) as demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        demo.stdout.close()
        errors = demo.stderr.read()

    assert (demo.returncode, errors) == (1, "")
    assert descendants(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_more_clients_than_files_may_be_open_are_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    command = f"ulimit -n 300 && exec {sys.executable} -m proxy demo --clients=1000"
    demo = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert demo.returncode == 1
    assert "1000 clients need" in demo.stderr
    assert "300 are allowed" in demo.stderr


# --- children ---------------------------------------------------------------------------------


async def test_a_child_that_fails_shows_what_it_said(tmp_path: Path) -> None:
    child = await Child.start("proxy.nothing", [], name="the registry", log=tmp_path / "log")
    async with child:
        with pytest.raises(ChildFailed, match=r"(?s)the registry ended .*No module named"):
            await child.line()


async def test_a_child_that_runs_is_ended_with_the_block(tmp_path: Path) -> None:
    # Anything that runs on and on will do.
    child = await Child.start("http.server", ["0"], name="it", log=tmp_path / "log")
    async with child:
        assert child.is_running
    assert not child.is_running


# --- the crowd --------------------------------------------------------------------------------


@asynccontextmanager
async def registry(answer: Handler) -> AsyncIterator[str]:
    """A server that answers everything so, and its URL."""
    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def contents(image: FakeImage) -> dict[str, bytes]:
    """The image's bodies by path."""
    blobs = {f"/v2/{image.name}/blobs/{blob.digest}": blob.data for blob in image.blobs}
    return {f"/v2/{image.name}/manifests/{image.tag}": image.manifest, **blobs}


def serving(bodies: dict[str, bytes]) -> Handler:
    async def answer(request: web.BaseRequest) -> web.Response:
        headers = {"Docker-Content-Digest": str(IMAGE.digest), "Content-Type": IMAGE.media_type}
        return web.Response(body=bodies[request.path], headers=headers)

    return answer


async def pull(answer: Handler, clients: int = 3) -> Tally:
    """What becomes of clients that pull the image from a registry that answers so."""
    tally = Tally(clients)
    async with registry(answer) as url:
        await run_crowd(url, [Image(IMAGE.name, IMAGE.tag)], tally)
    return tally


async def test_a_pull_is_served_when_every_byte_has_come() -> None:
    tally = await pull(serving(contents(IMAGE)))
    assert (tally.served, tally.failed) == (3, 0)
    assert tally.bytes == 3 * IMAGE.size
    assert sum(tally.sizes.values()) == IMAGE.size + len(IMAGE.manifest)
    assert len(tally.times) == 3


@pytest.mark.parametrize("status", [401, 429, 503])
async def test_a_refusal_ends_a_pull_and_is_counted(status: int) -> None:
    async def refuse(_request: web.BaseRequest) -> web.Response:
        return web.Response(status=status)

    tally = await pull(refuse)
    assert (tally.served, tally.failed, tally.refused) == (0, 3, {status: 3})


async def test_wrong_bytes_are_never_a_served_pull() -> None:
    layer = f"/v2/{IMAGE.name}/blobs/{IMAGE.layers[-1].digest}"
    tally = await pull(serving({**contents(IMAGE), layer: b"something else"}))
    assert (tally.served, tally.failed, tally.broken) == (0, 3, {"wrong digest": 3})


async def test_a_registry_that_hangs_up_breaks_the_pull() -> None:
    async def hang_up(request: web.BaseRequest) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    tally = await pull(hang_up)
    assert (tally.served, tally.failed, tally.broken) == (0, 3, {"broken off": 3})


async def test_a_registry_that_is_gone_breaks_the_pull() -> None:
    async with registry(serving({})) as url:
        pass
    tally = Tally(2)
    await run_crowd(url, [Image(IMAGE.name, IMAGE.tag)], tally)
    assert tally.broken == {"no connection": 2}


# --- figures and screen -----------------------------------------------------------------------


def tallied(pulls: int, times: tuple[float, ...]) -> Tally:
    tally = Tally(pulls)
    tally.served, tally.times = len(times), list(times)
    return tally


def outcome(tally: Tally) -> Outcome:
    return Outcome.of("direct", tally, sent=1000, peak=9, wall=4.0)


def test_percentiles_are_times_that_were_measured() -> None:
    figures = outcome(tallied(100, tuple(float(n) for n in range(100, 0, -1))))
    assert (figures.percentile(50), figures.percentile(99)) == (50.0, 99.0)
    assert figures.percentile(100) == 100.0
    assert outcome(tallied(1, (3.0,))).percentile(50) == 3.0


def test_without_a_served_pull_there_are_no_times_and_no_ratio() -> None:
    figures = outcome(tallied(2, ()))
    assert figures.percentile(50) is None
    assert figures.upstream_ratio is None
    assert not figures.is_whole


def test_transfers_that_broke_are_a_row_only_when_there_are_any() -> None:
    def shown(tally: Tally) -> str:
        console = Console(file=io.StringIO(), width=80)
        with console.capture() as capture:
            console.print(outcome_table([outcome(tally)], 8))
        return capture.get()

    tally = tallied(2, (1.0,))
    assert "broke" not in shown(tally)
    tally.break_off("broken off")
    assert "1 x broken off" in shown(tally)


def test_a_terminal_shows_what_the_servers_are_doing() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    tally = tallied(4, (1.0,))
    tally.bytes = 50
    tally.refuse(401)
    with Screen(console, ("direct", "through pullpool"), 8) as screen:
        screen.begin("direct", 100)
        screen.show("direct", tally, Sight(sockets=7, active=6, queued=12))
        drawn = file.getvalue()
        screen.end("direct", tally)
    assert re.search(r"direct .* 50% +1 served +1 refused", drawn)
    assert "connections at the registry   7 of 8   pullpool uses 6, 12 turns wait" in drawn


def test_elsewhere_only_the_results_are_written() -> None:
    file = io.StringIO()
    tally = tallied(4, (1.0,))
    with Screen(Console(file=file, width=80), ("direct",), 8) as screen:
        screen.begin("direct", 100)
        screen.show("direct", tally, Sight(sockets=7))
        screen.end("direct", tally)
    assert file.getvalue() == "direct: begins\ndirect: 1 of 4 served, 0 answers refused\n"
