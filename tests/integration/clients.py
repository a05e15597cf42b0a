"""The real clients: each pulls through a mirror into its own store and says what it then holds.

What a client holds is told in digests that it, or we, computed from its bytes after the pull:
skopeo and containerd keep blobs as they came, podman and dockerd name layers as they unpacked them.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
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


class ManyAtOnce(Protocol):
    """A client whose store takes several pulls at a time."""

    def pull_all(self, images: Sequence[Image]) -> frozenset[str]:
        """Pull these at the same time: the digests held then. PartFailed if one cannot be had."""
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


def _run_all(commands: Sequence[Sequence[str | Path]], env: Mapping[str, str]) -> list[str]:
    """Run these at the same time; what those said that failed."""
    children = [
        subprocess.Popen(
            [str(word) for word in command],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    said = [child.communicate()[0] for child in children]
    return [text for child, text in zip(children, said, strict=True) if child.returncode]


def _expect_all(commands: Sequence[Sequence[str | Path]], env: Mapping[str, str]) -> None:
    failed = _run_all(commands, env)
    if failed:
        raise PartFailed(f"{len(failed)} of {len(commands)} pulls failed:\n" + "\n".join(failed))


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
        failed = _run_all(list(map(self._copy, images, targets)), self._env)
        for target in targets:
            shutil.rmtree(target)
        return failed

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
        run(self._pulling(image), env=self._env)
        held = self._held(image)
        run([*self._podman(), "image", "rm", "--force", self._name(image)], env=self._env)
        return held

    def pull_all(self, images: Sequence[Image]) -> frozenset[str]:
        _expect_all([self._pulling(image) for image in images], self._env)
        return frozenset[str]().union(*map(self._held, images))

    def _pulling(self, image: Image) -> list[str]:
        return [*self._podman(), "pull", "--quiet", self._name(image)]

    def _held(self, image: Image) -> frozenset[str]:
        told = run([*self._podman(), "image", "inspect", self._name(image)], env=self._env)
        found = json.loads(told)[0]
        return frozenset({found["Digest"], f"sha256:{found['Id']}", *found["RootFS"]["Layers"]})

    def _name(self, image: Image) -> str:
        return f"{NAME}/{image.name}:{image.tag}"

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
    """`ctr images pull --hosts-dir`: the mirror stands in the upstream's hosts.toml, with `ns`.

    `server` is where it goes when the mirror fails it. Another `ctr` than the distribution's does
    the whole pull itself, and the daemon only stores.
    """

    def __init__(
        self, rig: Rig, mirror: str, *, server: str = f"https://{NAME}", ctr: Path | None = None
    ) -> None:
        place = rig.place("containerd")
        (place / "config.toml").write_text(_CONTAINERD.format(place=place))
        self._hosts = place / "certs.d"
        (self._hosts / NAME).mkdir(parents=True)
        (self._hosts / NAME / "hosts.toml").write_text(
            f"""
            server = "{server}"
            [host."http://{mirror}"]
            capabilities = ["pull", "resolve"]
            """
        )
        self._ctr = [ctr or debian("ctr"), "--address", f"{place}/grpc"]
        self._how = ["--local"] if ctr else []
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
        run(self._pulling(image))
        held = self._held()
        run([*self._ctr, "images", "rm", "--sync", self._name(image)])
        left = run([*self._ctr, "content", "ls", "-q"])
        if left:
            raise PartFailed(f"containerd kept what the next pull should fetch: {left}")
        return held

    def pull_all(self, images: Sequence[Image]) -> frozenset[str]:
        _expect_all([self._pulling(image) for image in images], {})
        return self._held()

    def _pulling(self, image: Image) -> list[str | Path]:
        flags = ["--snapshotter=native", f"--hosts-dir={self._hosts}", *self._how]
        return [*self._ctr, "images", "pull", *flags, self._name(image)]

    def _held(self) -> frozenset[str]:
        return frozenset(map(self._content, run([*self._ctr, "content", "ls", "-q"]).split()))

    def _name(self, image: Image) -> str:
        return f"{NAME}/{image.name}:{image.tag}"

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
        name = self._name(image)
        said = self.run("pull", name)
        if "Already exists" in said:
            raise PartFailed(f"dockerd had a layer before it pulled: {said}")
        held = self._held(image)
        self.run("image", "rm", "--force", name)
        return held

    def pull_all(self, images: Sequence[Image]) -> frozenset[str]:
        docker = [debian("docker"), "--host", self.socket, "pull"]
        _expect_all([[*docker, self._name(image)] for image in images], self._env)
        return frozenset[str]().union(*map(self._held, images))

    def _held(self, image: Image) -> frozenset[str]:
        told = json.loads(self.run("image", "inspect", self._name(image)))[0]
        manifests = [name.partition("@")[2] for name in told["RepoDigests"]]
        return frozenset({*manifests, told["Id"], *told["RootFS"]["Layers"]})

    def _name(self, image: Image) -> str:
        if not image.name.startswith("library/"):
            raise PartFailed("a registry mirror of dockerd serves docker.io only")
        return f"{image.name.removeprefix('library/')}:{image.tag}"

    def _answers(self) -> bool:
        asked = subprocess.run(
            [debian("docker"), "--host", self.socket, "version"], capture_output=True, check=False
        )
        return asked.returncode == 0


class Oras:
    """The `oras` package: artifacts that no container engine made."""

    def __init__(self, registry: str) -> None:
        self._registry = registry
        # By its path and without its directory: it runs from wherever the tests run.
        self._command = [sys.executable, "-P", str(Path(__file__).with_name("oras_client.py"))]

    def push(self, repository: str, file: Path) -> None:
        """Push one file as an artifact tagged v1."""
        run([*self._command, "push", self._name(repository), file])

    def crowd(
        self, rig: Rig, repositories: Sequence[str]
    ) -> tuple[list[str], list[dict[str, bytes]]]:
        """Pull all these at the same time: the errors of those that failed, and the files."""
        targets = [rig.place("pulled") for _ in repositories]
        commands: list[list[str | Path]] = [
            [*self._command, "pull", self._name(repository), target]
            for repository, target in zip(repositories, targets, strict=True)
        ]
        failed = _run_all(commands, _private_home(rig))
        return failed, [
            {path.name: path.read_bytes() for path in target.iterdir()} for target in targets
        ]

    def _name(self, repository: str) -> str:
        return f"{self._registry}/{repository}:v1"
