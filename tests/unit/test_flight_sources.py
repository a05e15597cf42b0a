"""Where a flight's bytes come from: bodies that break, turns, sizes, denials."""

import asyncio
from pathlib import Path

import pytest

from proxy.oci.errors import (
    Denied,
    NotFound,
    PullError,
    QueueFull,
    RealmRefused,
    SizeMismatch,
    Throttled,
    UpstreamDown,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.pull.sources import LATE_TRIES, TRIES
from tests.unit.flight_kit import (
    KIB,
    Act,
    ScriptedSource,
    Sipper,
    drink,
    ended,
    flying,
    until,
)
from tests.unit.store_kit import blob, count

DATA = blob(1, 100 * KIB + 7)
UNAVAILABLE = UpstreamUnavailable("reset")


# -- bodies that break ---------------------------------------------------------------------------


async def test_a_body_that_breaks_goes_on_at_its_byte(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(breaks=30 * KIB)])
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        assert [turn.start for turn in source.turns] == [0, 30 * KIB]
        assert source.sent == len(DATA)
        assert source.turns[1].is_urgent
        labels = {"upstream": "hub.example.com"}
        assert count(rig.metrics, "pullpool_upstream_resumes_total", **labels) == 1


async def test_ten_breaks_cost_no_byte_twice(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(breaks=9 * KIB + n) for n in range(10)])
    async with flying(tmp_path) as rig:
        got = await asyncio.gather(*[rig.pull(source) for _ in range(5)])
        assert got == [DATA] * 5
        assert len(source.turns) == 11
        assert source.sent == len(DATA)
        await until(lambda: not len(rig.flights))
        assert await rig.kept(source.digest) == DATA


async def test_without_range_it_starts_over_and_skips_what_it_has(tmp_path: Path) -> None:
    breaks = [Act(breaks=20 * KIB), Act(breaks=50 * KIB), Act(breaks=90 * KIB)]
    source = ScriptedSource(DATA, serves_ranges=False, acts=breaks)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        assert [turn.start for turn in source.turns] == [0, 20 * KIB, 50 * KIB, 90 * KIB]


async def test_tries_without_a_new_byte_come_to_an_end(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(breaks=10 * KIB)] + [Act(error=UNAVAILABLE)] * 50)
    async with flying(tmp_path) as rig:
        with pytest.raises(UpstreamUnavailable):
            await rig.pull(source)
        assert len(source.turns) == TRIES
        assert rig.store.size_of(source.digest) is None


async def test_a_new_byte_makes_failures_before_it_forgotten(tmp_path: Path) -> None:
    failures = [Act(error=UNAVAILABLE)] * (TRIES - 1)
    acts = failures + [Act(breaks=10 * KIB), *failures[1:]] * 3  # the break counts as one
    source = ScriptedSource(DATA, acts=acts)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA


async def test_answers_without_a_byte_come_to_an_end(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(ends=0)] * 50)
    async with flying(tmp_path) as rig:
        with pytest.raises(UpstreamUnavailable, match="without a byte"):
            await rig.pull(source)
        assert len(source.turns) == TRIES


@pytest.mark.parametrize("error", [UpstreamTimeout("slow"), Throttled(0.001)])
async def test_what_passes_is_tried_again(tmp_path: Path, error: PullError) -> None:
    source = ScriptedSource(DATA, acts=[Act(error=error)] * 2)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA


async def test_a_pause_grows_with_the_tries_and_obeys_the_upstream(tmp_path: Path) -> None:
    asked: list[int] = []

    def pause(tries: int) -> float:
        asked.append(tries)
        return 0.0

    acts = [Act(error=UNAVAILABLE)] * 3 + [Act(breaks=5)] + [Act(error=UNAVAILABLE)] * 2
    source = ScriptedSource(DATA, acts=acts)
    async with flying(tmp_path, pause=pause) as rig:
        reader = rig.join(source)
        assert await drink(reader) == DATA
        assert asked == [1, 2, 3, 1, 2, 3]
        pause_after = rig.readers[0].flight.settings.pause_after
        assert pause_after(1, Throttled(7.0)) == 7.0
        assert pause_after(1, Throttled(3600.0)) == 30.0


# -- turns ---------------------------------------------------------------------------------------


