"""The listener for clients that have to show who they are, over TLS: curl and skopeo."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bcrypt
import pytest
import trustme

from proxy.testing.images import FakeImage, make_image
from tests.integration.nginx import Nginx
from tests.integration.parts import Pullpool, Registry, Serving
from tests.integration.rig import PartFailed, Rig, debian, needs, run, wait_until
from tests.integration.seeding import MIB, push_image, sizes

pytestmark = needs("skopeo", "curl", "openssl")

Serve = Callable[[Serving], Pullpool]
ACCOUNT = "anna:correct horse"


@pytest.fixture(scope="module")
def image(registry: Registry) -> FakeImage:
    layers = (MIB, 300_000)
    return push_image(registry.url, make_image("team/guarded", "v1", layers=layers, seed=40))


@dataclass(frozen=True, slots=True)
class Guarded:
    """A pullpool that wants a password over TLS, and what its clients trust."""

    proxy: Pullpool
    place: Path

    @property
    def url(self) -> str:
        return f"https://{self.proxy.host}"

    @property
    def ca_file(self) -> Path:
        return self.place / "trust" / "ca.crt"

    def renew(self, authority: trustme.CA) -> None:
        certify(authority, self.place)

    def curl(self, *words: str) -> str:
        """The body of /v2/."""
        command = [debian("curl"), "--silent", "--show-error", "--cacert", str(self.ca_file)]
        return run([*command, *words, f"{self.url}/v2/"])

    def skopeo(self, image: FakeImage, target: Path, *words: str) -> frozenset[str]:
        """The digests of the blobs that skopeo holds after a copy with these options."""
        run(
            [
                *(debian("skopeo"), "--insecure-policy", "copy", "--quiet"),
                f"--src-cert-dir={self.ca_file.parent}",
                *words,
                f"docker://{self.proxy.host}/{image.name}:{image.tag}",
                f"dir:{target}",
            ],
            env={"HOME": str(target), "XDG_RUNTIME_DIR": str(target)},
        )
        # It names a blob's file by the digest that it has computed.
        names = {path.name for path in target.iterdir()} - {"version", "manifest.json"}
        return frozenset(f"sha256:{name}" for name in names)


def certify(authority: trustme.CA, place: Path) -> None:
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(place / "cert.pem")
    issued.private_key_pem.write_to_path(place / "key.pem")


@pytest.fixture
def guarded(rig: Rig, serve: Serve, upstream: Nginx, authority: trustme.CA) -> Guarded:
    place = rig.place("listener")
    certify(authority, place)
    (place / "trust").mkdir()
    authority.cert_pem.write_to_path(place / "trust" / "ca.crt")
    name, _, password = ACCOUNT.partition(":")
    hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(5)).decode()
    (place / "htpasswd").write_text(f"{name}:{hashed}\n")
    files = {key: json.dumps(str(place / key)) for key in ("cert.pem", "key.pem", "htpasswd")}
    tables = (
        f"[tls]\ncert_file = {files['cert.pem']}\nkey_file = {files['key.pem']}\n"
        f"[auth]\nhtpasswd_file = {files['htpasswd']}\n"
    )
    return Guarded(serve(Serving(upstream.url, tables=tables)), place)


def test_skopeo_pulls_with_a_password_over_tls(
    rig: Rig, guarded: Guarded, image: FakeImage
) -> None:
    held = guarded.skopeo(image, rig.place("pulled"), f"--src-creds={ACCOUNT}")
    assert held == set(sizes(image))


def test_skopeo_without_the_password_pulls_nothing(
    rig: Rig, guarded: Guarded, image: FakeImage
) -> None:
    for words in ([], ["--src-creds=anna:a guess"]):
        with pytest.raises(PartFailed, match=r"unauthorized|authentication required"):
            guarded.skopeo(image, rig.place("pulled"), *words)
    assert guarded.proxy.metric("pullpool_store_blobs") == 0


def test_curl_is_asked_for_a_password(guarded: Guarded) -> None:
    assert json.loads(guarded.curl())["errors"][0]["code"] == "UNAUTHORIZED"
    assert guarded.curl("--user", ACCOUNT) == "{}"


def test_a_renewed_certificate_is_served_without_a_restart(
    guarded: Guarded, authority: trustme.CA
) -> None:
    port = str(guarded.proxy.port)

    def served() -> str:
        command = [debian("openssl"), "s_client", "-connect", f"127.0.0.1:{port}"]
        said = subprocess.run(command, input="", capture_output=True, text=True, check=True).stdout
        return said.partition("-----BEGIN CERTIFICATE-----")[2].partition("-----END")[0]

    before = served()
    assert before
    guarded.renew(authority)
    wait_until(lambda: served() not in ("", before), "the new certificate")
    assert guarded.curl("--user", ACCOUNT) == "{}"
