"""The fake registry as a process of its own, for benchmarks and for trying things by hand.

`python -m proxy.testing registry --limit 8 --images 4` prints one line of JSON when it is ready and
serves until SIGTERM or SIGINT. `python -m proxy.testing harbor --breaks-beyond 6 --users ann:pw` is
a Harbor with Bearer tokens that breaks under load. A second port answers the parent process, so
that asking how many sockets there are does not open one more:

- `GET /_counters`: the totals;
- `GET /_timeline`: when each request came, in seconds, and what overload made of it;
- `POST /_reset`: counts anew;
- `POST /_limit?sockets=N`: moves the limit of sockets; without a number there is none any more;
- `POST /_overload?breaks-beyond=N&misbehave=KINDS&seed=S`: moves the limit, each part by itself;
  with an empty `breaks-beyond` nothing breaks any more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, TextIO, cast

from aiohttp import web

from proxy.testing.images import FakeImage, make_image
from proxy.testing.overload import Misbehaviour, Overload
from proxy.testing.quota import PullQuota
from proxy.testing.registry import FakeRegistry

_HARBOR = """\
A registry that refuses logins in Harbor's words (wrong credentials, a forbidden repository and an
unknown project get a token that grants nothing; only a request without scope is refused), hands out
tokens that do not live long, and breaks beyond so many requests in progress. It prints one line of
JSON when it is ready: its URL, its images, and the address of its control port, which knows
GET /_counters, GET /_timeline, POST /_reset, POST /_limit?sockets=N and
POST /_overload?breaks-beyond=N&misbehave=KINDS&seed=S."""

_KINDS = """\
kinds of misbehaviour, each drawn by its weight (1 unless given) for a request that it can strike:
  empty-challenge  401, WWW-Authenticate there but empty, the database's error in the body
  basic-challenge  401 with a Basic challenge to a request whose Bearer token is good
  database-text    401 or 500 that only the text in the body gives away
  empty-access     a token, valid for its whole life, that grants nothing
  500              an internal error that says nothing
  reset            RST instead of an answer

