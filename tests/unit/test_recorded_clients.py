"""What real clients send, replayed byte for byte, and what each is answered in every state.

`heads.json` holds what skopeo, podman, Buildah, containerd and dockerd sent for one pull, with
their versions and the date; `tests/integration/record_heads.py` recorded it and says how. It does
not matter to which address: Host names none that is looked at.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from proxy.config import HostPort
from proxy.testing import Answer as Scripted
from proxy.testing import FakeImage, FakeRegistry, Fault, make_image
from tests.unit.proxy_kit import (
    UPSTREAM,
    Pullpool,
    blob_path,
    manifest_path,
    running,
    slots_taken,
)
from tests.unit.virtual import now, run_virtually

RECORDED: Mapping[str, Any] = json.loads((Path(__file__).parent / "heads.json").read_text())
CLIENTS: Mapping[str, Mapping[str, Any]] = RECORDED["clients"]
#: What "later" is for whom (D7): these retry a 429 after Retry-After, the others go on from a 503.
LATER = {"skopeo": 429, "podman": 429, "buildah": 429, "containerd": 503, "dockerd": 503}
FALSE_401 = Scripted(401, {"WWW-Authenticate": ""}, b'{"errors":[{"code":"UNAUTHORIZED"}]}')


def recorded_image(client: str) -> FakeImage:
    """What the client pulled when it was recorded."""
    name = str(CLIENTS[client]["repository"])
    return make_image(name, "v1", layers=(300_000, 5_000), seed=7)


@dataclass(frozen=True, slots=True)
class Got:
    """A client's answer, when it came, and its body if it has an end."""

    status: int
    headers: Mapping[str, str]
    at: float
    body: bytes = b""

    @property
    def code(self) -> str:
        [error] = json.loads(self.body)["errors"]
        return str(error["code"])


async def replay(address: HostPort, head: str) -> Got:
    """Send these bytes; the answer's head, and its body unless it is yet to come."""
    began = now()
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(head.encode("latin-1"))
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        headers = {name.lower(): text for name, _, text in (line.partition(": ") for line in lines)}
        at = now() - began
        is_whole = "queued" not in headers.get("warning", "") and not head.startswith("HEAD")
        length = int(headers.get("content-length", 0)) if is_whole else 0
        return Got(int(status.split()[1]), headers, at, await reader.readexactly(length))
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@dataclass(frozen=True, slots=True)
class Expected:
    """An answer: at which second, or `by` which; `status` None is the client's own "later"."""

    status: int | None
    code: str | None = None
    word: str | None = None
    at: float = 0
    by: float = 0.0
    warning: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class State:
    """What the proxy is in when the client asks, and what is then said of whom."""

    tag: Expected  # a manifest asked for by tag
    digest: Expected  # and by digest
    blob: Expected
    pulled: bool = False  # everything was pulled before, and the tag's ttl is over
    sized: bool = False  # only the blob's size is known
    fault: Scripted | None = None
    is_down: bool = False
    slots_taken: bool = False
    upstream: Mapping[str, Any] = field(default_factory=dict)
    ttl: str = "30s"


LATE = Expected(None, "TOOMANYREQUESTS", at=20, headers={"retry-after": "10"})
SPILLED = Expected(None, "TOOMANYREQUESTS", at=19, headers={"retry-after": "10"})
EARLY = Expected(200, word="miss", at=20, warning="queued, 1 ahead")
HIT = Expected(200, word="hit")
DOWN = Expected(502, "UNAVAILABLE", by=5)  # after some tries
DENIED = Expected(403, "DENIED")

STATES = {
    "hit": State(HIT, HIT, HIT, pulled=True, ttl="1h"),
    "queued": State(LATE, LATE, EARLY, sized=True, slots_taken=True),
    "spill": State(
        SPILLED, SPILLED, SPILLED, sized=True, slots_taken=True, upstream={"overload": "spill"}
    ),
    "overloaded": State(
        LATE,
        LATE,
        Expected(200, word="miss", at=20, warning="queued, 0 ahead"),
        sized=True,
        fault=FALSE_401,
    ),
    "denied": State(DENIED, DENIED, DENIED, fault=Scripted(403)),
    "not found": State(
        Expected(404, "MANIFEST_UNKNOWN"),
        Expected(404, "MANIFEST_UNKNOWN"),
        Expected(404, "BLOB_UNKNOWN"),
        fault=Scripted(404),
    ),
    "upstream down": State(DOWN, DOWN, DOWN, is_down=True),
    "stale": State(
        Expected(200, word="stale", by=2, warning="served stale: "),
        HIT,
        HIT,
        pulled=True,
        is_down=True,
    ),
}


