"""Clients that have to show who they are: 401 from us, in our words, and the name in the log."""

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path

import bcrypt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.testing import Answer as Scripted
from proxy.testing import FakeRegistry, Fault
from proxy.web.auth import CHALLENGE, parse_basic
from proxy.web.reload import Unusable
from tests.unit.proxy_kit import LAYER, Pullpool, blob_path, manifest_path, pulling, running


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


ANNA = basic("anna", "correct horse")


def account(name: str, password: str) -> str:
    return f"{name}:{bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "htpasswd"
    file.write_text(account("anna", "correct horse"))
    return file


@pytest.fixture
async def guarded(tmp_path: Path, file: Path) -> AsyncIterator[tuple[Pullpool, FakeRegistry]]:
    async with pulling(tmp_path / "cache", auth={"htpasswd_file": str(file)}) as pair:
        yield pair


@pytest.mark.parametrize("path", ["/v2/", manifest_path("v1"), blob_path(), "/v2/Bad/x", "/"])
@pytest.mark.parametrize("shown", [None, basic("anna", "wrong"), "Bearer x", "Basic !"])
async def test_a_stranger_gets_our_challenge_and_nothing_else(
    guarded: tuple[Pullpool, FakeRegistry], path: str, shown: str | None
) -> None:
    pool, fake = guarded
    headers = {} if shown is None else {"Authorization": shown}
    for method in ("GET", "HEAD", "PUT"):
        answer = await pool.ask(method, path, **headers)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == CHALLENGE == 'Basic realm="pullpool"'
        assert method == "HEAD" or answer.code == "UNAUTHORIZED"
    assert not fake.counters.requests
    assert {line["reason"] for line in pool.access_log} == {"unauthenticated"}


async def test_a_client_that_is_known_pulls_under_its_name(
    guarded: tuple[Pullpool, FakeRegistry],
) -> None:
    pool, _ = guarded
    for path in ("/v2/", manifest_path("v1")):
        assert (await pool.get(path, Authorization=ANNA)).status == 200
    assert (await pool.get(blob_path(), Authorization=ANNA)).body == LAYER.data
    assert {(line["user"], line["client"]) for line in pool.access_log} == {("anna", "127.0.0.1")}
    assert "correct horse" not in pool.log


async def test_what_clients_show_us_never_reaches_the_upstream(
    guarded: tuple[Pullpool, FakeRegistry],
) -> None:
    pool, fake = guarded
    fake.script(
        Fault(Scripted(401, headers={"WWW-Authenticate": 'Basic realm="theirs"'}), times=None)
    )
    answer = await pool.get(manifest_path("v1"), Authorization=ANNA)
    assert answer.status not in (200, 401)
    assert "WWW-Authenticate" not in answer.headers


async def test_a_changed_file_counts_at_once_and_a_broken_one_does_not(
    guarded: tuple[Pullpool, FakeRegistry], file: Path
) -> None:
    pool, _ = guarded
    assert pool.proxy.accounts is not None
    assert (await pool.get("/v2/", Authorization=ANNA)).status == 200
    await asyncio.to_thread(file.write_text, "anna")
    await pool.proxy.accounts.look()
    assert (await pool.get("/v2/", Authorization=ANNA)).status == 200
    assert len(pool.events("not_reloaded")) == 1
    await asyncio.to_thread(file.write_text, account("anna", "another"))
    await pool.proxy.accounts.look()
    assert (await pool.get("/v2/", Authorization=ANNA)).status == 401
    assert (await pool.get("/v2/", Authorization=basic("anna", "another"))).status == 200


async def test_a_file_that_cannot_be_used_stops_the_start(tmp_path: Path, file: Path) -> None:
    await asyncio.to_thread(file.write_text, "anna")
    auth = {"htpasswd_file": str(file)}
    with pytest.raises(Unusable, match="htpasswd: line 1"):
        async with running(tmp_path / "cache", "http://127.0.0.1:1", auth=auth):
            pass


async def test_health_needs_no_password(guarded: tuple[Pullpool, FakeRegistry]) -> None:
    pool, _ = guarded
    assert (await pool.admin("/readyz")).status == 200


@pytest.mark.parametrize(
    ("header", "shown"),
    [
        (ANNA, ("anna", "correct horse")),
        (f"bAsIc   {ANNA[6:]} ", ("anna", "correct horse")),
        (basic("anna", ""), ("anna", "")),
        (basic("anna", "a:b:c"), ("anna", "a:b:c")),
        (basic("ännä", "é"), ("ännä", "é")),
        (basic("", "p"), None),
        (basic("a\nb", "p"), None),
        (basic("a", "p\x7f"), None),
        ("Basic", None),
        ("Basic YQ==", None),
        ("Basic /w==", None),
        ("Bearer YTpi", None),
        ("", None),
    ],
)
def test_only_basic_with_a_name_is_understood(header: str, shown: tuple[str, str] | None) -> None:
    assert parse_basic(header) == shown


@given(st.text())
def test_no_header_breaks_it(text: str) -> None:
    assert parse_basic(text) is None or text.lower().strip().startswith("basic")
    parse_basic(f"Basic {text}")


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1)


@given(names.filter(lambda name: ":" not in name), names)
def test_names_and_passwords_arrive_as_they_were_sent(name: str, password: str) -> None:
    assert parse_basic(basic(name, password)) == (name, password)
