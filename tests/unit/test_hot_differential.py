"""The hot path says what the handler says: to tens of thousands of requests, good and broken.

Two servers over one store get the same bytes in the same pieces, and must send the same bytes, end
the connection alike, log the same lines and count the same. What differs between any two answers to
one request (date, id, timing) is taken out before.
"""

import asyncio
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.pull.prefetch import AGAIN
from proxy.testing import FakeClock
from tests.unit.hot_kit import Side, exchange, request, two_sides
from tests.unit.proxy_kit import IMAGE, NAME, UPSTREAM, Pullpool, blob_path, manifest_path

SMALL = IMAGE.layers[1]
LARGE = IMAGE.layers[0]
MANIFEST = manifest_path(IMAGE.digest)
TARGETS = (
    MANIFEST,
    MANIFEST,
    manifest_path("v1"),
    manifest_path("v1"),
    manifest_path("v1") + f"?ns={UPSTREAM}",
    MANIFEST + "?n=1&ns=",
    blob_path(SMALL.digest),
    blob_path(IMAGE.config.digest),
    f"/v2/{UPSTREAM}/{NAME}/manifests/v1",
    f"/v2/{NAME}/manifests/%76%31",
    f"/v2/{NAME}/manifests/v1#part",
    f"http://elsewhere.example.com{MANIFEST}",
    "/v2/",
    "/v2/Bad/manifests/v1",
    f"/v2/{NAME}/manifests/../v1",
    f"/v2//{NAME}/manifests/v1",
    f"/v2/{NAME}/manifests/v1?ns=nobody.example.com",
    "*",
)
HEADERS = (
    b"Accept: */*",
    b"Accept: application/vnd.oci.image.index.v1+json",
    f"Accept: {IMAGE.media_type}, text/plain".encode(),
    b"ACCEPT:application/*;q=0.5  ",
    b"Accept:",
    f'If-None-Match: "{IMAGE.digest}"'.encode(),
    b"If-None-Match: *",
    b'If-None-Match: "else"',
    f"If-None-Match: {SMALL.digest}".encode(),
    b"User-Agent: containerd/2.1.0",
    b'User-Agent: a "quoted" agent\ttabbed',
    b"User-Agent: \xe9t\xe9",
    b"Accept-Encoding: gzip",
    b"Authorization: Bearer abcdefghijklmnopqrstuvwxyz0123456789",
    b"X-Unique: 1",
    b"X-Forwarded-For: 198.51.100.1",
    b"Connection: keep-alive",
    b"Connection: Keep-Alive",
    b"Connection: close",
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Upgrade: h2c",
    b"Host: another",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip",
    b"Content-Length: 0",
    b"Content-Length: 3",
    b"Content-Length: x",
    b"Content-Type: text/plain",
    b"Expect: 100-continue",
    b"Range: bytes=0-9",
    b"Range: bytes=5-",
    b"Range: bytes=9999999-",
    b"If-Range: *",
    b"Proxy-Connection: close",
    b"Keep-Alive: timeout=5",
    b"Sec-WebSocket-Key1: x",
    b"Name : space before the colon",
    b" folded: line",
    b"\tfolded",
    b"Bad Name: x",
    b"NoColon",
    b": no name",
    b"",
    b"X-Null: a\x00b",
    b"X-Bell: a\x07b",
    b"X-Latin: \xff\xfe",
    b"X-CR: a\rb",
    b"X-LF: a\nb",
    b"X-Long: " + b"a" * 9000,
    b"X-Longer: " + b"a" * 17000,
    b"GET " + MANIFEST.encode() + b" HTTP/1.1",
)
LINES = (
    b"%s %s HTTP/1.1",
    b"%s %s HTTP/1.1",
    b"%s %s HTTP/1.1",
    b"%s %s HTTP/1.1",
    b"%s %s HTTP/1.0",
    b"%s %s HTTP/1.1 ",
    b"%s  %s HTTP/1.1",
    b"\r\n%s %s HTTP/1.1",
    b"%s %s http/1.1",
    b"%s %s HTTP/2.0",
    b"%s %s",
    b" %s %s HTTP/1.1",
    b"%s\t%s\tHTTP/1.1",
)
METHODS = (b"GET", b"GET", b"GET", b"GET", b"HEAD", b"HEAD", b"get", b"POST", b"OPTIONS", b"GETS")
NOISE = b"\r\n :\t\x00\x7f\xc3GHaz09%/?#,;\"'"
#: What an id begins with.
IDS = (
    b" a",
    b" 00-",
    b"",
    b" a b",
    b" \xe9",
    b" 1\r\nRange: bytes=0-1\r\nX-More: ",
    b" 1\r\nIf-None-Match: *\r\nX-More: ",
    b" 1\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nX-More: ",
    b" 1\nX-More: ",
)
#: Streams of requests in one test, about two requests each.
STREAMS = 500


