"""The TLS context of an upstream's sockets, made of files that may change.

Certificates of machines live for days, and who renews them does not restart what uses them. So the
files are looked at before a socket is dialled, at most every few seconds, in a thread; a new
context takes the place of the old one only when all of it can be used, and until then the old one
serves and the log says why. Sockets that are open keep what they were made with.

There are two for each upstream: one with the client certificate, for the upstream's own origins,
and one without, for everybody whom they redirect to and for an egress proxy that speaks TLS.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from pathlib import Path

#: Seconds for which the files are not looked at again.
INTERVAL = 5.0

_Mark = tuple[int, int, int] | None


class CannotTrust(Exception):
    """An upstream's certificates or authorities cannot be used; the message names the file."""


class TlsFiles:
    """A client's TLS context: the system's authorities, those of ``ca_file``, and a certificate.

    ``on_reload`` hears the error of each new content that is no use, and ``None`` for one that is.
    """

    def __init__(
        self,
        *,
        ca_file: Path | None = None,
        cert_file: Path | None = None,
        key_file: Path | None = None,
        clock: Callable[[], float],
        on_reload: Callable[[CannotTrust | None], None] = lambda _error: None,
    ) -> None:
        self._ca_file = ca_file
        self._cert_file = cert_file
        self._key_file = key_file
        self._clock = clock
        self._on_reload = on_reload
        self._context: ssl.SSLContext | None = None
        self._marks: tuple[_Mark, ...] = ()
        self._looked_at = 0.0
        self._lock = asyncio.Lock()

    @property
    def shows_certificate(self) -> bool:
        """Does whoever asks for it get to see who we are?"""
        return self._cert_file is not None

    async def context(self) -> ssl.SSLContext:
        """The context to dial with now. Raises ``CannotTrust`` while there has never been one."""
        async with self._lock:
            if self._context is None or self._clock() - self._looked_at >= INTERVAL:
                await self._look()
        assert self._context is not None
        return self._context

    async def _look(self) -> None:
        # Looked at before the files are read: a change in between is then seen at the next look.
        # Kept only with what came of it: who asks may leave meanwhile, and then the next one reads.
        marks = await asyncio.to_thread(self._current_marks)
        if self._context is None or marks != self._marks:
            try:
                context = await asyncio.to_thread(self._read)
            except CannotTrust as error:
                if self._context is None:
                    raise
                self._on_reload(error)
            else:
                if self._context is not None:
                    self._on_reload(None)
                self._context = context
            self._marks = marks
        self._looked_at = self._clock()

    def _current_marks(self) -> tuple[_Mark, ...]:
        return tuple(_mark(file) for file in (self._ca_file, self._cert_file, self._key_file))

    def _read(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        try:
            if self._ca_file is not None:
                context.load_verify_locations(self._ca_file)
        except OSError as error:  # ssl.SSLError among them: not PEM, or nothing in it
            raise CannotTrust(f"ca_file {self._ca_file}: {error.strerror or error}") from error
        try:
            if self._cert_file is not None:
                # A key with a password would be asked for on the terminal.
                context.load_cert_chain(self._cert_file, self._key_file, password=_no_password)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise CannotTrust(f"client_cert_file {self._cert_file}: {why}") from error
        return context

    def __repr__(self) -> str:
        files = (self._ca_file, self._cert_file, self._key_file)
        return f"<TlsFiles {', '.join(str(file) for file in files if file is not None)}>"


Tls = ssl.SSLContext | TlsFiles | None
"""What sockets are made with; ``None`` is aiohttp's own context, which all share."""


async def context_of(tls: Tls) -> ssl.SSLContext | None:
    """The context to dial with now. Raises ``CannotTrust``."""
    return await tls.context() if isinstance(tls, TlsFiles) else tls


def _no_password() -> str:
    raise ValueError("the key has a password, which there is no way to give")


def _mark(file: Path | None) -> _Mark:
    if file is None:
        return None
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
