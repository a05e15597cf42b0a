"""Many images of one node behind a small cap: nobody waits longer than the cap makes necessary.

The kubelet's client gives an image up after five minutes without a byte of it. Here a real gate
serves layers in virtual time, each for the two seconds that a turn lasts.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest

from proxy.observe.metrics import Metrics
from proxy.upstream.gate import Gate
from proxy.upstream.turns import Ticket, TurnClass
from tests.unit.virtual import now, run_virtually

TURN = 2.0
CRI_PATIENCE = 300.0
BLOB = TurnClass.BLOB


class Node:
    """Pulls images: a few layers of each at a time, as containerd does, every layer one turn."""

    def __init__(self, gate: Gate, *, at_once: int) -> None:
        self.gate = gate
        self.at_once = at_once
        self.bytes_at: dict[int, list[float]] = {}  # by image, since it was asked for

    async def pull(self, image: int, layers: int, *, start: float = 0.0) -> None:
        await asyncio.sleep(start)
        self.bytes_at[image] = [now()]
        few = asyncio.Semaphore(self.at_once)
        async with asyncio.TaskGroup() as group:
            for _ in range(layers):
                group.create_task(self._layer(image, few))

    async def _layer(self, image: int, few: asyncio.Semaphore) -> None:
        async with few:
            slot = await self.gate.acquire(Ticket(BLOB, ["node"], image=image))
            try:
                self.bytes_at[image].append(now())
                await asyncio.sleep(TURN)
            finally:
                self.gate.release(slot)

    def longest_silence(self) -> float:
        """The longest time that any image had to be without a byte."""
        return max(b - a for times in self.bytes_at.values() for a, b in pairwise(times))


Script = Callable[[Node], Coroutine[Any, Any, None]]


def simulate(script: Script, *, cap: int, at_once: int) -> Node:
    async def run() -> Node:
        clock = asyncio.get_running_loop().time
        node = Node(Gate("up", capacity=cap, metrics=Metrics(), clock=clock), at_once=at_once)
        await script(node)
        return node

    return run_virtually(run(), grace=0.0)


@pytest.mark.parametrize("at_once", [3, 10], ids=["three layers at a time", "all layers at once"])
def test_two_hundred_images_of_one_client_are_all_served_in_every_round(at_once: int) -> None:
    images, layers, cap = 200, 10, 4
    slots = cap - 1  # one is kept for manifests

    async def script(node: Node) -> None:
        async with asyncio.TaskGroup() as group:
            for image in range(images):
                group.create_task(node.pull(image, layers))

    node = simulate(script, cap=cap, at_once=at_once)
    # A round is a turn for each image; nobody can do better for the one that comes last. One who
    # asks for more only after a turn of its own has had that turn besides.
    a_round = math.ceil(images / slots) * TURN
    assert node.longest_silence() <= a_round + TURN < CRI_PATIENCE
    # The cap was never idle: all of it took no longer than the turns do.
    end = max(times[-1] for times in node.bytes_at.values()) + TURN
    assert end == pytest.approx(math.ceil(images * layers / slots) * TURN)
    # Who was asked for first got its first byte first, and so on.
    firsts = [node.bytes_at[image][1] for image in range(images)]
    assert firsts == sorted(firsts)


def test_an_image_never_loses_to_one_that_came_later() -> None:
    images, layers, cap = 60, 4, 4

    async def script(node: Node) -> None:
        async with asyncio.TaskGroup() as group:
            for image in range(images):
                group.create_task(node.pull(image, layers, start=image * 0.3))

    node = simulate(script, cap=cap, at_once=3)
    for image in range(images - 1):
        for mine, later in zip(node.bytes_at[image], node.bytes_at[image + 1], strict=True):
            assert mine <= later


def test_more_images_than_the_cap_can_serve_in_time_are_seen_beforehand() -> None:
    """No order helps then, and the gate says so."""
    images, cap = 900, 4

    async def script(node: Node) -> None:
        async with asyncio.TaskGroup() as group:
            for image in range(images):
                group.create_task(node.pull(image, layers=2))
            await asyncio.sleep(TURN * 10)
            expected = (images / (cap - 1)) * TURN
            assert node.gate.state().round_seconds == pytest.approx(expected, rel=0.05)
            assert node.gate.state().round_seconds > CRI_PATIENCE

    node = simulate(script, cap=cap, at_once=1)
    assert node.longest_silence() > CRI_PATIENCE
    assert node.gate.state().round_seconds == 0
