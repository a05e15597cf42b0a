"""Logins, tokens, Harbor's ways and signed URLs of the fake registry."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest

from proxy.testing import (
    EmptyAccess,
    FakeClock,
    FakeRegistry,
    Fault,
    Kind,
)
from tests.unit.fake_kit import (
    IMAGE,
    LAYER,
    basic,
    blob_url,
    claims,
    error_code,
    manifest_url,
)


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


class TestBasic:
    async def test_everybody_needs_a_login(self, client: aiohttp.ClientSession) -> None:
        async with FakeRegistry(auth="basic", users={"ann": "pw"}) as registry:
            registry.push(IMAGE)
            for headers, status in [({}, 401), (basic("ann", "x"), 401), (basic("ann", "pw"), 200)]:
                async with client.get(manifest_url(registry), headers=headers) as answer:
                    assert answer.status == status
                    if status == 401:
                        assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")

    async def test_a_private_repository_is_denied_to_others(
        self, client: aiohttp.ClientSession
    ) -> None:
        users = {"ann": "pw", "bob": "pw"}
        async with FakeRegistry(
            auth="basic", users=users, private={"team/app": ["ann"]}
        ) as registry:
            registry.push(IMAGE)
            async with client.get(manifest_url(registry), headers=basic("bob", "pw")) as answer:
                assert answer.status == 403
                assert await error_code(answer) == "DENIED"


async def challenge(client: aiohttp.ClientSession, url: str) -> Mapping[str, str]:
    """The parameters of the Bearer challenge that an anonymous request gets."""
    async with client.get(url) as answer:
        assert answer.status == 401
        scheme, _, rest = answer.headers["WWW-Authenticate"].partition(" ")
    assert scheme == "Bearer"
    pairs = (pair.split("=", 1) for pair in rest.split(","))
    return {key: value.strip('"') for key, value in pairs}


async def fetch_token(
    client: aiohttp.ClientSession, asked: Mapping[str, str], login: Mapping[str, str]
) -> tuple[int, dict[str, Any]]:
    params = {key: asked[key] for key in ("service", "scope") if key in asked}
    async with client.get(asked["realm"], params=params, headers=login) as answer:
        return answer.status, await answer.json()


async def try_token(client: aiohttp.ClientSession, url: str, token: str) -> tuple[int, str]:
    async with client.get(url, headers={"Authorization": f"Bearer {token}"}) as answer:
        return answer.status, answer.headers.get("WWW-Authenticate", "")


class TestBearer:
    @pytest.mark.parametrize("opaque", [False, True])
    async def test_a_token_opens_what_it_was_asked_for(
        self, client: aiohttp.ClientSession, opaque: bool
    ) -> None:
        async with FakeRegistry(auth="bearer", opaque_tokens=opaque) as registry:
            registry.push(IMAGE)
            registry.retag("other/app", "v1", IMAGE)
            asked = await challenge(client, manifest_url(registry))
            assert asked["scope"] == "repository:team/app:pull"
            status, reply = await fetch_token(client, asked, {})
            assert status == 200
            assert (reply["token"].count(".") == 2) is not opaque
            assert (await try_token(client, manifest_url(registry), reply["token"]))[0] == 200
            elsewhere = manifest_url(registry, name="other/app")
            status, header = await try_token(client, elsewhere, reply["token"])
            assert status == 401
            assert 'error="insufficient_scope"' in header
            assert registry.counters.tokens_issued == 1

    async def test_a_token_expires_by_the_clock(self, client: aiohttp.ClientSession) -> None:
        clock = FakeClock()
        async with FakeRegistry(auth="bearer", token_ttl=60, clock=clock) as registry:
            registry.push(IMAGE)
            asked = await challenge(client, manifest_url(registry))
            _, reply = await fetch_token(client, asked, {})
            assert reply["expires_in"] == 60
            clock.advance(59)
            assert (await try_token(client, manifest_url(registry), reply["token"]))[0] == 200
            clock.advance(1)
            status, header = await try_token(client, manifest_url(registry), reply["token"])
            assert status == 401
            assert 'error="invalid_token"' in header

    async def test_revoked_tokens_are_refused(self, client: aiohttp.ClientSession) -> None:
        async with FakeRegistry(auth="bearer") as registry:
            registry.push(IMAGE)
            asked = await challenge(client, manifest_url(registry))
            _, reply = await fetch_token(client, asked, {})
            registry.tokens.revoke_all()
            assert (await try_token(client, manifest_url(registry), reply["token"]))[0] == 401

    async def test_wrong_rights_are_refused(self, client: aiohttp.ClientSession) -> None:
        async with FakeRegistry(
            auth="bearer", users={"ann": "pw", "bob": "pw"}, private={"team/app": ["ann"]}
        ) as registry:
            registry.push(IMAGE)
            asked = await challenge(client, manifest_url(registry))
            assert (await fetch_token(client, asked, basic("ann", "x")))[0] == 401
            assert (await fetch_token(client, asked, basic("bob", "pw")))[0] == 403
            assert (await fetch_token(client, asked, {}))[0] == 403
            assert (await fetch_token(client, asked, basic("ann", "pw")))[0] == 200

    async def test_another_registry_may_serve_the_tokens(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with (
            FakeRegistry(name="localhost") as issuer,
            FakeRegistry(auth="bearer", token_service=issuer) as registry,
        ):
            registry.push(IMAGE)
            asked = await challenge(client, manifest_url(registry))
            assert asked["realm"].startswith(f"http://localhost:{issuer.port}/")
            _, reply = await fetch_token(client, asked, {})
            assert (await try_token(client, manifest_url(registry), reply["token"]))[0] == 200
            assert issuer.counters.count(Kind.TOKEN) == 1
            assert registry.counters.count(Kind.TOKEN) == 0


class TestHarbor:
    @pytest.mark.parametrize(
        ("user", "password"),
        [("ann", "wrong"), ("bob", "pw")],
    )
    async def test_refusals_are_tokens_that_grant_nothing(
        self, client: aiohttp.ClientSession, user: str, password: str
    ) -> None:
        async with FakeRegistry(
            auth="bearer",
            harbor=True,
            users={"ann": "pw", "bob": "pw"},
            private={"team/app": ["ann"]},
        ) as registry:
            registry.push(IMAGE)
            url = manifest_url(registry)
            asked = await challenge(client, url)
            status, reply = await fetch_token(client, asked, basic(user, password))
            assert status == 200
            (entry,) = claims(reply["token"])["access"]
            assert (entry["name"], entry["actions"]) == ("team/app", [])
            status, header = await try_token(client, url, reply["token"])
            assert (status, header) == (401, 'Basic realm="harbor"')

    async def test_only_a_request_without_scope_is_refused(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with FakeRegistry(auth="bearer", harbor=True, users={"ann": "pw"}) as registry:
            asked = await challenge(client, f"{registry.url}/v2/")
            assert "scope" not in asked
            assert (await fetch_token(client, asked, basic("ann", "wrong")))[0] == 401
            assert (await fetch_token(client, asked, {}))[0] == 401
            assert (await fetch_token(client, asked, basic("ann", "pw")))[0] == 200

    async def test_a_poisoned_token_is_valid_and_empty(self, client: aiohttp.ClientSession) -> None:
        async with FakeRegistry(auth="bearer", harbor=True) as registry:
            registry.push(IMAGE)
            registry.script(Fault(EmptyAccess(), kind="token"))
            asked = await challenge(client, manifest_url(registry))
            _, poisoned = await fetch_token(client, asked, {})
            _, good = await fetch_token(client, asked, {})
            assert claims(poisoned["token"])["access"][0]["actions"] == []
            assert claims(good["token"])["access"][0]["actions"] == ["pull"]
            assert (await try_token(client, manifest_url(registry), poisoned["token"]))[0] == 401
            assert (await try_token(client, manifest_url(registry), good["token"]))[0] == 200


class TestCdn:
    async def test_blobs_come_by_signed_url_and_manifests_do_not(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with FakeRegistry() as cdn, FakeRegistry(redirect_blobs_to=cdn) as registry:
            registry.push(IMAGE)
            async with client.get(blob_url(registry), headers={"Range": "bytes=5-9"}) as answer:
                assert answer.history[0].status == 307
                assert answer.url.port == cdn.port
                assert await answer.read() == LAYER.data[5:10]
            assert (registry.counters.bytes_sent, cdn.counters.bytes_sent) == (0, 5)
            assert cdn.counters.gets == {LAYER.digest: 1}
            async with client.get(manifest_url(registry)) as answer:
                assert not answer.history

    async def test_an_authorization_header_is_refused_and_counted(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with FakeRegistry() as cdn, FakeRegistry(redirect_blobs_to=cdn) as registry:
            registry.push(IMAGE)
            url = await location(client, registry)
            async with client.get(url, headers=basic("ann", "pw")) as answer:
                assert answer.status == 400
            assert cdn.counters.authorization_leaks == 1
            assert registry.counters.authorization_leaks == 0

    async def test_a_signed_url_expires_and_cannot_be_altered(
        self, client: aiohttp.ClientSession
    ) -> None:
        clock = FakeClock()
        async with (
            FakeRegistry(clock=clock) as cdn,
            FakeRegistry(redirect_blobs_to=cdn, signed_url_ttl=30) as registry,
        ):
            registry.push(IMAGE)
            url = await location(client, registry)
            assert set(parse_qs(urlsplit(url).query)) == {"expires", "sig"}

            async def status(target: str) -> int:
                async with client.get(target) as answer:
                    return answer.status

            assert await status(url) == 200
            other = str(IMAGE.layers[0].digest)
            assert await status(url.replace(str(LAYER.digest), other)) == 403
            clock.advance(30)
            assert await status(url) == 403


async def location(client: aiohttp.ClientSession, registry: FakeRegistry) -> str:
    async with client.get(blob_url(registry), allow_redirects=False) as answer:
        assert answer.status == 307
        return answer.headers["Location"]


class TestExchange:
    """The OAuth2 POST by which an identity token becomes another one."""

    FORM: ClassVar[Mapping[str, str]] = {
        "grant_type": "refresh_token",
        "client_id": "somebody",
        "refresh_token": "of-ann",
        "scope": f"repository:{IMAGE.name}:pull",
    }

    async def ask(
        self, client: aiohttp.ClientSession, registry: FakeRegistry, **changes: str
    ) -> tuple[int, dict[str, Any]]:
        form = {**self.FORM, "service": registry.netloc, **changes}
        async with client.post(f"{registry.url}/service/token", data=form) as reply:
            return reply.status, await reply.json()

    async def test_it_gives_a_token_that_opens_the_repository(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with FakeRegistry(
            auth="bearer", identities={"of-ann": "ann"}, private={IMAGE.name: ["ann"]}
        ) as registry:
            registry.push(IMAGE)
            status, said = await self.ask(client, registry)
            assert (status, said["scope"], said["expires_in"]) == (200, self.FORM["scope"], 300)
            assert not {"token", "refresh_token"} & said.keys()
            headers = {"Authorization": f"Bearer {said['access_token']}"}
            async with client.get(manifest_url(registry), headers=headers) as reply:
                assert reply.status == 200
            _, said = await self.ask(client, registry, access_type="offline")
            assert said["refresh_token"] == "of-ann"

    @pytest.mark.parametrize(
        ("changes", "status", "error"),
        [
            ({"refresh_token": "of-nobody"}, 400, "invalid_grant"),
            ({"grant_type": "password"}, 400, "unsupported_grant_type"),
            ({"client_id": ""}, 400, "invalid_request"),
            ({"service": "elsewhere"}, 405, None),
        ],
    )
    async def test_it_is_refused_in_oauths_words(
        self,
        client: aiohttp.ClientSession,
        changes: Mapping[str, str],
        status: int,
        error: str | None,
    ) -> None:
        async with FakeRegistry(auth="bearer", identities={"of-ann": "ann"}) as registry:
            found, said = await self.ask(client, registry, **changes)
            assert (found, said.get("error")) == (status, error)

    async def test_who_may_not_pull_is_refused(self, client: aiohttp.ClientSession) -> None:
        async with FakeRegistry(
            auth="bearer", identities={"of-ann": "ann"}, private={IMAGE.name: ["bob"]}
        ) as registry:
            assert (await self.ask(client, registry))[0] == 403

    async def test_a_service_without_identities_knows_get_only(
        self, client: aiohttp.ClientSession
    ) -> None:
        async with FakeRegistry(auth="bearer", users={"ann": "pw"}) as registry:
            assert (await self.ask(client, registry))[0] == 405
