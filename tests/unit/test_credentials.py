"""Credentials: where they come from, when they are read again, and that they stay secret."""

import asyncio
import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.credentials import (
    Credentials,
    CredentialSource,
    CredentialsUnavailable,
    DockerConfigCredentials,
    EnvCredentials,
    FileCredentials,
    HelperCredentials,
    StaticCredentials,
    docker_config_path,
    find_auth,
    find_helper,
)

HOST = "harbor.example.com"
SECRET = "s3cr3t-of-the-robot"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Helper:
    """A real credential helper: a shell script that notes each run, in a PATH of its own."""

    def __init__(self, directory: Path, name: str, script: str) -> None:
        self.runs = directory / f"{name}.runs"
        self.asked = directory / f"{name}.asked"
        program = directory / f"docker-credential-{name}"
        program.write_text(f'#!/bin/sh\necho "$1" >>"{self.runs}"\ncat >"{self.asked}"\n{script}\n')
        program.chmod(0o755)
        self.environ = {"PATH": f"{directory}:{os.defpath}"}

    def count(self) -> int:
        return len(self.runs.read_text().splitlines()) if self.runs.exists() else 0

    def source(self, name: str, clock: Clock, **options: float) -> HelperCredentials:
        return HelperCredentials(name, HOST, clock=clock, environ=self.environ, **options)


def answer(username: str, secret: str) -> str:
    return f"echo '{json.dumps({'ServerURL': HOST, 'Username': username, 'Secret': secret})}'"


async def problem_of(source: CredentialSource) -> str:
    with pytest.raises(CredentialsUnavailable) as caught:
        await source.get()
    error = caught.value
    assert error.status == 500
    assert SECRET not in f"{error} {error!r} {error.body('id')!r}"
    assert error.problem not in error.message
    return error.problem


# -- the value -------------------------------------------------------------------------------------


text = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=20)


@given(username=text.filter(lambda name: ":" not in name), password=text)
def test_basic_carries_user_and_password_as_they_are(username: str, password: str) -> None:
    scheme, _, encoded = Credentials(username, password).authorization.partition(" ")
    assert scheme == "Basic"
    assert base64.b64decode(encoded).decode() == f"{username}:{password}"


@pytest.mark.parametrize(
    ("username", "password"),
    [("a:b", SECRET), ("a\n", SECRET), ("a", f"{SECRET}\r\nX: y"), ("a", f"{SECRET}\x7f")],
)
def test_what_basic_cannot_carry_is_refused(username: str, password: str) -> None:
    with pytest.raises(ValueError, match=r"colon|control") as caught:
        Credentials(username, password)
    assert SECRET not in str(caught.value)


def test_a_password_does_not_show() -> None:
    credentials = Credentials("robot", SECRET)
    assert SECRET not in repr(credentials)
    assert SECRET not in repr(StaticCredentials(credentials))


def test_an_identity_token_has_no_account() -> None:
    assert Credentials("robot$pull", "x").account == "robot$pull"
    assert Credentials("<token>", "x").account is None


# -- configuration, environment, file --------------------------------------------------------------


async def test_configured_credentials_are_given_as_they_are() -> None:
    credentials = Credentials("robot", SECRET)
    assert await StaticCredentials(credentials).get() == credentials


async def test_a_variable_is_looked_at_each_time() -> None:
    environ = {"PW": "one"}
    source = EnvCredentials("robot", "PW", environ)
    assert await source.get() == Credentials("robot", "one")
    environ["PW"] = "two"
    assert await source.get() == Credentials("robot", "two")
    assert "two" not in repr(source)


@pytest.mark.parametrize("environ", [{}, {"PW": ""}])
async def test_an_unset_variable_is_named(environ: Mapping[str, str]) -> None:
    assert "variable PW is not set" in await problem_of(EnvCredentials("robot", "PW", environ))


async def test_a_password_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("one\n")
    source = FileCredentials("robot", path)
    assert await source.get() == Credentials("robot", "one")
    path.write_text("second")
    assert await source.get() == Credentials("robot", "second")
    # The way Kubernetes changes a mounted secret: another file under the same name, same size.
    (tmp_path / "new").write_text("thirdd")
    (tmp_path / "new").replace(path)
    assert await source.get() == Credentials("robot", "thirdd")
    assert "thirdd" not in repr(source)


