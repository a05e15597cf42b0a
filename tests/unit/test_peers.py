"""Taking stripes of other nodes: exact, verified as they come, and left when they do not."""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.fleet.answer import MOST as MOST_HEAD
from proxy.fleet.connection import LUMP
from proxy.fleet.peers import AHEAD, PATIENCE, REFUSAL, SOCKETS, patience_of
from proxy.fleet.pieces import MOST, PIECE
from proxy.fleet.protocol import SEAL, written
from proxy.fleet.seal import Said, Seal
from proxy.oci.digest import Digest
from proxy.oci.errors import PeerBusy, PeerFailed, PeerLied
from proxy.testing import FakeClock
from proxy.testing.peer import HONEST, Conduct, ScriptedGiver, pieces_of
from proxy.throttle import Throttle
from proxy.web.tls import peer_context, server_context
from tests.unit.peer_kit import (
    GIVER,
    SECRET,
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

MIB = 1 << 20
OTHER = b"\x09" * len(STRIPE)
#: Seconds for givers that are to be given up: long for a connection on a machine that is busy.
SHORT = 0.5


@contextlib.asynccontextmanager
async def scripted(
    *conducts: Conduct, patience: float = 30.0, sockets: int = SOCKETS
) -> AsyncIterator[tuple[Taker, ScriptedGiver]]:
    """A giver that behaves so, one conduct for each request, and who asks it."""
    async with (
        ScriptedGiver(STRIPE, *conducts) as giver,
        taking(patience=patience, sockets=sockets) as taker,
    ):
        yield taker, giver


# -- what goes well ---------------------------------------------------------------------------


async def test_a_stripe_comes_piece_by_piece() -> None:
    async with scripted() as (taker, giver):
        pieces = await taker.pieces(giver.url)
        assert pieces == [STRIPE[:PIECE], STRIPE[PIECE : 2 * PIECE], STRIPE[2 * PIECE :]]
        assert taker.outcome("done") == 1
        assert taker.count("bytes_total", direction="received") == len(STRIPE)


@pytest.mark.parametrize("start", [PIECE, 2 * PIECE])
async def test_the_rest_of_a_stripe_comes_from_the_piece_on_that_is_missing(start: int) -> None:
    async with scripted() as (taker, giver):
        assert await taker.take(giver.url, start) == STRIPE[start:]
        assert f"Range: bytes={start}-" in giver.requests[0]


async def test_a_piece_is_handed_out_while_the_next_one_has_not_come() -> None:
    async with (
        scripted(Conduct(stall=PIECE)) as (taker, giver),
        taker.peers.taking(grant(giver.url), wanted()) as transfer,
    ):
        assert b"".join(await anext(transfer)) == STRIPE[:PIECE]
        assert transfer.position == PIECE
        assert transfer.pieces == pieces_of(STRIPE)  # what to pass it on with


async def test_the_next_stripe_comes_over_the_same_socket() -> None:
    async with scripted() as (taker, giver):
        for _ in range(3):
            assert await taker.take(giver.url) == STRIPE
        assert (giver.accepted, len(taker.peers)) == (1, 1)


async def test_a_socket_that_the_giver_has_closed_is_replaced_once() -> None:
    async with scripted(HONEST, Conduct(hangs_up=True), HONEST) as (taker, giver):
        assert await taker.take(giver.url) == STRIPE
        assert await taker.take(giver.url) == STRIPE
        assert giver.accepted == 2
        # But a giver that hangs up on a fresh one has failed.
    async with scripted(Conduct(hangs_up=True)) as (taker, giver):
        with pytest.raises(PeerFailed, match="connection ended"):
            await taker.take(giver.url)
        assert giver.accepted == 1


async def test_an_idle_socket_ends_after_its_time_and_beyond_their_number() -> None:
    async with ScriptedGiver(STRIPE) as one, ScriptedGiver(STRIPE) as two:
        async with taking(idle=1) as taker:
            await taker.take(one.url)
            await taker.take(two.url)
            await one.until_open(0)  # the older one has made way
            assert len(taker.peers) == 1
        async with taking(idle_seconds=0.0) as taker:
            await taker.take(one.url)
            await one.until_open(0)


# -- givers that lie --------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, PIECE - 1, PIECE, 2 * PIECE - 1, 2 * PIECE, len(STRIPE) - 1])
async def test_a_wrong_byte_is_found_at_the_end_of_its_piece(at: int) -> None:
    async with scripted(Conduct(lie=at)) as (taker, giver):
        got, error = await taker.until_failure(giver.url)
        assert isinstance(error, PeerLied)
        assert got == STRIPE[: at // PIECE * PIECE]
        assert taker.outcome("lied") == 1
        await giver.until_open(0)  # whoever lies is not asked again over this socket


@pytest.mark.parametrize(
    ("conduct", "words"),
    [
        (Conduct(pieces=written(pieces_of(OTHER)), body=OTHER), "do not make up"),
        (Conduct(pieces=written(pieces_of(STRIPE[:PIECE]))), "expected the digests of 3"),
        (Conduct(pieces=""), "expected the digests of 3"),
        (Conduct(pieces="%%%"), "base64"),
        (Conduct(body=STRIPE[:-1]), "bytes to send"),
        (Conduct(body=STRIPE + b"!"), "bytes to send"),
        (Conduct(length=0, body=b""), "bytes to send"),
    ],
)
async def test_a_head_that_is_not_the_stripes_is_a_lie(conduct: Conduct, words: str) -> None:
    async with scripted(conduct) as (taker, giver):
        with pytest.raises(PeerLied, match=words):
            await taker.take(giver.url)
        assert taker.outcome("lied") == 1
        await giver.until_open(0)


@pytest.mark.parametrize(
    "span", ["bytes 0-6/7", f"bytes {PIECE}-{len(STRIPE) - 2}/{len(STRIPE)}", "bytes */7", "x"]
)
async def test_another_range_than_was_asked_for_is_a_lie(span: str) -> None:
    async with scripted(Conduct(headers=[("Content-Range", span)])) as (taker, giver):
        with pytest.raises(PeerLied, match="another range"):
            await taker.take(giver.url, PIECE)


async def test_a_whole_stripe_where_the_rest_was_asked_for_is_no_answer() -> None:
    async with scripted(Conduct(status=200)) as (taker, giver):
        with pytest.raises(PeerFailed, match="answered 200"):
            await taker.take(giver.url, PIECE)


# -- givers that fail -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 1, len(STRIPE) - 1]
)
async def test_a_body_that_is_cut_gives_the_pieces_that_came_and_no_more(cut: int) -> None:
    async with scripted(Conduct(cut=cut)) as (taker, giver):
        got, error = await taker.until_failure(giver.url)
        assert "connection ended" in str(error)
        assert got == STRIPE[: cut // PIECE * PIECE]
        assert taker.outcome("failed") == 1


@pytest.mark.parametrize("stall", [0, 1, PIECE, 2 * PIECE + 3])
async def test_a_giver_that_stalls_is_left(stall: int) -> None:
    async with scripted(Conduct(stall=stall), patience=SHORT) as (taker, giver):
        with pytest.raises(PeerFailed, match="came to a halt"):
            await taker.take(giver.url)
        await giver.until_open(0)


async def test_a_byte_now_and_then_is_no_progress() -> None:
    async with scripted(Conduct(stall=PIECE, drip=0.001), patience=SHORT) as (taker, giver):
        got, error = await taker.until_failure(giver.url)
        assert (got, "came to a halt" in str(error)) == (STRIPE[:PIECE], True)
        await giver.until_open(0)


@pytest.mark.parametrize(
    ("rate", "seconds"), [(100e6, 5.0), (2e6, 5.0), (MIB, 9.0), (MIB / 2, 18.0), (1000.0, 30.0)]
)
def test_on_a_slow_line_givers_have_the_time_that_pieces_take(rate: float, seconds: float) -> None:
    """A giver that receives a stripe itself sends nothing while its own next piece comes."""
    assert patience_of(Throttle(rate, clock=FakeClock())) == pytest.approx(seconds)
    assert patience_of(None) == PATIENCE


def lump_of(taker: Taker) -> int:
    """For how many bytes the kernel wakes the one connection that there is."""
    [[berth]] = taker.peers._sockets._berths.values()
    assert berth.sock is not None
    return berth.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)


async def test_a_slow_giver_is_judged_by_all_that_it_has_sent() -> None:
    """The kernel wakes its taker for whole lumps only; what is less is taken at the next look."""
    async with (
        scripted(Conduct(stall=PIECE, drip=0.001), patience=5.0) as (taker, giver),
        taker.peers.taking(grant(giver.url), wanted()) as transfer,
    ):
        await anext(transfer)
        next_one = asyncio.ensure_future(anext(transfer))
        await until(lambda: lump_of(taker) == LUMP or next_one.done())
        await until(lambda: taker.peers.held > 0 or next_one.done())
        assert 0 < taker.peers.held < LUMP
        next_one.cancel()
        await asyncio.wait([next_one])


async def test_the_end_of_a_piece_is_not_waited_for_longer_than_it_has_bytes(
    tmp_path: Path,
) -> None:
    """Whatever its last lump is: by itself, over TLS too, and with nothing behind it."""
    pki = await asyncio.to_thread(Pki.made, tmp_path)
    over_tls = (
        await asyncio.to_thread(server_context, pki.files),
        await asyncio.to_thread(peer_context, pki.files),
    )
    for server, client in ((None, None), over_tls):
        for size in (1, LUMP - 1, LUMP, LUMP + 1, PIECE - 1, PIECE + 1):
            data = os.urandom(size)
            # No look comes in time to take what it would wait for in vain.
            patient = taking(tls=client, patience=1e6)
            async with ScriptedGiver(data, tls=server) as giver, patient as taker:
                ask = grant(giver.url, digest=Digest.of(data))
                async with taker.peers.taking(ask, wanted(data=data)) as transfer:
                    got = b"".join([b"".join(chunks) async for chunks in transfer])
                assert got == data


async def test_a_giver_that_says_nothing_is_left() -> None:
    async with scripted(Conduct(raw=b""), patience=SHORT) as (taker, giver):
        with pytest.raises(PeerFailed, match="said nothing"):
            await taker.take(giver.url)
        await giver.until_open(0)


async def test_a_taker_that_takes_its_time_is_not_the_givers_fault() -> None:
    async with (
        scripted(patience=SHORT) as (taker, giver),
        taker.peers.taking(grant(giver.url), wanted()) as transfer,
    ):
        await anext(transfer)
        await asyncio.sleep(2 * SHORT)
        assert [b"".join(chunks) async for chunks in transfer] == [
            STRIPE[PIECE : 2 * PIECE],
            STRIPE[2 * PIECE :],
        ]


@pytest.mark.parametrize("status", [401, 403, 404, 500, 206, 301, 307])
async def test_a_refusal_is_a_failure_that_keeps_its_socket(status: int) -> None:
    headers = [("Location", "http://127.0.0.1:1/")] if status < 400 else []
    refusal = Conduct(status=status, headers=headers, body=b"no")
    async with scripted(refusal, HONEST) as (taker, giver):
        with pytest.raises(PeerFailed, match=f"answered {status}") as failed:
            await taker.take(giver.url)
        assert failed.value.answered == status
        assert not isinstance(failed.value, PeerBusy | PeerLied)
        assert await taker.take(giver.url) == STRIPE
        assert giver.accepted == 1
        assert "301" not in giver.requests[-1]


async def test_a_long_refusal_is_not_read() -> None:
    async with scripted(Conduct(status=404, body=bytes(REFUSAL + 1)), HONEST) as (taker, giver):
        with pytest.raises(PeerFailed, match="answered 404"):
            await taker.take(giver.url)
        await giver.until_open(0)


@pytest.mark.parametrize(
    ("after", "pause"), [("7", 7.0), ("", 1.0), ("soon", 1.0), ("99999", 60.0), ("-1", 1.0)]
)
async def test_a_busy_giver_says_for_how_long(after: str, pause: float) -> None:
    busy = Conduct(status=503, headers=[("Retry-After", after)] if after else [], body=b"{}")
    async with scripted(busy) as (taker, giver):
        with pytest.raises(PeerBusy) as refused:
            await taker.take(giver.url)
        assert refused.value.retry_after == pause
        assert taker.outcome("busy") == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 3,
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 2 * MOST_HEAD,
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 2 * MOST_HEAD + b"\r\n\r\n",
    ],
)
async def test_what_is_no_answer_of_a_node_is_a_failure(raw: bytes) -> None:
    async with scripted(Conduct(raw=raw)) as (taker, giver):
        with pytest.raises(PeerFailed) as failed:
            await taker.take(giver.url)
        assert failed.value.outcome == "failed"
        await giver.until_open(0)