@contextlib.asynccontextmanager
async def in_state(directory: Path, state: State, image: FakeImage) -> AsyncIterator[Pullpool]:
    """A proxy that is in this state for this image."""
    clock, upstream = asyncio.get_running_loop().time, {"max_connections": 1, **state.upstream}
    settings: dict[str, Any] = {"upstreams": {UPSTREAM: upstream}, "tags": {"ttl": state.ttl}}
    async with contextlib.AsyncExitStack() as stack:
        fakes = await stack.enter_async_context(contextlib.AsyncExitStack())
        fake = await fakes.enter_async_context(FakeRegistry())
        fake.push(image)
        # With pauses, or an upstream that is busy would be asked a thousand times in no time.
        proxy = running(directory, fake.url, clock=clock, pause=0.7, **settings)
        pool = await stack.enter_async_context(proxy)
        if state.pulled:
            await pool.get(manifest_path("v1", image.name))
            for blob in image.blobs:
                await pool.get(blob_path(blob.digest, image.name))
            await pool.stored()
            await asyncio.sleep(31)
        if state.sized:
            await pool.head(blob_path(image.layers[0].digest, image.name))
        if state.is_down:
            await fakes.aclose()
        if state.fault is not None:
            fake.script(Fault(state.fault, times=None))
        if state.slots_taken:
            await stack.enter_async_context(slots_taken(pool, fake.url))
        yield pool


def expected_of(state: State, kind: str, head: str) -> Expected:
    if kind == "ping":
        return Expected(200)
    if kind.startswith("blob"):
        return state.blob
    return state.digest if "/manifests/sha256:" in head else state.tag


def check(got: Got, expected: Expected, client: str, head: str) -> None:
    assert got.status == (expected.status or LATER[client])
    assert got.at == pytest.approx(expected.at, abs=expected.by + 0.05)
    assert got.headers["docker-distribution-api-version"] == "registry/2.0"
    assert "x-request-id" in got.headers
    assert "www-authenticate" not in got.headers
    assert got.headers.get("oci-namespace") == (UPSTREAM if "?ns=" in head else None)
    assert got.headers.get("x-pullpool-cache") == expected.word
    assert got.headers.items() >= expected.headers.items()
    warning = got.headers.get("warning", "")
    assert warning.startswith(f'299 - "{expected.warning}' if expected.warning else "")
    assert bool(warning) is bool(expected.warning)
    if expected.code is not None:
        assert got.headers["content-type"] == "application/json"
        if not head.startswith("HEAD"):
            assert got.code == expected.code


def content(kind: str, image: FakeImage) -> tuple[str, str, bytes]:
    """Media type, digest and bytes of what a client gets."""
    if kind.startswith("blob"):
        layer = image.layers[0]
        return "application/octet-stream", str(layer.digest), layer.data
    return image.media_type, str(image.digest), image.manifest


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("state", STATES)
def test_a_client_gets_the_answer_that_it_understands(
    tmp_path: Path, state: str, client: str
) -> None:
    image = recorded_image(client)

    async def ask(number: int, kind: str, head: str) -> None:
        async with in_state(tmp_path / str(number), STATES[state], image) as pool:
            expected = expected_of(STATES[state], kind, head)
            got = await replay(pool.address, head)
            check(got, expected, client, head)
            if kind == "ping":
                assert got.body == b"{}"
            elif got.status == 200:
                media_type, digest, data = content(kind, image)
                assert got.headers["content-type"] == media_type
                assert got.headers["docker-content-digest"] == digest
                assert got.headers["content-length"] == str(len(data))
                assert got.body == (data if got.body else b"")
                assert bool(got.body) is (method(head) == "GET" and not is_early(got))

    heads: Mapping[str, str] = CLIENTS[client]["heads"]
    for number, (kind, head) in enumerate(heads.items()):
        run_virtually(ask(number, kind, head))


def method(head: str) -> str:
    return head.partition(" ")[0]


def is_early(got: Got) -> bool:
    return "queued" in got.headers.get("warning", "")


def test_every_client_was_recorded_with_what_it_asks_for() -> None:
    def kinds(client: str) -> set[str]:
        return set(CLIENTS[client]["heads"])

    assert CLIENTS.keys() == LATER.keys()
    for client in ("skopeo", "podman", "buildah"):
        assert kinds(client) == {"ping", "manifest GET", "blob GET"}
    assert kinds("containerd") == {"manifest HEAD", "manifest GET", "blob GET"}
    assert kinds("dockerd") == {"ping", "manifest HEAD", "manifest GET", "blob GET"}
