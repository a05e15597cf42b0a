"""[tls] and [auth]: how clients reach pullpool, and who they have to be."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from proxy.settings.faults import Conflict, Fault
from proxy.settings.types import FilePath, Section
from proxy.web.passwords import read_htpasswd
from proxy.web.reload import Unusable
from proxy.web.tls import TlsFiles, server_context


class Tls(Section):
    """[tls]: TLS on the registry listener."""

    cert_file: FilePath | None = Field(
        default=None,
        description="PEM file of the listener's certificate and its chain; read again when it"
        " changes.",
    )
    key_file: FilePath | None = Field(
        default=None, description="PEM file of the certificate's key, without a password."
    )
    client_ca_file: FilePath | None = Field(
        default=None,
        description="PEM file of authorities; clients need a certificate of theirs, then.",
    )

    @property
    def files(self) -> TlsFiles | None:
        """The files to serve with; None: plain HTTP."""
        if self.cert_file is None or self.key_file is None:
            return None
        return TlsFiles(self.cert_file, self.key_file, self.client_ca_file)

    def conflicts(self) -> Iterator[Conflict]:
        """Rules between the keys of this table."""
        pair = (("tls", "cert_file"), ("tls", "key_file"))
        given = [key for key in pair if getattr(self, key[1]) is not None]
        if len(given) == 1:
            (other,) = set(pair) - set(given)
            yield Conflict(given[0], f"needs {other[1]} beside it", pair)
        if self.client_ca_file is not None and not given:
            message = "needs cert_file and key_file beside it"
            yield Conflict(("tls", "client_ca_file"), message, pair)

    def missing(self) -> Iterator[Fault]:
        """Files that these keys name and that cannot be used (looks at disk)."""
        unread = list(unreadable(self, "tls"))
        yield from unread
        if self.files is None or unread:
            return
        try:
            server_context(self.files)
        except Unusable as error:
            yield Fault("tls", str(error))


class Auth(Section):
    """[auth]: who may pull."""

    htpasswd_file: FilePath | None = Field(
        default=None,
        description="File of names and bcrypt hashes (htpasswd -B); clients need one of them, then."
        " Read again when it changes.",
    )

    def missing(self) -> Iterator[Fault]:
        """Files that these keys name and that cannot be used (looks at disk)."""
        unread = list(unreadable(self, "auth"))
        yield from unread
        if self.htpasswd_file is None or unread:
            return
        try:
            read_htpasswd(self.htpasswd_file)
        except Unusable as error:
            yield Fault("auth.htpasswd_file", str(error))


def unreadable(section: Section, table: str) -> Iterator[Fault]:
    """Every file that a table names and that cannot be read."""
    values: dict[str, Any] = dict(section)
    for key, path in values.items():
        if isinstance(path, Path) and not (path.is_file() and os.access(path, os.R_OK)):
            yield Fault(f"{table}.{key}", "is not a file that can be read", repr(str(path)))