async def test_an_unchanged_password_file_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("one")
    stat = path.stat()
    source = FileCredentials("robot", path)
    await source.get()
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert await source.get() == Credentials("robot", "one")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert await source.get() == Credentials("robot", "two")


async def test_a_missing_password_file_is_named_and_may_come_back(tmp_path: Path) -> None:
    path = tmp_path / "password"
    source = FileCredentials("robot", path)
    problem = await problem_of(source)
    assert str(path) in problem
    assert "No such file" in problem
    path.write_text("one\r\n")
    assert await source.get() == Credentials("robot", "one")
    path.unlink()
    assert "No such file" in await problem_of(source)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (SECRET.encode() + b"\nsecond line", "control characters"),
        (SECRET.encode() * 100_000, "larger than"),
    ],
)
async def test_a_useless_password_file_says_why(tmp_path: Path, data: bytes, what: str) -> None:
    path = tmp_path / "password"
    path.write_bytes(data)
    problem = await problem_of(FileCredentials("robot", path))
    assert what in problem
    assert str(path) in problem


async def test_a_directory_is_no_password_file(tmp_path: Path) -> None:
    assert "directory" in await problem_of(FileCredentials("robot", tmp_path))


# -- helpers ---------------------------------------------------------------------------------------


async def test_a_helper_is_asked_for_the_host(tmp_path: Path) -> None:
    helper = Helper(tmp_path, "cloud", answer("AWS", SECRET))
    assert await helper.source("cloud", Clock()).get() == Credentials("AWS", SECRET)
    assert helper.runs.read_text() == "get\n"
    assert helper.asked.read_text() == HOST


async def test_a_helper_knows_docker_hub_by_its_old_name(tmp_path: Path) -> None:
    helper = Helper(tmp_path, "store", answer("me", SECRET))
    for name in ("docker.io", "registry-1.docker.io"):
        source = HelperCredentials("store", name, clock=Clock(), environ=helper.environ)
        assert await source.get() == Credentials("me", SECRET)
        assert helper.asked.read_text() == "https://index.docker.io/v1/"


async def test_a_helpers_answer_is_kept_until_it_has_aged(tmp_path: Path) -> None:
    clock = Clock()
    helper = Helper(tmp_path, "cloud", answer("AWS", SECRET))
    source = helper.source("cloud", clock, ttl=60.0)
    await source.get()
    clock.now += 59.0
    await source.get()
    assert helper.count() == 1
    clock.now += 1.0
    await source.get()
    assert helper.count() == 2


async def test_many_who_ask_at_once_run_one_helper(tmp_path: Path) -> None:
    helper = Helper(tmp_path, "cloud", answer("AWS", SECRET))
    source = helper.source("cloud", Clock())
    found = await asyncio.gather(*(source.get() for _ in range(10)))
    assert found == [Credentials("AWS", SECRET)] * 10
    assert helper.count() == 1


async def test_a_helper_that_knows_nothing_means_anonymous(tmp_path: Path) -> None:
    script = "echo 'credentials not found in native keychain'; exit 1"
    helper = Helper(tmp_path, "store", script)
    source = helper.source("store", Clock())
    assert await source.get() is None
    assert await source.get() is None
    assert helper.count() == 1


@pytest.mark.parametrize(
    ("script", "what"),
    [
        (f"echo '{SECRET}'; echo '{SECRET}' >&2; exit 3", "ended with status 3"),
        (f"echo '{SECRET}'", "did not answer with a JSON object"),
        (f"echo '[\"{SECRET}\"]'", "did not answer with a JSON object"),
        (f'echo \'{{"Secret": "{SECRET}"}}\'', "did not answer with a JSON object"),
        (f'echo \'{{"Username": 1, "Secret": "{SECRET}"}}\'', "did not answer with text"),
        (answer("a:b", SECRET), "colon"),
        ("kill -9 $$", "ended with status -9"),
        ("exec >&-; exit 0", "did not answer with a JSON object"),
    ],
)
async def test_a_helper_that_fails_is_named_and_not_quoted(
    tmp_path: Path, script: str, what: str
) -> None:
    helper = Helper(tmp_path, "cloud", script)
    problem = await problem_of(helper.source("cloud", Clock()))
    assert what in problem
    assert "docker-credential-cloud" in problem


