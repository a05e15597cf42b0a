"""Builds ctr of a containerd that is newer than the distribution's, from the Go module proxy.

Versions and checksums are pinned by go.mod and go.sum in `ctr/`; what was compiled stays in Go's
own cache, so only the first run on a machine takes a minute.
"""

import os
import shutil
import subprocess
from pathlib import Path

from tests.integration.rig import PartFailed, has

MODULE = Path(__file__).parent / "ctr"
PACKAGE = "github.com/containerd/containerd/v2/cmd/ctr"

# No toolchain is downloaded for it: what is installed has to do.
_ENV = {"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"}


class NotToBeHad(Exception):
    """There is no Go here, or one that is too old, or the modules cannot be fetched."""


def build_ctr(directory: Path) -> Path:
    """The program, built. Raises NotToBeHad, and PartFailed when it cannot be compiled."""
    if not has("go"):
        raise NotToBeHad("not installed: go")
    fetched = _go("mod", "download")
    if fetched.returncode:
        raise NotToBeHad(f"containerd's modules: {fetched.stderr.strip()[-300:]}")
    built = _go("build", "-o", str(directory / "ctr"), PACKAGE)
    if built.returncode:
        raise PartFailed(f"ctr cannot be built:\n{built.stderr}")
    return directory / "ctr"


def _go(*words: str) -> subprocess.CompletedProcess[str]:
    go = shutil.which("go")
    assert go is not None
    return subprocess.run(
        [go, *words],
        cwd=MODULE,
        env={**os.environ, **_ENV},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
