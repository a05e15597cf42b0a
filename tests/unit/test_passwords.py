"""htpasswd: what a file may hold, whose password is right, and how seldom that is computed."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import bcrypt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.testing import FakeClock
from proxy.web.passwords import (
    BAD_TTL,
    GOOD_TTL,
    MAX_FILE,
    Passwords,
    parse_htpasswd,
    read_htpasswd,
)
from proxy.web.reload import Unusable


def hashed(password: str) -> bytes:
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(4))


ANNA = hashed("correct horse")
BERT = hashed("battery staple")


class Checks:
    """Stands in for bcrypt: a password is right when it is the hash; counts what it is asked."""

    def __init__(self) -> None:
        self.count = 0
        self.go = threading.Event()
        self.go.set()

    def __call__(self, password: bytes, hashed: bytes) -> bool:
        self.count += 1
        self.go.wait()
        return password == hashed


@asynccontextmanager
async def counted() -> AsyncIterator[tuple[Passwords, Checks, FakeClock]]:
    checks, clock = Checks(), FakeClock()
    passwords = Passwords({"anna": b"a", "bert": b"b"}, clock=clock, check=checks)
    yield passwords, checks, clock
    checks.go.set()
    passwords.close()


def test_a_file_holds_names_hashes_and_comments() -> None:
    text = f"# accounts\n\nanna:{ANNA.decode()}\r\n  bert:{BERT.decode()}  \n"
    assert parse_htpasswd(text) == {"anna": ANNA, "bert": BERT}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nobody"),
        ("# nobody\n", "nobody"),
        ("anna", "line 1 is not NAME:HASH"),
        (":hash", "line 1 is not NAME:HASH"),
        ("\nanna:hunter2", "line 2 does not hold a bcrypt hash"),
        ("anna:{SHA}hunter2=", "bcrypt"),
        ("anna:$apr1$hunter2$x", "bcrypt"),
        (f"anna:$2y$99${'.' * 53}", "bcrypt"),
        (f"anna:$2y$05${'.' * 53}:hunter2", "bcrypt"),
        (f"anna:$2y$05${'.' * 53}\nanna:$2y$05${'.' * 53}", "line 2 has a name that was there"),
    ],
)
def test_anything_else_is_refused_without_showing_it(text: str, words: str) -> None:
    with pytest.raises(Unusable, match=words) as caught:
        parse_htpasswd(text)
    assert "hunter2" not in str(caught.value)


@given(st.text())
def test_no_text_breaks_the_reader_of_files(text: str) -> None:
    with suppress(Unusable):
        parse_htpasswd(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "htpasswd"
    with pytest.raises(Unusable, match=r"htpasswd: No such file"):
        read_htpasswd(file)
    for data in (b"\xff", b"#" * (MAX_FILE + 1)):
        file.write_bytes(data)
        with pytest.raises(Unusable, match=r"htpasswd: is"):
            read_htpasswd(file)


@pytest.mark.parametrize(
    ("name", "password", "is_right"),
    [
        ("anna", "correct horse", True),
        ("bert", "battery staple", True),
        ("anna", "battery staple", False),
        ("nobody", "correct horse", False),
        ("anna", "", False),
        ("anna", "p\0q", False),
        ("anna", "p" * 10_000, False),
        ("\udcff", "\udcff", False),
    ],
)
async def test_bcrypt_decides(name: str, password: str, is_right: bool) -> None:
    passwords = Passwords({"anna": ANNA, "bert": BERT}, clock=FakeClock())
    try:
        assert await passwords.is_right(name, password) is is_right
    finally:
        passwords.close()


async def test_the_hashes_that_htpasswd_writes_are_understood() -> None:
    passwords = Passwords({"anna": b"$2y" + ANNA[3:]}, clock=FakeClock())
    assert await passwords.is_right("anna", "correct horse")
    passwords.close()


async def test_verdicts_are_remembered_the_bad_ones_shortly() -> None:
    async with counted() as (passwords, checks, clock):
        for _ in range(3):
            assert await passwords.is_right("anna", "a")
            assert not await passwords.is_right("anna", "x")
        assert checks.count == 2
        clock.advance(BAD_TTL + 1)
        assert await passwords.is_right("anna", "a")
        assert not await passwords.is_right("anna", "x")
        assert checks.count == 3
        clock.advance(GOOD_TTL)
        assert await passwords.is_right("anna", "a")
        assert checks.count == 4


async def test_an_unknown_name_costs_as_much_and_is_never_right() -> None:
    async with counted() as (passwords, checks, _):
        assert not await passwords.is_right("nobody", "a")
        assert checks.count == 1


async def test_a_crowd_with_one_password_is_checked_once() -> None:
    async with counted() as (passwords, checks, _):
        checks.go.clear()
        crowd = [asyncio.create_task(passwords.is_right("anna", "a")) for _ in range(50)]
        await asyncio.sleep(0)
        checks.go.set()
        assert all(await asyncio.gather(*crowd))
        assert checks.count == 1


async def test_one_who_leaves_does_not_spoil_it_for_the_others() -> None:
    async with counted() as (passwords, checks, _):
        checks.go.clear()
        first = asyncio.create_task(passwords.is_right("anna", "a"))
        others = [asyncio.create_task(passwords.is_right("anna", "a")) for _ in range(5)]
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        checks.go.set()
        assert all(await asyncio.gather(*others))


async def test_another_file_forgets_every_verdict() -> None:
    async with counted() as (passwords, _checks, _):
        assert await passwords.is_right("anna", "a")
        passwords.replace({"anna": b"new"})
        assert not await passwords.is_right("anna", "a")
        assert await passwords.is_right("anna", "new")
        assert not await passwords.is_right("bert", "b")


async def test_a_verdict_by_the_old_file_is_not_remembered() -> None:
    async with counted() as (passwords, checks, _):
        checks.go.clear()
        asked = asyncio.create_task(passwords.is_right("anna", "a"))
        await asyncio.sleep(0)
        passwords.replace({"anna": b"new"})
        checks.go.set()
        await asked
        assert not await passwords.is_right("anna", "a")