async def test_a_helper_that_failed_is_asked_again(tmp_path: Path) -> None:
    clock = Clock()
    failing = Helper(tmp_path, "cloud", "exit 1")
    source = failing.source("cloud", clock)
    await problem_of(source)
    Helper(tmp_path, "cloud", answer("AWS", SECRET))
    assert await source.get() == Credentials("AWS", SECRET)


async def test_a_missing_helper_is_named(tmp_path: Path) -> None:
    source = HelperCredentials("none", HOST, clock=Clock(), environ={"PATH": str(tmp_path)})
    assert "docker-credential-none is not on the PATH" in await problem_of(source)


async def test_a_helper_that_cannot_be_started_says_so(tmp_path: Path) -> None:
    helper = Helper(tmp_path, "cloud", "")
    (tmp_path / "docker-credential-cloud").write_text("#!/no/such/interpreter\n")
    assert "cannot be started" in await problem_of(helper.source("cloud", Clock()))


@pytest.mark.parametrize("name", ["", "../evil", "a/b", "-x", "a b"])
def test_a_helpers_name_is_no_path(name: str) -> None:
    with pytest.raises(ValueError, match="docker-credential-NAME"):
        HelperCredentials(name, HOST, clock=Clock())


async def ended(pid: int) -> None:
    """Return when no such process runs any more (a zombie does not)."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def opened(path: Path) -> str:
    """Read a named pipe: returns when the script has written to it."""
    return await asyncio.to_thread(path.read_text)


async def test_a_helper_that_stalls_is_given_up(tmp_path: Path) -> None:
    helper = Helper(tmp_path, "slow", "exec sleep 1000")
    source = helper.source("slow", Clock(), timeout=0.1)
    assert "no answer within 0.1 s" in await problem_of(source)


async def test_a_cancelled_caller_leaves_nothing_running_and_the_next_one_works(
    tmp_path: Path,
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    helper = Helper(tmp_path, "slow", f'sleep 1000 & echo "$$ $!" >"{pipe}"; wait')
    source = helper.source("slow", Clock())
    first = asyncio.create_task(source.get())
    second = asyncio.create_task(source.get())
    pids = (await opened(pipe)).split()
    Helper(tmp_path, "slow", answer("AWS", SECRET))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert len(pids) == 2
    for pid in pids:
        await ended(int(pid))
    assert await second == Credentials("AWS", SECRET)


# -- docker's config.json --------------------------------------------------------------------------


def auth(username: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}


@pytest.mark.parametrize(
    ("auths", "host", "found"),
    [
        ({HOST: auth("me", "pw:with:colons")}, HOST, Credentials("me", "pw:with:colons")),
        ({HOST: auth("me", "pw\0\0")}, HOST, Credentials("me", "pw")),
        ({HOST: {"username": "me", "password": "pw"}}, HOST, Credentials("me", "pw")),
        ({HOST: {**auth("me", ""), "identitytoken": "t"}}, HOST, Credentials("<token>", "t")),
        ({f"https://{HOST}/v2/": auth("me", "pw")}, HOST, Credentials("me", "pw")),
        ({f"http://{HOST}": auth("me", "pw")}, HOST, Credentials("me", "pw")),
        ({"Harbor.example.com/": auth("me", "pw")}, HOST, Credentials("me", "pw")),
        ({f"{HOST}:8443": auth("me", "pw")}, f"{HOST}:8443", Credentials("me", "pw")),
        (
            {"https://index.docker.io/v1/": auth("me", "pw")},
            "docker.io",
            Credentials("me", "pw"),
        ),
        ({"docker.io": auth("me", "pw")}, "registry-1.docker.io", Credentials("me", "pw")),
        (
            {f"https://{HOST}": auth("loose", "pw"), HOST: auth("exact", "pw")},
            HOST,
            Credentials("exact", "pw"),
        ),
        # A login for one path is not one for the whole host.
        ({f"{HOST}/team": auth("me", "pw")}, HOST, None),
        ({f"{HOST}:8443": auth("me", "pw")}, HOST, None),
        ({f"{HOST}.evil.example.net": auth("me", "pw")}, HOST, None),
        ({HOST: {}}, HOST, None),
        ({HOST: None}, HOST, None),
        ({HOST: {"username": "me"}}, HOST, None),
        ({}, HOST, None),
        (None, HOST, None),
    ],
)
def test_an_auths_entry_is_found_for_its_host(
    auths: Any, host: str, found: Credentials | None
) -> None:
    assert find_auth({"auths": auths}, host) == found


@pytest.mark.parametrize(
    "config",
    [
        [],
        {"auths": []},
        {"auths": {HOST: SECRET}},
        {"auths": {HOST: {"auth": SECRET}}},
        {"auths": {HOST: {"auth": base64.b64encode(SECRET.encode()).decode()}}},
    ],
)
def test_a_malformed_entry_is_told_without_its_secret(config: Any) -> None:
    with pytest.raises(ValueError, match=r"auths|object") as caught:
        find_auth(config, HOST)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "host", "helper"),
    [
        ({"credHelpers": {HOST: "cloud"}, "credsStore": "desktop"}, HOST, "cloud"),
        ({"credHelpers": {"other.example.com": "cloud"}, "credsStore": "pass"}, HOST, "pass"),
        ({"credHelpers": {"docker.io": "hub"}}, "index.docker.io", "hub"),
        ({"credHelpers": {HOST: ""}}, HOST, None),
        ({"credsStore": 1}, HOST, None),
        ({}, HOST, None),
    ],
)
def test_a_hosts_own_helper_goes_before_the_store(
    config: Any, host: str, helper: str | None
) -> None:
    assert find_helper(config, host) == helper


def write(path: Path, config: Any) -> Path:
    path.write_text(json.dumps(config))
    return path


async def test_a_docker_config_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "config.json", {"auths": {HOST: auth("me", "one")}})
    source = DockerConfigCredentials(HOST, path, clock=Clock(), environ={})
    assert await source.get() == Credentials("me", "one")
    write(path, {"auths": {HOST: auth("me", "second")}})
    assert await source.get() == Credentials("me", "second")
    write(path, {"auths": {}})
    assert await source.get() is None


async def test_a_docker_configs_helper_is_run(tmp_path: Path) -> None:
    helper = Helper(tmp_path, "cloud", answer("AWS", SECRET))
    path = write(tmp_path / "config.json", {"credHelpers": {HOST: "cloud"}})
    source = DockerConfigCredentials(HOST, path, clock=Clock(), environ=helper.environ)
    assert await source.get() == Credentials("AWS", SECRET)
    assert await source.get() == Credentials("AWS", SECRET)
    assert helper.count() == 1
    assert SECRET not in repr(source)


async def test_what_the_store_does_not_know_may_stand_in_the_file(tmp_path: Path) -> None:
    helper = Helper(tmp_path, "store", "echo 'credentials not found in native keychain'; exit 1")
    config = {"credsStore": "store", "auths": {HOST: auth("me", "pw")}}
    path = write(tmp_path / "config.json", config)
    source = DockerConfigCredentials(HOST, path, clock=Clock(), environ=helper.environ)
    assert await source.get() == Credentials("me", "pw")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        f'{{"auths": {{"{HOST}": "{SECRET}"}}}}',
        f'{{"auths": {{"{HOST}": {{"auth": "{SECRET}"}}}}}}',
        '{"credsStore": "../evil"}',
    ],
)
async def test_a_malformed_docker_config_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    source = DockerConfigCredentials(HOST, path, clock=Clock(), environ={})
    assert str(path) in await problem_of(source)


async def test_a_missing_docker_config_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    source = DockerConfigCredentials(HOST, path, clock=Clock(), environ={})
    assert str(path) in await problem_of(source)


def test_docker_says_where_its_config_is() -> None:
    assert docker_config_path({"DOCKER_CONFIG": "/etc/d"}) == Path("/etc/d/config.json")
    assert docker_config_path({"HOME": "/home/me"}) == Path("/home/me/.docker/config.json")