async def test_what_follows_an_answer_is_not_the_next_one() -> None:
    forged = b"HTTP/1.1 404 Gone\r\nContent-Length: 0\r\n\r\n"
    async with scripted(Conduct(surplus=forged), HONEST) as (taker, giver):
        assert await taker.take(giver.url) == STRIPE
        await giver.until_open(0)
        assert await taker.take(giver.url) == STRIPE
        assert giver.accepted == 2


async def test_a_node_that_is_gone_is_a_failure() -> None:
    async with ScriptedGiver(STRIPE) as giver:
        url = giver.url
    async with taking() as taker:
        with pytest.raises(PeerFailed, match="no connection"):
            await taker.take(url)


# -- whom we dial -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:80",
        "http://127.0.0.1",
        "http://127.0.0.1:0",
        "http://127.0.0.1:65536",
        "http://127.0.0.1:80/v2/",
        "http://a:b@127.0.0.1:80",
        "http://127.0.0.1:80?x",
        "http://127.0.0.1:80\r\nX: y",
        "ftp://127.0.0.1:80",
        "file:///etc/passwd",
    ],
)
async def test_what_is_no_address_of_a_node_is_not_dialled(url: str) -> None:
    async with taking() as taker:
        with pytest.raises(PeerFailed, match="URL is not"):
            await taker.take(url)


