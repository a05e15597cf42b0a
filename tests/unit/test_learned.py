"""What was learned of caps, written rarely and found again."""

from __future__ import annotations

import asyncio
from pathlib import Path

from proxy.testing import FakeClock
from proxy.upstream.cap import Cap, Learned
from proxy.upstream.learned import CONFIRM, CapBook
from tests.unit.store_kit import opened
from tests.unit.upstream_kit import until

Row = tuple[str, int, int | None]


class Shelf:
    """Where a book is kept, and every write to it."""

    def __init__(self) -> None:
        self.writes: list[Row] = []

    async def save(self, origin: str, limit: int, ceiling: int | None) -> None:
        await asyncio.sleep(0)
        self.writes.append((origin, limit, ceiling))


async def test_many_changes_in_a_row_are_one_write() -> None:
    shelf = Shelf()
    book = CapBook({}, shelf.save, clock=FakeClock(), quiet=0.01)
    for limit in (4, 8, 16, 8):
        book.note("hub", Cap(limit, 32, 16))
    await until(lambda: bool(shelf.writes))
    assert shelf.writes == [("hub", 8, 16)]


async def test_what_has_not_changed_is_written_once_an_hour() -> None:
    shelf, clock = Shelf(), FakeClock()
    book = CapBook({}, shelf.save, clock=clock, quiet=0.0)
    for _ in range(3):
        for _ in range(10):
            book.note("hub", Cap(4, 32))
            await asyncio.sleep(0.001)
        clock.advance(CONFIRM / 2)
    await book.close()
    assert len(shelf.writes) == 3  # at first, after an hour, at the end


async def test_at_the_end_every_cap_is_written_as_it_is() -> None:
    shelf = Shelf()
    book = CapBook({}, shelf.save, clock=FakeClock())
    book.note("hub", Cap(4, 32))
    book.note("harbor", Cap(6, 32, 7))
    book.note("hub", Cap(8, 32))
    await book.close()
    assert sorted(shelf.writes) == [("harbor", 6, 7), ("hub", 8, None)]
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "learned caps"]


async def test_an_origin_that_was_not_used_keeps_the_age_of_what_is_known() -> None:
    shelf = Shelf()
    book = CapBook({"hub": Learned(6, 7, 60.0)}, shelf.save, clock=FakeClock())
    assert book.learned("hub") == Learned(6, 7, 60.0)
    assert book.learned("harbor") is None
    await book.close()
    assert shelf.writes == []
    assert repr(book) == "<CapBook 0 origins, 0 to be written>"


async def test_the_store_keeps_caps_over_a_restart(tmp_path: Path) -> None:
    wall = FakeClock()
    async with opened(tmp_path, wall=wall) as store:
        assert await store.caps() == {}
        await store.put_cap("harbor.example.com", 16, None)
        await store.put_cap("harbor.example.com", 6, 7)
        await store.put_cap("127.0.0.1:5000", 4, None)
    wall.advance(90.0)
    async with opened(tmp_path, wall=wall) as store:
        rows = await store.caps()
        assert {(name, row.value, row.ceiling) for name, row in rows.items()} == {
            ("harbor.example.com", 6, 7),
            ("127.0.0.1:5000", 4, None),
        }
        assert {round(row.age) for row in rows.values()} == {90}
