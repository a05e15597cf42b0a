"""An htpasswd file, and whether a name and a password are in it.

Only bcrypt is taken, as docker-registry does: everything else that htpasswd can write is too
quick to guess. To check one costs a tenth of a second of a core, so that

* it happens in two threads of its own (bcrypt lets go of the interpreter meanwhile): a flood of
  wrong passwords waits for itself, and who leaves the queue leaves no work behind;
* the verdict is remembered under a keyed hash of name and password, the good for minutes and the
  bad for seconds: a node that pulls fifty layers is checked once, and so is a crowd that asks at
  the same time. A changed file forgets all of it;
* a name that is unknown costs what a known one does, and takes as long.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bcrypt
from cachetools import TTLCache

from proxy.web.reload import Unusable

#: Seconds that a verdict is remembered.
GOOD_TTL = 300.0
BAD_TTL = 10.0
#: Verdicts that are remembered, of each kind.
REMEMBERED = 4096
#: Checks at a time.
CHECKS = 2
#: Bytes of a password that bcrypt looks at; what has made the file looked at no more either.
MAX_PASSWORD = 72
#: Most bytes of a file.
MAX_FILE = 4 << 20

_HASH = re.compile(r"\$2[aby]\$(?:0[4-9]|1[0-9]|2[0-9]|3[01])\$[./A-Za-z0-9]{53}")


def parse_htpasswd(text: str) -> dict[str, bytes]:
    """The hash of each name. Raises ``Unusable`` with the number of the line, never its text."""
    hashes: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        name, colon, hashed = entry.partition(":")
        if not colon or not name:
            raise Unusable(f"line {number} is not NAME:HASH")
        if not _HASH.fullmatch(hashed):
            raise Unusable(f"line {number} does not hold a bcrypt hash (htpasswd -B)")
        if name in hashes:
            raise Unusable(f"line {number} has a name that was there before")
        hashes[name] = hashed.encode()
    if not hashes:
        raise Unusable("there is nobody in it")
    return hashes


def read_htpasswd(file: Path) -> dict[str, bytes]:
    """The hash of each name in a file. Reads it; raises ``Unusable``."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise Unusable(f"{file}: is larger than {MAX_FILE} bytes")
        return parse_htpasswd(data.decode())
    except OSError as error:
        raise Unusable(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Unusable(f"{file}: is not UTF-8 text") from error
    except Unusable as error:
        raise Unusable(f"{file}: {error}") from error


class Passwords:
    """Answers whether a password is right. ``check`` compares a password with a hash, slowly."""

    def __init__(
        self,
        hashes: Mapping[str, bytes],
        *,
        clock: Callable[[], float],
        check: Callable[[bytes, bytes], bool] = bcrypt.checkpw,
    ) -> None:
        self._check = check
        self._key = secrets.token_bytes(32)
        self._threads = ThreadPoolExecutor(CHECKS, thread_name_prefix="password")
        self._good: TTLCache[bytes, bool] = TTLCache(REMEMBERED, GOOD_TTL, timer=clock)
        self._bad: TTLCache[bytes, bool] = TTLCache(REMEMBERED, BAD_TTL, timer=clock)
        self._under_way: dict[bytes, asyncio.Lock] = {}
        self._hashes: Mapping[str, bytes] = {}
        self.replace(hashes)

    def replace(self, hashes: Mapping[str, bytes]) -> None:
        """Go by another file's content from now on."""
        self._hashes = hashes
        self._good.clear()
        self._bad.clear()

    def close(self) -> None:
        """Check no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def is_right(self, name: str, password: str) -> bool:
        """Whether the file has this name with this password."""
        # Keyed: neither the process's memory nor a dump of it holds what could be guessed from.
        text = f"{len(name)}:{name}:{password}".encode(errors="surrogatepass")
        key = hmac.digest(self._key, text, hashlib.sha256)
        known = self._known(key)
        if known is not None:
            return known
        lock = self._under_way.setdefault(key, asyncio.Lock())
        try:
            async with lock:
                known = self._known(key)
                return await self._ask(key, name, password) if known is None else known
        finally:
            if not lock.locked():
                self._under_way.pop(key, None)

    def _known(self, key: bytes) -> bool | None:
        return True if key in self._good else False if key in self._bad else None

    async def _ask(self, key: bytes, name: str, password: str) -> bool:
        hashes = self._hashes
        # For a stranger's name any hash will do: what it takes to compare is the point.
        hashed = hashes.get(name) or next(iter(hashes.values()))
        secret = password.encode(errors="surrogatepass")[:MAX_PASSWORD]
        loop = asyncio.get_running_loop()
        is_equal = await loop.run_in_executor(self._threads, self._check, secret, hashed)
        is_right = is_equal and name in hashes
        if hashes is self._hashes:  # else it is a verdict by a file that is no more
            (self._good if is_right else self._bad)[key] = True
        return is_right
