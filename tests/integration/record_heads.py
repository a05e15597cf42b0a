"""Records the request heads of the real clients, byte for byte: `python -m …record_heads FILE`.

Each client pulls one image through a relay that stands before docker-registry and keeps what the
client sends; only the kernel's version, which dockerd tells, is made up. The heads go to FILE as
JSON (tests/unit/heads.json), which the unit tests replay against pullpool in every state; so run
this again when a client's new version is to be tried. Needs root, and the clients: skopeo, podman
(also for what its Buildah sends), containerd with ctr, dockerd.
"""

import contextlib
import datetime
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proxy.testing.images import FakeImage, make_image
from tests.integration.clients import Client, Containerd, Dockerd, Image, Podman, Skopeo
from tests.integration.parts import NAME, Registry
from tests.integration.rig import Rig, debian, run
from tests.integration.seeding import push_image

LAYERS = (300_000, 5_000)
SEED = 7
"""The unit tests make the same images, so the recorded digests are theirs."""


def image(name: str) -> FakeImage:
    """What the clients pulled."""
    return make_image(name, "v1", layers=LAYERS, seed=SEED)


class PodmanBuild(Podman):
    """`podman build` of something that is FROM the image: Buildah pulls it."""

    def pull(self, image: Image) -> frozenset[str]:
        place = self._rig.place("build")
        (place / "Containerfile").write_text(f"FROM {NAME}/{image.name}:{image.tag}\n")
        run([*self._podman(), "build", "--isolation=chroot", place], env=self._env)
        return frozenset()


class Relay:
    """Carries connections to a port, and keeps what clients send."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sent: list[bytearray] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                upstream = socket.create_connection(("127.0.0.1", self._port))
                self._sent.append(bytearray())
                for source, target, kept in (
                    (client, upstream, self._sent[-1]),
                    (upstream, client, None),
                ):
                    carry = (source, target, kept)
                    threading.Thread(target=self._carry, args=carry, daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket, kept: bytearray | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if kept is not None:
                    kept += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def heads(self) -> list[str]:
        """Every request's head, by connection; none of them has a body."""
        found = [bytes(sent).split(b"\r\n\r\n")[:-1] for sent in self._sent]
        heads = [head.decode("latin-1") + "\r\n\r\n" for part in found for head in part]
        return [re.sub(r"kernel/\S+", "kernel/6.1.0", head) for head in heads]

    def close(self) -> None:
        self._server.close()


def chosen(heads: list[str], layer: str) -> dict[str, str]:
    """One head of each kind that the client sends: ping, manifests by method, a layer."""
    kinds: dict[str, str] = {}
    for head in heads:
        method, target, _ = head.split(" ", 2)
        if target.partition("?")[0] == "/v2/":
            kinds.setdefault("ping", head)
        elif "/manifests/" in target:
            kinds.setdefault(f"manifest {method}", head)
        elif target.partition("?")[0].endswith(layer):
            kinds.setdefault(f"blob {method}", head)
    return kinds


def version(*words: str) -> str:
    """What a client says of itself."""
    told = subprocess.run(
        [debian(words[0]), *words[1:]], check=True, capture_output=True, text=True
    )
    return told.stdout.strip()


def recorded(rig: Rig) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each client sends for its pull."""
    registry = Registry(rig, storage=rig.place("storage"))
    clients: list[tuple[str, type[Any], str, tuple[str, ...]]] = [
        ("skopeo", Skopeo, "team/app", ("skopeo", "--version")),
        ("podman", Podman, "team/app", ("podman", "--version")),
        ("buildah", PodmanBuild, "team/app", ("podman", "--version")),
        ("containerd", Containerd, "team/app", ("containerd", "--version")),
        ("dockerd", Dockerd, "library/app", ("dockerd", "--version")),
    ]
    for name, start, repository, asks in clients:
        pulled = push_image(registry.url, image(repository))
        relay = Relay(registry.port)
        rig.at_end(relay.close)
        client: Client = start(rig, relay.host)
        client.pull(pulled)
        heads = chosen(relay.heads(), str(pulled.layers[0].digest))
        yield name, {"version": version(*asks), "repository": repository, "heads": heads}


def main(file: Path) -> None:
    with tempfile.TemporaryDirectory() as place, Rig(Path(place) / "rig") as rig:
        document = {
            "recorded": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "how": "python -m tests.integration.record_heads tests/unit/heads.json",
            "clients": dict(recorded(rig)),
        }
    file.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
