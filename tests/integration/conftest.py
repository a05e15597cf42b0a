"""Fixtures of the suite with real parts: rigs, the seeded registry, and logs when a test fails."""

import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from benchmarks.parts import free_port
from tests.integration.golang import Build, NotToBeHad
from tests.integration.nginx import Front, Nginx
from tests.integration.parts import ROBOT, Pullpool, Registry, Serving, TokenAuth
from tests.integration.rig import Rig, has
from tests.integration.token_service import ISSUER, SERVICE, TokenService

LIMIT = 8
"""Requests that the upstream serves at a time; it answers 401 beyond."""

_RIG: pytest.StashKey[Rig] = pytest.StashKey()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long comes last; with several processes first, so that no other waits for it."""
    here = Path(__file__).parent
    is_one_of_several = hasattr(config, "workerinput")

    def place(item: pytest.Item) -> tuple[bool, bool]:
        is_here = item.path.is_relative_to(here)
        return is_here is not is_one_of_several, "ctr" in getattr(item, "fixturenames", ())

    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.integration)
    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed shows what its processes said."""
    report = yield
    if report.failed and (rig := item.stash.get(_RIG, None)) is not None:
        report.sections += [(f"log of {name}", text) for name, text in rig.logs()]
    return report


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A rig for one test. Its path is short: a Unix socket's may have 107 bytes, podman's run
    directory 50, and that of one of several test processes is longer than that."""
    # What a container engine leaves mounted is not worth a failure.
    directory = tempfile.TemporaryDirectory(prefix="rig-", ignore_cleanup_errors=True)
    with directory as place, Rig(Path(place)) as rig:
        request.node.stash[_RIG] = rig
        yield rig


@pytest.fixture(scope="session")
def session_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A rig for what all tests share."""
    with Rig(tmp_path_factory.mktemp("session")) as rig:
        yield rig


@pytest.fixture(scope="session", autouse=True)
def ctr_build(request: pytest.FixtureRequest) -> Iterator[Build | None]:
    """What takes long to build begins with the first test of this suite, beside those before the
    one that needs it."""
    wanted = any("ctr" in getattr(item, "fixturenames", ()) for item in request.session.items)
    if not wanted or os.geteuid() != 0 or not has("go"):
        yield None
        return
    build = Build()
    try:
        yield build
    finally:
        build.stop()


@pytest.fixture(scope="session")
def ctr(ctr_build: Build | None) -> Path:
    """ctr of a containerd since 2.3, which waits 30 s for headers."""
    if ctr_build is None:
        pytest.skip("not installed: go")
    try:
        return ctr_build.wait()
    except NotToBeHad as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def storage(session_rig: Rig) -> Path:
    """The directory of images that every registry of the suite shows."""
    return session_rig.place("storage")


@pytest.fixture(scope="session")
def registry(session_rig: Rig, storage: Path) -> Registry:
    """The open door to the images: to seed them, and behind nginx."""
    if not has("docker-registry", "nginx"):
        pytest.skip("docker-registry and nginx are not installed")
    return Registry(session_rig, storage=storage)


@pytest.fixture(scope="session")
def authority(session_rig: Rig) -> trustme.CA:
    """The certificate authority of this run."""
    return trustme.CA()


@pytest.fixture
def serve(rig: Rig) -> Callable[[Serving], Pullpool]:
    """Starts pullpool in this test's rig."""
    return lambda serving: Pullpool(rig, serving)


@pytest.fixture
def rate() -> str | None:
    """The pace of one answer of the upstream, none by default; tests parametrize it.

    In nginx's words: "1m" sends the first MiB at once, and one more every second.
    """
    return None


@pytest.fixture
def upstream(rig: Rig, registry: Registry, rate: str | None) -> Nginx:
    """The registry behind its limit: eight requests at once, 401 beyond."""
    return Nginx(rig, Front(connections=LIMIT, rate=rate), registry_port=registry.port)


@dataclass(frozen=True, slots=True)
class Private:
    """A registry over TLS that wants tokens of the token service on the same address."""

    nginx: Nginx
    tokens: TokenService
    ca_file: Path

    def serving(self, *, account: tuple[str, str] = ROBOT, on_abandon: str = "finish") -> Serving:
        """How pullpool serves it with these credentials."""
        return Serving(
            self.nginx.url, credentials=account, ca_file=self.ca_file, on_abandon=on_abandon
        )


@pytest.fixture
def private(
    rig: Rig, registry: Registry, storage: Path, authority: trustme.CA, rate: str | None
) -> Iterator[Private]:
    """The registry of private images: nginx ends TLS for it and for the token service.

    It shows what the open registry has, so that is where tests put the images.
    """
    place = rig.place("tls")
    ca_file, certificate = place / "ca.pem", place / "server.pem"
    authority.cert_pem.write_to_path(ca_file)
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
    port = free_port()
    with TokenService(authority, ROBOT) as tokens:
        wants = TokenAuth(f"https://127.0.0.1:{port}/token", SERVICE, ISSUER, ca_file)
        guarded = Registry(rig, storage=storage, tokens=wants)
        front = Front(port=port, certificate=certificate, token_port=tokens.port, rate=rate)
        yield Private(Nginx(rig, front, registry_port=guarded.port), tokens, ca_file)
