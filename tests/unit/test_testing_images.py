"""Images made from a seed, and the clock that stands still."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from proxy.oci.digest import Digest
from proxy.testing import FakeClock, make_image, make_index


def test_the_same_arguments_give_the_same_image() -> None:
    first = make_image("team/app", "v1", layers=[1000, 5], seed=7)
    second = make_image("team/app", "v1", layers=[1000, 5], seed=7)
    assert first == second


def test_another_seed_gives_other_layers() -> None:
    first = make_image("team/app", "v1", layers=[1000], seed=1)
    second = make_image("team/app", "v1", layers=[1000], seed=2)
    assert first.layers[0].digest != second.layers[0].digest
    assert first.digest != second.digest


def test_images_of_one_seed_share_layers_under_any_name() -> None:
    first = make_image("team/app", "v1", layers=[64, 128], seed=1)
    second = make_image("other/app", "v9", layers=[64, 256], seed=1)
    assert first.layers[0] == second.layers[0]
    assert first.layers[1] != second.layers[1]


def test_layers_of_one_image_differ_though_their_sizes_are_equal() -> None:
    image = make_image("a", "b", layers=[4096, 4096], seed=1)
    assert image.layers[0].digest != image.layers[1].digest


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, (1 << 20) + 3])
def test_an_untarred_layer_is_exactly_as_long_as_asked(size: int) -> None:
    image = make_image("a", "b", layers=[size], seed=3, tarred=False)
    assert image.layers[0].size == size


@pytest.mark.parametrize("size", [0, 1, 512, 1000])
def test_a_tarred_layer_is_an_archive_with_one_file_of_that_size(size: int) -> None:
    layer = make_image("a", "b", layers=[size], seed=3).layers[0]
    with tarfile.open(fileobj=io.BytesIO(layer.data)) as archive:
        (entry,) = archive.getmembers()
        content = archive.extractfile(entry)
        assert content is not None
        assert len(content.read()) == entry.size == size
    assert layer.size % 512 == 0


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_every_digest_names_its_bytes(algorithm: str) -> None:
    image = make_image("a", "b", layers=[10, 20], seed=3, algorithm=algorithm)
    assert image.digest == Digest.of(image.manifest, algorithm)
    for blob in image.blobs:
        assert blob.digest == Digest.of(blob.data, algorithm)


def test_the_manifest_lists_configuration_and_layers() -> None:
    image = make_image("a", "b", layers=[10, 20], seed=3)
    manifest = json.loads(image.manifest)
    assert manifest["mediaType"] == image.media_type
    listed = [manifest["config"], *manifest["layers"]]
    assert [entry["digest"] for entry in listed] == [str(blob.digest) for blob in image.blobs]
    assert sum(entry["size"] for entry in listed) == image.size


def test_the_configuration_names_the_platform_and_the_diff_ids() -> None:
    image = make_image("a", "b", layers=[10, 20], seed=3)
    config = json.loads(image.config.data)
    assert (config["os"], config["architecture"]) == ("linux", "amd64")
    assert config["rootfs"]["diff_ids"] == [str(layer.digest) for layer in image.layers]


def test_an_index_lists_its_images_with_their_platforms() -> None:
    images = [
        make_image("a", "b", layers=[10], seed=1, architecture=architecture)
        for architecture in ("amd64", "arm64")
    ]
    index = make_index("a", "multi", images)
    listed = json.loads(index.manifest)["manifests"]
    assert [entry["digest"] for entry in listed] == [str(image.digest) for image in images]
    assert [entry["platform"]["architecture"] for entry in listed] == ["amd64", "arm64"]
    assert index.digest == Digest.of(index.manifest)


def test_a_fake_clock_moves_only_when_told() -> None:
    clock = FakeClock(10.0)
    assert clock() == clock() == 10.0
    clock.advance(2.5)
    assert clock() == 12.5


def test_a_fake_clock_does_not_run_backwards() -> None:
    with pytest.raises(ValueError, match="cannot go back"):
        FakeClock().advance(-1)
