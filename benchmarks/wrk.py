"""wrk, the load generator for what is asked for often: a thread that does little else than ask."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.parts import LOOPBACK, PartFailed
from benchmarks.setups import DIRECTORY


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk did: requests with their bytes (heads included), in so many seconds; those that
    failed; latencies in seconds."""

    requests: int
    size: int
    seconds: float
    failed: int
    p50: float
    p99: float


def wrk(
    port: int,
    path: str,
    *,
    connections: int,
    lasting: float,
    tls: bool = False,
    unique: bool = False,
    paths: Path | None = None,
) -> Load:
    """Asks 127.0.0.1:`port` for `path` over so many connections, or for those in a file in turn.

    Raises PartFailed.
    """
    if shutil.which("wrk") is None:
        raise PartFailed("this scenario needs wrk (Debian package wrk)")
    words = (*(("unique",) if unique else ()), *((str(paths),) if paths else ()))
    command = (
        *("wrk", "-t1", f"-c{connections}", f"-d{max(1, round(lasting))}s", "--timeout", "30s"),
        *("-s", str(DIRECTORY / "wrk.lua")),
        f"{'https' if tls else 'http'}://{LOOPBACK}:{port}{path}",
        *("--", *words),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not said:
        raise PartFailed(f"wrk ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return Load(**json.loads(said[-1]))
