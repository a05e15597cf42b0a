"""Any order of joins, leaves, breaks, denials and full disks.

Whatever happens, each reader gets exactly its bytes or an error, never others and never a clean end
too early; and when all is over nothing is left.
"""

import asyncio
import tempfile
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from proxy.oci.digest import Digest
from proxy.oci.errors import Denied, NotFound, PullError, QueueFull, UpstreamUnavailable
from proxy.pull.flight_settings import FlightSettings
from proxy.store.store import Disk
from tests.unit.flight_kit import Act, Rig, ScriptedSource, ended, flying, read, turns_of
from tests.unit.store_kit import FullDisk, blob, roomy

SIZE = 4000
DATA = blob(7, SIZE)
ENDLESS = 1 << 30
#: These clients all go on sooner or later, so no fill may ever need to lose patience with them.
PATIENT = 1e9


@dataclass(frozen=True)
class Client:
    """When a client joins (in loop turns), what it wants, and how it behaves."""

    joins: int
    source: int
    start: int
    stop: int | None
    pace: int  # loop turns between pieces
    leaves: int | None  # after so many pieces
    close_only: bool  # leaves without a byte
    named: bool


@dataclass(frozen=True)
class Origin:
    """One repository, its script, and whether it knows Range and sizes."""

    acts: tuple[Act, ...]
    serves_ranges: bool
    says_size: bool
    chunk: int
    turn_bytes: int
    overdue: int  # bytes
    segments: int
    spare: int


@dataclass(frozen=True)
class World:
    clients: tuple[Client, ...]
    origins: tuple[Origin, ...]
    slots: int
    room: int
    max_size: int
    window: int
    far: int
    patience: float
    on_abandon: str
    segment_bytes: int
    long_segment: int
    is_right: bool  # the bytes are those that were asked for
    closes: int | None  # shutdown, in loop turns


ERRORS = st.sampled_from(
    [UpstreamUnavailable("reset"), Denied("no"), NotFound("blob"), QueueFull(0.0)]
)
ACTS = st.one_of(
    st.just(Act()),
    st.builds(Act, error=ERRORS),
    st.builds(Act, breaks=st.integers(0, SIZE)),
    st.builds(Act, ends=st.integers(0, SIZE)),
    st.builds(Act, total=st.sampled_from([SIZE - 1, SIZE + 1])),
)
ORIGINS = st.builds(
    Origin,
    acts=st.lists(ACTS, max_size=6).map(tuple),
    serves_ranges=st.booleans(),
    says_size=st.booleans(),
    chunk=st.sampled_from([64, 300, SIZE]),
    turn_bytes=st.sampled_from([500, ENDLESS]),
    overdue=st.sampled_from([700, ENDLESS]),
    segments=st.sampled_from([1, 3, 8]),
    spare=st.sampled_from([0, 1, 2, 8]),
)


@st.composite
def clients(draw: st.DrawFn) -> Client:
    start = draw(st.one_of(st.just(0), st.integers(0, SIZE)))
    stop = draw(st.one_of(st.none(), st.integers(start, SIZE)))
    return Client(
        joins=draw(st.integers(0, 60)),
        source=draw(st.integers(0, 1)),
        start=start,
        stop=stop if start == 0 or stop is not None else SIZE,
        pace=draw(st.sampled_from([0, 0, 1, 10])),
        leaves=draw(st.one_of(st.none(), st.integers(0, 5))),
        close_only=draw(st.booleans()) and draw(st.booleans()),
        named=draw(st.booleans()),
    )


WORLDS = st.builds(
    World,
    clients=st.lists(clients(), min_size=1, max_size=6).map(tuple),
    origins=st.tuples(ORIGINS, ORIGINS),
    slots=st.sampled_from([1, 2, 100]),
    room=st.sampled_from([0, 1500, ENDLESS, ENDLESS]),
    max_size=st.sampled_from([1000, ENDLESS, ENDLESS]),
    window=st.sampled_from([2, 100, 600]),
    far=st.sampled_from([200, ENDLESS]),
    patience=st.sampled_from([0.0, PATIENT]),
    on_abandon=st.sampled_from(["finish", "cancel"]),
    segment_bytes=st.sampled_from([1, 100, 700]),
    long_segment=st.sampled_from([1, 300, ENDLESS]),
    is_right=st.sampled_from([True, True, True, False]),
    closes=st.one_of(st.none(), st.none(), st.integers(0, 100)),
)


def build(world: World, digest: Digest) -> list[ScriptedSource]:
    slots = asyncio.Semaphore(world.slots)
    sources = []
    for number, origin in enumerate(world.origins):
        source = ScriptedSource(
            DATA,
            digest=digest,
            repository=f"team/{number}",
            chunk=origin.chunk,
            turn_bytes=origin.turn_bytes,
            serves_ranges=origin.serves_ranges,
            says_size=origin.says_size,
            acts=list(origin.acts),
            slots=slots,
            segments=origin.segments,
        )
        source.spare = origin.spare
        source.is_overdue = lambda turn, most=origin.overdue, source=source: (  # type: ignore[misc]
            turn.sent >= most or source.waiting > 0
        )
        sources.append(source)
    return sources