class Generator:
    """Streams of requests, by one seed."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def stream(self) -> bytes:
        """What one client sends."""
        if self.random.random() < 0.15:
            return self.much_the_same()
        count = self.random.choice((1, 1, 2, 3, 5))
        data = b"".join(self.one() for _ in range(count))
        if self.random.random() < 0.12:
            data = self.mutated(data)
        if self.random.random() < 0.1:
            data += self.one()[: self.random.randrange(60)]
        return data

    def one(self) -> bytes:
        """A request: mostly plain, else with something that is not."""
        pick = self.random.choice
        if self.random.random() < 0.75:
            target, method = pick(TARGETS[:9]), pick(("GET", "GET", "HEAD"))
            headers = [pick(HEADERS[:18]) for _ in range(self.random.randrange(4))]
            return request(target, method)[:-2] + b"".join(h + b"\r\n" for h in headers) + b"\r\n"
        line = pick(LINES) % (pick(METHODS), pick(TARGETS).encode())
        headers = [pick(HEADERS) for _ in range(self.random.choice((0, 1, 1, 2, 3, 70)))]
        if self.random.random() < 0.9:
            headers.insert(0, b"Host: pullpool")
        end = pick((b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n"))
        body = pick((b"", b"", b"", b"", b"abc", b"3\r\nabc\r\n0\r\n\r\n"))
        return end.join((line, *headers, b"", b"")) + body

    def much_the_same(self) -> bytes:
        """A plain request again and again, in the same bytes or with another id in each; sometimes
        with more in the id's place than that."""
        pick = self.random.choice
        target, method = pick(TARGETS[:9]), pick(("GET", "GET", "HEAD"))
        headers = [pick(HEADERS[:18]) for _ in range(self.random.randrange(3))]
        place = self.random.randrange(len(headers) + 1)
        kinds = pick(((IDS[0],), IDS[:3], IDS))
        requests = []
        for _ in range(self.random.choice((3, 4, 6, 9))):
            value = pick(kinds) + b"%x" % self.random.getrandbits(32) * (len(kinds) > 1)
            lines = [*headers[:place], b"X-Id:" + value, *headers[place:]]
            head = b"".join(line + b"\r\n" for line in lines)
            requests.append(request(target, method)[:-2] + head + b"\r\n")
        return b"".join(requests)

    def mutated(self, data: bytes) -> bytes:
        """The same with a few bytes changed, lost or added."""
        changed = bytearray(data)
        for _ in range(self.random.choice((1, 1, 2, 4))):
            at = self.random.randrange(len(changed))
            noise = self.random.choice(NOISE)
            match self.random.randrange(3):
                case 0:
                    changed[at] = noise
                case 1:
                    del changed[at]
                case _:
                    changed.insert(at, noise)
        return bytes(changed)

    def pieces(self, data: bytes) -> tuple[list[bytes], list[int]]:
        """How it arrives: cut, and with how many turns of the loop after each piece."""
        match self.random.randrange(6):
            case 0 | 1:
                chunks = [data]
            case 2:
                chunks = [part + b"\r\n\r\n" for part in data.split(b"\r\n\r\n") if part]
            case 3:
                cuts = sorted(self.random.randrange(len(data) + 1) for _ in range(3))
                chunks = [data[a:b] for a, b in itertools.pairwise((0, *cuts, len(data))) if a < b]
            case 4 if len(data) < 400:
                return [data[i : i + 1] for i in range(len(data))], [0] * len(data)
            case _:
                chunks = list(whole_requests(data))
        pause = self.random.choice((-1, -1, 0, 1, 2, 5))
        return chunks, [pause] * len(chunks)


