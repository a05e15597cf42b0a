"""Where an upstream's user name and password come from, and when they are read again.

Passwords rotate while the proxy runs: a mounted secret is rewritten, a cloud's helper hands out one
that lives for hours. So nothing is read once and kept. Sources are asked before every use: files
are looked at (one `stat`) and read again when they changed, helpers run again when their answer has
aged. What blocks (files) runs in a thread; what waits (helpers) is a subprocess of the event loop.

Nothing in here puts a password into a message: what a helper printed is never quoted, and
`Credentials` does not show its password.
"""

import asyncio
import base64
import binascii
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from proxy.oci.errors import InternalError
from proxy.upstream.routing import DOCKER_HUB_NAMES

# The key docker has used for its own registry since the first API.
DOCKER_HUB_KEY = "https://index.docker.io/v1/"

# docker's mark for "the password is an identity token" (docker-credential-helpers, Credentials).
IDENTITY_TOKEN_USER = "<token>"

# What every helper prints, with status 1, when it knows no such server
# (docker-credential-helpers, credentials.errCredentialsNotFoundMessage).
_NOT_FOUND = b"credentials not found in native keychain"

_MAX_FILE = 1 << 20


class CredentialsUnavailable(InternalError):
    """The configured source gave no credentials.

    `str()` of it says which source and why, for the operator's eyes; `message`, which clients get,
    tells nobody where the passwords lie.
    """

    reason = "credentials_unavailable"
    default_message = "the credentials for this upstream cannot be read"

    def __init__(self, problem: str) -> None:
        super().__init__()
        self.problem = problem

    def __str__(self) -> str:
        return self.problem


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user name and its password, or `<token>` and an identity token.

    Raises ValueError for what HTTP Basic cannot carry (RFC 7617 §2: no colon in the user name, no
    control characters).
    """

    username: str
    password: str = field(repr=False)

    def __post_init__(self) -> None:
        if ":" in self.username:
            raise ValueError("a user name with a colon cannot be sent by HTTP Basic")
        if any(ord(c) < 0x20 or ord(c) == 0x7F for c in self.username + self.password):
            raise ValueError("user name or password contains control characters")

    @property
    def authorization(self) -> str:
        """The value of the `Authorization` header (RFC 7617, UTF-8)."""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"

    @property
    def is_identity(self) -> bool:
        """Is the password an identity token, which a token service exchanges for others?"""
        return self.username == IDENTITY_TOKEN_USER

    @property
    def account(self) -> str | None:
        """Who this is, for the token service; an identity token says that itself."""
        return None if self.is_identity else self.username


class CredentialSource(Protocol):
    """Gives the credentials of one upstream as they are now."""

    async def get(self) -> Credentials | None:
        """None means: go anonymously. Raises CredentialsUnavailable when there should be some."""


class StaticCredentials:
    """Credentials written in the configuration."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def __repr__(self) -> str:
        return f"<StaticCredentials of {self._credentials.username!r}>"

    async def get(self) -> Credentials | None:
        return self._credentials


