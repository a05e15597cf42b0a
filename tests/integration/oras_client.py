"""Pushes and pulls one artifact by the `oras` package, as Apptainer's `oras://` does.

    python oras_client.py push 127.0.0.1:5000/tools/samtools:1.0 samtools.sif
    python oras_client.py pull 127.0.0.1:5000/tools/samtools:1.0 DIRECTORY

The package would ask again five times, for two minutes, whatever went wrong. Apptainer does not ask
again after a 401, which is why its users see it (dragonflyoss/dragonfly#3662); nor does this.
"""

import sys
from pathlib import Path

from oras.provider import Registry

SIF = "application/vnd.sylabs.sif.layer.v1.sif"
"""What an Apptainer image is, in an artifact."""


class Apptainer(Registry):  # type: ignore[misc]  # the package has no types
    """A client of plain HTTP that asks once."""

    do_request = Registry.do_request.__wrapped__

    def __init__(self) -> None:
        super().__init__(insecure=True)


def push(target: str, file: Path) -> None:
    """Push one file as an artifact. Raises what the package raises."""
    Apptainer().push(target, files=[f"{file}:{SIF}"], disable_path_validation=True)


def pull(target: str, directory: Path) -> None:
    """Pull an artifact's files. Raises what the package raises."""
    Apptainer().pull(target, outdir=str(directory))


if __name__ == "__main__":
    {"push": push, "pull": pull}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
