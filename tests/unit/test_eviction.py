"""The ledger: what it promises, what it gives up, and what it must not touch."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.oci.digest import Digest
from proxy.store.eviction import Ledger

LATER = 10_000_000


def name(number: int) -> Digest:
    return Digest("sha256", f"{number:064x}")


def ledger_of(*sizes: int, max_size: int = 100, high: float = 1.0, low: float = 1.0) -> Ledger:
    """Blobs 0, 1, 2, … with these sizes, 0 the oldest."""
    ledger = Ledger(max_size=max_size, high_water=high, low_water=low)
    for number, size in enumerate(sizes):
        ledger.add(name(number), size, number)
    return ledger


def test_room_that_is_free_is_promised_without_victims() -> None:
    ledger = ledger_of(40)
    assert ledger.admit(60) == ()
    assert (ledger.held, ledger.reserved) == (40, 60)


def test_what_is_found_late_stands_where_its_age_puts_it() -> None:
    ledger = Ledger(max_size=1000)
    ledger.restore([(name(1), 10, 100), (name(2), 10, 200), (name(3), 10, 300)])
    ledger.pin(name(5))
    found = [(name(4), 1, 250), (name(5), 2, 50), (name(6), 3, 400), (name(2), 999, 1)]
    assert set(ledger.insert(found)) == {name(4), name(5), name(6)}  # the other one is held
    assert list(ledger) == [name(5), name(1), name(2), name(4), name(3), name(6)]
    assert ledger.held == 36
    assert ledger.spare == 998  # of what is pinned nothing may go
    assert ledger.add(name(7), 1, 0).used == 401  # times only grow
    assert ledger.insert([]) == []
    assert [entry.used for _, entry in ledger.entries()] == [50, 100, 200, 250, 300, 400, 401]


def test_the_least_recently_used_go_first_and_no_more_than_needed() -> None:
    ledger = ledger_of(30, 30, 40)
    assert ledger.admit(35) == (name(0), name(1))
    assert list(ledger) == [name(2)]


def test_a_blob_larger_than_the_room_is_refused_and_nothing_changes() -> None:
    ledger = ledger_of(30, 30)
    assert ledger.admit(101) is None
    assert (ledger.held, ledger.reserved, len(ledger)) == (60, 0, 2)


def test_a_blob_as_large_as_the_room_gets_all_of_it() -> None:
    ledger = ledger_of(30, 30)
    assert ledger.admit(100) == (name(0), name(1))


def test_what_is_promised_counts_as_taken_until_it_is_released() -> None:
    ledger = ledger_of()
    assert ledger.admit(70) == ()
    assert ledger.admit(40) is None
    ledger.release(70)
    assert ledger.admit(40) == ()


def test_nothing_goes_below_the_high_mark_and_a_round_goes_down_to_the_low_mark() -> None:
    ledger = ledger_of(*[10] * 8, high=0.9, low=0.5)
    assert ledger.admit(10) == ()
    assert ledger.admit(5) == tuple(name(n) for n in range(5))  # 95 wanted, 50 allowed
    assert ledger.held + ledger.reserved == 45


def test_when_the_low_mark_is_out_of_reach_no_more_goes_than_must() -> None:
    ledger = ledger_of(10, 10, 70, high=0.95, low=0.5)
    ledger.pin(name(2))
    assert ledger.admit(15) == (name(0),)  # 105 wanted, 95 is the high mark


def test_what_is_pinned_stays_however_old_it_is() -> None:
    ledger = ledger_of(50, 50)
    ledger.pin(name(0))
    assert ledger.admit(50) == (name(1),)
    assert ledger.admit(1) is None
    ledger.unpin(name(0))
    assert ledger.admit(1) == (name(0),)


def test_a_pin_holds_until_the_last_reader_has_gone() -> None:
    ledger = ledger_of(100)
    ledger.pin(name(0))
    ledger.pin(name(0))
    ledger.unpin(name(0))
    assert ledger.is_pinned(name(0))
    assert ledger.admit(1) is None


def test_a_pin_taken_before_the_blob_is_stored_protects_it_afterwards() -> None:
    ledger = ledger_of()
    ledger.pin(name(0))
    ledger.add(name(0), 100, 1)
    assert ledger.admit(1) is None


def test_a_touched_manifest_takes_its_image_along() -> None:
    ledger = ledger_of(10, 10, 10, 10)
    ledger.set_children(name(0), [name(1)])
    ledger.touch(name(0), LATER)
    assert list(ledger) == [name(2), name(3), name(1), name(0)]


def test_a_touched_index_takes_its_manifests_and_their_layers_along() -> None:
    ledger = ledger_of(*[10] * 6)
    index, amd64, arm64, layer, shared, stranger = (name(n) for n in range(6))
    ledger.set_children(index, [amd64, arm64, name(99)])
    ledger.set_children(amd64, [layer, shared])
    ledger.set_children(arm64, [shared])
    moved = ledger.touch(index, LATER)
    assert {digest for digest, _ in moved} == {index, amd64, arm64, layer, shared}
    assert next(iter(ledger)) == stranger
    assert list(ledger)[-1] == index


def test_a_touched_layer_moves_alone() -> None:
    ledger = ledger_of(10, 10, 10)
    ledger.set_children(name(0), [name(1)])
    ledger.touch(name(1), LATER)
    assert list(ledger) == [name(0), name(2), name(1)]


def test_manifests_that_name_one_another_do_not_loop() -> None:
    ledger = ledger_of(10, 10)
    ledger.set_children(name(0), [name(1), name(0)])
    ledger.set_children(name(1), [name(0)])
    assert len(ledger.touch(name(0), LATER)) == 2


def test_a_deep_chain_of_indexes_needs_no_recursion() -> None:
    ledger = ledger_of(*[1] * 5000, max_size=10_000)
    for number in range(4999):
        ledger.set_children(name(number), [name(number + 1)])
    assert len(ledger.touch(name(0), LATER)) == 5000


def test_times_of_use_only_grow_even_if_the_clock_goes_back() -> None:
    ledger = ledger_of(10, 10)
    ledger.touch(name(0), 1_000_000_000)
    ledger.touch(name(1), 5)
    first, second = ledger.get(name(0)), ledger.get(name(1))
    assert first is not None
    assert second is not None
    assert second.used > first.used


def test_the_youngest_is_not_moved_again_and_again_but_its_time_is_renewed() -> None:
    ledger = ledger_of(10)
    assert ledger.touch(name(0), 500_000) == []
    assert ledger.touch(name(0), LATER) == [(name(0), LATER)]


def test_touching_what_is_not_held_does_nothing() -> None:
    assert ledger_of(10).touch(name(7), LATER) == []


def test_a_blob_entered_twice_counts_once() -> None:
    ledger = ledger_of(10)
    ledger.add(name(0), 25, 5)
    assert (ledger.held, len(ledger)) == (25, 1)


def test_what_was_held_before_a_restart_keeps_its_order() -> None:
    ledger = ledger_of()
    ledger.restore([(name(7), 10, 3), (name(2), 20, 3), (name(5), 30, 9)])
    assert list(ledger) == [name(7), name(2), name(5)]
    assert ledger.held == 60
    assert ledger.admit(50) == (name(7),)


def test_a_removed_manifest_is_forgotten_with_its_children() -> None:
    ledger = ledger_of(10, 10)
    ledger.set_children(name(0), [name(1)])
    assert ledger.remove(name(0))
    assert not ledger.remove(name(0))
    ledger.add(name(0), 10, 5)
    assert [digest for digest, _ in ledger.touch(name(0), LATER)] == [name(0)]


def test_a_disk_that_is_fuller_than_the_ledger_thinks_costs_old_blobs() -> None:
    ledger = ledger_of(10, 10, 10, max_size=1000)
    assert ledger.admit(5, spare=5) == ()
    assert ledger.admit(15, spare=5) == (name(0),)
    assert ledger.admit(5, spare=-6) == (name(1), name(2))
    assert ledger.admit(1, spare=0) is None


def test_shedding_gives_what_there_is() -> None:
    ledger = ledger_of(10, 10, 10)
    ledger.pin(name(0))
    assert ledger.shed(11) == (name(1), name(2))
    assert ledger.shed(11) == ()


def test_a_store_that_was_made_smaller_shrinks_to_the_low_mark() -> None:
    ledger = ledger_of(*[10] * 30, max_size=100, high=0.9, low=0.5)
    assert len(ledger.shrink()) == 25
    assert ledger.shrink() == ()


def test_shrinking_below_what_is_pinned_gives_up_all_the_rest() -> None:
    ledger = ledger_of(200, 10, max_size=100)
    ledger.pin(name(0))
    assert ledger.shrink() == (name(1),)


@pytest.mark.parametrize(("high", "low"), [(0.5, 0.9), (1.1, 0.5), (0.5, 0.0)])
def test_water_marks_that_make_no_sense_are_refused(high: float, low: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        Ledger(max_size=10, high_water=high, low_water=low)


def test_a_size_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        Ledger(max_size=0)


@dataclass
class Model:
    """The same, without any cleverness: a list from old to young, everything summed anew."""

    order: list[int] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    children: dict[int, list[int]] = field(default_factory=dict)
    pins: list[int] = field(default_factory=list)
    promises: list[int] = field(default_factory=list)

    def image(self, root: int) -> set[int]:
        found: set[int] = set()
        ahead = [root]
        while ahead:
            number = ahead.pop()
            if number in self.sizes and number not in found:
                found.add(number)
                ahead.extend(self.children.get(number, []))
        return found

    def drop(self, number: int) -> None:
        self.order.remove(number)
        del self.sizes[number]
        self.children.pop(number, None)


NUMBERS = st.integers(0, 9)


class LedgerMachine(RuleBasedStateMachine):
    """Any order of calls keeps the ledger equal to its model, and never breaks a promise."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(max_size=100, high_water=0.9, low_water=0.6)
        self.model = Model()
        self.clock = 0

    @rule(number=NUMBERS, size=st.integers(0, 120), spare=st.none() | st.integers(-30, 130))
    def admit_and_store(self, number: int, size: int, spare: int | None) -> None:
        if self.admit(size, spare):
            self.ledger.release(size)
            self.model.promises.remove(size)
            self.enter(number, size)

    @rule(size=st.integers(0, 120), spare=st.none() | st.integers(-30, 130))
    def promise(self, size: int, spare: int | None) -> None:
        self.admit(size, spare)

    def admit(self, size: int, spare: int | None) -> bool:
        before = dict(self.model.sizes)
        evictable = sum(s for n, s in before.items() if n not in self.model.pins)
        taken = sum(before.values()) + sum(self.model.promises)
        victims = self.ledger.admit(size, spare)
        if victims is None:
            no_size = taken + size - evictable > 100
            no_disk = spare is not None and size - spare > evictable
            assert no_size or no_disk
            return False
        freed = self.check_victims(victims)
        assert taken + size - freed <= 100
        assert spare is None or freed >= size - spare
        self.model.promises.append(size)
        return True

    def check_victims(self, victims: tuple[Digest, ...]) -> int:
        """They are exactly the oldest that nobody pins; returns their bytes."""
        numbers = [int(victim.hex, 16) for victim in victims]
        free = [n for n in self.model.order if n not in self.model.pins]
        assert numbers == free[: len(numbers)]
        freed = sum(self.model.sizes[n] for n in numbers)
        for number in numbers:
            self.model.drop(number)
        return freed

    def enter(self, number: int, size: int) -> None:
        self.clock += 1
        if number in self.model.sizes:
            children = self.model.children.get(number)
            self.model.drop(number)
            if children is not None:
                self.model.children[number] = children
        self.model.order.append(number)
        self.model.sizes[number] = size
        self.ledger.add(name(number), size, self.clock)

    @precondition(lambda self: self.model.promises)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        size = data.draw(st.sampled_from(self.model.promises))
        self.model.promises.remove(size)
        self.ledger.release(size)

    @rule(number=NUMBERS, children=st.lists(NUMBERS, max_size=4))
    def name_children(self, number: int, children: list[int]) -> None:
        if number in self.model.sizes:
            self.model.children[number] = children
            self.ledger.set_children(name(number), [name(n) for n in children])

    @rule(number=NUMBERS)
    def touch(self, number: int) -> None:
        self.clock += 2_000_000
        moved = self.ledger.touch(name(number), self.clock)
        image = self.model.image(number)
        assert {int(digest.hex, 16) for digest, _ in moved} == image
        kept = [n for n in self.model.order if n not in image]
        young = [int(digest.hex, 16) for digest, _ in moved]
        self.model.order = kept + young
        if image:
            assert young[-1] == number

    @rule(number=NUMBERS)
    def pin(self, number: int) -> None:
        self.model.pins.append(number)
        self.ledger.pin(name(number))

    @precondition(lambda self: self.model.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.model.pins))
        self.model.pins.remove(number)
        self.ledger.unpin(name(number))

    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        assert self.ledger.remove(name(number)) == (number in self.model.sizes)
        if number in self.model.sizes:
            self.model.drop(number)

    @rule(size=st.integers(0, 50))
    def shed(self, size: int) -> None:
        evictable = sum(s for n, s in self.model.sizes.items() if n not in self.model.pins)
        freed = self.check_victims(self.ledger.shed(size))
        assert freed >= min(size, evictable)

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert [int(digest.hex, 16) for digest in self.ledger] == self.model.order
        assert self.ledger.held == sum(self.model.sizes.values())
        assert self.ledger.reserved == sum(self.model.promises)
        assert self.ledger.held + self.ledger.reserved <= 100

    @invariant()
    def times_follow_the_order(self) -> None:
        entries = [self.ledger.get(digest) for digest in self.ledger]
        times = [entry.used for entry in entries if entry is not None]
        assert times == sorted(set(times))


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
