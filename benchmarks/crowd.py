"""A crowd on a registry with a connection limit: many clients, many images, everything cold.

`python -m benchmarks crowd` starts every part itself and plays two scenes in rounds:

- crowd: 300 clients pull 20 cold images of 4 layers from the bundled registry, which allows 8
  sockets;
- crowd-real: the same in front of docker-registry, where only requests are limited.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.herd import CAP, RATE, Scene, Size, findings, make_images, play_scene
from benchmarks.load import Want
from benchmarks.parts import MIB
from benchmarks.rounds import Crowd
from benchmarks.scenario import Findings, Options
from benchmarks.subjects import SUBJECTS, chosen
from benchmarks.tables import crowd_table
from benchmarks.upstreams import Upstream, fake_registry, limited_registry

ROUNDS = 1  # after one in which the clients hash everything; docker-registry takes long

ABOUT = """\
300 clients pull 20 cold images through a limit of 8 connections, each at 100 MB/s, with 401 beyond:
straight, through three caches and through pullpool. *crowd*: the bundled registry, which counts
sockets when it accepts them. *crowd-real*: docker-registry behind nginx's `limit_conn`, which
counts requests. Whoever fails an image's manifest does not ask for its blobs, and is done early.
"""


@contextlib.contextmanager
def open_crowd(directory: Path, size: Size) -> Iterator[Crowd]:
    """Everybody pulls one of the images by tag from the registry that counts at accept."""
    with fake_registry(
        directory,
        images=size.images,
        layers=size.layers,
        layer_size=size.layer_size,
        limit=CAP,
        rate=RATE,
    ) as upstream:
        yield _pulling(upstream, upstream.pulls, upstream.unique_size, size)


@contextlib.contextmanager
def open_crowd_real(directory: Path, size: Size) -> Iterator[Crowd]:
    """Everybody pulls one of the images by tag from a real registry at its limit."""
    images = make_images(size)
    with limited_registry(directory, images, limit=CAP, rate=RATE) as upstream:
        pulls = [image.wanted() for image in images]
        yield _pulling(upstream, pulls, sum(image.size for image in images), size)


def _pulling(upstream: Upstream, pulls: Sequence[Want], unique: int, size: Size) -> Crowd:
    """A crowd spread over the images; each client gets a manifest, a config and the layers."""
    wants = tuple(pulls[number % len(pulls)] for number in range(size.clients))
    return Crowd(upstream, CAP, wants, size.clients * (2 + size.layers), unique)


FULL, FAST = Size(300, 20, 4, 3 * MIB // 2), Size(40, 5, 4, MIB // 8)
SCENES = (
    Scene("crowd", FULL, FAST, open_crowd, crowd_table),
    Scene("crowd-real", FULL, FAST, open_crowd_real, crowd_table),
)


def measure(options: Options) -> Findings:
    """Plays the two scenes. Raises PartFailed."""
    subjects = chosen(SUBJECTS, options)
    played = [play_scene(scene, subjects, options, rounds=ROUNDS) for scene in SCENES]
    return findings(ABOUT, played, options)
