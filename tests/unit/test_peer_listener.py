"""The listener for other nodes: whom it answers, with what, and what nobody gets out of it."""

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.fleet.pieces import PIECE
from proxy.fleet.protocol import PIECES, SEAL, StripeAsk
from proxy.fleet.seal import SKEW, request_said
from proxy.fleet.stripes import LARGEST
from proxy.oci.digest import Digest
from proxy.oci.errors import Denied, NotFound, PeerBusy, PeerFailed, PeerLied, StoreFailed
from proxy.testing import FakeClock
from proxy.throttle import Throttle
from proxy.web.peer import PeerContexts, even, is_loopback, whole_pieces
from proxy.web.reload import Unusable
from proxy.web.transfers import LEAST_RATE, MOST, places
from tests.unit.giving_kit import FlowingStripe, OneStripe, WholeStripe, giver
from tests.unit.peer_kit import (
    DIGEST,
    GIVER,
    STRIPE,
    TAKER,
    Pki,
    Taker,
    grant,
    sealer,
    taking,
    wanted,
)
from tests.unit.proxy_kit import until

PATH = StripeAsk(DIGEST, 0, 1).path
PLAIN = f"GET {PATH} HTTP/1.1\nHost: x\nPullpool-Rank: 1\nConnection: close\n"


# -- what goes well ---------------------------------------------------------------------------


async def test_what_has_another_hash_than_the_taker_was_told_is_not_given() -> None:
    stripe = FlowingStripe()
    for piece in range(3):
        stripe.come(piece)
    async with giver(OneStripe(stripe)) as node, taking() as taker:
        other = replace(wanted(), stripe_hash=bytes(32))
        with pytest.raises(PeerFailed) as refused:
            async with taker.peers.taking(grant(node.url), other):
                pass
        assert not isinstance(refused.value, PeerLied)  # it may have what was published before
        assert refused.value.answered == 409


@pytest.mark.parametrize("start", [0, PIECE, 2 * PIECE])
async def test_a_stripe_arrives_whole_or_from_a_piece_on(start: int) -> None:
    stripe = FlowingStripe()
    for piece in range(start // PIECE, 3):
        stripe.come(piece)
    shelf = OneStripe(stripe)
    async with giver(shelf) as node, taking() as taker:
        assert await taker.take(node.url, start) == STRIPE[start:]
        assert shelf.asked == [StripeAsk(DIGEST, 0, 1, start, wanted().stripe_hash)]
        await until(lambda: node.events("peer_request") != [])
        [line] = node.events("peer_request")
        status = 206 if start else 200
        assert (line["status"], line["bytes"]) == (status, len(STRIPE) - start)
        assert node.count("requests_total", code=str(status)) == 1
        assert node.count("bytes_total", direction="sent") == len(STRIPE) - start
        assert stripe.is_closed


async def test_a_stripe_is_passed_on_while_its_giver_receives_it() -> None:
    stripe = FlowingStripe()
    async with (
        giver(OneStripe(stripe)) as node,
        taking() as taker,
        taker.peers.taking(grant(node.url), wanted()) as transfer,
    ):
        assert stripe.reads == 0  # its head has come, before any byte
        for piece in range(3):
            stripe.come(piece)
            chunks = await anext(transfer)
            assert b"".join(chunks) == STRIPE[piece * PIECE :][:PIECE]
            assert stripe.reads == piece + 1


async def test_a_stripe_that_its_giver_cannot_finish_ends_behind_its_last_piece() -> None:
    stripe = FlowingStripe()
    stripe.come(0)
    stripe.fail(PeerFailed("its own giver has gone"))
    async with giver(OneStripe(stripe)) as node, taking() as taker:
        got, error = await taker.until_failure(node.url)
        assert got == STRIPE[:PIECE]
        assert error.outcome == "failed"
        await until(lambda: stripe.is_closed and node.events("peer_request") != [])
        assert node.events("peer_request")[0]["error"] == "its own giver has gone"


@pytest.mark.parametrize("tls", [False, True])
async def test_a_stripe_that_fails_by_a_defect_of_ours_ends_as_well(
    tmp_path: Path, tls: bool
) -> None:
    stripe = FlowingStripe()
    stripe.come(0)
    stripe.come(2)  # which is not the next one
    contexts = None
    if tls:
        contexts = await PeerContexts.read((await asyncio.to_thread(Pki.made, tmp_path)).files)
    trust = None if contexts is None else contexts.client()
    async with (
        giver(OneStripe(stripe), contexts=contexts) as node,
        taking(tls=trust, patience=2.0) as taker,
    ):
        got, error = await taker.until_failure(node.url)
        assert got in (STRIPE[:PIECE], b"")  # a reset may overtake what came before it
        assert "the connection" in str(error)  # ended or broke; not: came to a halt
        await until(lambda: node.events("peer_request") != [])
        assert "AssertionError" in node.events("peer_request")[0]["exception"]
        assert node.transfers.under_way == 0


async def test_stripes_and_refusals_go_over_one_connection() -> None:
    shelf = OneStripe(WholeStripe())
    async with giver(shelf) as node, taking() as taker:
        assert await taker.take(node.url) == STRIPE
        shelf.stripe = NotFound("blob", "not here")
        with pytest.raises(PeerFailed, match="answered 404"):
            await taker.take(node.url)
        shelf.stripe = WholeStripe()
        assert await taker.take(node.url) == STRIPE
        assert node.listener.state().open == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotFound("blob", "not here"), 404),
        (Denied("not for others"), 403),
        (StoreFailed("the disk"), 500),
        (ValueError("a defect of ours"), 500),
    ],
)
async def test_a_refusal_is_one_whatever_the_cause(error: Exception, status: int) -> None:
    async with (
        giver(OneStripe(error), sealer=sealer(GIVER)) as node,
        taking(sealer=sealer(TAKER)) as taker,
    ):
        with pytest.raises(PeerFailed, match=f"answered {status}") as failed:
            await taker.take(node.url)
        assert failed.value.answered == status
        await until(lambda: node.events("peer_request") != [])
        [line] = node.events("peer_request")
        assert (line["node"], line["status"]) == (TAKER, status)
        assert ("exception" in line) == isinstance(error, ValueError)


