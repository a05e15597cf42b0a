"""What a container image needs to be built here: a base image, dependencies, a build context.

Everything is made on this machine by the distribution's own tools, so that the image is built and
run where there is no registry to take a base image from, and no package index inside the build.
"""

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from tests.integration.clients import Dockerd
from tests.integration.rig import Rig, debian, run

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
    run([debian("debootstrap"), "--variant=minbase", packages, suite, root, *_mirror(suite)])
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
    return [*project["build-system"]["requires"], *project["project"]["dependencies"]]


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


def health(dockerd: Dockerd, container: str) -> str:
    """What the engine thinks of the container: starting, healthy or unhealthy."""
    state = json.loads(dockerd.run("container", "inspect", container))[0]["State"]
    return str(state["Health"]["Status"])


def logs(dockerd: Dockerd, container: str) -> str:
    """What the container wrote."""
    docker = [debian("docker"), "--host", dockerd.socket, "logs", container]
    ended = subprocess.run(
        docker, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return ended.stdout