example:
  python -m proxy.testing harbor --users ann:pw --breaks-beyond 6 --misbehave empty-access,500=2"""
#: The repository of `--patterns`.
PATTERNS = "demo/patterns"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and serve. Exits with 2 when the command line is wrong."""
    options = _parser().parse_args(arguments)
    asyncio.run(_serve(options, sys.stdout))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m proxy.testing")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_registry(commands.add_parser("registry", help="serve generated images"))
    _add_harbor(
        commands.add_parser(
            "harbor",
            help="the same as a Harbor that breaks under load",
            description=_HARBOR,
            epilog=_KINDS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=0, help="a free one by default")
    add(
        "--limit",
        type=_natural,
        metavar="N",
        help="sockets at once, counted when accepted; beyond it Harbor's 401; none by default",
    )
    add("--rate", type=int, metavar="BYTES", help="bytes per second and connection; any by default")
    add("--repository", default="demo/app", metavar="NAME", help="of the images: NAME-0, NAME-1, …")
    add("--images", type=int, default=1, metavar="K", help="%(default)s by default")
    add("--layers", type=int, default=3, metavar="L", help="of each image, %(default)s by default")
    add(
        "--layer-size",
        type=_read_sizes,
        default=[1 << 20],
        metavar="BYTES[,BYTES...]",
        help="of the layers in turn; 1 MiB by default",
    )
    add("--patterns", type=int, default=0, metavar="K", help="large blobs made as they are sent")
    add("--pattern-size", type=int, default=64 << 20, metavar="BYTES", help="of each of them")
    add("--seed", type=int, default=1, help="of the images and of what breaks")
    add("--no-ranges", dest="ranges", action="store_false", help="ignore Range")


def _add_registry(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    add = command.add_argument
    add("--latency", type=float, default=0.0, metavar="SECONDS")
    add("--auth", choices=("basic", "bearer"))
    add("--user", metavar="NAME:PASSWORD", help="the one user; anonymous pulls need bearer")
    add("--harbor", action="store_true", help="refuse logins in Harbor's way")
    add("--pulls", type=_natural, metavar="N", help="manifest GETs per window; 429 beyond")
    add("--pull-window", type=float, default=21_600.0, metavar="SECONDS")
    command.set_defaults(make=_registry)


def _add_harbor(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    add = command.add_argument
    add(
        "--breaks-beyond", type=_natural, metavar="N", help="requests in progress; never by default"
    )
    add(
        "--misbehave",
        type=_read_kinds,
        default=",".join(Misbehaviour),
        metavar="KIND[=WEIGHT],...",
        help="how it breaks, see below; all alike by default",
    )
    add(
        "--refusal-time",
        type=float,
        default=0.005,
        metavar="SECONDS",
        help="of a broken answer, %(default)s by default",
    )
    add(
        "--service-time",
        dest="latency",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="of any other one, before its headers; none by default",
    )
    _add_logins(command)
    command.set_defaults(make=_harbor)


def _add_logins(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--users",
        type=_read_users,
        default={},
        metavar="NAME:PASSWORD,...",
        help="who may pull; with none everybody may, with an anonymous token",
    )
    add(
        "--strangers",
        type=_read_users,
        default={},
        metavar="NAME:PASSWORD,...",
        help="who may log in, and pull nothing",
    )
    add(
        "--token-ttl",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="how long a token lives, %(default)g by default",
    )
    add("--opaque-tokens", action="store_true", help="tokens that nobody else can read")


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number


def _read_sizes(text: str) -> list[int]:
    """`1000,20` as sizes. Raises ValueError."""
    return [_natural(size) for size in text.split(",")]


def _read_kinds(text: str) -> dict[str, float]:
    """`500=2,reset` as weights; a kind without one weighs 1. Raises ValueError."""
    parts = (part.partition("=") for part in text.split(","))
    kinds = {Misbehaviour(kind).value: float(weight or 1) for kind, _, weight in parts}
    Overload(0, kinds)
    return kinds


def _read_users(text: str) -> dict[str, str]:
    """`ann:pw,bob:pw` as passwords by name. Raises ValueError."""
    users = dict(part.split(":", 1) for part in text.split(","))
    if "" in users:
        raise ValueError("a user without a name")
    return users


async def _serve(options: argparse.Namespace, out: TextIO) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    images = _images(options)
    async with options.make(options, images) as registry:
        for image in images:
            registry.push(image)
        patterns = registry.put_patterns(PATTERNS, options.pattern_size, options.patterns)
        control = web.ServerRunner(web.Server(_Control(registry, options).answer, access_log=None))
        await control.setup()
        try:
            await web.TCPSite(control, options.host, 0).start()
            host, port = control.addresses[0][:2]
            said = _announcement(registry, images, f"http://{host}:{port}")
            said["patterns"] = {"name": PATTERNS, "digests": [str(digest) for digest in patterns]}
            out.write(json.dumps(said) + "\n")
            out.flush()
            await stop.wait()
        finally:
            await control.cleanup()


def _registry(options: argparse.Namespace, _images: Sequence[FakeImage]) -> FakeRegistry:
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
        pulls=None if options.pulls is None else PullQuota(options.pulls, options.pull_window),
        ranges=options.ranges,
        keep_seen=False,  # a benchmark asks for many thousands
    )


def _harbor(options: argparse.Namespace, images: Sequence[FakeImage]) -> FakeRegistry:
    users: dict[str, str] = options.users
    return FakeRegistry(
        host=options.host,
        port=options.port,
        limit=options.limit,
        rate=options.rate,
        latency=options.latency,
        overload=_overload(options),
        auth="bearer",
        harbor=True,
        users={**options.strangers, **users},
        private={image.name: tuple(users) for image in images} if users else {},
        token_ttl=options.token_ttl,
        opaque_tokens=options.opaque_tokens,
        ranges=options.ranges,
        keep_seen=False,
    )


def _overload(options: argparse.Namespace) -> Overload | None:
    """When and how to break, by the options. Raises ValueError."""
    if options.breaks_beyond is None:
        return None
    return Overload(options.breaks_beyond, options.misbehave, options.refusal_time, options.seed)


def _images(options: argparse.Namespace) -> list[FakeImage]:
    given: list[int] = options.layer_size
    sizes = [given[number % len(given)] for number in range(options.layers)]
    return [
        make_image(
            f"{options.repository}-{number}", "latest", layers=sizes, seed=options.seed + number
        )
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
                "size": len(image.manifest),
                "blobs": [{"digest": str(blob.digest), "size": blob.size} for blob in image.blobs],
            }
            for image in images
        ],
    }


class _Control:
    """The parent process's view of the counters."""

    def __init__(self, registry: FakeRegistry, options: argparse.Namespace) -> None:
        self._registry = registry
        self._options = options

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        counters = self._registry.counters
        match request.method, request.path:
            case "GET", "/_counters":
                return web.json_response(counters.as_json())
            case "GET", "/_timeline":
                return web.json_response(counters.timeline_as_json())
            case "POST", "/_reset":
                counters.reset()
                return web.Response(status=204)
            case "POST", "/_limit":
                return self._limit(request.query.get("sockets", ""))
            case "POST", "/_overload":
                return self._move(request.query)
            case _:
                return web.Response(status=404)

    def _limit(self, number: str) -> web.Response:
        try:
            self._registry.limit = _natural(number) if number else None
        except ValueError as error:
            return web.Response(status=400, text=f"{error}\n")
        return web.Response(status=204)

    def _move(self, query: Mapping[str, str]) -> web.Response:
        if "breaks_beyond" not in self._options:
            return web.Response(status=404, text="only a harbor breaks\n")
        try:
            changed = argparse.Namespace(**vars(self._options))
            if (number := query.get("breaks-beyond")) is not None:
                changed.breaks_beyond = _natural(number) if number else None
            if (kinds := query.get("misbehave")) is not None:
                changed.misbehave = _read_kinds(kinds)
            if (seed := query.get("seed")) is not None:
                changed.seed = int(seed)
            self._registry.overload = _overload(changed)
        except ValueError as error:
            return web.Response(status=400, text=f"{error}\n")
        self._options = changed
        return web.Response(status=204)


if __name__ == "__main__":
    main()
