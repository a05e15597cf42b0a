"""What a container image needs to be built here: a base image, dependencies, a build context.

Everything is made on this machine by the distribution's own tools, so that the image is built and
run where there is no registry to take a base image from, and no package index inside the build.
"""

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.integration.clients import Dockerd
from tests.integration.rig import PartFailed, Rig, debian, run, wait_until

ROOT = Path(__file__).parents[2]

BASE = "base:latest"

_LEFT_OUT = (
    "./dev/*",
    "./proc/*",
    "./sys/*",
    "./usr/share/doc",
    "./usr/share/locale",
    "./usr/share/man",
    "./var/cache/apt/archives/*.deb",
    "./var/lib/apt/lists/*",
)


def start_engine(rig: Rig) -> Dockerd:
    """A container engine; one that stacks file systems if the kernel lets it, else one that copies.

    Copying works everywhere, inside a container, too, but every step of a build then copies the
    whole base image: two minutes instead of ten seconds.
    """
    try:
        return Dockerd(rig, storage_driver="overlay2")
    except PartFailed:
        return Dockerd(rig, storage_driver="vfs")


def _mirror(suite: str) -> list[str]:
    """The package mirror that this machine uses for the suite; nothing means debootstrap's own."""
    wanted = ["Created-By: Packages", f"Codename: {suite}", "Component: main"]
    told = run([debian("apt-get"), "indextargets", "--format", "$(REPO_URI)", *wanted])
    return told.split()[:1]


def _suite() -> str:
    """The release of the distribution that the machine runs."""
    told = Path("/etc/os-release").read_text().splitlines()
    pairs = dict(line.split("=", 1) for line in told if "=" in line)
    return pairs["VERSION_CODENAME"].strip('"')


def import_base_image(dockerd: Dockerd, rig: Rig) -> str:
    """Make a small Debian with Python, import it as `BASE`, and return its Python version."""
    root = rig.place("base")
    packages = "--include=python3,python3-venv"
    suite = _suite()
    # What a power failure would do to this directory is of no interest.
    quick = {"DPKG_FORCE": "unsafe-io"}
    where = [str(root), *_mirror(suite)]
    run([debian("debootstrap"), "--variant=minbase", packages, suite, *where], env=quick)
    archive = rig.directory / "base.tar"
    excluded = [f"--exclude={pattern}" for pattern in _LEFT_OUT]
    run(["tar", "--directory", root, "--numeric-owner", *excluded, "-cf", archive, "."])
    dockerd.run("import", archive, BASE)
    archive.unlink()
    shutil.rmtree(root)
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    said = dockerd.run("run", "--rm", "--network=host", BASE, "python3", "-c", asked)
    return said.strip()


def _build_requirements() -> Sequence[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]["fleet"]
    # redis needs it before Python 3.11.3; pip looks at the Python that runs it, not the image's.
    needed = [*project["project"]["dependencies"], *extras, "async-timeout>=4.0.3"]
    return [*project["build-system"]["requires"], *needed]


def make_context(rig: Rig, python_version: str) -> Path:
    """A build context: the files of the image, and a wheelhouse for that Python."""
    context = rig.place("context")
    for name in ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, context)
    (context / "deploy").mkdir()
    shutil.copy(ROOT / "deploy/constraints.txt", context / "deploy")
    shutil.copytree(ROOT / "proxy", context / "proxy")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    wheels = ["--only-binary=:all:", f"--python-version={python_version}"]
    where = [f"--dest={context}/wheelhouse", f"--constraint={ROOT}/deploy/constraints.txt"]
    run([*pip, *wheels, *where, *_build_requirements()])
    return context


def build(dockerd: Dockerd, context: Path, name: str) -> None:
    """Build the image; PartFailed with the build's output when it cannot be built."""
    # The classic builder: BuildKit is an extra program where the engine is the distribution's.
    words = ["build", "--network=host", f"--build-arg=BASE={BASE}", f"--tag={name}"]
    dockerd.run(*words, context, env={"DOCKER_BUILDKIT": "0"})


def wait_for(dockerd: Dockerd, container: str, ready: Callable[[], bool], what: str) -> None:
    """Wait for something that the container is to do; PartFailed, with its log, if it does not."""

    def ready_or_dead() -> bool:
        if not _state(dockerd, container)["Running"]:
            raise PartFailed(f"{container} ended before this was seen: {what}")
        return ready()

    try:
        wait_until(ready_or_dead, what)
    except PartFailed as error:
        state, said = _state(dockerd, container), _logs(dockerd, container)
        raise PartFailed(f"{error}\n{json.dumps(state, indent=1)}\n{said}") from error


def exit_code(dockerd: Dockerd, container: str) -> int:
    """The exit status of a container that ended."""
    return int(_state(dockerd, container)["ExitCode"])


def health(dockerd: Dockerd, container: str) -> str:
    """What the engine thinks of the container: starting, healthy or unhealthy."""
    return str(_state(dockerd, container)["Health"]["Status"])


def _state(dockerd: Dockerd, container: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(dockerd.run("inspect", container))[0]["State"]
    return state


def _logs(dockerd: Dockerd, container: str) -> str:
    docker = [debian("docker"), "--host", dockerd.socket, "logs", container]
    ended = subprocess.run(
        docker, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return ended.stdout