async def test_without_secret_or_certificates_only_this_machine_is_asked() -> None:
    async with taking() as taker:
        with pytest.raises(PeerFailed, match="only this machine"):
            await taker.take("http://192.0.2.1:80")


async def test_with_certificates_nobody_is_asked_without() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    async with ScriptedGiver(STRIPE) as giver, taking(tls=context) as taker:
        with pytest.raises(PeerFailed, match="speak https"):
            await taker.take(giver.url)
        assert giver.accepted == 0
    async with taking() as taker:
        with pytest.raises(PeerFailed, match="speak http"):
            await taker.take("https://127.0.0.1:1")


# -- seals ------------------------------------------------------------------------------------


async def test_a_sealed_answer_to_a_sealed_request_is_taken() -> None:
    async with (
        ScriptedGiver(STRIPE, sealer=sealer(GIVER)) as giver,
        taking(sealer=sealer(TAKER)) as taker,
    ):
        assert await taker.take(giver.url) == STRIPE
        assert await taker.take(giver.url, PIECE) == STRIPE[PIECE:]
        assert SECRET.decode() not in "".join(giver.requests)


@pytest.mark.parametrize(
    "conduct",
    [
        Conduct(is_sealed=False),
        Conduct(is_sealed=False, status=404, body=b""),
        Conduct(is_sealed=False, headers=[(SEAL, "v1 mac=" + "0" * 64)]),
        Conduct(is_sealed=False, status=503, headers=[("Retry-After", "60")], body=b""),
    ],
)
async def test_an_answer_without_a_right_seal_is_nobodys(conduct: Conduct) -> None:
    async with (
        ScriptedGiver(STRIPE, conduct, sealer=sealer(GIVER)) as giver,
        taking(sealer=sealer(TAKER)) as taker,
    ):
        with pytest.raises(PeerFailed, match="seal") as failed:
            await taker.take(giver.url)
        # Neither shunned as a liar nor left alone as busy: somebody else may have said it.
        assert failed.value.outcome == "failed"


