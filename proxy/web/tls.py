"""TLS of the registry listener: the context that handshakes use, and the name in a certificate.

And whether PEM files can be used at all, which the settings ask for those of upstreams too.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.web.reload import Unusable

#: Characters of a name that are kept: RFC 5280 allows 64 for a common name, DNS 253.
MAX_NAME = 253


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: our certificate with its chain, its key, and who vouches for clients, if asked."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        files = (self.cert, self.key, self.client_ca)
        return tuple(file for file in files if file is not None)


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """The context of a listener, TLS 1.2 or newer. Reads files; raises ``Unusable``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_key_pair(context, files.cert, files.key)
    if files.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_authorities(context, files.client_ca)
    return context


def peer_context(files: TlsFiles) -> ssl.SSLContext:
    """The context that one node dials another with: the same certificate, and of all authorities
    only the fleet's own. Reads files; raises ``Unusable``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the name, too
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_key_pair(context, files.cert, files.key)
    if files.client_ca is None:
        raise Unusable("nodes need an authority that vouches for them")
    _load_authorities(context, files.client_ca)
    return context


def check_authorities(file: Path) -> None:
    """Raises ``Unusable`` for a file that is no PEM of certificates."""
    _load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), file)


def check_key_pair(cert: Path, key: Path) -> None:
    """Raises ``Unusable`` for a certificate and a key that nobody can be shown."""
    _load_key_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), cert, key)


def _load_key_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:
        raise Unusable(f"{cert} with {key}: {_words(error)}") from error


def _load_authorities(context: ssl.SSLContext, file: Path) -> None:
    try:
        context.load_verify_locations(file)
    except (OSError, ValueError) as error:
        raise Unusable(f"{file}: {_words(error)}") from error


def certificate_name(certificate: Mapping[str, Any] | None) -> str | None:
    """Whom a verified certificate names: its common name, else its first alternative name.

    ``certificate`` is in the form of ``ssl.SSLSocket.getpeercert``; None when there is no name.
    """
    if not certificate:
        return None
    found = _common_names(certificate.get("subject", ()))
    for candidate in (*found, *(name for _, name in certificate.get("subjectAltName", ()))):
        name = "".join(c if c.isprintable() else "?" for c in str(candidate)).strip()
        if name:
            return name[:MAX_NAME]
    return None


def _common_names(subject: Iterable[Iterable[tuple[str, str]]]) -> Iterator[str]:
    for names in subject:
        for kind, name in names:
            if kind == "commonName":
                yield name


def _no_password() -> bytes:
    # Without it OpenSSL would ask at the terminal.
    raise ValueError("the key is protected by a password")


def _words(error: Exception) -> str:
    """What is wrong: ``[X509: KEY_VALUES_MISMATCH] key values mismatch (_ssl.c:3900)``, shorter."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if isinstance(error, ssl.SSLError) and "PEM lib" in str(error):
        return "no PEM, or of something else"  # OpenSSL gives no reason, then
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
