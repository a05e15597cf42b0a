"""Manifests are read for their children and left alone otherwise."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.digest import Digest
from proxy.oci.errors import ManifestInvalid
from proxy.oci.manifest import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    MANIFEST_ACCEPT,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    acceptable,
    parse_manifest,
)

from .test_token import json_values

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
ARTIFACT = "application/vnd.example.thing.v1+json"


def _descriptor(name: str, **more: object) -> dict[str, object]:
    return {
        "mediaType": LAYER,
        "digest": str(Digest.of(name.encode())),
        "size": len(name),
        **more,
    }


def _child(name: str) -> Descriptor:
    return Descriptor(LAYER, Digest.of(name.encode()), len(name))


def _image(**more: object) -> dict[str, object]:
    return {
        "schemaVersion": 2,
        "config": _descriptor("config"),
        "layers": [_descriptor("layer one"), _descriptor("layer two")],
        **more,
    }


def _index(**more: object) -> dict[str, object]:
    return {"schemaVersion": 2, "manifests": [_descriptor("amd64"), _descriptor("arm64")], **more}


def _parse(document: object, media_type: str | None = OCI_MANIFEST) -> Manifest:
    raw = json.dumps(document).encode()
    manifest = parse_manifest(raw, media_type, Digest.of(raw))
    assert (manifest.raw, manifest.digest) == (raw, Digest.of(raw))
    return manifest


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST])
def test_the_children_of_an_image_are_its_config_and_layers(media_type: str) -> None:
    manifest = _parse(_image(), media_type)
    assert manifest.children == (_child("config"), _child("layer one"), _child("layer two"))
    assert (manifest.media_type, manifest.is_index) == (media_type, False)


@pytest.mark.parametrize("media_type", [OCI_INDEX, DOCKER_LIST])
def test_the_children_of_an_index_are_its_manifests(media_type: str) -> None:
    manifest = _parse(_index(), media_type)
    assert manifest.children == (_child("amd64"), _child("arm64"))
    assert (manifest.media_type, manifest.is_index) == (media_type, True)


def test_a_child_named_twice_is_one_child() -> None:
    manifest = _parse(_image(layers=[_descriptor("a"), _descriptor("b"), _descriptor("a")]))
    assert manifest.children == (_child("config"), _child("a"), _child("b"))


def test_a_foreign_layer_is_nobodys_child() -> None:
    foreign = _descriptor("foreign", urls=["https://cdn.example.com/layer"])
    manifest = _parse(_image(layers=[foreign, _descriptor("own", urls=[])]))
    assert manifest.children == (_child("config"), _child("own"))


def test_the_subject_is_read_and_is_no_child() -> None:
    manifest = _parse(_image(subject=_descriptor("subject")))
    assert manifest.subject == _child("subject")
    assert manifest.subject not in manifest.children
    assert _parse(_image(subject=None)).subject is None


def test_fields_nobody_knows_are_left_alone() -> None:
    manifest = _parse(
        _image(annotations={"a": "b"}, artifactType=ARTIFACT, future=[1, {"x": None}])
    )
    assert len(manifest.children) == 3


@pytest.mark.parametrize("absent", [{"layers": None}, {"layers": []}])
def test_an_image_without_layers_has_its_config(absent: dict[str, object]) -> None:
    assert _parse(_image(**absent)).children == (_child("config"),)


def test_the_first_schema_has_no_children_here() -> None:
    signed = {"schemaVersion": 1, "fsLayers": [{"blobSum": str(Digest.of(b""))}], "signatures": []}
    assert _parse(signed, None).media_type == DOCKER_SCHEMA1_SIGNED
    assert _parse({"schemaVersion": 1, "fsLayers": []}, None).media_type == DOCKER_SCHEMA1
    assert _parse(signed, DOCKER_SCHEMA1_SIGNED).children == ()


@pytest.mark.parametrize("header", [None, "", "application/json", "text/plain; charset=utf-8"])
def test_a_document_without_a_type_is_asked_for_its_own(header: str | None) -> None:
    assert _parse(_image(mediaType=DOCKER_MANIFEST), header).media_type == DOCKER_MANIFEST
    assert _parse(_image(), header).media_type == OCI_MANIFEST
    assert _parse(_index(mediaType=7), header).media_type == OCI_INDEX


def test_the_type_of_the_answer_counts_before_the_documents_own() -> None:
    manifest = _parse(_image(mediaType=OCI_INDEX), f"{DOCKER_MANIFEST}; charset=utf-8")
    assert manifest.media_type == DOCKER_MANIFEST


def test_only_the_fields_of_its_own_type_give_a_manifest_children() -> None:
    # Nobody checked, when it was pushed, that the pusher may read what the other fields name.
    assert _parse(_image(), OCI_INDEX).children == ()
    assert _parse(_index(), OCI_MANIFEST).children == ()
    assert _parse(_image(), ARTIFACT).children == ()
    assert _parse({"blobs": [_descriptor("x")]}, ARTIFACT).children == ()


@pytest.mark.parametrize("media_type", [OCI_INDEX, OCI_MANIFEST, None])
def test_an_image_and_an_index_at_once_is_refused(media_type: str | None) -> None:
    with pytest.raises(ManifestInvalid, match="at once"):
        _parse(_image(manifests=[_descriptor("x")]), media_type)


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"[]", b"7", b'"text"', b"{", b"\xff\xfe", b"<html>", b"[" * 100_000],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(raw, OCI_MANIFEST, Digest.of(raw))


def test_an_object_that_is_no_manifest_is_refused() -> None:
    with pytest.raises(ManifestInvalid, match="no manifest"):
        _parse({"hello": "world"}, "application/json")


@pytest.mark.parametrize(
    "broken",
    [
        {"config": "text"},
        {"config": []},
        {"config": {}},
        {"layers": {}},
        {"layers": "text"},
        {"layers": ["text"]},
        {"layers": [{"digest": str(Digest.of(b""))}]},
        {"layers": [_descriptor("x", digest="sha256:short")]},
        {"layers": [_descriptor("x", digest="../../etc/passwd")]},
        {"layers": [_descriptor("x", digest=None)]},
        {"layers": [_descriptor("x", size=-1)]},
        {"layers": [_descriptor("x", size="5")]},
        {"layers": [_descriptor("x", size=True)]},
        {"layers": [_descriptor("x", size=1.5)]},
        {"layers": [_descriptor("x", size=2**63)]},
        {"subject": {"digest": 5}},
    ],
)
def test_a_malformed_descriptor_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(ManifestInvalid):
        _parse(_image(**broken))


@given(
    st.dictionaries(
        st.sampled_from(["schemaVersion", "config", "layers", "manifests", "subject", "mediaType"]),
        json_values,
    ),
    st.sampled_from([None, OCI_MANIFEST, OCI_INDEX, ARTIFACT]),
)
def test_any_document_is_a_manifest_or_refused(
    document: dict[str, object], media_type: str | None
) -> None:
    try:
        manifest = _parse(document, media_type)
    except ManifestInvalid:
        return
    assert "/" in manifest.media_type


def test_a_manifest_names_itself() -> None:
    assert "3 children" in repr(_parse(_image()))


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [""],
        ["*/*"],
        ["application/*"],
        [OCI_INDEX],
        [OCI_INDEX.upper()],
        [f"{DOCKER_LIST}, {OCI_INDEX};q=0.1 , text/html"],
        [DOCKER_MANIFEST, OCI_MANIFEST, OCI_INDEX],
        [f"{OCI_MANIFEST}, */*"],
        [MANIFEST_ACCEPT],
    ],
)
def test_a_client_takes_what_one_of_its_lines_names(lines: list[str]) -> None:
    assert acceptable(OCI_INDEX, lines)


@pytest.mark.parametrize(
    "lines", [[OCI_MANIFEST], ["text/html"], ["text/*"], [DOCKER_MANIFEST, DOCKER_LIST]]
)
def test_a_client_does_not_take_what_none_of_its_lines_names(lines: list[str]) -> None:
    assert not acceptable(OCI_INDEX, lines)


def test_the_upstream_is_asked_for_every_type_in_one_header() -> None:
    types = [item.strip() for item in MANIFEST_ACCEPT.split(",")]
    assert {OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, "*/*"} <= set(types)
    assert len(set(types)) == len(types)
