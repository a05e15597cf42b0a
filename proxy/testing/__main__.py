"""The fake registry as a process of its own, for benchmarks and for trying things by hand.

`python -m proxy.testing registry --limit 8 --images 4` prints one line of JSON when it is ready and
serves until SIGTERM or SIGINT. A second port answers the parent process (`GET /_counters`,
`POST /_reset`), so that asking how many sockets there are does not open one more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from typing import Literal, TextIO, cast

from aiohttp import web

from proxy.testing.images import FakeImage, make_image
from proxy.testing.registry import FakeRegistry


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and serve. Exits with 2 when the command line is wrong."""
    options = _parser().parse_args(arguments)
    asyncio.run(_serve(options, sys.stdout))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m proxy.testing")
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "registry", help="serve generated images"
    )
    add = command.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=0, help="0: a free one")
    add("--limit", type=int, help="sockets at once; beyond it Harbor's 401")
    add("--rate", type=int, metavar="BYTES", help="bytes per second and connection")
    add("--latency", type=float, default=0.0, metavar="SECONDS")
    add("--images", type=int, default=1, metavar="K")
    add("--layers", type=int, default=3, metavar="L")
    add("--layer-size", type=int, default=1 << 20, metavar="BYTES")
    add("--seed", type=int, default=1)
    add("--auth", choices=("basic", "bearer"))
    add("--user", metavar="NAME:PASSWORD", help="the one user; anonymous pulls need bearer")
    add("--harbor", action="store_true", help="refuse logins in Harbor's way")
    add("--no-ranges", dest="ranges", action="store_false", help="ignore Range")
    return parser


async def _serve(options: argparse.Namespace, out: TextIO) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    images = _images(options)
    async with _registry(options) as registry:
        for image in images:
            registry.push(image)
        control = web.ServerRunner(web.Server(_Control(registry).answer, access_log=None))
        await control.setup()
        try:
            await web.TCPSite(control, "127.0.0.1", 0).start()
            host, port = control.addresses[0][:2]
            out.write(json.dumps(_announcement(registry, images, f"http://{host}:{port}")) + "\n")
            out.flush()
            await stop.wait()
        finally:
            await control.cleanup()


def _registry(options: argparse.Namespace) -> FakeRegistry:
    name, _, password = (options.user or "").partition(":")
    return FakeRegistry(
        host=options.host,
        port=options.port,
        limit=options.limit,
        rate=options.rate,
        latency=options.latency,
        auth=cast(Literal["basic", "bearer"] | None, options.auth),
        users={name: password} if name else {},
        harbor=options.harbor,
        ranges=options.ranges,
        keep_seen=False,  # a benchmark asks for many thousands
    )


def _images(options: argparse.Namespace) -> list[FakeImage]:
    sizes = [options.layer_size] * options.layers
    return [
        make_image(f"demo/app-{number}", "latest", layers=sizes, seed=options.seed + number)
        for number in range(options.images)
    ]


def _announcement(
    registry: FakeRegistry, images: Sequence[FakeImage], control: str
) -> dict[str, object]:
    return {
        "url": registry.url,
        "control": control,
        "images": [
            {
                "name": image.name,
                "tag": image.tag,
                "digest": str(image.digest),
                "blobs": [{"digest": str(blob.digest), "size": blob.size} for blob in image.blobs],
            }
            for image in images
        ],
    }


class _Control:
    """The parent process's view of the counters."""

    def __init__(self, registry: FakeRegistry) -> None:
        self._registry = registry

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        counters = self._registry.counters
        match request.method, request.path:
            case "GET", "/_counters":
                return web.json_response(counters.as_json())
            case "POST", "/_reset":
                counters.reset()
                return web.Response(status=204)
            case _:
                return web.Response(status=404)


if __name__ == "__main__":
    main()
