"""[fleet]: the nodes that share one directory, and how this one takes part."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PlainSerializer, PlainValidator, SecretStr

from proxy.fleet.place import Place
from proxy.settings.faults import Conflict, Fault
from proxy.settings.listener import unreadable
from proxy.settings.types import (
    Address,
    FilePath,
    MaybeBytesInTime,
    Secret,
    Section,
    Shown,
    Url,
    Variable,
    pattern,
    text_schema,
)
from proxy.settings.values import HostPort
from proxy.web.reload import Unusable
from proxy.web.tls import TlsFiles, check_authorities, check_key_pair, server_context

#: Characters of a secret below which it could be guessed.
MIN_SECRET = 16
_SECRETS = ("secret", "secret_env", "secret_file")
_PASSWORDS = ("directory_password", "directory_password_env", "directory_password_file")
_SENTINEL_PASSWORDS = (
    "directory_sentinel_password",
    "directory_sentinel_password_env",
    "directory_sentinel_password_file",
)
#: Each user's key, and the keys of which it needs one.
_USERS = {
    "directory_username": _PASSWORDS,
    "directory_sentinel_username": _SENTINEL_PASSWORDS,
}
_PAPERS = ("ca_file", "cert_file", "key_file")
_OF_TLS = ("directory_ca_file", "directory_cert_file", "directory_key_file")
_EVERYWHERE = ("0.0.0.0", "::")


def _advertised(value: str) -> str:
    parts = urlsplit(value)
    if parts.path:
        raise ValueError("must have no path: 'http://10.0.0.7:5052'")
    if parts.hostname in _EVERYWHERE:
        raise ValueError("must be an address that other nodes can reach, such as this machine's")
    return value


def _long_enough(value: Any) -> Any:
    if len(value.get_secret_value()) < MIN_SECRET:
        raise ValueError(f"must have at least {MIN_SECRET} characters")
    return value


_Directory = Annotated[
    Place,
    PlainValidator(Place.parse),
    PlainSerializer(str),
    text_schema(
        "redis://redis:6379/0",
        "rediss+sentinel://s1:26379,s2:26379/SERVICE/0",
        "redis+cluster://r1:6379,r2:6379",
    ),
]
_Label = Annotated[
    str, pattern(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", "must be a short name")
]


@dataclass(frozen=True, slots=True)
class User:
    """Whom to log in as (empty: the default user), and the one place that the password is in; all
    None: there is no login."""

    name: str
    password: SecretStr | None
    variable: str | None
    file: Path | None


class Fleet(Section):
    """[fleet]: see the module."""

    directory: Annotated[_Directory | None, Shown("URL")] = Field(
        default=None,
        description="Redis or Valkey (7.0 or newer) that the nodes share: redis://H:P/DB,"
        " redis+sentinel://H:P,H:P/SERVICE/DB or redis+cluster://H:P,H:P; rediss for TLS. Needs"
        " pullpool[fleet].",
    )
    listen: Annotated[Address | None, Shown("host:port")] = Field(
        default=None, description="Where other nodes fetch from this one."
    )
    advertise: Annotated[Annotated[Url, AfterValidator(_advertised)] | None, Shown("URL")] = Field(
        default=None, description="URL at which other nodes reach that address."
    )
    name: Annotated[_Label | None, Shown("text", "the host's name")] = Field(
        default=None, description="What this node is called."
    )
    zone: Annotated[_Label | None, Shown("text")] = Field(
        default=None, description="Nodes of the same zone are asked first."
    )
    secret: Annotated[Annotated[Secret, AfterValidator(_long_enough)] | None, Shown("text")] = (
        Field(
            default=None,
            description="What nodes show one another that they belong together by; at least"
            f" {MIN_SECRET} characters.",
        )
    )
    secret_env: Variable | None = Field(
        default=None, description="Environment variable that holds the secret."
    )
    secret_file: FilePath | None = Field(
        default=None,
        description="File that holds the secret; read again when it changes. The one before is"
        " accepted for some minutes.",
    )
    ca_file: FilePath | None = Field(
        default=None,
        description="PEM file of the authorities of the nodes' certificates; read again when it"
        " changes.",
    )
    cert_file: FilePath | None = Field(
        default=None,
        description="PEM file of this node's certificate, for both sides of a connection; read"
        " again when it changes.",
    )
    key_file: FilePath | None = Field(
        default=None, description="PEM file of that certificate's key."
    )
    uplink: MaybeBytesInTime = Field(
        default=None, description="Most bytes in a time to other nodes, such as 100MiB/s."
    )
    downlink: MaybeBytesInTime = Field(
        default=None, description="Most bytes in a time from other nodes."
    )
    directory_username: Annotated[_Label | None, Shown("text")] = Field(
        default=None, description="ACL user of the directory; needs one password key."
    )
    directory_password: Annotated[Secret | None, Shown("text")] = Field(
        default=None, description="Password of the directory."
    )
    directory_password_env: Variable | None = Field(
        default=None, description="Environment variable that holds that password."
    )
    directory_password_file: FilePath | None = Field(
        default=None, description="File that holds that password; read at every connection."
    )
    directory_sentinel_username: Annotated[_Label | None, Shown("text")] = Field(
        default=None, description="ACL user of the Sentinels; needs one password key of theirs."
    )
    directory_sentinel_password: Annotated[Secret | None, Shown("text")] = Field(
        default=None,
        description="Password of the Sentinels (requirepass, or the ACL user's); without one they"
        " are asked without a login.",
    )
    directory_sentinel_password_env: Variable | None = Field(
        default=None, description="Environment variable that holds the Sentinels' password."
    )
    directory_sentinel_password_file: FilePath | None = Field(
        default=None,
        description="File that holds the Sentinels' password; read at every connection.",
    )
    directory_ca_file: FilePath | None = Field(
        default=None,
        description="PEM file of the authorities to trust for the directory; read at every"
        " connection.",
    )
    directory_cert_file: FilePath | None = Field(
        default=None,
        description="PEM file of the certificate to show to the directory; read at every"
        " connection.",
    )
    directory_key_file: FilePath | None = Field(
        default=None, description="PEM file of that certificate's key."
    )

    @property
    def files(self) -> TlsFiles | None:
        """What both sides of a connection between nodes show and check; None: plain HTTP."""
        if self.ca_file is None or self.cert_file is None or self.key_file is None:
            return None
        return TlsFiles(self.cert_file, self.key_file, self.ca_file)

    @property
    def directory_user(self) -> User:
        """Who asks the servers that hold the directory's keys."""
        return User(
            self.directory_username or "",
            self.directory_password,
            self.directory_password_env,
            self.directory_password_file,
        )

    @property
    def sentinel_user(self) -> User:
        """Who asks its Sentinels."""
        return User(
            self.directory_sentinel_username or "",
            self.directory_sentinel_password,
            self.directory_sentinel_password_env,
            self.directory_sentinel_password_file,
        )

    def _given(self, keys: tuple[str, ...]) -> list[str]:
        return [key for key in keys if getattr(self, key) is not None]

    def conflicts(self, listen: HostPort, admin: HostPort) -> Iterator[Conflict]:
        """Rules between the keys of this table, and with the other two listeners."""
        if self.directory is None:
            for key in self._given(tuple(type(self).model_fields)):
                yield _conflict(key, "needs directory beside it", "directory")
            return
        for key in ("listen", "advertise"):
            if getattr(self, key) is None:
                yield _conflict("directory", f"needs {key} beside it", key)
        yield from self._rivals()
        yield from self._papers()
        yield from self._protection()
        for key, address in (("listen", listen), ("admin", admin)):
            if self.listen is not None and self.listen == address and address.port:
                at, message = ("fleet", "listen"), f"must not be the same address as {key}"
                yield Conflict(at, message, ((key,),))

    def _rivals(self) -> Iterator[Conflict]:
        for keys in (_SECRETS, *_USERS.values()):
            given = self._given(keys)
            if len(given) > 1:
                message = f"only one of {' and '.join(given)} can be set"
                yield _conflict(given[1], message, *given)
        for user, keys in _USERS.items():
            if self._given((user,)) and not self._given(keys):
                message = f"needs {keys[0]}, {keys[1]} or {keys[2]} beside it"
                yield _conflict(user, message, *keys)
        assert self.directory is not None
        if self.directory.kind != "sentinel":
            message = "needs a directory that Sentinels know: 'redis+sentinel://…'"
            for key in self._given(("directory_sentinel_username", *_SENTINEL_PASSWORDS)):
                yield _conflict(key, message, "directory")

    def _papers(self) -> Iterator[Conflict]:
        given = self._given(_PAPERS)
        if given and len(given) < len(_PAPERS):
            missing = " and ".join(key for key in _PAPERS if key not in given)
            yield _conflict(given[0], f"needs {missing} beside it", *_PAPERS)
        pair = ("directory_cert_file", "directory_key_file")
        shown = self._given(pair)
        if len(shown) == 1:
            (other,) = set(pair) - set(shown)
            yield _conflict(shown[0], f"needs {other} beside it", *pair)
        assert self.directory is not None
        if not self.directory.tls:
            for key in self._given(_OF_TLS):
                yield _conflict(key, "needs a directory with TLS: 'rediss://…'", "directory")

    def _protection(self) -> Iterator[Conflict]:
        """May strangers fetch from this node, or speak for one?"""
        is_tls = len(self._given(_PAPERS)) == len(_PAPERS)
        if self.advertise is not None and self._given(_PAPERS) in ([], list(_PAPERS)):
            scheme = "https" if is_tls else "http"
            if urlsplit(self.advertise).scheme != scheme:
                why = "with cert_file" if is_tls else "without cert_file"
                yield _conflict("advertise", f"must begin with {scheme}:// {why}", *_PAPERS)
        if self.listen is None or self.listen.is_loopback or is_tls or self._given(_SECRETS):
            return
        message = (
            f"everybody who reaches {self.listen} could fetch from this node: set secret"
            " (secret_env, secret_file), or ca_file, cert_file and key_file, or listen on 127.0.0.1"
        )
        yield _conflict("listen", message, *_SECRETS, *_PAPERS)

    def warnings(self) -> Iterator[str]:
        """What is allowed but is likely to be regretted."""
        if self.directory is None:
            return
        passwords = self._given(_PASSWORDS + _SENTINEL_PASSWORDS)
        if passwords and not self.directory.tls and not self.directory.is_loopback:
            yield (
                "fleet.directory: its password goes over a connection that anybody can read;"
                " rediss:// is with TLS"
            )
        if self.advertise is not None and self.listen is not None:
            host = urlsplit(self.advertise).hostname or ""
            if HostPort(host, 1).is_loopback and not self.listen.is_loopback:
                yield "fleet.advertise: other machines do not reach this one by a loopback address"

    def missing(
        self,
        environ: Mapping[str, str],
        is_installed: Callable[[str], bool] = lambda name: find_spec(name) is not None,
    ) -> Iterator[Fault]:
        """What these keys need and is not there (looks at disk)."""
        if self.directory is not None and not is_installed("redis"):
            words = "needs the package redis, which is not installed: pip install 'pullpool[fleet]'"
            yield Fault("fleet.directory", words)
        unread = list(unreadable(self, "fleet"))
        yield from unread
        bad = {fault.path for fault in unread}
        for key in ("secret_env", "directory_password_env", "directory_sentinel_password_env"):
            variable = getattr(self, key)
            if variable is not None and not environ.get(variable):
                yield Fault(f"fleet.{key}", "names an environment variable that is not set")
        if self.secret_env is not None and 0 < len(environ.get(self.secret_env, "")) < MIN_SECRET:
            words = f"names a variable that holds fewer than {MIN_SECRET} characters"
            yield Fault("fleet.secret_env", words)
        file = None if "fleet.secret_file" in bad else self.secret_file
        if file is not None and len(file.read_bytes().strip()) < MIN_SECRET:
            words = f"holds fewer than {MIN_SECRET} characters"
            yield Fault("fleet.secret_file", words, repr(str(file)))
        yield from self._unusable(bad)

    def _unusable(self, bad: set[str]) -> Iterator[Fault]:
        """PEM files that can be read and are no use."""
        if self.files is not None and not bad & {f"fleet.{key}" for key in _PAPERS}:
            try:
                server_context(self.files)
            except Unusable as error:
                yield Fault("fleet.cert_file", str(error))
        pair = ("directory_cert_file", "directory_key_file")
        for keys, check in ((("directory_ca_file",), check_authorities), (pair, check_key_pair)):
            files = [getattr(self, key) for key in keys]
            if None in files or bad & {f"fleet.{key}" for key in keys}:
                continue
            try:
                check(*files)
            except Unusable as error:
                yield Fault(f"fleet.{keys[0]}", str(error))


def _conflict(at: str, message: str, *about: str) -> Conflict:
    return Conflict(("fleet", at), message, tuple(("fleet", key) for key in about))
