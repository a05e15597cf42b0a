"""What a large fleet's directory needs: memory and processor time of a real server."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from benchmarks.charts import Bar, Chart
from benchmarks.parts import LOOPBACK, MIB, free_port
from benchmarks.scenario import Findings, Options, Sheet
from proxy.fleet.claims import WHOLE, Giver, Outcome, Taken, Wish
from proxy.fleet.claims_redis import RedisClaims
from proxy.fleet.script import Argument, Script, root_of
from proxy.fleet.stripes import stripe_count, stripe_size
from proxy.oci.digest import Digest

ABOUT = """
One `redis-server`, filled by the claims of nodes (`proxy/fleet/claims_redis.py`) as a fleet fills
it: every digest has the hashes of a blob of 64 MiB and is held whole by as many nodes as are
listed. Memory is what the server says that it uses, less what it used when it was empty. The time
of a call is the server's own processor time, taken while all that is in its memory: calls a second
are what one core can do.
""".strip()

SIZE = 64 * MIB
TOGETHER = 200


@dataclass(frozen=True, slots=True)
class Scale:
    nodes: int
    digests: int
    calls: int


FULL = Scale(nodes=5000, digests=10_000, calls=2000)
FAST = Scale(nodes=100, digests=20, calls=50)


class Batches:
    """Runs scripts many at a time, so that filling a server takes minutes and not an hour."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._waiting: list[tuple[Script, str, Sequence[Argument], asyncio.Future[Any]]] = []
        self._known: set[str] = set()

    def __repr__(self) -> str:
        return f"<Batches {len(self._waiting)} waiting>"

    async def run(self, script: Script, tag: str, args: Sequence[Argument] = ()) -> Any:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((script, tag, args, future))
        return await future

    async def all(self, calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """The results of these calls, a batch after the other."""
        found: list[Any] = []
        for at in range(0, len(calls), TOGETHER):
            tasks = [asyncio.create_task(call) for call in calls[at : at + TOGETHER]]
            while not all(task.done() for task in tasks):
                await asyncio.sleep(0)
                await self._send()
            found += [task.result() for task in tasks]
        return found

    async def _send(self) -> None:
        batch, self._waiting = self._waiting, []
        if not batch:
            return
        for text in {script.text for script, *_ in batch} - self._known:
            await self._client.script_load(text)
            self._known.add(text)
        pipeline = self._client.pipeline(transaction=False)
        for script, tag, args, _ in batch:
            pipeline.evalsha(script.sha, 1, root_of(tag), *args)  # type: ignore[unused-awaitable]  # a pipeline only notes it
        for (*_, future), reply in zip(batch, await pipeline.execute(), strict=True):
            future.set_result(reply)


@asynccontextmanager
async def server() -> AsyncIterator[Redis]:
    """A server of its own, asked over one connection."""
    with tempfile.TemporaryDirectory() as directory:
        port = free_port()
        options = ("--port", str(port), "--bind", LOOPBACK, "--save", "", "--dir", directory)
        quiet = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec("redis-server", *options, stdout=quiet)
        try:
            async with Redis(host=LOOPBACK, port=port) as client:
                await _answers(client)
                yield client
        finally:
            process.kill()
            await process.wait()


async def _answers(client: Redis) -> None:
    while True:
        try:
            await client.ping()
        except ConnectionError:
            await asyncio.sleep(0.02)
        else:
            return


def giver(number: int) -> Giver:
    name = f"{number:016x}"
    host = f"node-{number}.example.com"
    return Giver(
        name, host, f"zone-{number % 3}", f"https://10.{number >> 8}.{number & 255}.7:5052"
    )


def digest(number: int) -> Digest:
    return Digest.of(b"blob %d" % number)


class Load:
    """All that a scale has in the server, and calls against it."""

    def __init__(self, client: Redis, scale: Scale) -> None:
        self.scale = scale
        self.client = client
        self.batches = Batches(client)
        self.nodes = [RedisClaims(self.batches, giver(number)) for number in range(scale.nodes)]
        self.rng = random.Random(1)
        self.hashes = [bytes([stripe]) * 32 for stripe in range(stripe_count(SIZE))]

    async def fill(self, log: Callable[[str], None]) -> None:
        for number in range(self.scale.digests):
            blob = digest(number)
            holders = self.rng.sample(self.nodes, min(64, len(self.nodes)))
            await self.batches.all([holders[0].fill(blob, SIZE)])
            await self.batches.all([holders[0].publish(blob, SIZE, 0, self.hashes)])
            await self.batches.all([holders[0].settle(blob)])
            await self.batches.all([node.hold(blob, "", WHOLE) for node in holders])
            if number and number % 2000 == 0:
                log(f"{number:,} digests")

    async def used(self) -> int:
        return int((await self.client.info("memory"))["used_memory"])

    def somebody(self) -> RedisClaims:
        return self.rng.choice(self.nodes)

    def something(self) -> Digest:
        return digest(self.rng.randrange(self.scale.digests))

    async def timed(self, calls: Sequence[Coroutine[Any, Any, Any]]) -> tuple[float, list[Any]]:
        """Microseconds of the server for one of them, and what they returned."""
        before = await self._processor()
        found = await self.batches.all(calls)
        return 1e6 * (await self._processor() - before) / len(calls), found

    async def _processor(self) -> float:
        """Seconds that the server has used."""
        cpu = await self.client.info("cpu")
        return float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])


