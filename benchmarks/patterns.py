"""The bundled registry with large blobs that it makes as it sends them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.load import Want
from benchmarks.parts import running, until

PATIENCE = 600.0  # seconds: it computes the digests first


@contextlib.contextmanager
def pattern_registry(
    directory: Path, *, size: int, number: int, rate: int | None = None
) -> Iterator[tuple[int, tuple[Want, ...]]]:
    """Its port, and what there is to ask for: `number` blobs of `size` bytes. Raises PartFailed."""
    command = (
        *(sys.executable, "-m", "proxy.testing", "registry", "--layers=1", "--layer-size=1"),
        *(f"--patterns={number}", f"--pattern-size={size}"),
        *((f"--rate={rate}",) if rate else ()),
    )
    with running("patterns", command, directory) as part:

        def has_spoken() -> bool:
            part.check()
            return "\n" in part.output.read_text()

        until(has_spoken, "the bundled registry", patience=PATIENCE)
        ready = json.loads(part.output.read_text().splitlines()[0])
        port = urlsplit(ready["url"]).port
        assert port is not None
        name, digests = ready["patterns"]["name"], ready["patterns"]["digests"]
        yield port, tuple(Want("blob", name, digest, digest, size) for digest in digests)
