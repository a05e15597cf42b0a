"""The only door: it lets in exactly the read endpoints, decoded once, never normalised."""

from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.digest import Digest
from proxy.oci.errors import (
    ClientError,
    DigestInvalid,
    EndpointUnknown,
    NameInvalid,
    TagInvalid,
)
from proxy.oci.paths import Kind, Target, parse_path
from proxy.oci.reference import Repository, Tag

from .test_digest import digests
from .test_reference import names, tags

DIGEST = Digest.of(b"")


@pytest.mark.parametrize("path", ["/v2", "/v2/", "/%762/"])
def test_the_root_is_the_ping(path: str) -> None:
    assert parse_path(path) == Target(Kind.PING, None, None)


@given(names, tags)
def test_a_manifest_by_tag(name: str, tag: str) -> None:
    target = parse_path(f"/v2/{name}/manifests/{tag}")
    assert target == Target(Kind.MANIFEST, Repository(name), Tag(tag))


@given(names, digests)
def test_everything_by_digest(name: str, digest: Digest) -> None:
    for word, kind in (
        ("manifests", Kind.MANIFEST),
        ("blobs", Kind.BLOB),
        ("referrers", Kind.REFERRERS),
    ):
        assert parse_path(f"/v2/{name}/{word}/{digest}") == Target(kind, Repository(name), digest)


@given(names)
def test_the_list_of_tags(name: str) -> None:
    assert parse_path(f"/v2/{name}/tags/list") == Target(Kind.TAGS, Repository(name), None)


@given(names, digests)
def test_an_escaped_path_means_the_same_as_a_plain_one(name: str, digest: Digest) -> None:
    plain = parse_path(f"/v2/{name}/blobs/{digest}")
    assert parse_path(f"/v2/{name}/blobs/{quote(str(digest), safe='')}") == plain
    every_byte = "".join(f"%{ord(character):02x}" for character in f"{name}/blobs/{digest}")
    assert parse_path(f"/v2/{every_byte}") == plain


@given(names, digests)
def test_a_path_escaped_twice_is_refused(name: str, digest: Digest) -> None:
    twice = quote(quote(str(digest), safe=""), safe="")
    with pytest.raises(DigestInvalid):
        parse_path(f"/v2/{name}/blobs/{twice}")


def test_the_words_of_the_endpoints_may_be_parts_of_names() -> None:
    assert parse_path("/v2/blobs/manifests/tags/list").repository == Repository("blobs/manifests")
    assert parse_path("/v2/a/tags/list/manifests/v1").repository == Repository("a/tags/list")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/v1/",
        "/v2x",
        "//v2/",
        "/v2//",
        "/v2/_catalog",
        "/v2/a",
        "/v2/a/b",
        "/v2/a/blobs",
        "/v2/a/blobs/uploads",
        "/v2/a/blobs/uploads/",
        "/v2/a/blobs/uploads/0b9e",
        "/v2/a/tags/other",
        "/v2/a/tags/list/",
        "/v2/a/manifests/b/c",
        "/v2/a/manifests/../../secret",
        "/v2/a/Manifests/b",
        "/V2/a/manifests/b",
        "v2/a/manifests/b",
    ],
)
def test_what_is_no_read_endpoint_is_unknown(path: str) -> None:
    with pytest.raises(EndpointUnknown):
        parse_path(path)


@pytest.mark.parametrize(
    "path",
    [
        f"/v2/../../etc/blobs/{DIGEST}",
        f"/v2/%2e%2e/%2e%2e/etc/blobs/{DIGEST}",
        f"/v2/a/..%2f..%2fetc/blobs/{DIGEST}",
        f"/v2/a//b/blobs/{DIGEST}",
        f"/v2//a/blobs/{DIGEST}",
        f"/v2//blobs/{DIGEST}",
        f"/v2/a/./b/blobs/{DIGEST}",
        f"/v2/a%00b/blobs/{DIGEST}",
        f"/v2/a%0d%0aHost:x/blobs/{DIGEST}",
        f"/v2/a%5cb/blobs/{DIGEST}",
        f"/v2/a%/blobs/{DIGEST}",
        f"/v2/a%zz/blobs/{DIGEST}",
        f"/v2/%ff%fe/blobs/{DIGEST}",
        f"/v2/a\udcff/blobs/{DIGEST}",
        f"/v2/UPPER/blobs/{DIGEST}",
        "/v2/UPPER/blobs/not-a-digest",
        "/v2/UPPER/manifests/sha256:short",
        "/v2/../manifests/..",
    ],
)
def test_a_malformed_name_is_told_first(path: str) -> None:
    with pytest.raises(NameInvalid):
        parse_path(path)


@pytest.mark.parametrize("reference", ["sha256:short", f"{DIGEST}0", "sha256%3Ashort", "md5:00"])
@pytest.mark.parametrize("word", ["manifests", "blobs", "referrers"])
def test_a_malformed_digest_is_400(word: str, reference: str) -> None:
    with pytest.raises(DigestInvalid) as caught:
        parse_path(f"/v2/a/{word}/{reference}")
    assert caught.value.status == 400


@pytest.mark.parametrize("tag", ["", ".hidden", "..", "%2e%2e", "a b", "-x", "a" * 129, "a%00"])
def test_a_malformed_tag_is_a_manifest_nobody_has(tag: str) -> None:
    with pytest.raises(TagInvalid) as caught:
        parse_path(f"/v2/a/manifests/{tag}")
    assert caught.value.status == 404


pieces = st.sampled_from(
    [
        *("v2", "a", "..", ".", "", "%2e%2e", "%2F", "%252e", "%00", "\n", "\\", "é", "%ff", "%"),
        *("blobs", "manifests", "tags", "list", "uploads", "referrers"),
        *(str(DIGEST), f"sha256%3A{DIGEST.hex}"),
    ]
)
hostile_paths = st.lists(pieces, max_size=8).map(lambda parts: "/v2/" + "/".join(parts))


@given(hostile_paths | st.text(max_size=60))
def test_nothing_that_is_let_in_can_traverse(path: str) -> None:
    try:
        target = parse_path(path)
    except ClientError:  # any other failure would be ours
        return
    if target.repository is None:
        assert (target.kind, target.reference) == (Kind.PING, None)
        return
    parts = [*target.repository.components, str(target.reference or "list")]
    assert all(part not in ("", ".", "..") and part.isprintable() for part in parts)
    assert not set("".join(parts)) & set("/\\% ")
    # It names what was asked, and nothing was tidied away on the way.
    assert unquote(path).startswith(f"/v2/{target.repository}/")
    assert unquote(path).endswith(f"/{parts[-1]}")
