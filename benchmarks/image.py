"""A whole image, pulled by containerd: cold, and once more when the cache holds it.

`python -m benchmarks image` needs root (containerd does). The image's layers come from a registry
of files that gives each connection 100 MB/s. What is timed is `ctr content fetch`: the manifest,
the config and all layers, of which containerd fetches three at a time, hashed and written by it,
not unpacked.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.board import GIGABYTE, Board, Played, cpu_per_gigabyte, play_in_turn, seconds
from benchmarks.containerd import running_containerd
from benchmarks.images import Image, make_image
from benchmarks.parts import MIB, TIMES, PartFailed, cpu_seconds
from benchmarks.scenario import Findings, Options, Promise
from benchmarks.static import static_registry
from benchmarks.subjects import CACHES, Place, Subject

CAP = 8
RATE = 100_000_000  # bytes a second for each connection

ABOUT = """\
containerd fetches a whole image, manifest, config and layers, through each cache: cold, and again
when the cache holds it, into an empty store each time. It fetches three layers at a time, hashes
and writes them; unpacking, the same for all, is left out. The upstream gives each connection
100 MB/s.
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Layers, and bytes of each."""

    layers: int
    layer: int


FULL, FAST = Size(8, 24 * MIB), Size(4, MIB)

MEASURES = (
    seconds("cold", "cold"),
    seconds("warm", "warm"),
    cpu_per_gigabyte("cpu", "CPU, both"),
)


def play(subject: Subject, directory: Path, upstream: int, image: Image) -> Played:
    """A cold pull and a warm one."""
    (directory / "front").mkdir()
    (directory / "client").mkdir()
    with (
        subject.start(Place(upstream, CAP, directory / "front")) as front,
        running_containerd(front.port, directory / "client") as client,
    ):
        assert front.part is not None
        before = cpu_seconds(front.part.pid)
        cold = client.fetch(image)
        client.forget(image)
        warm = client.fetch(image)
        front.part.check()
        cpu = (cpu_seconds(front.part.pid) - before) / (2 * image.size) * GIGABYTE
        return Played({"cold": cold, "warm": warm, "cpu": cpu}, front.configuration)


def measure(options: Options) -> Findings:
    """Pulls through each subject in turn. Raises PartFailed."""
    if os.geteuid() or not (shutil.which("containerd") and shutil.which("ctr")):
        raise PartFailed("this scenario needs root and containerd (Debian package containerd)")
    size = FAST if options.fast else FULL
    image = make_image("bench/image", layers=size.layers, layer_size=size.layer)
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        static_registry(Path(name), [image], rate=RATE) as (upstream, _shelf),
    ):
        board = play_in_turn(
            "image",
            CACHES,
            options,
            lambda subject, directory: play(subject, directory, upstream.port, image),
        )
    what = f"an image of {size.layers} {TIMES} {size.layer / MIB:g} MiB by containerd"
    return Findings(
        about=ABOUT,
        sheets=(board.sheet(f"image: {what}", MEASURES),),
        promises=tuple(_promises(board)),
        configurations={"the upstream": upstream.configuration, **board.configurations()},
        figures=board.figures(),
        charts=(
            board.chart("image-cold", f"Cold pull of {what}", MEASURES[0], better="less"),
            board.chart("image-warm", f"Warm pull of {what}", MEASURES[1], better="less"),
        ),
    )


def _promises(board: Board) -> Iterator[Promise]:
    for rival in ("registry", "nginx"):
        yield from board.promise("cold pull", "cold", "≤", 1.0, rival)
        yield from board.promise("warm pull", "warm", "≤", 1.0, rival)