# -- who is no node ---------------------------------------------------------------------------


async def test_nodes_that_share_the_secret_are_answered() -> None:
    async with (
        giver(OneStripe(WholeStripe()), sealer=sealer(GIVER)) as node,
        taking(sealer=sealer(TAKER)) as taker,
    ):
        assert await taker.take(node.url) == STRIPE
        assert node.count("unsealed_total") == 0


async def refused(node_url: str, taker: Taker, *, node: str = GIVER) -> None:
    with pytest.raises(PeerFailed, match="no seal") as failed:
        await taker.take(node_url, node=node)
    assert failed.value.outcome == "failed"


async def test_another_secret_another_node_and_another_time_are_refused() -> None:
    shelf, clock = OneStripe(WholeStripe()), FakeClock(1_000_000.0 + SKEW + 1)
    async with giver(shelf, sealer=sealer(GIVER)) as node:
        async with taking(sealer=sealer(TAKER, secret=b"another fleet's secret")) as taker:
            await refused(node.url, taker)
        async with taking(sealer=sealer(TAKER)) as taker:
            await refused(node.url, taker, node="c" * 16)  # a node that was here before
        async with taking(sealer=sealer(TAKER, wall=clock)) as taker:
            await refused(node.url, taker)
        async with taking() as taker:
            with pytest.raises(PeerFailed, match="answered 401"):
                await taker.take(node.url)
        await until(lambda: len(node.events("peer_request")) == 4)
        errors = [line["error"] for line in node.events("peer_request")]
        assert shelf.asked == []
        assert node.count("unsealed_total") == 4
        for error, words in zip(
            errors, ("seal is wrong", "for node cccc", "31.0 s ahead", "no seal"), strict=True
        ):
            assert words in error