async def costs(load: Load) -> dict[str, float]:
    """Microseconds a call, by what is called."""
    count = load.scale.calls
    found: dict[str, float] = {}
    some = [load.something() for _ in range(count)]
    found["look"], _ = await load.timed([load.somebody().look(blob) for blob in some])
    takers = [(load.somebody(), blob) for blob in some]
    wishes = [Wish(stripe) for stripe in range(6)]
    found["take"], taken = await load.timed([node.take(blob, wishes, 2) for node, blob in takers])
    back: list[Coroutine[Any, Any, None]] = []
    for (node, _), answer in zip(takers, taken, strict=True):
        assert isinstance(answer, Taken)
        back += [node.give_back(grant, Outcome.DONE) for grant in answer.grants]
    found["give back"], _ = await load.timed(back)
    found["hold, whole"], _ = await load.timed(
        [load.somebody().hold(blob, "", WHOLE) for blob in some]
    )
    fresh = [Digest.of(b"new %d" % number) for number in range(count)]
    found["fill"], _ = await load.timed([load.nodes[0].fill(blob, SIZE) for blob in fresh])
    found["publish"], _ = await load.timed(
        [load.nodes[0].publish(blob, SIZE, 0, load.hashes[:1]) for blob in fresh]
    )
    return found


async def crowd(load: Load) -> dict[str, float]:
    """Microseconds a call while all nodes want one blob: that is the largest entry there is."""
    blob = Digest.of(b"what everybody wants")
    await load.batches.all([load.nodes[0].fill(blob, SIZE)])
    await load.batches.all([load.nodes[0].publish(blob, SIZE, 0, load.hashes[:-1])])
    wishes = [Wish(stripe) for stripe in range(6)]
    took, _ = await load.timed([node.take(blob, wishes, 2) for node in load.nodes[1:]])
    looked, _ = await load.timed([node.look(blob, 10) for node in load.nodes[1:]])
    return {"look, in a crowd": looked, "take, in a crowd": took}


async def _measure(options: Options) -> tuple[Scale, int, dict[str, float]]:
    scale = FAST if options.fast else FULL
    async with server() as client:
        load = Load(client, scale)
        empty = await load.used()
        await load.fill(options.log)
        memory = await load.used() - empty
        return scale, memory, {**await costs(load), **await crowd(load)}


def measure(options: Options) -> Findings:
    scale, memory, micros = asyncio.run(_measure(options))
    what = f"{scale.nodes:,} nodes, {scale.digests:,} digests"
    kept = (what, f"{memory / MIB:,.0f} MiB", f"{memory / scale.digests:,.0f} bytes")
    rows = [
        (name, f"{spent:.0f} \N{MICRO SIGN}s", f"{1e6 / spent:,.0f}")
        for name, spent in micros.items()
    ]
    bars = [
        Bar(name, spent, f"{spent:.0f}", spent, spent, ours=True) for name, spent in micros.items()
    ]
    calls = ("call", "server's processor time", "calls a second of a core")
    return Findings(
        about=ABOUT,
        sheets=(
            Sheet("Memory of a directory", ("fleet", "memory", "a digest"), (kept,)),
            Sheet(f"Calls of a directory: {what}", calls, tuple(rows)),
        ),
        promises=(),
        figures={
            "nodes": scale.nodes,
            "digests": scale.digests,
            "stripes": stripe_count(SIZE),
            "stripe": stripe_size(SIZE),
            "memory": memory,
            "microseconds": micros,
        },
        charts=(
            Chart(
                "fleet-directory",
                "A call of the directory, on its server",
                "\N{MICRO SIGN}s",
                "less",
                tuple(bars),
            ),
        ),
    )