async def test_turns_are_as_large_as_the_source_says(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, turn_bytes=30 * KIB)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        asked = [(turn.start, turn.length) for turn in source.turns]
        assert asked == [(n * 30 * KIB, 30 * KIB) for n in range(4)]


async def test_a_turn_that_is_overdue_is_cut_and_goes_on(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.is_overdue = lambda turn: turn.sent >= 16 * KIB
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        assert [turn.start for turn in source.turns] == [n * 16 * KIB for n in range(7)]
        assert source.sent == len(DATA)


async def test_a_turn_that_would_start_all_over_is_not_cut(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, serves_ranges=False)
    source.is_overdue = lambda turn: turn.sent >= 16 * KIB
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        assert len(source.turns) == 1


# -- sizes ---------------------------------------------------------------------------------------


async def test_a_size_that_contradicts_the_manifest_is_an_error(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path) as rig:
        reader = rig.join(source, size=5)
        with pytest.raises(SizeMismatch):
            await drink(reader, 0, 5)
        await ended(reader.flight)
        assert rig.store.size_of(source.digest) is None


async def test_a_wrong_manifest_hurts_only_those_who_came_through_it(tmp_path: Path) -> None:
    right = ScriptedSource(DATA)
    wrong = ScriptedSource(DATA, repository="evil/app")
    async with flying(tmp_path) as rig:
        liar = rig.join(wrong, size=5)
        reader = rig.join(right, size=len(DATA))
        unsure = rig.join(right)
        with pytest.raises(SizeMismatch):
            await drink(liar, 0, 5)
        late = rig.join(wrong, size=6)
        with pytest.raises(SizeMismatch):
            await late.started()
        assert await drink(reader, 0, len(DATA)) == await drink(unsure) == DATA
        await until(lambda: rig.store.size_of(right.digest) is not None)


async def test_a_source_that_lies_about_the_size_is_left_for_another(tmp_path: Path) -> None:
    liar = ScriptedSource(DATA, repository="evil/app", acts=[Act(total=7)] * 50)
    right = ScriptedSource(DATA)
    async with flying(tmp_path) as rig:
        reader = rig.join(liar, size=len(DATA))
        other = rig.join(right, size=len(DATA))
        assert await drink(other) == DATA
        with pytest.raises(SizeMismatch):
            await drink(reader)


async def test_a_body_that_changes_its_size_between_turns_is_an_error(tmp_path: Path) -> None:
    acts = [Act(), Act(total=len(DATA) + 1)]
    source = ScriptedSource(DATA, turn_bytes=30 * KIB, acts=acts)
    async with flying(tmp_path) as rig:
        with pytest.raises(SizeMismatch):
            await rig.pull(source)
        assert len(source.turns) == 2


async def test_more_bytes_than_were_announced_are_an_error(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(total=10 * KIB)])
    async with flying(tmp_path) as rig:
        sipper = Sipper(rig.join(source))
        with pytest.raises(SizeMismatch):
            await sipper.rest()
        assert len(sipper.got) <= 10 * KIB
        await ended(sipper.reader.flight)
        assert rig.staging() == 0


async def test_a_body_shorter_than_announced_is_asked_for_the_rest(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(ends=10 * KIB)])
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA


async def test_a_blob_shorter_than_announced_is_an_error(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(total=len(DATA) + 9)] * 50)
    async with flying(tmp_path) as rig:
        with pytest.raises(UpstreamUnavailable):
            await rig.pull(source)
        assert rig.store.size_of(source.digest) is None


async def test_a_reader_who_was_promised_more_than_came_gets_no_clean_end(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, says_size=False, serves_ranges=False)
    async with flying(tmp_path) as rig:
        unsure = rig.join(source)
        reader = rig.join(source, size=len(DATA) + 1)
        results = await asyncio.gather(
            drink(unsure), drink(reader, 0, len(DATA) + 1), return_exceptions=True
        )
        assert results[0] == DATA
        assert isinstance(results[1], SizeMismatch)


