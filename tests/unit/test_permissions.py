"""Permissions by themselves: what is remembered, for whom, and for how long."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest

from proxy.oci.digest import Digest
from proxy.oci.errors import Denied, NotFound, PullError, UpstreamUnavailable
from proxy.oci.paths import Kind
from proxy.pull.asking import TRIES, Questions
from proxy.pull.asks import Ask
from proxy.pull.permissions import Permissions
from proxy.store.store import Link, Store
from proxy.testing import FakeClock
from proxy.upstream.client import Head
from proxy.upstream.routing import Route, Upstream
from proxy.upstream.turns import Ticket
from tests.unit.proxy_kit import until
from tests.unit.store_kit import opened, silent

DIGEST = Digest.of(b"a blob")
HARBOR = Upstream("harbor.example.com", "https://harbor.example.com")


def ask_of(repository: str) -> Ask:
    return Ask(Route(HARBOR, repository, repository, None), "10.0.0.1", 0.0)


class Registry:
    """Answers HEADs: what a test tells it to, for each repository."""

    def __init__(self) -> None:
        self.answers: dict[str, Head | PullError] = {}
        self.asked: list[str] = []
        self.go = asyncio.Event()
        self.go.set()

    async def head_blob(self, repository: str, digest: Digest, _ticket: Ticket) -> Head:
        self.asked.append(repository)
        await self.go.wait()
        answer = self.answers[repository]
        if isinstance(answer, PullError):
            raise answer
        return answer


class Kit:
    def __init__(self, store: Store) -> None:
        self.clock = FakeClock()
        self.registry = Registry()
        self.permissions = Permissions(
            store,
            proofs=Questions(log=silent(), pause=lambda _: 0.0),
            negative_ttl=10,
            clock=self.clock,
        )

    def prove(self, repository: str, **options: Any) -> Awaitable[Link]:
        # What it is asked of an upstream is one method, which Registry has.
        client: Any = self.registry
        return self.permissions.prove_blob(ask_of(repository), DIGEST, client, **options)


@pytest.fixture
async def kit(tmp_path: Path) -> AsyncIterator[Kit]:
    async with opened(tmp_path) as store:
        kit = Kit(store)
        yield kit
        await kit.permissions.close()


async def test_a_proof_is_a_link_from_then_on(kit: Kit) -> None:
    kit.registry.answers["team/app"] = Head(DIGEST, None, 6)
    assert await kit.permissions.link(ask_of("team/app"), DIGEST) is None
    assert await kit.prove("team/app") == Link(6)
    assert await kit.permissions.link(ask_of("team/app"), DIGEST) == Link(6)
    assert await kit.permissions.link(ask_of("team/other"), DIGEST) is None


@pytest.mark.parametrize("error", [Denied("no"), NotFound("blob")])
async def test_a_refusal_is_remembered_for_its_repository_until_its_time_is_over(
    kit: Kit, error: PullError
) -> None:
    kit.registry.answers |= {"team/app": error, "team/other": Head(DIGEST, None, 6)}
    for _ in range(3):
        with pytest.raises(type(error)):
            await kit.prove("team/app")
    assert await kit.prove("team/other") == Link(6)
    assert kit.registry.asked == ["team/app", "team/other"]
    kit.clock.advance(10)
    kit.registry.answers["team/app"] = Head(DIGEST, None, 6)
    assert await kit.prove("team/app") == Link(6)


async def test_a_failure_is_not_remembered(kit: Kit) -> None:
    kit.registry.answers["team/app"] = UpstreamUnavailable("down")
    with pytest.raises(UpstreamUnavailable):
        await kit.prove("team/app")
    kit.registry.answers["team/app"] = Head(DIGEST, None, 6)
    assert await kit.prove("team/app") == Link(6)


async def test_what_a_manifest_names_is_asked_for_again_and_not_remembered(kit: Kit) -> None:
    kit.registry.answers["team/app"] = NotFound("blob")
    with pytest.raises(NotFound):
        await kit.prove("team/app", named=True)
    assert len(kit.registry.asked) == TRIES
    kit.permissions.check(ask_of("team/app"), Kind.BLOB, str(DIGEST))


async def test_what_was_refused_a_moment_ago_is_tried_when_a_manifest_names_it(kit: Kit) -> None:
    kit.registry.answers["team/app"] = NotFound("blob")
    with pytest.raises(NotFound):
        await kit.prove("team/app")
    kit.registry.answers["team/app"] = Head(DIGEST, None, 6)
    assert await kit.prove("team/app", named=True) == Link(6)


async def test_a_refusal_that_is_told_again_does_not_grow(kit: Kit) -> None:
    kit.permissions.remember(ask_of("team/app"), Kind.MANIFEST, "v1", Denied("no"))
    depths = set()
    for _ in range(3):
        with pytest.raises(Denied) as caught:
            kit.permissions.check(ask_of("team/app"), Kind.MANIFEST, "v1")
        depths.add(len(caught.traceback))
    assert len(depths) == 1


async def test_one_proof_for_all_who_want_it_at_once(kit: Kit) -> None:
    kit.registry.answers["team/app"] = Head(DIGEST, None, 6)
    kit.registry.go.clear()
    proofs = [asyncio.ensure_future(kit.prove("team/app")) for _ in range(5)]
    await until(lambda: bool(kit.registry.asked))
    kit.registry.go.set()
    assert set(await asyncio.gather(*proofs)) == {Link(6)}
    assert kit.registry.asked == ["team/app"]


async def test_a_remembered_refusal_holds_no_frames_of_the_requests_it_answered(kit: Kit) -> None:
    kit.registry.answers["team/app"] = NotFound("blob", "no such blob", detail={"name": "x"})
    for _ in range(3):
        with pytest.raises(NotFound) as caught:
            await kit.prove("team/app")
        error = caught.value
        assert (error.message, error.detail, error.kind) == ("no such blob", {"name": "x"}, "blob")
    assert kit.registry.asked == ["team/app"]
    kept = list(kit.permissions._refusals.values())
    assert [(e.__traceback__, e.__cause__, e.__context__) for e in kept] == [(None, None, None)]


async def test_no_blob_by_a_manifests_digest_says_nothing_of_the_manifest(kit: Kit) -> None:
    """containerd asks for what it knows by digest alone as a blob first."""
    kit.registry.answers["team/app"] = NotFound("blob")
    with pytest.raises(NotFound):
        await kit.prove("team/app")
    with pytest.raises(NotFound):
        kit.permissions.check(ask_of("team/app"), Kind.BLOB, str(DIGEST))
    kit.permissions.check(ask_of("team/app"), Kind.MANIFEST, str(DIGEST))
