"""`python -m proxy.testing` as a part of the suite: the bundled registry, the overloaded Harbor.

Their images are made of a seed, so this process makes them again and knows their digests. What
they counted is asked on a second port, which costs no socket of those that they count.
"""

import json
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from proxy.testing.images import FakeImage, make_image
from tests.integration.rig import Daemon, Rig

LOGIN = ("robot$pull", "correct horse battery staple")
"""The account that may pull its images."""


@dataclass(frozen=True, slots=True)
class Content:
    """The images of a Harbor: how many, under which name, and the sizes of their layers."""

    repository: str = "library/app"
    images: int = 4
    layers: tuple[int, ...] = (1 << 20, 1 << 18, 1 << 16)

    def make(self) -> list[FakeImage]:
        """The same images as the program makes of these options."""
        return [
            make_image(f"{self.repository}-{n}", "latest", layers=self.layers, seed=1 + n)
            for n in range(self.images)
        ]

    def options(self) -> Sequence[str]:
        sizes = ",".join(map(str, self.layers))
        return (
            f"--repository={self.repository}",
            f"--images={self.images}",
            f"--layers={len(self.layers)}",
            f"--layer-size={sizes}",
        )


class FakeRegistryProgram:
    """`python -m proxy.testing registry` with these images and options."""

    COMMAND: ClassVar[Sequence[str]] = ("registry",)

    def __init__(self, rig: Rig, content: Content, *options: str) -> None:
        place = rig.place(self.COMMAND[0])
        self._daemon = Daemon(
            self.COMMAND[0],
            [sys.executable, "-m", "proxy.testing", *self.COMMAND, *content.options(), *options],
            directory=place,
            ready=self._has_spoken,
        )
        rig.start(self._daemon)
        said = json.loads(self._daemon.log.read_text().splitlines()[0])
        self.url: str = said["url"]
        self.host = urlsplit(self.url).netloc
        self._control: str = said["control"]
        self.images = content.make()

    def counters(self) -> dict[str, Any]:
        """What it counted since its start."""
        with urllib.request.urlopen(f"{self._control}/_counters") as answer:
            counted: dict[str, Any] = json.load(answer)
        return counted

    def _has_spoken(self) -> bool:
        return "\n" in self._daemon.log.read_text()


class Harbor(FakeRegistryProgram):
    """A private Harbor that breaks as the options say; `LOGIN` may pull from it."""

    COMMAND = ("harbor", f"--users={':'.join(LOGIN)}")
