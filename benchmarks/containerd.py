"""containerd, the client whose pulls count: a daemon of its own that fetches through a mirror."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.images import Image
from benchmarks.parts import LOOPBACK, Part, PartFailed, running, until
from benchmarks.setups import fill

NAME = "registry.example.com"  # never asked for by itself: the mirror stands for it


@dataclass(frozen=True, slots=True)
class Containerd:
    """A running daemon with an empty store; a client of its own finds nobody's settings."""

    directory: Path
    hosts: Path

    def fetch(self, image: Image) -> float:
        """Fetches all of an image; the seconds it took. Nothing is unpacked: that is the same
        whoever the bytes come from. Raises PartFailed."""
        began = time.monotonic()
        self._ctr("content", "fetch", f"--hosts-dir={self.hosts}", self._name(image))
        took = time.monotonic() - began
        missing = {*image.blobs} - {*self._held()}
        if missing:
            raise PartFailed(f"containerd lacks {sorted(missing)} of an image it has fetched")
        return took

    def forget(self, image: Image) -> None:
        """Removes an image with all its bytes. Raises PartFailed."""
        self._ctr("images", "rm", "--sync", self._name(image))
        left = self._held()
        if left:
            raise PartFailed(f"containerd kept what the next fetch should get: {left}")

    def _held(self) -> Sequence[str]:
        return self._ctr("content", "ls", "-q").split()

    def _name(self, image: Image) -> str:
        return f"{NAME}/{image.repository}:{image.tag}"

    def _ctr(self, *words: str) -> str:
        command = ("ctr", "--address", f"{self.directory}/grpc", *words)
        environment = {**os.environ, "HOME": str(self.directory)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise PartFailed(f"ctr {' '.join(words)}: {done.stdout[-2000:]}{done.stderr}")
        return done.stdout

    def answers(self) -> bool:
        with contextlib.suppress(PartFailed):
            self._ctr("version")
            return True
        return False


@contextlib.contextmanager
def running_containerd(mirror: int, directory: Path) -> Iterator[Containerd]:
    """Runs one whose only way to a registry is 127.0.0.1:`mirror`."""
    hosts = directory / "certs.d"
    (hosts / NAME).mkdir(parents=True)
    (hosts / NAME / "hosts.toml").write_text(
        f'server = "http://{LOOPBACK}:{mirror}"\n'
        f'[host."http://{LOOPBACK}:{mirror}"]\ncapabilities = ["pull", "resolve"]\n'
    )
    (directory / "config.toml").write_text(fill("containerd.toml", directory=directory))
    daemon = Containerd(directory, hosts)
    command = ("containerd", "--config", str(directory / "config.toml"))
    with running("containerd", command, directory) as part:
        until(lambda: _is_up(daemon, part), "containerd to answer")
        yield daemon


def _is_up(daemon: Containerd, part: Part) -> bool:
    part.check()
    return daemon.answers()