async def test_a_request_that_was_overheard_is_of_no_use() -> None:
    shelf = OneStripe(WholeStripe())
    async with giver(shelf, sealer=sealer(GIVER)) as node:
        seal = sealer(TAKER).seal(GIVER, request_said("GET", PATH, "1", None))
        request = f"{PLAIN}{SEAL}: {seal}\n\n"
        assert (await node.ask(request)).startswith(b"HTTP/1.1 200")
        again = await node.ask(request)
        assert again.startswith(b"HTTP/1.1 401")
        assert SEAL.encode() not in again  # nor does a stranger learn what a seal is like
        assert b"used before" not in again
        for other in (
            request.replace("stripes/0", "stripes/1"),
            request.replace("GET", "HEAD"),
            request.replace("Rank: 1", "Rank: 2"),
            f"{PLAIN}Range: bytes={PIECE}-\n{SEAL}: {seal}\n\n",
            f"{PLAIN}{SEAL}: {seal}\n{SEAL}: {seal}\n\n",
        ):
            assert (await node.ask(other)).startswith(b"HTTP/1.1 401")
        assert len(shelf.asked) == 1


async def test_strangers_learn_nothing_of_paths() -> None:
    async with giver(OneStripe(WholeStripe()), sealer=sealer(GIVER)) as node:
        for path in ("/", "/v2/", "/metrics", PATH, "/fleet/v2/blobs/x/stripes/0"):
            head = f"GET {path} HTTP/1.1\nHost: x\nConnection: close\n\n"
            assert (await node.ask(head)).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (PLAIN.replace("GET", "POST"), 405),
        (PLAIN.replace("GET", "HEAD"), 405),
        (PLAIN.replace(PATH, "/v2/"), 404),
        (PLAIN.replace(PATH, "/metrics"), 404),
        (PLAIN.replace(PATH, PATH + "?x=1"), 404),
        (PLAIN.replace(PATH, PATH.replace("/fleet", "/../fleet")), 404),
        (PLAIN.replace(PATH, PATH.replace("sha256:", "sha256%3a")), 404),
        (PLAIN.replace(PATH, "http://127.0.0.1" + PATH), 404),
        (PLAIN.replace("Pullpool-Rank: 1\n", ""), 400),
        (PLAIN + "Pullpool-Rank: 1\n", 400),
        (PLAIN + "Range: bytes=1-\n", 400),
        (PLAIN + "Range: bytes=0-1\n", 400),
        (PLAIN + f"Range: bytes={3 * PIECE}-\n", 400),
        (PLAIN + f"Range: bytes={PIECE}-\nRange: bytes={PIECE}-\n", 400),
        (PLAIN + "Content-Length: 3\n", 400),
        (PLAIN + "Transfer-Encoding: chunked\n", 400),
        (PLAIN.replace("HTTP/1.1", "nonsense"), 400),
    ],
)
async def test_any_other_request_is_refused(head: str, status: int) -> None:
    async with giver(OneStripe(WholeStripe())) as node:
        answer = await node.ask(head + "\n")
        assert answer.split(b" ", 2)[1] == str(status).encode()
        assert PIECES.encode() not in answer
        await until(lambda: node.events("peer_request") != [])
        assert node.events("peer_request")[0]["status"] == status


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "node.example", ""])
async def test_without_secret_or_certificates_others_cannot_reach_it(host: str) -> None:
    with pytest.raises(Unusable, match="not this machine"):
        async with giver(OneStripe(WholeStripe()), host=host):
            raise AssertionError("it listens")


def test_what_only_this_machine_reaches() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "", "127.0.0.1.example")))


# -- TLS --------------------------------------------------------------------------------------


async def test_nodes_with_certificates_of_the_fleet_are_answered(tmp_path: Path) -> None:
    pki = await asyncio.to_thread(Pki.made, tmp_path)
    contexts = await PeerContexts.read(pki.files)
    async with (
        giver(OneStripe(WholeStripe()), contexts=contexts) as node,
        taking(tls=contexts.client()) as taker,
    ):
        for start in (0, PIECE, 2 * PIECE):
            assert await taker.take(node.url, start) == STRIPE[start:]
        await until(lambda: len(node.events("peer_request")) == 3)
        assert {line["name"] for line in node.events("peer_request")} == {"a node"}


