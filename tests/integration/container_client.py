"""Pulls one image over HTTP and checks every digest: what runs in the container beside pullpool.

    python3 container_client.py http://127.0.0.1:5050 team/app v1

Only the standard library, since the container has nothing else. Prints one digest a line: the
manifest's, the configuration's, the layers'. Ends with a traceback when anything is wrong.
"""

import hashlib
import json
import sys
from urllib.request import Request, urlopen

_ACCEPT = (
    "application/vnd.docker.distribution.manifest.v2+json,"
    "application/vnd.oci.image.manifest.v1+json"
)


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _fetch(url: str) -> bytes:
    with urlopen(Request(url, headers={"Accept": _ACCEPT})) as answer:
        data: bytes = answer.read()
        told = answer.headers["Docker-Content-Digest"]
    if told != _sha256(data):
        raise ValueError(f"{url}: told {told}, got {_sha256(data)}")
    return data


def pull(registry: str, repository: str, tag: str) -> list[str]:
    """Fetch manifest, configuration and layers; their digests. ValueError when one is wrong."""
    manifest = _fetch(f"{registry}/v2/{repository}/manifests/{tag}")
    document = json.loads(manifest)
    held = [_sha256(manifest)]
    for descriptor in (document["config"], *document["layers"]):
        data = _fetch(f"{registry}/v2/{repository}/blobs/{descriptor['digest']}")
        if (_sha256(data), len(data)) != (descriptor["digest"], descriptor["size"]):
            raise ValueError(f"not what the manifest names: {descriptor}")
        held.append(_sha256(data))
    return held


if __name__ == "__main__":
    sys.stdout.write("\n".join(pull(*sys.argv[1:])))
