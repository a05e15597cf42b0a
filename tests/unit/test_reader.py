"""How bytes reach one client: from the file, or by turns of its own."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.errors import (
    Denied,
    PullError,
    QueueFull,
    SizeMismatch,
    UpstreamUnavailable,
)
from proxy.pull.reader import (
    MAX_OWN_TURN,
    MIN_OWN_TURN,
    OWN_TURN_BYTES,
    SLOW_CLIENT,
    SPAN,
    FileSpan,
    next_own_turn,
)
from proxy.pull.sources import TRIES, WAIT_SECONDS
from tests.unit.flight_kit import (
    KIB,
    Act,
    ScriptedSource,
    Sipper,
    a_while,
    drink,
    flying,
    until,
)
from tests.unit.proxy_kit import Pauses
from tests.unit.store_kit import blob

MIB = 1 << 20
DATA = blob(1, 400 * KIB + 7)
FAR = 32 * KIB


# -- ranges of a fill ----------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 70 * KIB), (399 * KIB, 400 * KIB + 7)])
async def test_a_range_gets_exactly_its_bytes(tmp_path: Path, start: int, stop: int) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source, start=start, stop=stop) == DATA[start:stop]


async def test_an_empty_range_gets_nothing(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source, start=9, stop=9) == b""


async def test_a_range_is_served_before_the_rest_has_come(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(50 * KIB)
    async with flying(tmp_path) as rig:
        assert await rig.pull(source, start=KIB, stop=40 * KIB) == DATA[KIB : 40 * KIB]


async def test_a_reader_that_lags_lets_the_loop_go_round_between_two_spans(tmp_path: Path) -> None:
    """Its client may take all of a large blob as fast as it is sent."""
    data = blob(5, 2 * SPAN + 5)
    source = ScriptedSource(data, chunk=SPAN, turn_bytes=len(data))
    async with flying(tmp_path) as rig:
        reader = rig.join(source)
        await until(lambda: reader.flight.is_verified)
        lengths, order = list[int](), list[str]()
        async for piece in reader.pieces(0, None):
            assert isinstance(piece, FileSpan)
            lengths.append(piece.length)
            order.append("piece")
            asyncio.get_running_loop().call_soon(order.append, "turn")
        assert lengths == [SPAN, SPAN, 5]
        assert order[:5] == ["piece", "turn", "piece", "turn", "piece"]


async def test_a_far_range_takes_a_turn_of_its_own(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    other = ScriptedSource(DATA, repository="other/app")
    source.valve.open(10 * KIB)
    async with flying(tmp_path, far=FAR) as rig:
        whole = asyncio.create_task(rig.pull(source))
        await until(lambda: len(source.turns) == 1)
        got = await rig.pull(other, "bob", start=300 * KIB, stop=310 * KIB)
        assert got == DATA[300 * KIB : 310 * KIB]
        assert [(turn.start, turn.length) for turn in other.turns] == [(300 * KIB, 10 * KIB)]
        assert other.turns[0].clients == {"bob"}
        source.valve.open()
        assert await whole == DATA
        assert len(source.turns) == 1


async def test_a_near_range_waits_for_the_fill(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(10 * KIB)
    async with flying(tmp_path, far=FAR) as rig:
        first = rig.join(source)
        await until(lambda: first.flight.mark == 10 * KIB)
        near = asyncio.create_task(rig.pull(source, start=40 * KIB, stop=50 * KIB))
        await a_while()
        source.valve.open()
        assert await near == DATA[40 * KIB : 50 * KIB]
        assert len(source.turns) == 1


async def test_a_far_range_that_the_fill_catches_up_with_follows_it(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(0)
    other = ScriptedSource(DATA, repository="other/app")
    other.valve.open(101 * KIB)
    async with flying(tmp_path, far=FAR) as rig:
        rig.join(source)
        far = Sipper(rig.join(other), 100 * KIB, len(DATA))
        sip = asyncio.create_task(far.sip())
        await until(lambda: other.sent == KIB)
        source.valve.open(200 * KIB)
        await until(lambda: far.reader.flight.mark == 200 * KIB)
        other.acts.append(Act(error=UpstreamUnavailable("not asked again")))
        other.valve.open(164 * KIB)
        other.data = other.data[: 164 * KIB]  # its turn ends here
        other.valve.open()
        await sip
        source.valve.open()
        assert await far.rest() == DATA[100 * KIB :]
        assert len(other.turns) == 1


# -- turns of its own ----------------------------------------------------------------------------


async def test_a_turn_of_its_own_holds_no_slot_while_the_client_is_slow(tmp_path: Path) -> None:
    slots = asyncio.Semaphore(2)
    source = ScriptedSource(DATA, slots=slots)
    source.valve.open(0)
    other = ScriptedSource(DATA, repository="other/app", slots=slots)
    async with flying(tmp_path, far=FAR) as rig:
        rig.join(source)
        slow = [Sipper(rig.join(other), n * KIB, len(DATA)) for n in (100, 200, 300)]
        for sipper in slow:
            assert await sipper.sip()
            assert other.active == 0


async def test_a_body_of_its_own_that_breaks_goes_on_at_its_byte(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(0)
    acts = [Act(breaks=10 * KIB), Act(error=UpstreamUnavailable("reset")), Act(breaks=KIB)]
    other = ScriptedSource(DATA, repository="other/app", acts=acts)
    async with flying(tmp_path, far=FAR) as rig:
        rig.join(source)
        got = await rig.pull(other, start=100 * KIB, stop=300 * KIB)
        assert got == DATA[100 * KIB : 300 * KIB]
        assert other.sent == 200 * KIB
        assert [turn.start for turn in other.turns] == [n * KIB for n in (100, 110, 110, 111)]


@pytest.mark.parametrize(
    "act",
    [Act(error=UpstreamUnavailable("reset")), Act(error=QueueFull()), Act(ends=0), Act(breaks=0)],
)
async def test_tries_of_its_own_come_to_an_end(tmp_path: Path, act: Act) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(0)
    other = ScriptedSource(DATA, repository="other/app", acts=[act] * 50)
    async with flying(tmp_path, far=FAR) as rig:
        rig.join(source)
        with pytest.raises((UpstreamUnavailable, QueueFull)):
            await rig.pull(other, start=100 * KIB, stop=300 * KIB)
        waits = isinstance(act.error, QueueFull)
        assert len(other.turns) == (1 + WAIT_SECONDS / Pauses.EACH if waits else TRIES)


@pytest.mark.parametrize(
    ("act", "error"),
    [(Act(error=Denied("no")), Denied), (Act(total=len(DATA) - 1), SizeMismatch)],
)
async def test_a_refusal_of_its_own_hurts_nobody_else(
    tmp_path: Path, act: Act, error: type[PullError]
) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(0)
    other = ScriptedSource(DATA, repository="other/app", acts=[act] * 9)
    async with flying(tmp_path, far=FAR) as rig:
        first = rig.join(source)
        with pytest.raises(error):
            await rig.pull(other, start=100 * KIB, stop=300 * KIB)
        assert len(other.turns) == 1
        source.valve.open()
        assert await drink(first) == DATA


async def test_without_range_a_turn_of_its_own_lasts_to_the_end(tmp_path: Path) -> None:
    source = ScriptedSource(DATA)
    source.valve.open(0)
    other = ScriptedSource(DATA, repository="other/app", serves_ranges=False)
    async with flying(tmp_path, far=FAR) as rig:
        rig.join(source)
        got = await rig.pull(other, start=100 * KIB, stop=300 * KIB)
        assert got == DATA[100 * KIB : 300 * KIB]
        assert len(other.turns) == 1
        assert other.sent <= 304 * KIB


async def test_a_turn_of_its_own_follows_the_pace_of_its_client(tmp_path: Path) -> None:
    data = blob(2, 12 * MIB)
    source = ScriptedSource(data)
    source.valve.open(0)
    other = ScriptedSource(data, repository="other/app", chunk=MIB)
    async with flying(tmp_path, far=FAR) as rig:
        rig.join(source)
        got = await rig.pull(other, start=MIB, stop=12 * MIB)
        assert got == data[MIB:]
        assert [turn.length for turn in other.turns] == [MIB, 2 * MIB, 4 * MIB, 4 * MIB]


@given(st.lists(st.floats(0, 10), max_size=20))
def test_a_turn_of_its_own_stays_within_bounds(paces: list[float]) -> None:
    length = OWN_TURN_BYTES
    for seconds in paces:
        before, length = length, next_own_turn(length, seconds)
        assert MIN_OWN_TURN <= length <= MAX_OWN_TURN
        assert (length <= before) if seconds > SLOW_CLIENT else (length >= before)