async def test_secret_and_certificates_are_both_needed_where_both_are_set(tmp_path: Path) -> None:
    pki = await asyncio.to_thread(Pki.made, tmp_path)
    contexts = await PeerContexts.read(pki.files)
    async with giver(OneStripe(WholeStripe()), contexts=contexts, sealer=sealer(GIVER)) as node:
        async with taking(tls=contexts.client(), sealer=sealer(TAKER)) as taker:
            assert await taker.take(node.url) == STRIPE
        async with taking(tls=contexts.client()) as taker:
            with pytest.raises(PeerFailed, match="answered 401"):
                await taker.take(node.url)


@pytest.mark.parametrize("case", ["none", "another authority's"])
async def test_who_shows_no_certificate_of_the_fleet_is_not_answered(
    tmp_path: Path, case: str
) -> None:
    pki = await asyncio.to_thread(Pki.made, tmp_path / "ours")
    theirs = await asyncio.to_thread(Pki.made, tmp_path / "theirs")
    contexts = await PeerContexts.read(pki.files)
    trust = (await PeerContexts.read(theirs.files)).client()
    await asyncio.to_thread(trust.load_verify_locations, pki.files.client_ca)
    shelf = OneStripe(WholeStripe())
    async with giver(shelf, contexts=contexts) as node:
        if case == "none":
            with contextlib.suppress(ConnectionError):
                assert await node.ask(PLAIN + "\n") == b""  # no HTTP is spoken here
        else:
            async with taking(tls=trust) as taker:
                with pytest.raises(PeerFailed):
                    await taker.take(node.url)
        assert shelf.asked == []


async def test_a_door_that_needs_certificates_stays_closed_without_tls() -> None:
    async with giver(OneStripe(WholeStripe()), needs_certificate=True) as node, taking() as taker:
        with pytest.raises(PeerFailed, match="answered 401"):
            await taker.take(node.url)


async def test_certificates_are_read_again_for_both_directions(tmp_path: Path) -> None:
    pki = await asyncio.to_thread(Pki.made, tmp_path)
    contexts = await PeerContexts.read(pki.files)
    before = contexts.client()
    async with giver(OneStripe(WholeStripe()), contexts=contexts) as node:
        await asyncio.to_thread(pki.files.cert.write_bytes, b"half a file")
        await until(lambda: node.events("not_reloaded") != [])
        assert contexts.client() is before
        renewed = await asyncio.to_thread(Pki.made, tmp_path)  # another authority altogether
        await until(lambda: node.events("reloaded") != [] and contexts.client() is not before)
        now = (await PeerContexts.read(renewed.files)).client()
        async with taking(tls=now) as taker:
            assert await taker.take(node.url) == STRIPE
        async with taking(tls=before) as taker:
            with pytest.raises(PeerFailed, match="no connection"):
                await taker.take(node.url)


async def test_what_cannot_be_used_is_told_at_the_start(tmp_path: Path) -> None:
    pki = await asyncio.to_thread(Pki.made, tmp_path)
    await asyncio.to_thread(pki.files.key.unlink)
    with pytest.raises(Unusable, match=r"key\.pem"):
        await PeerContexts.read(pki.files)


# -- room -------------------------------------------------------------------------------------


