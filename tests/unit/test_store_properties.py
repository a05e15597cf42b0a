"""The store against a model: any order of fills, reads, losses and restarts."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.observe.metrics import Metrics
from proxy.store.store import FileLease, NoRoom, Staging, Store, StoreFull
from tests.unit.store_kit import blob, name, roomy, silent, staging_files, stored_files

T = TypeVar("T")

MAX_SIZE = 1000
BLOBS = {number: blob(number, 90 * number + 10) for number in range(10)}  # 10 to 820 bytes
NUMBERS = st.integers(0, 9)


@dataclass
class Reader:
    number: int
    lease: FileLease


@dataclass
class Filling:
    number: int
    fill: Staging


class StoreMachine(RuleBasedStateMachine):
    """What is held is right and on the disk, what is leased stays, what was promised is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp(prefix="pullpool-test-"))
        self.fills: list[Filling] = []
        self.readers: list[Reader] = []
        self.used: list[int] = []  # from the oldest use to the youngest
        self.open()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def open(self) -> None:
        # The order of fsync is tested elsewhere; here it would only cost time.
        disk = replace(roomy(), sync=lambda _: None, sync_directory=lambda _: None)
        self.store = self.run(
            Store.open(
                self.directory, max_size=MAX_SIZE, metrics=Metrics(), log=silent(), disk=disk
            )
        )

    def teardown(self) -> None:
        for reader in self.readers:
            reader.lease.close()
        self.run(self.store.close())
        self.runner.close()
        shutil.rmtree(self.directory)

    def use(self, number: int) -> None:
        if number in self.used:
            self.used.remove(number)
        self.used.append(number)

    def held(self) -> list[int]:
        return [n for n, data in BLOBS.items() if self.store.size_of(name(data)) is not None]

    # Fills

    @rule(number=NUMBERS)
    def put(self, number: int) -> None:
        data = BLOBS[number]
        with suppress(StoreFull):
            self.run(self.store.put(name(data), data))
            self.use(number)

    @rule(number=NUMBERS, is_known=st.booleans())
    def begin(self, number: int, is_known: bool) -> None:
        data = BLOBS[number]
        with suppress(NoRoom):
            size = len(data) if is_known else None
            self.fills.append(Filling(number, self.run(self.store.create(name(data), size))))

    @precondition(lambda self: self.fills)
    @rule(data=st.data(), size=st.integers(0, 500), cuts=st.integers(1, 4))
    def append(self, data: st.DataObject, size: int, cuts: int) -> None:
        filling = data.draw(st.sampled_from(self.fills))
        mark = filling.fill.mark
        part = BLOBS[filling.number][mark : mark + size]
        step = max(1, len(part) // cuts)
        chunks = [part[at : at + step] for at in range(0, len(part), step)]
        try:
            self.run(filling.fill.append(chunks))
        except StoreFull:
            assert filling.fill.mark == mark
        else:
            assert filling.fill.mark == mark + len(part)

    @precondition(lambda self: self.fills)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Commit what is complete, discard what is not."""
        filling = data.draw(st.sampled_from(self.fills))
        self.fills.remove(filling)
        is_complete = filling.fill.mark == len(BLOBS[filling.number])
        assert filling.fill.verified() == is_complete
        if is_complete:
            self.run(filling.fill.commit())
            self.use(filling.number)
            assert filling.number in self.held()
        else:
            self.run(filling.fill.discard())

    # Readers

    @rule(number=NUMBERS)
    def lease(self, number: int) -> None:
        lease = self.run(self.store.lease(name(BLOBS[number])))
        assert (lease is not None) == (number in self.held())
        if lease is not None:
            self.readers.append(Reader(number, lease))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        self.readers.remove(reader)
        content = BLOBS[reader.number]
        assert os.pread(reader.lease.fileno(), 2 * MAX_SIZE, 0) == content
        reader.lease.close()

    @rule(number=NUMBERS)
    def read(self, number: int) -> None:
        expected = BLOBS[number] if number in self.held() else None
        assert self.run(self.store.read(name(BLOBS[number]))) == expected

    @rule(number=NUMBERS)
    def touch(self, number: int) -> None:
        self.store.touch(name(BLOBS[number]))
        if number in self.held():
            self.use(number)

    # Accidents

    @rule(number=NUMBERS, is_cut=st.booleans())
    def lose_a_file(self, number: int, is_cut: bool) -> None:
        """Somebody removes or cuts a file behind our back; nobody reads it at the time."""
        leased = {reader.number for reader in self.readers}
        if number not in self.held() or number in leased:
            return
        path = self.store._shelf.layout.blob(name(BLOBS[number]))
        if is_cut:
            os.truncate(path, 1)
        else:
            path.unlink()
        assert self.run(self.store.lease(name(BLOBS[number]))) is None

    @precondition(lambda self: not self.readers)
    @rule(is_index_lost=st.booleans())
    def restart(self, is_index_lost: bool) -> None:
        before = list(self.store._ledger)
        self.run(self.store.close())
        self.fills.clear()
        if is_index_lost:
            (self.directory / "index.db").unlink()
        self.open()
        self.run(self.store.recovered())
        if is_index_lost:
            assert set(self.store._ledger) == set(before)
            numbers = {name(data): number for number, data in BLOBS.items()}
            self.used = [numbers[digest] for digest in self.store._ledger]
        else:
            assert list(self.store._ledger) == before

    # What always holds

    @invariant()
    def files_ledger_and_fills_agree(self) -> None:
        held = self.held()
        assert stored_files(self.directory) == {str(name(BLOBS[n])) for n in held}
        assert len(staging_files(self.directory)) == len(self.fills)
        ledger = self.store._ledger
        assert ledger.held == sum(len(BLOBS[n]) for n in held) == self.store.state().bytes
        assert ledger.reserved == sum(filling.fill.reserved for filling in self.fills)
        assert ledger.held + ledger.reserved <= MAX_SIZE

    @invariant()
    def what_is_leased_is_held(self) -> None:
        assert {reader.number for reader in self.readers} <= set(self.held())

    @invariant()
    def the_order_is_that_of_use(self) -> None:
        held = set(self.held())
        expected = [name(BLOBS[n]) for n in self.used if n in held]
        assert list(self.store._ledger) == expected


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