async def test_an_answer_sealed_with_another_secret_is_nobodys() -> None:
    other = sealer(GIVER, secret=b"a secret of another fleet")
    asked = Seal(TAKER, GIVER, 0, "0" * 32, "0" * 64)
    foreign = Conduct(is_sealed=False, headers=[(SEAL, other.seal_answer(asked, Said(())))])
    async with (
        ScriptedGiver(STRIPE, foreign, sealer=sealer(GIVER)) as giver,
        taking(sealer=sealer(TAKER)) as taker,
    ):
        with pytest.raises(PeerFailed, match="answer is wrong"):
            await taker.take(giver.url)


# -- TLS --------------------------------------------------------------------------------------


async def test_stripes_come_over_tls_from_who_is_named_in_the_certificate(tmp_path: Path) -> None:
    pki = await asyncio.to_thread(Pki.made, tmp_path)
    server = await asyncio.to_thread(server_context, pki.files)
    client = await asyncio.to_thread(peer_context, pki.files)
    async with ScriptedGiver(STRIPE, tls=server) as giver, taking(tls=client) as taker:
        for _ in range(2):
            assert await taker.take(giver.url) == STRIPE
        assert giver.accepted == 1


@pytest.mark.parametrize("case", ["another name", "another authority"])
async def test_a_certificate_of_somebody_else_is_refused(tmp_path: Path, case: str) -> None:
    ours = await asyncio.to_thread(Pki.made, tmp_path / "ours")
    client = await asyncio.to_thread(peer_context, ours.files)
    theirs = await asyncio.to_thread(Pki.made, tmp_path / "theirs")
    if case == "another name":
        await asyncio.to_thread(theirs.issue, "another.node.example", ours.ca)
    server = await asyncio.to_thread(server_context, theirs.files)
    async with ScriptedGiver(STRIPE, tls=server) as giver, taking(tls=client) as taker:
        with pytest.raises(PeerFailed, match="no connection"):
            await taker.take(giver.url)
        assert giver.requests == []
        await until(lambda: len(taker.peers) == 0)


