"""Names of images, read as docker, podman and containerd read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.digest import Digest
from proxy.oci.errors import DigestInvalid, NameInvalid, PullError, TagInvalid
from proxy.oci.image import ImageName

DIGEST = Digest.of(b"an image")


@pytest.mark.parametrize(
    ("text", "registry", "repository", "reference"),
    [
        ("alpine", None, "alpine", "latest"),
        ("alpine:3.20", None, "alpine", "3.20"),
        ("library/alpine:3.20", None, "library/alpine", "3.20"),
        ("docker.io/library/alpine", "docker.io", "library/alpine", "latest"),
        ("docker.io/alpine:3", "docker.io", "alpine", "3"),
        ("quay.io/team/sub/app:v1", "quay.io", "team/sub/app", "v1"),
        ("harbor.example.com:8443/team/app:v1", "harbor.example.com:8443", "team/app", "v1"),
        ("localhost/app", "localhost", "app", "latest"),
        ("localhost:5000/app:v1", "localhost:5000", "app", "v1"),
        ("HARBOR.example.com/app:V1", "harbor.example.com", "app", "V1"),
        ("127.0.0.1:5000/a:b", "127.0.0.1:5000", "a", "b"),
        ("[::1]:5000/a:b", "[::1]:5000", "a", "b"),
        (f"alpine@{DIGEST}", None, "alpine", str(DIGEST)),
        (f"quay.io/a/b:v1@{DIGEST}", "quay.io", "a/b", str(DIGEST)),
    ],
)
def test_a_name_is_read(text: str, registry: str | None, repository: str, reference: str) -> None:
    image = ImageName.parse(text)
    assert (image.registry, str(image.repository), str(image.reference)) == (
        registry,
        repository,
        reference,
    )
    assert ImageName.parse(str(image)) == image


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", NameInvalid),
        ("Alpine", NameInvalid),
        (":v1", NameInvalid),
        ("quay.io/", NameInvalid),
        ("quay.io/:v1", NameInvalid),
        ("/app", NameInvalid),
        ("a//b", NameInvalid),
        ("a/b/", NameInvalid),
        ("a b", NameInvalid),
        ("://quay.io/app", NameInvalid),
        ("a:b:c", NameInvalid),
        ("app:", TagInvalid),
        ("app:v1/x", TagInvalid),
        (":5000/x", NameInvalid),
        ("Harbor/team/app", NameInvalid),
        ("app:-v1", TagInvalid),
        ("app@", DigestInvalid),
        ("app@sha256:abc", DigestInvalid),
        (f"@{DIGEST}", NameInvalid),
    ],
)
def test_what_is_no_name_is_refused(text: str, error: type[PullError]) -> None:
    with pytest.raises(error):
        ImageName.parse(text)


@pytest.mark.parametrize("scheme", ["http", "https", "docker", "HTTPS", "oci-archive"])
def test_a_url_is_no_name_and_is_told_so(scheme: str) -> None:
    with pytest.raises(NameInvalid) as caught:
        ImageName.parse(f"{scheme}://h/demo/app")
    assert caught.value.message == (
        f"the name of an image does not begin with {scheme}://: leave it out"
    )


@given(st.text(alphabet="aZ0.:/@-_ sha256", max_size=40) | st.text(max_size=20))
def test_any_text_is_a_name_or_a_client_error(text: str) -> None:
    try:
        image = ImageName.parse(text)
    except (NameInvalid, TagInvalid, DigestInvalid):
        return
    assert ImageName.parse(str(image)) == image
