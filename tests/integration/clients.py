"""The real clients: each pulls through a mirror into its own store and says what it then holds.

What a client holds is told in digests that it, or we, computed from its bytes after the pull:
skopeo and containerd keep blobs as they came, podman and dockerd name layers as they unpacked them.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from proxy.testing.images import FakeImage, FakeIndex
from tests.integration.parts import NAME
from tests.integration.rig import Daemon, PartFailed, Rig, debian, run

Image = FakeImage | FakeIndex


class Client(Protocol):
    """Pulls images through one mirror."""

    def pull(self, image: Image) -> frozenset[str]:
        """Pull into an empty store: the digests that are held then. PartFailed if it cannot."""
        ...


def _private_home(rig: Rig) -> dict[str, str]:
    """An environment in which a client finds nobody's settings and nobody's passwords."""
    home = rig.place("home")
    # podman takes a DOCKER_CONFIG without this file for an error.
    (home / "config.json").write_text("{}")
    return {"HOME": str(home), "XDG_RUNTIME_DIR": str(home), "DOCKER_CONFIG": str(home)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


class Skopeo:
    """`skopeo copy docker://… dir:…`: the mirror is named in the image, as a registry would be."""

    def __init__(self, rig: Rig, mirror: str) -> None:
        self._rig = rig
        self._mirror = mirror
        self._env = _private_home(rig)

    def pull(self, image: Image) -> frozenset[str]:
        target = self._rig.place("pulled")
        run(self._copy(image, target), env=self._env)
        held = frozenset(_sha256(path) for path in target.iterdir() if path.name != "version")
        shutil.rmtree(target)
        return held

    def crowd(self, images: Sequence[Image]) -> list[str]:
        """Pull all these at the same time; the errors of those that failed."""
        targets = [self._rig.place("pulled") for _ in images]
        children = [
            subprocess.Popen(
                [str(word) for word in self._copy(image, target)],
                env=self._env | {"PATH": "/usr/bin:/bin"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for image, target in zip(images, targets, strict=True)
        ]
        said = [child.communicate()[0] for child in children]
        for target in targets:
            shutil.rmtree(target)
        return [text for child, text in zip(children, said, strict=True) if child.returncode]

    def _copy(self, image: Image, target: Path) -> list[str | Path]:
        return [
            debian("skopeo"),
            "--insecure-policy",
            "copy",
            "--quiet",
            "--src-tls-verify=false",
            f"docker://{self._mirror}/{image.name}:{image.tag}",
            f"dir:{target}",
        ]


class Podman:
    """`podman pull` of the upstream's name, with the mirror in registries.conf."""

    def __init__(self, rig: Rig, mirror: str, *, prefix: str = "") -> None:
        self._rig = rig
        place = rig.place("podman")
        self._place = place
        configuration = place / "registries.conf"
        configuration.write_text(
            f"""
            unqualified-search-registries = []
            [[registry]]
            prefix = "{NAME}"
            location = "{NAME}"
            [[registry.mirror]]
            location = "{mirror}{prefix}"
            insecure = true
            """
        )
        self._env = _private_home(rig) | {"CONTAINERS_REGISTRIES_CONF": str(configuration)}

    def pull(self, image: Image) -> frozenset[str]:
        name = f"{NAME}/{image.name}:{image.tag}"
        run([*self._podman(), "pull", "--quiet", name], env=self._env)
        told = json.loads(run([*self._podman(), "image", "inspect", name], env=self._env))[0]
        run([*self._podman(), "image", "rm", "--force", name], env=self._env)
        return frozenset({told["Digest"], f"sha256:{told['Id']}", *told["RootFS"]["Layers"]})

    def _podman(self) -> list[str]:
        return [
            debian("podman"),
            f"--root={self._place / 'root'}",
            f"--runroot={self._place / 'run'}",
            f"--tmpdir={self._place / 'tmp'}",
            "--storage-driver=vfs",
            "--cgroup-manager=cgroupfs",
            "--events-backend=file",
        ]


_CONTAINERD = """
version = 2
root = "{place}/root"
state = "{place}/state"
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "{place}/grpc"
"""