async def test_a_handshake_that_does_not_begin_has_an_end(tmp_path: Path) -> None:
    pki = await asyncio.to_thread(Pki.made, tmp_path)
    client = await asyncio.to_thread(peer_context, pki.files)
    async with (
        ScriptedGiver(STRIPE, tls=client, silent=True) as giver,
        taking(tls=client, patience=0.05) as taker,
    ):
        with pytest.raises(PeerFailed, match="no connection within"):
            await taker.take(giver.url)
        await giver.until_open(0)
        await until(lambda: len(taker.peers) == 0)


# -- sockets ----------------------------------------------------------------------------------


async def test_a_giver_is_asked_over_so_many_sockets_and_no_more() -> None:
    async with scripted(sockets=2) as (taker, giver):
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                transfer = taker.peers.taking(grant(giver.url), wanted())
                await stack.enter_async_context(transfer)
            third = asyncio.create_task(taker.take(giver.url))
            await until(lambda: taker.peers.waiting == 1)
            assert giver.accepted == 2
        assert await third == STRIPE  # as soon as one of them is free
        assert taker.peers.waiting == 0


async def test_a_giver_that_is_asked_for_all_it_may_be_is_not_waited_for_for_ever() -> None:
    async with scripted(Conduct(stall=PIECE), sockets=1, patience=SHORT) as (taker, giver):
        async with taker.peers.taking(grant(giver.url), wanted()):
            with pytest.raises(PeerBusy, match="we ask it for 1 stripes already"):
                await taker.take(giver.url)
        assert giver.accepted == 1


async def test_who_waits_for_a_socket_may_leave() -> None:
    async with scripted(Conduct(stall=PIECE), sockets=1) as (taker, giver):
        async with taker.peers.taking(grant(giver.url), wanted()):
            second = asyncio.create_task(taker.take(giver.url))
            await until(lambda: taker.peers.waiting == 1)
            second.cancel()
            await asyncio.wait([second])
            assert taker.peers.waiting == 0
        assert giver.accepted == 1