async def live(rig: Rig, sources: list[ScriptedSource], client: Client, *, is_right: bool) -> str:
    """One client's life; how it ended. Asserts that it never got anything but its bytes."""
    for _ in range(client.joins):
        await asyncio.sleep(0)
    try:
        reader = rig.join(sources[client.source], f"{client.joins}", named=client.named)
    except PullError as error:
        return error.reason
    got = bytearray()
    left = client.leaves
    try:
        if client.close_only:
            return "left at once"
        async with aclosing(reader.pieces(client.start, client.stop)) as pieces:
            async for piece in pieces:
                got += read(piece)
                for _ in range(client.pace):
                    await asyncio.sleep(0)
                if left == 0:
                    return "left"
                left = None if left is None else left - 1
    except PullError as error:
        return error.reason
    finally:
        reader.close()
        stop = SIZE if client.stop is None else client.stop
        assert bytes(got) == DATA[client.start : client.start + len(got)]
        if client.start == 0 and not is_right:
            assert len(got) < (reader.flight.size or SIZE), "the last of wrong bytes"
    assert len(got) == stop - client.start, "a clean end too early"
    return "served"


async def play(world: World, directory: Path) -> list[str]:
    digest = Digest.of(DATA if world.is_right else b"another")
    disk = Disk(
        free=roomy().free,
        write=FullDisk(world.room).write,
        sync=lambda _: None,
        sync_directory=lambda _: None,
    )
    async with flying(
        directory,
        max_size=world.max_size,
        disk=disk,
        window=world.window,
        far=world.far,
        patience=world.patience,
        on_abandon=world.on_abandon,
        segment_bytes=world.segment_bytes,
        long_segment=world.long_segment,
    ) as rig:
        sources = build(world, digest)
        lives = [live(rig, sources, client, is_right=world.is_right) for client in world.clients]
        tasks = [asyncio.create_task(one) for one in lives]
        if world.closes is not None:
            for _ in range(world.closes):
                await asyncio.sleep(0)
            await rig.flights.close()
        endings = await asyncio.gather(*tasks)
        for reader in rig.readers:
            await ended(reader.flight)
        assert not any(source.active or source.waiting for source in sources)
        kept = await rig.kept(digest)
        assert kept is None or (world.is_right and kept == DATA)
        assert all(not turn.is_open for reader in rig.readers for turn in turns_of(reader))
    return endings


@given(world=WORLDS)
@settings(max_examples=60, deadline=None)
def test_everybody_gets_exact_bytes_or_an_error_and_nothing_is_left(world: World) -> None:
    with tempfile.TemporaryDirectory(prefix="pullpool-test-") as directory:
        endings = asyncio.run(play(world, Path(directory)))
    for ending in set(endings):
        event(ending)


@given(
    world=st.builds(
        World,
        clients=st.lists(clients(), min_size=1, max_size=6).map(tuple),
        origins=st.tuples(
            *[
                st.builds(
                    Origin,
                    acts=st.lists(st.builds(Act, breaks=st.integers(1, SIZE)), max_size=4).map(
                        tuple
                    ),
                    serves_ranges=st.just(True),
                    says_size=st.booleans(),
                    chunk=st.sampled_from([64, SIZE]),
                    turn_bytes=st.sampled_from([500, ENDLESS]),
                    overdue=st.just(ENDLESS),
                    segments=st.sampled_from([1, 3, 8]),
                    spare=st.sampled_from([0, 8]),
                )
            ]
            * 2
        ),
        slots=st.sampled_from([1, 100]),
        room=st.sampled_from([0, 1500, ENDLESS]),
        max_size=st.sampled_from([1000, ENDLESS]),
        window=st.sampled_from([2, 600]),
        far=st.sampled_from([200, ENDLESS]),
        patience=st.sampled_from([0.0, PATIENT]),
        on_abandon=st.sampled_from(["finish", "cancel"]),
        segment_bytes=st.sampled_from([1, 100, 700]),
        long_segment=st.sampled_from([1, 300, ENDLESS]),
        is_right=st.just(True),
        closes=st.none(),
    )
)
@settings(max_examples=40, deadline=None)
def test_breaks_and_full_disks_alone_fail_nobody(world: World) -> None:
    with tempfile.TemporaryDirectory(prefix="pullpool-test-") as directory:
        endings = asyncio.run(play(world, Path(directory)))
    assert set(endings) <= {"served", "left", "left at once"}


def test_the_defaults_are_those_of_the_design() -> None:
    assert FlightSettings().on_abandon == "finish"
    assert FlightSettings().window_bytes == 16 << 20
    assert 0 <= FlightSettings().pause(3) <= 0.8


@pytest.mark.parametrize("tries", [1, 10, 100])
def test_a_pause_is_bounded(tries: int) -> None:
    assert 0 <= FlightSettings().pause(tries) <= 5.0
