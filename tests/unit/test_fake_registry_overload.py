"""The fake registry as a Harbor that breaks beyond so many requests in progress."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

import aiohttp
import pytest

from proxy.testing import (
    POISONED_TOKEN,
    FakeClock,
    FakeRegistry,
    Misbehaviour,
    Overload,
)
from tests.unit.fake_kit import IMAGE, basic, blob_url, claims, manifest_url

DATABASE_TEXTS = (":5432", "Error 1040", "too many clients")


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@contextlib.asynccontextmanager
async def harbor(
    *kinds: str, requests: int = 0, clock: FakeClock | None = None, seed: int = 1
) -> AsyncIterator[FakeRegistry]:
    """A Harbor that breaks in these ways; `ann` may pull team/app, `bob` may not."""
    overload = Overload(requests, dict.fromkeys(kinds, 1.0), refusal_time=0, seed=seed)
    async with FakeRegistry(
        auth="bearer",
        harbor=True,
        users={"ann": "pw", "bob": "pw"},
        private={"team/app": ["ann"]},
        overload=overload if kinds else None,
        token_ttl=60,
        clock=clock or FakeClock(),
    ) as registry:
        registry.push(IMAGE)
        yield registry


def token_url(registry: FakeRegistry, name: str = "team/app") -> str:
    scope = f"repository:{name}:pull"
    return f"{registry.url}/service/token?service={registry.netloc}&scope={scope}"


async def get_token(client: aiohttp.ClientSession, registry: FakeRegistry) -> str:
    async with client.get(token_url(registry), headers=basic("ann", "pw")) as answer:
        assert answer.status == 200
        return str((await answer.json())["token"])


async def bearer(client: aiohttp.ClientSession, registry: FakeRegistry) -> dict[str, str]:
    """The header of a good token, got while nothing was wrong."""
    overload, registry.overload = registry.overload, None
    token = await get_token(client, registry)
    registry.overload = overload
    return {"Authorization": f"Bearer {token}"}


async def ask(
    client: aiohttp.ClientSession, url: str, headers: dict[str, str]
) -> tuple[int, str | None, str]:
    """Status, challenge (None: no such header) and body."""
    async with client.get(url, headers=headers) as answer:
        return answer.status, answer.headers.get("WWW-Authenticate"), await answer.text("latin-1")


class TestMisbehaviours:
    async def test_an_empty_challenge_comes_with_the_databases_text(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with harbor("empty-challenge") as registry:
            headers = await bearer(client, registry)
            status, challenge, body = await ask(client, manifest_url(registry), headers)
            assert (status, challenge) == (401, "")
            assert any(text in body for text in DATABASE_TEXTS)
            assert registry.counters.overloads == {"empty-challenge": 1}

    async def test_a_basic_challenge_answers_a_good_bearer_token(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with harbor("basic-challenge") as registry:
            headers = await bearer(client, registry)
            status, challenge, body = await ask(client, manifest_url(registry), headers)
            assert (status, challenge) == (401, 'Basic realm="harbor"')
            assert "unauthorized to access repository: team/app, action: pull" in body
            registry.overload = None
            assert (await ask(client, manifest_url(registry), headers))[0] == 200

    async def test_a_basic_challenge_strikes_no_request_without_token(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with harbor("basic-challenge") as registry:
            status, challenge, _ = await ask(client, manifest_url(registry), {})
            assert status == 401
            assert challenge is not None
            assert challenge.startswith("Bearer ")
            assert not registry.counters.overloads

    async def test_only_the_text_tells_a_database_error_from_an_honest_answer(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with harbor("database-text") as registry:
            headers = await bearer(client, registry)
            url = manifest_url(registry)
            answers = [await ask(client, url, headers) for _ in range(20)]
            assert {status for status, _, _ in answers} == {401, 500}
            for status, challenge, body in answers:
                assert any(text in body for text in DATABASE_TEXTS)
                assert (challenge is not None and challenge.startswith("Bearer ")) is (
                    status == 401
                )

    async def test_a_token_with_empty_access_is_valid_and_useless_until_it_expires(
        self, client: aiohttp.ClientSession
    ) -> None:
        clock = FakeClock()
        async with harbor("empty-access", clock=clock) as registry:
            token = await get_token(client, registry)
            (entry,) = claims(token)["access"]
            assert (entry["name"], entry["actions"]) == ("team/app", [])
            registry.overload = None
            headers = {"Authorization": f"Bearer {token}"}
            status, challenge, _ = await ask(client, manifest_url(registry), headers)
            assert (status, challenge) == (401, 'Basic realm="harbor"')
            assert registry.counters.overloads == {"empty-access": 1, POISONED_TOKEN: 1}

    async def test_only_a_token_with_a_scope_can_be_emptied(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with harbor("empty-access") as registry:
            url = f"{registry.url}/service/token?service={registry.netloc}"
            assert (await ask(client, url, basic("ann", "pw")))[0] == 200
            assert (await ask(client, url, basic("ann", "wrong")))[0] == 401
            headers = await bearer(client, registry)
            assert (await ask(client, manifest_url(registry), headers))[0] == 200
            assert not registry.counters.overloads

    async def test_a_500_says_nothing(self, client: aiohttp.ClientSession) -> None:
        async with harbor("500") as registry:
            for url in (manifest_url(registry), token_url(registry), f"{registry.url}/v2/"):
                status, challenge, body = await ask(client, url, {})
                assert (status, challenge) == (500, None)
                assert not any(text in body for text in DATABASE_TEXTS)

    async def test_a_reset_comes_before_any_header(self, client: aiohttp.ClientSession) -> None:
        async with harbor("reset") as registry:
            with pytest.raises(aiohttp.ClientOSError):
                await ask(client, token_url(registry), basic("ann", "pw"))
            assert registry.counters.overloads["reset"] == registry.counters.count("token")
            assert registry.counters.seen[0].status is None


class TestRequestsInProgress:
    async def test_it_breaks_beyond_the_number_and_recovers(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with harbor("500", requests=2) as registry:
            headers = await bearer(client, registry)
            with registry.hold(kind="blob") as hold:
                url = blob_url(registry)
                held = [asyncio.create_task(ask(client, url, headers)) for _ in range(2)]
                await hold.arrived(2)
                assert (await ask(client, manifest_url(registry), headers))[0] == 500
                assert (await ask(client, token_url(registry), {}))[0] == 500
            await asyncio.gather(*held)
            assert (await ask(client, manifest_url(registry), headers))[0] == 200
            assert registry.counters.peak_requests == 2

    async def test_token_requests_are_in_progress_too(self, client: aiohttp.ClientSession) -> None:
        async with harbor("500", requests=1) as registry:
            with registry.hold(kind="token") as hold:
                held = asyncio.create_task(ask(client, token_url(registry), basic("ann", "pw")))
                await hold.arrived()
                assert (await ask(client, manifest_url(registry), {}))[0] == 500
            assert (await held)[0] == 200

    async def test_a_client_that_leaves_is_in_progress_no_longer(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with harbor("500", requests=1) as registry:
            headers = await bearer(client, registry)
            with registry.hold(kind="blob") as hold:
                held = asyncio.create_task(ask(client, blob_url(registry), headers))
                await hold.arrived()
                held.cancel()
                await asyncio.wait([held])
                await registry.drop_connections()
                assert hold.waiting == 0
                assert (await ask(client, manifest_url(registry), headers))[0] == 200

    async def test_the_limit_may_move(self, client: aiohttp.ClientSession) -> None:
        async with harbor() as registry:
            headers = await bearer(client, registry)
            registry.overload = Overload(0, {Misbehaviour.SERVER_ERROR: 1}, refusal_time=0)
            assert (await ask(client, manifest_url(registry), headers))[0] == 500
            registry.overload = Overload(1, {Misbehaviour.SERVER_ERROR: 1}, refusal_time=0)
            assert (await ask(client, manifest_url(registry), headers))[0] == 200


class TestMixture:
    async def drawn(self, client: aiohttp.ClientSession, overload: Overload) -> list[str | None]:
        async with harbor() as registry:
            registry.overload = overload
            for _ in range(30):
                with contextlib.suppress(aiohttp.ClientError):
                    await ask(client, manifest_url(registry), {"Authorization": "Bearer x"})
            return [moment.overload for moment in registry.counters.timeline]

    async def test_kinds_are_drawn_by_weight_and_the_same_for_a_seed(
        self, client: aiohttp.ClientSession
    ) -> None:
        kinds = {"empty-challenge": 9.0, "basic-challenge": 1.0}
        first = await self.drawn(client, Overload(0, kinds, refusal_time=0, seed=7))
        again = await self.drawn(client, Overload(0, kinds, refusal_time=0, seed=7))
        other = await self.drawn(client, Overload(0, kinds, refusal_time=0, seed=8))
        assert first == again != other
        counted = Counter(first)
        assert counted["empty-challenge"] > counted["basic-challenge"] > 0

    @pytest.mark.parametrize(
        ("requests", "kinds", "refusal_time"),
        [(-1, {"500": 1.0}, 0.0), (1, {"no-such": 1.0}, 0.0), (1, {"500": 0.0}, 0.0), (1, {}, -1)],
    )
    def test_a_wrong_description_is_refused(
        self, requests: int, kinds: dict[str, float], refusal_time: float
    ) -> None:
        with pytest.raises(ValueError, match=r"negative|no-such|not positive"):
            Overload(requests, kinds, refusal_time)


class TestFigures:
    async def test_the_timeline_tells_when_overload_struck(
        self, client: aiohttp.ClientSession
    ) -> None:
        clock = FakeClock()
        async with harbor(clock=clock) as registry:
            headers = await bearer(client, registry)
            registry.counters.reset()
            await ask(client, manifest_url(registry), headers)
            clock.advance(12)
            registry.overload = Overload(0, {"500": 1.0}, refusal_time=0)
            await ask(client, manifest_url(registry), headers)
            assert registry.counters.timeline_as_json() == [(0.0, None), (12.0, "500")]
            assert registry.counters.as_json()["overloads"] == {"500": 1}

    async def test_sockets_are_counted_at_accept(self, client: aiohttp.ClientSession) -> None:
        async with harbor() as registry:
            for _ in range(3):
                await ask(client, manifest_url(registry), {})
            assert (registry.counters.accepted, registry.counters.peak_sockets) == (1, 1)


class TestDenials:
    """What an overloaded Harbor must be told from: the same answers, meant."""

    @pytest.mark.parametrize(("user", "password"), [("ann", "wrong"), ("bob", "pw")])
    async def test_a_denied_token_is_not_taken_for_a_poisoned_one(
        self, client: aiohttp.ClientSession, user: str, password: str
    ) -> None:
        async with harbor() as registry:
            async with client.get(token_url(registry), headers=basic(user, password)) as answer:
                assert answer.status == 200
                token = (await answer.json())["token"]
            assert claims(token)["access"][0]["actions"] == []
            headers = {"Authorization": f"Bearer {token}"}
            status, challenge, body = await ask(client, manifest_url(registry), headers)
            assert (status, challenge) == (401, 'Basic realm="harbor"')
            assert "unauthorized to access repository: team/app, action: pull" in body
            assert not registry.counters.overloads

    async def test_a_project_that_does_not_exist_is_an_empty_challenge(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with harbor() as registry:
            async with client.get(token_url(registry, "no/such"), headers=basic("ann", "pw")) as it:
                token = (await it.json())["token"]
            assert claims(token)["access"][0]["actions"] == []
            url = manifest_url(registry, name="no/such")
            for headers in ({}, {"Authorization": f"Bearer {token}"}, basic("ann", "pw")):
                status, challenge, body = await ask(client, url, headers)
                assert (status, challenge) == (401, "")
                assert "project no not found" in body
            async with client.head(url) as answer:
                assert answer.headers["WWW-Authenticate"].startswith("Bearer ")

    async def test_a_repository_that_does_not_exist_in_a_project_is_not_found(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with harbor() as registry:
            async with client.get(
                token_url(registry, "team/other"), headers=basic("ann", "pw")
            ) as answer:
                token = (await answer.json())["token"]
            assert claims(token)["access"][0]["actions"] == ["pull"]
            url = manifest_url(registry, name="team/other")
            assert (await ask(client, url, {"Authorization": f"Bearer {token}"}))[0] == 404

    @pytest.mark.parametrize(("user", "password"), [("ann", "wrong"), ("bob", "pw")])
    async def test_basic_logins_are_refused_with_a_basic_challenge(
        self, client: aiohttp.ClientSession, user: str, password: str
    ) -> None:
        async with harbor() as registry:
            headers = basic(user, password)
            status, challenge, _ = await ask(client, manifest_url(registry), headers)
            assert (status, challenge) == (401, 'Basic realm="harbor"')