async def test_so_many_transfers_go_out_and_who_comes_then_is_sent_elsewhere() -> None:
    stripe = FlowingStripe()
    async with (
        giver(OneStripe(stripe), places=2, waiting=0) as node,
        taking() as taker,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(2):
            await stack.enter_async_context(taker.peers.taking(grant(node.url), wanted()))
        assert node.transfers.under_way == 2
        assert node.count("transfers") == 2
        with pytest.raises(PeerBusy) as busy:
            await taker.take(node.url)
        assert (busy.value.answered, busy.value.retry_after) == (503, 1.0)
        await stack.aclose()
        await until(lambda: node.transfers.under_way == 0)
        assert stripe.is_closed


async def test_few_wait_for_a_place_and_not_for_long() -> None:
    stripe = FlowingStripe()
    async with (
        giver(OneStripe(stripe), places=1, waiting=1, patience=0.05) as node,
        taking() as taker,
        taker.peers.taking(grant(node.url), wanted()),
    ):
        with pytest.raises(PeerBusy):
            await taker.take(node.url)
        assert (node.transfers.under_way, node.transfers.waiting) == (1, 0)


async def test_who_waits_gets_the_place_that_comes_free() -> None:
    shelf = OneStripe(FlowingStripe())
    async with giver(shelf, places=1) as node, taking() as taker:
        async with taker.peers.taking(grant(node.url), wanted()):
            shelf.stripe = WholeStripe()
            later = asyncio.create_task(taker.take(node.url))
            await until(lambda: node.transfers.waiting == 1)
        assert await later == STRIPE
        await until(lambda: node.transfers.under_way == 0)


async def test_a_taker_that_takes_nothing_loses_its_place() -> None:
    big = bytes(LARGEST)
    async with giver(OneStripe(WholeStripe(big)), stuck=0.1) as node:
        _, writer = await asyncio.open_connection("127.0.0.1", node.listener.port, limit=1)
        writer.write(PLAIN.replace("\n", "\r\n").encode() + b"\r\n")
        await until(lambda: node.events("peer_request") != [])
        assert "took nothing" in node.events("peer_request")[0]["error"]
        assert node.transfers.under_way == 0
        writer.transport.abort()


async def test_a_taker_that_leaves_frees_its_place_and_the_stripe() -> None:
    stripe = FlowingStripe()
    stripe.come(0)
    async with giver(OneStripe(stripe)) as node, taking() as taker:
        async with taker.peers.taking(grant(node.url), wanted()) as transfer:
            await anext(transfer)
        await until(lambda: stripe.is_closed and node.transfers.under_way == 0)
        await until(lambda: node.events("peer_request") != [])
        assert node.events("peer_request")[0]["status"] == 499


async def test_a_node_that_drains_gives_no_more() -> None:
    async with giver(OneStripe(WholeStripe()), is_draining=True) as node, taking() as taker:
        with pytest.raises(PeerBusy):
            await taker.take(node.url)


async def test_what_goes_to_all_takers_keeps_to_the_uplink() -> None:
    rate = 20 * PIECE
    uplink = Throttle(rate, clock=time.monotonic)
    async with (
        giver(OneStripe(WholeStripe()), uplink=uplink) as node,
        taking() as one,
        taking() as two,
    ):
        began = time.monotonic()
        got = await asyncio.gather(one.take(node.url), two.take(node.url))
        assert list(got) == [STRIPE, STRIPE]
        allowed = rate * (time.monotonic() - began) + rate * 0.05 + uplink.piece
        assert 2 * len(STRIPE) <= allowed


@pytest.mark.parametrize("piece", [1000, 50_000, 71_250, PIECE // 2, PIECE, 4 * PIECE])
def test_what_is_paced_is_cut_into_equal_parts_of_whole_pieces(piece: int) -> None:
    """So that a taker's next piece begins only when the one before is on its way."""
    body = bytes(2 * PIECE + 7)
    parts = list(whole_pieces(body, even(PIECE, piece)))
    assert b"".join(bytes(part) for part, _ in parts if isinstance(part, bytes)) == body
    assert max(len(part) for part, _ in parts if isinstance(part, bytes)) <= piece
    begins, at = [], 0
    for part, goes_on in parts:
        assert isinstance(part, bytes)
        if not goes_on:
            begins.append(at)
        at += len(part)
    assert begins == [0, PIECE, 2 * PIECE]


def test_places_are_as_many_as_an_uplink_can_feed() -> None:
    assert places(None) == MOST
    assert places(LEAST_RATE / 2) == 1
    assert places(3 * LEAST_RATE) == 3
    assert places(1e12) == MOST


async def test_another_digest_is_another_blob() -> None:
    shelf = OneStripe(WholeStripe())
    other = Digest.of(b"other", "sha512")
    async with giver(shelf) as node, taking() as taker:
        asked = grant(node.url, digest=other, stripe=7)
        async with taker.peers.taking(asked, wanted()) as transfer:
            assert [len(b"".join(chunks)) async for chunks in transfer] == [PIECE, PIECE, 7]
        assert [(ask.digest, ask.stripe) for ask in shelf.asked] == [(other, 7)]