async def test_nobody_has_all_he_was_promised_before_the_digest_is_known(tmp_path: Path) -> None:
    """More comes than a manifest says, and no Content-Length: the promise is not fulfilled."""
    source = ScriptedSource(DATA, says_size=False, serves_ranges=False)
    trickle = iter(range(len(DATA) * 3 // 4, len(DATA)))  # its end is not in sight
    source.valve.open(next(trickle))
    async with flying(tmp_path) as rig:
        promised = len(DATA) // 2
        sipper = Sipper(rig.join(source, size=promised))
        drinking = asyncio.create_task(sipper.rest())
        while not drinking.done() and len(sipper.got) < promised:
            if source.sent == source.valve.limit:  # else the store is still busy
                source.valve.open(next(trickle))
            await asyncio.sleep(0)
        assert len(sipper.got) < promised
        with pytest.raises(SizeMismatch):
            await drinking


async def test_who_joins_with_a_promise_that_was_passed_is_refused_and_others_are_served(
    tmp_path: Path,
) -> None:
    source = ScriptedSource(DATA, says_size=False, serves_ranges=False)
    async with flying(tmp_path) as rig:
        unsure = Sipper(rig.join(source))
        early = rig.join(source, size=len(DATA) // 2)
        await unsure.sip()
        late = rig.join(source, size=1)
        results = await asyncio.gather(
            unsure.rest(), drink(early), drink(late), return_exceptions=True
        )
        assert unsure.got == DATA
        assert all(isinstance(one, SizeMismatch) for one in results[1:])


async def test_a_range_beyond_the_end_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path) as rig:
        with pytest.raises(SizeMismatch):
            await rig.pull(source, start=len(DATA) - 1, stop=len(DATA) + 1)


# -- denials -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Denied("no"), NotFound("blob"), RealmRefused()])
@pytest.mark.parametrize("upstream", ["hub.example.com", "other.example.com"])
async def test_a_denial_removes_only_its_source_and_readers(
    tmp_path: Path, error: PullError, upstream: str
) -> None:
    denied = ScriptedSource(DATA, repository="secret/app", acts=[Act(error=error)] * 50)
    allowed = ScriptedSource(DATA, upstream=upstream)
    async with flying(tmp_path) as rig:
        refused = [rig.join(denied, named=False) for _ in range(2)]
        served = [rig.join(allowed) for _ in range(2)]
        for reader in refused:
            with pytest.raises(type(error)):
                await drink(reader)
        assert [await drink(reader) for reader in served] == [DATA] * 2
        assert len(denied.turns) == 1
        await ended(served[0].flight)
        assert await rig.store.linked("hub.example.com", "secret/app", denied.digest) is None


async def test_a_denial_in_the_middle_goes_on_through_another_repository(tmp_path: Path) -> None:
    first = ScriptedSource(DATA, turn_bytes=30 * KIB, acts=[Act(), Act(error=Denied("no more"))])
    second = ScriptedSource(DATA, repository="other/app")
    async with flying(tmp_path) as rig:
        refused, served = rig.join(first), rig.join(second)
        with pytest.raises(Denied):
            await drink(refused)
        assert await drink(served) == DATA
        assert first.sent + second.sent == len(DATA)
        assert served.flight.proved == {second.key}


async def test_the_last_denial_ends_the_flight(tmp_path: Path) -> None:
    sources = [
        ScriptedSource(DATA, repository=name, acts=[Act(error=Denied(name))] * 9)
        for name in ("a", "b")
    ]
    async with flying(tmp_path) as rig:
        readers = [rig.join(source) for source in sources]
        for reader, name in zip(readers, ("a", "b"), strict=True):
            with pytest.raises(Denied, match=name):
                await drink(reader)
        assert rig.flights.find(readers[0].flight.digest) is None
        labels = {"reason": "denied"}
        assert count(rig.metrics, "pullpool_fill_failures_total", **labels) == 1


async def test_a_refused_repository_may_come_again(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(error=Denied("not yet"))])
    other = ScriptedSource(DATA, repository="other/app")
    other.valve.open(0)
    async with flying(tmp_path) as rig:
        refused, served = rig.join(source), rig.join(other)
        with pytest.raises(Denied):
            await drink(refused)
        refused.close()
        again = rig.join(source)
        assert again.flight is served.flight
        other.valve.open()
        assert await drink(again) == DATA


async def test_what_a_manifest_names_is_late_and_not_missing(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(error=NotFound("blob"))] * (LATE_TRIES - 1))
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA


async def test_what_stays_late_is_missing(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(error=NotFound("blob"))] * 50)
    async with flying(tmp_path) as rig:
        with pytest.raises(NotFound):
            await rig.pull(source)
        assert len(source.turns) == LATE_TRIES


