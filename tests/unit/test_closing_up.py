"""Hashing what has closed up: by one task, beside those who bring more, and to an end."""

import asyncio

import pytest

from proxy.oci.errors import StoreFailed
from proxy.pull.closing_up import STEP, ClosingUp
from proxy.pull.segments import Segments
from tests.unit.flight_kit import a_while

SIZE = 4 * STEP


class File:
    """Hashes when it is let; counts how many do so at once."""

    def __init__(self) -> None:
        self.received = 0
        self.has_file = True
        self.steps: list[int] = []
        self.error: Exception | None = None
        self.may_go_on = asyncio.Event()
        self.busy = self.most = 0

    async def advance(self, upto: int) -> None:
        self.busy += 1
        self.most = max(self.most, self.busy)
        try:
            await self.may_go_on.wait()
        finally:
            self.busy -= 1
        if self.error is not None:
            raise self.error
        self.steps.append(upto)
        self.received = upto


class Rig:
    def __init__(self) -> None:
        self.file = File()
        self.plan = Segments(SIZE, least=1)
        self.heard: list[str] = []
        self.closing_up = ClosingUp(
            "a blob",
            intake=self.file,
            hashed=lambda: self.heard.append("hashed"),
            idle=lambda: self.heard.append("idle"),
        )

    def bring(self, upto: int) -> None:
        """All before ``upto`` is in the file."""
        self.plan.reach(upto)
        self.closing_up.begin(self.plan)


async def test_whoever_brings_does_not_wait_and_one_task_hashes_all_that_comes() -> None:
    rig = Rig()
    rig.bring(STEP + 1)
    await a_while()
    rig.bring(2 * STEP)  # while the first step is under way
    rig.bring(SIZE)
    assert rig.file.busy == 1
    rig.file.may_go_on.set()
    await a_while()
    assert rig.file.steps == [STEP, 2 * STEP, 3 * STEP, SIZE]
    assert rig.file.most == 1
    assert rig.heard == ["hashed"] * 4 + ["idle"]
    assert not rig.closing_up.end()


async def test_it_begins_again_when_more_has_closed_up() -> None:
    rig = Rig()
    rig.file.may_go_on.set()
    for upto in (1, 1, STEP):
        rig.bring(upto)
        await a_while()
    assert rig.file.steps == [1, STEP]
    assert "idle" in repr(rig.closing_up)
    assert not rig.closing_up.end()


async def test_what_a_disk_does_not_give_back_is_told_to_whoever_brings_more() -> None:
    rig = Rig()
    rig.file.error = StoreFailed("gone")
    rig.file.may_go_on.set()
    rig.bring(STEP)
    await a_while()
    assert rig.heard == ["idle"]  # so who waits for it looks
    for _ in range(2):
        with pytest.raises(StoreFailed, match="gone"):
            rig.bring(SIZE)
    assert not rig.file.steps
    assert not rig.closing_up.end()


async def test_nothing_is_hashed_where_there_is_no_file_any_more() -> None:
    rig = Rig()
    rig.file.has_file = False
    rig.bring(STEP)
    await a_while()
    assert rig.heard == []
    assert not rig.closing_up.end()


async def test_its_end_ends_the_task_and_nothing_begins_after_it() -> None:
    rig = Rig()
    rig.bring(STEP)
    await a_while()
    assert "busy" in repr(rig.closing_up)
    await asyncio.wait(rig.closing_up.end())
    assert rig.file.busy == 0
    rig.file.may_go_on.set()
    rig.bring(SIZE)
    assert not rig.closing_up.end()
    assert not rig.file.steps
    await rig.closing_up.run(rig.plan)  # whoever takes the plan away does the rest himself
    assert rig.file.received == SIZE