async def test_what_was_left_counts_until_it_is_closed_and_is_closed_at_once() -> None:
    async with scripted(Conduct(stall=PIECE), sockets=1) as (taker, giver):
        for turn in range(20):
            async with taker.peers.taking(grant(giver.url), wanted()) as transfer:
                await anext(transfer)
                assert len(taker.peers) == 1
            assert turn + 1 == giver.accepted
        assert taker.outcome("left") == 20


async def test_a_body_that_is_left_is_not_received_to_its_end() -> None:
    big = bytes(MOST)
    async with ScriptedGiver(big) as giver, taking() as taker:
        async with taker.peers.taking(grant(giver.url), wanted(data=big)) as transfer:
            await anext(transfer)
        await giver.until_open(0)
        assert giver.sent < len(big)


async def test_a_giver_cannot_fill_our_memory() -> None:
    big = bytes(MOST)
    async with (
        ScriptedGiver(big) as giver,
        taking() as taker,
        taker.peers.taking(grant(giver.url), wanted(data=big)) as transfer,
    ):
        await anext(transfer)
        for _ in range(5):  # in which the kernels' buffers fill, and no more comes
            await asyncio.sleep(0.02)
            assert taker.peers.held <= AHEAD + (256 << 10)


# -- cancellation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conduct", "silent"),
    [
        (Conduct(raw=b""), False),  # waiting for a head
        (Conduct(stall=0), False),  # … for the first piece
        (Conduct(stall=PIECE + 1), False),  # … for the second
        (Conduct(status=404, body=b"x", length=9), False),  # … for the rest of a refusal
        (HONEST, True),  # … for the handshake
    ],
)
async def test_cancelled_while_it_waits_a_transfer_leaves_no_socket(
    conduct: Conduct, silent: bool, tmp_path: Path
) -> None:
    tls = None
    if silent:
        pki = await asyncio.to_thread(Pki.made, tmp_path)
        tls = await asyncio.to_thread(peer_context, pki.files)
    async with (
        ScriptedGiver(STRIPE, conduct, tls=tls, silent=silent) as giver,
        taking(tls=tls) as taker,
    ):
        task = asyncio.create_task(taker.take(giver.url))
        await giver.until_open(1)
        if not silent:
            await giver.until_asked(1)
        if conduct.stall:
            await giver.until_sent(conduct.stall)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await giver.until_open(0)
        await until(lambda: len(taker.peers) == 0)
        assert taker.outcome("left") == 1


async def test_cancelled_after_any_number_of_steps_a_transfer_leaves_no_socket() -> None:
    """From the look-up of the address to the last hash, wherever it is."""
    async with scripted() as (taker, giver):
        steps, is_done = 0, False
        while not is_done:
            task = asyncio.create_task(taker.take(giver.url))
            for _ in range(steps):
                await asyncio.sleep(0)
            is_done = task.done()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await task == STRIPE
            # What is idle may stay; what was under way may not.
            await until(lambda: len(taker.peers) == taker.peers.idle)
            steps += 1 + steps // 8
        assert await taker.take(giver.url) == STRIPE


async def test_a_client_that_closes_ends_its_transfers() -> None:
    async with scripted(Conduct(stall=PIECE)) as (taker, giver):
        task = asyncio.create_task(taker.take(giver.url))
        await giver.until_sent(PIECE)
        await taker.peers.close()
        with pytest.raises(PeerFailed, match="connection ended"):
            await task
        with pytest.raises(PeerFailed, match="closing"):
            await taker.take(giver.url)


# -- the downlink -----------------------------------------------------------------------------


async def test_what_comes_keeps_to_the_downlink() -> None:
    clock = FakeClock()
    throttle = Throttle(PIECE, clock=clock)  # bytes a second
    async with ScriptedGiver(STRIPE) as giver, taking(downlink=throttle) as taker:
        task = asyncio.create_task(taker.take(giver.url))
        await until(lambda: throttle.waiting == 1 or task.done())
        assert not task.done()
        began = clock()
        while not task.done():
            clock.advance(0.05)
            await asyncio.sleep(0.001)  # for the throttle's timer
        assert await task == STRIPE
        allowed = PIECE * (clock() - began) + 2 * throttle.piece
        assert len(STRIPE) <= allowed