def whole_requests(data: bytes) -> Iterator[bytes]:
    """Cut behind each empty line."""
    *whole, rest = data.split(b"\r\n\r\n")
    yield from (part + b"\r\n\r\n" for part in whole)
    if rest:
        yield rest


async def prime(pool: Pullpool) -> None:
    """Everything is held, and what is refused is remembered."""
    await pool.get(manifest_path("v1"))
    await pool.get(f"/v2/{UPSTREAM}/{NAME}/manifests/v1")
    for blob in IMAGE.blobs:
        await pool.get(blob_path(blob.digest))
    await pool.stored()


def counted(side: Side) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The counts of requests and bytes, durations left out."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for metric in side.metrics.registry.collect()
        for sample in metric.samples
        if sample.name.startswith("pullpool_http_")
        and sample.name.endswith(("_total", "_count", "_inflight"))
        and "hot" not in sample.name
    }


@pytest.mark.parametrize(("seed", "prefetch"), [*((n, "off") for n in range(6)), (6, "manifest")])
async def test_both_paths_say_the_same_to_whatever_is_sent(
    tmp_path: Path, seed: int, prefetch: str
) -> None:
    loop = type(asyncio.get_running_loop()).__module__  # each loop gets streams of its own
    generator = Generator(f"{seed} on {loop}")
    cache = {"prefetch": prefetch}
    async with two_sides(tmp_path, FakeClock(), cache=cache) as (fast, slow, pool, _):
        await prime(pool)
        for _ in range(STREAMS):
            data = generator.stream()
            chunks, turns = generator.pieces(data)
            expected = await exchange(slow.server, chunks, turns)
            found = await exchange(fast.server, chunks, turns)
            assert found == expected, (chunks, turns)
            assert fast.lines() == slow.lines(), chunks
        assert counted(fast) == counted(slow)
        assert fast.hot_hits > STREAMS / 3  # it was the hot path that was compared


async def test_whichever_path_answers_nothing_is_left_to_fetch_ahead(tmp_path: Path) -> None:
    """Blobs go, time passes, manifests are asked for."""
    pick, clock = random.Random(7), FakeClock()
    cache = {"prefetch": "manifest"}
    async with two_sides(tmp_path, clock, cache=cache) as (fast, slow, pool, fake):
        await prime(pool)
        shelf, prefetch = pool.proxy.store._shelf, pool.proxy.puller._prefetch
        assert prefetch is not None
        for _ in range(200):
            clock.advance(pick.choice((0.0, 0.1, 2.0, AGAIN + 1)))
            gone = pick.sample([blob.digest for blob in IMAGE.blobs], pick.choice((0, 0, 1, 2)))
            await shelf.evict([digest for digest in gone if shelf.ledger.remove(digest)], "room")
            target = pick.choice((MANIFEST, MANIFEST, manifest_path("v1")))
            await exchange(pick.choice((fast, fast, slow)).server, [request(target)], [-1])
            assert all(prefetch._is_there(blob.digest) for blob in IMAGE.blobs)
            if pick.random() < 0.5:
                await pool.stored()
        assert fast.hot_hits > 50
        assert sum(fake.counters.gets[blob.digest] for blob in IMAGE.blobs) > 20