async def test_what_no_manifest_names_is_missing_at_once(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(error=NotFound("blob"))] * 50)
    async with flying(tmp_path) as rig:
        reader = rig.join(source, named=False)
        with pytest.raises(NotFound):
            await drink(reader)
        assert len(source.turns) == 1


@pytest.mark.parametrize("begun", [True, False])
async def test_a_failing_source_gives_way_to_another(tmp_path: Path, begun: bool) -> None:
    acts = [Act(breaks=10 * KIB)] * begun + [Act(error=UNAVAILABLE)] * 99
    failing = ScriptedSource(DATA, upstream="bad.example.com", acts=acts)
    good = ScriptedSource(DATA)
    async with flying(tmp_path) as rig:
        readers = [rig.join(failing), rig.join(good)]
        assert [await drink(reader) for reader in readers] == [DATA] * 2
        assert len(failing.turns) == 1
        assert failing.sent + good.sent == len(DATA)


async def test_with_several_failing_sources_each_has_its_tries(tmp_path: Path) -> None:
    sources = [
        ScriptedSource(DATA, upstream=f"{name}.example.com", acts=[Act(error=UNAVAILABLE)] * 99)
        for name in "ab"
    ]
    async with flying(tmp_path) as rig:
        readers = [rig.join(source) for source in sources]
        for reader in readers:
            with pytest.raises(UpstreamUnavailable):
                await drink(reader)
        assert sorted(len(source.turns) for source in sources) == [TRIES, TRIES]


async def test_a_full_queue_sends_newcomers_away(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(error=QueueFull(5.0))])
    async with flying(tmp_path) as rig:
        readers = [rig.join(source) for _ in range(3)]
        for reader in readers:
            with pytest.raises(QueueFull) as caught:
                await drink(reader)
            assert caught.value.retry_after == 5.0
        assert len(source.turns) == 1


async def test_a_full_queue_only_holds_up_what_has_begun(tmp_path: Path) -> None:
    acts = [Act(), Act(error=QueueFull())]
    source = ScriptedSource(DATA, turn_bytes=30 * KIB, acts=acts)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA


async def test_an_error_shared_by_many_does_not_grow_with_them(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(error=Denied("no"))])
    async with flying(tmp_path) as rig:
        depths = []
        for reader in [rig.join(source) for _ in range(20)]:
            with pytest.raises(Denied) as caught:
                await drink(reader)
            depths.append(len(caught.traceback))
        assert len(set(depths[1:])) == 1


async def test_a_flight_that_has_begun_waits_for_an_upstream_that_is_down(tmp_path: Path) -> None:
    down = UpstreamDown("hub is down", retry_after=0.001)
    acts = [Act(breaks=10 * KIB)] + [Act(error=down)] * (TRIES + 4)
    source = ScriptedSource(DATA, acts=acts)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA


async def test_a_newcomer_is_told_that_the_upstream_is_down(tmp_path: Path) -> None:
    source = ScriptedSource(DATA, acts=[Act(error=UpstreamDown("down", retry_after=0.001))] * 50)
    async with flying(tmp_path) as rig:
        with pytest.raises(UpstreamDown):
            await rig.pull(source)
        assert len(source.turns) == 1


async def test_a_newcomer_goes_to_another_source_when_one_is_down(tmp_path: Path) -> None:
    down = [Act(error=UpstreamDown("down", retry_after=0.001))] * 50
    source = ScriptedSource(DATA, upstream="down.example.com", acts=down)
    other = ScriptedSource(DATA, upstream="up.example.com")
    async with flying(tmp_path) as rig:
        first, second = rig.join(source), rig.join(other)
        assert await drink(first) == await drink(second) == DATA
        assert len(source.turns) == 1


async def test_every_turn_after_a_failure_says_that_it_is_another_try(tmp_path: Path) -> None:
    """For the retry budget: with the word of the failure, until a turn has gone well."""
    acts = [Act(error=UNAVAILABLE), Act(breaks=10 * KIB), Act()]
    source = ScriptedSource(DATA, turn_bytes=30 * KIB, acts=acts)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source) == DATA
        word = UNAVAILABLE.reason
        assert [turn.retry for turn in source.turns] == ["", word, word, "", "", ""]
