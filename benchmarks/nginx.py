"""nginx with all it writes in a directory of its own: an upstream at its limit, and a rival."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.parts import Part, running

WORKERS = 2
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@contextlib.contextmanager
def running_nginx(name: str, http: str, directory: Path) -> Iterator[Part]:
    """Runs nginx with the given contents of its http block until the block ends."""
    path = directory / f"{name}.conf"
    path.write_text(_config(http, directory))
    command = ("nginx", "-c", str(path), "-e", str(directory / f"{name}.err"))
    with running(name, command, directory) as part:
        yield part


def _config(http: str, directory: Path) -> str:
    # Started by root, the workers would become a user who may not enter our private directory.
    user = "user root;" if os.geteuid() == 0 else ""
    temporary = "\n".join(f"{kind}_temp_path {directory}/{kind};" for kind in TEMPORARY)
    return f"""
{user}
daemon off;
worker_processes {WORKERS};
worker_rlimit_nofile 16384;
pid {directory}/nginx.pid;
error_log {directory}/nginx.err error;
events {{ worker_connections 4096; }}
http {{
{temporary}
{http}
}}
"""
