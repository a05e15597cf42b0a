"""Builds ctr of a containerd that is newer than the distribution's, from the Go module proxy.

Versions and checksums are pinned by go.mod and go.sum in `ctr/`; what was compiled stays in Go's
own cache. Where that is empty it takes a minute of both cores (containerd 2.4, nothing else
running), so the build begins early and goes on, nicely, beside the tests that come before the one
that needs it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from tests.integration.rig import PartFailed

MODULE = Path(__file__).parent / "ctr"
PACKAGE = "github.com/containerd/containerd/v2/cmd/ctr"

NOT_FETCHED = 3
_SCRIPT = f'nice go mod download || exit {NOT_FETCHED}; exec nice go build -o "$1" {PACKAGE}'

# No toolchain is downloaded for it: what is installed has to do.
_ENV = {"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"}


class NotToBeHad(Exception):
    """Go here is too old, or the modules cannot be fetched."""


class Build:
    """ctr on its way. Whoever starts it calls `stop` in the end."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="ctr-"))
        self._log = self._directory / "log"
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                ["sh", "-c", _SCRIPT, "build", self._directory / "ctr"],
                cwd=MODULE,
                env={**os.environ, **_ENV},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the compilers, too, end with it
            )

    def wait(self) -> Path:
        """The program. Raises NotToBeHad, and PartFailed when it cannot be compiled."""
        code = self._child.wait()
        said = self._log.read_text(errors="replace").strip()
        if code == NOT_FETCHED:
            raise NotToBeHad(f"containerd's modules: {said[-300:]}")
        if code:
            raise PartFailed(f"ctr cannot be built: exit {code}\n{said}")
        return self._directory / "ctr"

    def stop(self) -> None:
        """End it, finished or not, and remove what it made."""
        if self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGTERM)
            self._child.wait()
        shutil.rmtree(self._directory)

    def __repr__(self) -> str:
        return f"<Build of ctr in {self._directory}, exit {self._child.poll()}>"
