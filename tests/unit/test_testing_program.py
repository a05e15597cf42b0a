"""`python -m proxy.testing harbor`: the overloaded Harbor as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from proxy.testing.__main__ import main
from proxy.testing.overload import Misbehaviour
from tests.unit.fake_kit import basic, claims

pytestmark = pytest.mark.one_loop


@contextlib.asynccontextmanager
async def program(*options: str) -> AsyncIterator[dict[str, Any]]:
    """What the program announces, until the block ends."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy.testing", "harbor", "--layer-size=1000", *options),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield json.loads(await process.stdout.readline())
    finally:
        process.terminate()
        assert await process.wait() == 0


async def test_it_serves_private_images_and_breaks_when_it_is_told_to() -> None:
    options = ("--users=ann:pw,bob:p:w", "--token-ttl=60", "--breaks-beyond=1", "--misbehave=500")
    async with program(*options) as ready, aiohttp.ClientSession() as client:
        (image,) = ready["images"]
        url = f"{ready['url']}/v2/{image['name']}/manifests/{image['tag']}"
        scope = f"scope=repository:{image['name']}:pull"
        token_url = f"{ready['url']}/service/token?service={ready['url'][7:]}&{scope}"
        async with client.get(url) as answer:
            assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
        async with client.get(token_url) as answer:
            assert claims((await answer.json())["token"])["access"][0]["actions"] == []
        async with client.get(token_url, headers=basic("bob", "p:w")) as answer:
            said = await answer.json()
        assert said["expires_in"] == 60
        headers = {"Authorization": f"Bearer {said['token']}"}
        control = f"{ready['control']}/_overload"
        for change, status in [("", 200), ("?breaks-beyond=0", 500), ("?breaks-beyond=", 200)]:
            async with client.post(control + change) as answer:
                assert answer.status == 204
            async with client.get(url, headers=headers) as answer:
                assert answer.status == status
        async with client.post(f"{control}?misbehave=nonsense") as answer:
            assert answer.status == 400
        async with client.get(f"{ready['control']}/_counters") as answer:
            assert (await answer.json())["overloads"] == {"500": 1}
        async with client.get(f"{ready['control']}/_timeline") as answer:
            timeline = await answer.json()
        assert [overload for _, overload in timeline] == [None, None, None, None, "500", None]
        assert timeline[0][0] == 0


async def test_its_limit_of_sockets_moves_while_it_runs() -> None:
    async with program("--limit=1", "--users=ann:pw") as ready:
        for sockets, status in (("?sockets=0", 204), ("", 204), ("?sockets=-1", 400)):
            async with aiohttp.ClientSession() as client:
                async with client.post(f"{ready['control']}/_limit{sockets}") as answer:
                    assert answer.status == status
                # One socket: too many beyond none, and as good as any when there is no limit.
                async with client.get(f"{ready['url']}/v2/") as answer:
                    challenge = answer.headers["WWW-Authenticate"]
                    assert (answer.status, bool(challenge)) == (401, sockets != "?sockets=0")
            async with (
                aiohttp.ClientSession() as client,
                client.get(f"{ready['control']}/_counters") as answer,
            ):
                assert (await answer.json())["peak_sockets"] == 1


async def test_its_token_service_refuses_in_harbors_way() -> None:
    async with (
        program("--users=ann:pw", "--strangers=bob:pw", "--repository=team/app") as ready,
        aiohttp.ClientSession() as client,
    ):
        base = f"{ready['url']}/service/token?service={ready['url'][7:]}"
        (image,) = ready["images"]
        assert image["name"] == "team/app-0"
        mine, lost = ("repository:team/app-0:pull", "repository:nowhere/app:pull")
        for scope, login, actions in (
            (mine, basic("ann", "pw"), ["pull"]),
            (mine, basic("ann", "wrong"), []),
            (mine, basic("bob", "pw"), []),
            (mine, {}, []),
            (lost, basic("ann", "pw"), []),
        ):
            async with client.get(f"{base}&scope={scope}", headers=login) as answer:
                assert answer.status == 200
                token = (await answer.json())["token"]
                assert claims(token)["access"][0]["actions"] == actions
        for login, status in ((basic("ann", "wrong"), 401), (basic("bob", "pw"), 200)):
            async with client.get(base, headers=login) as answer:
                assert answer.status == status


async def test_layers_have_the_given_sizes_in_turn() -> None:
    async with program("--layers=3", "--layer-size=2000,500", "--images=2") as ready:
        for image in ready["images"]:
            # A tar header, the data in blocks of 512, and two empty blocks at the end.
            assert [blob["size"] for blob in image["blobs"][1:]] == [3584, 2048, 3584]


def test_its_help_tells_every_misbehaviour(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["harbor", "--help"])
    assert raised.value.code == 0
    said = capsys.readouterr().out
    assert [kind for kind in Misbehaviour if f"\n  {kind} " not in said] == []


@pytest.mark.parametrize(
    "wrong",
    [
        "--layer-size=big",
        "--limit=-1",
        "--misbehave=nonsense",
        "--misbehave=500=0",
        "--breaks-beyond=-1",
        "--users=ann",
        "--users=",
    ],
)
def test_a_wrong_option_is_named(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["harbor", wrong])
    assert raised.value.code == 2
    assert wrong.split("=", 1)[0] in capsys.readouterr().err