class Containerd:
    """`ctr images pull --hosts-dir`: the mirror stands in the upstream's hosts.toml, with `ns`."""

    def __init__(self, rig: Rig, mirror: str) -> None:
        place = rig.place("containerd")
        (place / "config.toml").write_text(_CONTAINERD.format(place=place))
        self._hosts = place / "certs.d"
        (self._hosts / NAME).mkdir(parents=True)
        (self._hosts / NAME / "hosts.toml").write_text(
            f"""
            server = "https://{NAME}"
            [host."http://{mirror}"]
            capabilities = ["pull", "resolve"]
            """
        )
        self._ctr = [debian("ctr"), "--address", f"{place}/grpc"]
        rig.start(
            Daemon(
                "containerd",
                [debian("containerd"), "--config", place / "config.toml"],
                directory=place,
                ready=self._answers,
                env=_private_home(rig),
            )
        )

    def pull(self, image: Image) -> frozenset[str]:
        name = f"{NAME}/{image.name}:{image.tag}"
        flags = ["--snapshotter=native", f"--hosts-dir={self._hosts}"]
        run([*self._ctr, "images", "pull", *flags, name])
        held = frozenset(map(self._content, run([*self._ctr, "content", "ls", "-q"]).split()))
        run([*self._ctr, "images", "rm", "--sync", name])
        left = run([*self._ctr, "content", "ls", "-q"])
        if left:
            raise PartFailed(f"containerd kept what the next pull should fetch: {left}")
        return held

    def _content(self, digest: str) -> str:
        """The digest of the bytes that containerd keeps under this name."""
        got = subprocess.run(
            [*self._ctr, "content", "get", digest], check=True, stdout=subprocess.PIPE
        )
        return f"sha256:{hashlib.sha256(got.stdout).hexdigest()}"

    def _answers(self) -> bool:
        asked = subprocess.run([*self._ctr, "version"], capture_output=True, check=False)
        return asked.returncode == 0


def _unmount(path: Path) -> None:
    # Path.is_mount knows directories only, and this is a file.
    if os.path.ismount(path):
        run(["umount", path])


class Dockerd:
    """`docker pull` from a daemon with `--registry-mirror`, which mirrors docker.io only."""

    def __init__(self, rig: Rig, mirror: str | None = None, *, storage_driver: str = "vfs") -> None:
        place = rig.place("dockerd")
        self.socket = f"unix://{place}/docker.sock"
        self._env = _private_home(rig)
        # With containers on the host's network it leaves the mount of a namespace behind.
        rig.at_end(_unmount, place / "exec/netns/default")
        mirrors = [f"--registry-mirror=http://{mirror}"] if mirror else []
        rig.start(
            Daemon(
                "dockerd",
                [
                    debian("dockerd"),
                    "--bridge=none",
                    "--iptables=false",
                    "--ip6tables=false",
                    f"--storage-driver={storage_driver}",
                    f"--data-root={place}/data",
                    f"--exec-root={place}/exec",
                    f"--pidfile={place}/pid",
                    f"--host={self.socket}",
                    *mirrors,
                ],
                directory=place,
                ready=self._answers,
                env=self._env,
            )
        )

    def run(self, *words: str | Path, env: dict[str, str] | None = None) -> str:
        """A command of the docker client against this daemon: its stdout."""
        docker = [debian("docker"), "--host", self.socket]
        return run([*docker, *words], env=self._env | (env or {}))

    def pull(self, image: Image) -> frozenset[str]:
        if not image.name.startswith("library/"):
            raise PartFailed("a registry mirror of dockerd serves docker.io only")
        name = f"{image.name.removeprefix('library/')}:{image.tag}"
        said = self.run("pull", name)
        if "Already exists" in said:
            raise PartFailed(f"dockerd had a layer before it pulled: {said}")
        told = json.loads(self.run("image", "inspect", name))[0]
        self.run("image", "rm", "--force", name)
        manifests = [name.partition("@")[2] for name in told["RepoDigests"]]
        return frozenset({*manifests, told["Id"], *told["RootFS"]["Layers"]})

    def _answers(self) -> bool:
        asked = subprocess.run(
            [debian("docker"), "--host", self.socket, "version"], capture_output=True, check=False
        )
        return asked.returncode == 0