class EnvCredentials:
    """The password is in an environment variable."""

    def __init__(
        self, username: str, variable: str, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._username = username
        self._variable = variable
        self._environ = environ

    def __repr__(self) -> str:
        return f"<EnvCredentials of {self._username!r} from ${self._variable}>"

    async def get(self) -> Credentials | None:
        """Raises CredentialsUnavailable when the variable is unset, empty or unusable."""
        password = self._environ.get(self._variable, "")
        if not password:
            raise CredentialsUnavailable(f"the environment variable {self._variable} is not set")
        return _credentials(self._username, password, f"${self._variable}")


class FileCredentials:
    """The password is in a file, read again whenever the file changes.

    One line break at its end is dropped, as editors and `echo` put it there.
    """

    def __init__(self, username: str, path: Path) -> None:
        self._username = username
        self._file = _WatchedFile(path)

    def __repr__(self) -> str:
        return f"<FileCredentials of {self._username!r} from {self._file.path}>"

    async def get(self) -> Credentials | None:
        """Raises CredentialsUnavailable when the file is missing, unreadable, empty or no text."""
        data = await self._file.read()
        source = f"the password file {self._file.path}"
        try:
            password = data.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise CredentialsUnavailable(f"{source} is not UTF-8 text") from None
        if not password:
            raise CredentialsUnavailable(f"{source} is empty")
        return _credentials(self._username, password, source)


class HelperCredentials:
    """A docker credential helper: `docker-credential-NAME get`, the server's name on its stdin.

    Its answer is kept for `ttl` seconds by `clock` (helpers of clouds ask the network), and however
    many ask at once, one helper runs. "Not found" is an answer too: anonymous. `environ` is what
    the helper sees, its PATH included; `timeout` in seconds. A helper that is cancelled or late is
    killed with everything it started.
    """

    def __init__(
        self,
        name: str,
        host: str,
        *,
        clock: Callable[[], float],
        environ: Mapping[str, str] = os.environ,
        ttl: float = 60.0,
        timeout: float = 30.0,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"a credential helper is the NAME of docker-credential-NAME: {name!r}")
        self._program = f"docker-credential-{name}"
        self._host = server_key(host)
        self._clock = clock
        self._environ = environ
        self._ttl = ttl
        self._timeout = timeout
        self._answer: Credentials | None = None
        self._fresh_until: float | None = None
        self._running = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<HelperCredentials {self._program} for {self._host}>"

    async def get(self) -> Credentials | None:
        """Raises CredentialsUnavailable when the helper is missing, fails, stalls or talks junk."""
        async with self._running:
            if self._fresh_until is None or self._clock() >= self._fresh_until:
                self._answer = await self._ask()
                self._fresh_until = self._clock() + self._ttl
            return self._answer

    async def _ask(self) -> Credentials | None:
        try:
            async with asyncio.timeout(self._timeout):
                status, output = await self._run()
        except TimeoutError:
            raise self._failed(f"gave no answer within {self._timeout:g} s") from None
        if status == 0:
            return self._parsed(output)
        if output.strip() == _NOT_FOUND:
            return None
        raise self._failed(f"ended with status {status}")

    async def _run(self) -> tuple[int, bytes]:
        path = self._environ.get("PATH", os.defpath)
        program = await asyncio.to_thread(shutil.which, self._program, path=path)
        if program is None:
            raise self._failed("is not on the PATH")
        try:
            process = await asyncio.create_subprocess_exec(
                program,
                "get",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=dict(self._environ),
                # A group of its own, so that what the helper started dies with it.
                start_new_session=True,
            )
        except OSError as error:
            raise self._failed(f"cannot be started: {error.strerror}") from error
        try:
            output, _ = await process.communicate(self._host.encode())
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        return process.returncode or 0, output

    def _parsed(self, output: bytes) -> Credentials | None:
        try:
            answer = json.loads(output)
            username, secret = answer["Username"], answer["Secret"]
        except (ValueError, KeyError, TypeError):
            raise self._failed("did not answer with a JSON object of Username and Secret") from None
        if not isinstance(username, str) or not isinstance(secret, str):
            raise self._failed("did not answer with text for Username and Secret")
        return _credentials(username, secret, self._program)

    def _failed(self, what: str) -> CredentialsUnavailable:
        return CredentialsUnavailable(f"credential helper {self._program} {what}")


class DockerConfigCredentials:
    """docker's `config.json` (podman's `auth.json` is the same), read again when it changes.

    For the host of an upstream: the helper that `credHelpers` names, else the one of `credsStore`;
    if that knows nothing or there is none, the entry in `auths`. Nothing found: anonymous.
    """

    def __init__(
        self,
        host: str,
        path: Path,
        *,
        clock: Callable[[], float],
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._host = host
        self._file = _WatchedFile(path)
        self._clock = clock
        self._environ = environ
        self._helpers: dict[str, HelperCredentials] = {}

    def __repr__(self) -> str:
        return f"<DockerConfigCredentials for {self._host} from {self._file.path}>"

    async def get(self) -> Credentials | None:
        """Raises CredentialsUnavailable when the file, the entry or the helper is unusable."""
        data = await self._file.read()
        try:
            config = json.loads(data)
            helper = find_helper(config, self._host)
            found = await self._helper(helper).get() if helper else None
            return found or find_auth(config, self._host)
        except ValueError as error:
            # A JSON error tells a place, our own name a fault; neither quotes a secret.
            raise CredentialsUnavailable(f"{self._file.path}: {error}") from None

    def _helper(self, name: str) -> HelperCredentials:
        if name not in self._helpers:
            self._helpers[name] = HelperCredentials(
                name, self._host, clock=self._clock, environ=self._environ
            )
        return self._helpers[name]


def docker_config_path(environ: Mapping[str, str]) -> Path:
    """Where docker keeps its `config.json`: `$DOCKER_CONFIG`, else `~/.docker`."""
    directory = environ.get("DOCKER_CONFIG")
    return Path(directory or Path(environ.get("HOME", "/")) / ".docker") / "config.json"


def server_key(host: str) -> str:
    """The name under which docker files `host`."""
    return DOCKER_HUB_KEY if host.lower() in DOCKER_HUB_NAMES else host


def find_helper(config: Any, host: str) -> str | None:
    """The helper that a parsed `config.json` names for `host`. Raises ValueError when malformed."""
    config = _table(config, "the file")
    helpers = _table(config.get("credHelpers"), "credHelpers")
    for key in _keys(helpers, host):
        name = helpers[key]
        if isinstance(name, str) and name:
            return name
    store = config.get("credsStore")
    return store if isinstance(store, str) and store else None


def find_auth(config: Any, host: str) -> Credentials | None:
    """The credentials in a parsed `config.json` for `host`. Raises ValueError when malformed."""
    auths = _table(_table(config, "the file").get("auths"), "auths")
    for key in _keys(auths, host):
        found = _parse_auth(_table(auths[key], f"auths of {key}"), key)
        if found is not None:
            return found
    return None


def _keys(table: Mapping[str, Any], host: str) -> Iterable[str]:
    """The keys that mean `host`, exact ones first.

    Old clients wrote URLs (`https://host/v2/`). Keys with a path of their own (`host/team`, which
    podman writes) are for that path only and are left alone.
    """
    names = DOCKER_HUB_NAMES if host.lower() in DOCKER_HUB_NAMES else (host.lower(),)
    exact = [key for key in (server_key(host), host, *names) if key in table]
    loose = [key for key in table if key not in exact and _bare(key) in names]
    return dict.fromkeys(exact + loose)


def _bare(key: str) -> str:
    return re.sub(r"^https?://|/(v[12]/?)?$", "", key.lower())


def _table(value: Any, what: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{what} should be a JSON object")
    return value


def _parse_auth(entry: Mapping[str, Any], key: str) -> Credentials | None:
    """An entry of `auths`: an identity token, `auth` (base64 of user:password), or plain fields."""
    token, auth = entry.get("identitytoken"), entry.get("auth")
    username, password = entry.get("username"), entry.get("password")
    if isinstance(token, str) and token:
        return Credentials(IDENTITY_TOKEN_USER, token)
    if isinstance(auth, str) and auth:
        try:
            # docker pads old entries with NUL bytes.
            text = base64.b64decode(auth, validate=True).decode().rstrip("\0")
        except (binascii.Error, UnicodeDecodeError):
            text = ""
        username, colon, password = text.partition(":")
        if not colon:
            raise ValueError(f"auths of {key}: auth is not the base64 of user:password")
    if isinstance(username, str) and isinstance(password, str) and username:
        return Credentials(username, password)
    return None


def _credentials(username: str, password: str, source: str) -> Credentials:
    try:
        return Credentials(username, password)
    except ValueError as error:
        raise CredentialsUnavailable(f"{source}: {error}") from None


class _WatchedFile:
    """A small file's bytes, read again when its inode, time or size differ from the last look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[tuple[int, int, int], bytes] | None = None

    async def read(self) -> bytes:
        """Raises CredentialsUnavailable when the file cannot be read or is over 1 MiB."""
        # Kept in one assignment: readers in two threads at once each leave a consistent pair.
        self._seen = await asyncio.to_thread(self._look, self._seen)
        return self._seen[1]

    def _look(
        self, seen: tuple[tuple[int, int, int], bytes] | None
    ) -> tuple[tuple[int, int, int], bytes]:
        try:
            with self.path.open("rb") as file:
                # Of the open file and before reading: written to meanwhile, it is read once more.
                stat = os.fstat(file.fileno())
                stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                if seen is not None and seen[0] == stamp:
                    return seen
                data = file.read(_MAX_FILE + 1)
        except OSError as error:
            raise CredentialsUnavailable(f"cannot read {self.path}: {error.strerror}") from error
        if len(data) > _MAX_FILE:
            raise CredentialsUnavailable(f"{self.path} is larger than {_MAX_FILE} bytes")
        return stamp, data
