"""nginx with all it writes in a directory of its own: an upstream at its limit, and a rival."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.parts import Part, running
from benchmarks.setups import fill

WORKERS = 2  # as in setups/nginx.conf


@contextlib.contextmanager
def running_nginx(name: str, http: str, directory: Path) -> Iterator[Part]:
    """Runs nginx with the given contents of its http block until the block ends."""
    path = directory / f"{name}.conf"
    # Started by root, the workers would become a user who may not enter our private directory.
    user = "user root;" if os.geteuid() == 0 else ""
    path.write_text(fill("nginx.conf", user=user, directory=directory, http=http))
    command = ("nginx", "-c", str(path), "-e", str(directory / f"{name}.err"))
    with running(name, command, directory) as part:
        yield part
