"""`pullpool status`: what somebody on call wants to see of a running node, or of its fleet."""

import http.client
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from proxy.cli.health import admin_address, admin_options, ask

#: Bytes of the answer that are read: a fleet of thousands of nodes is some megabytes.
MAX_ANSWER = 64 << 20


@click.command()
@click.option("--fleet", is_flag=True, help="Show the nodes of the fleet instead.")
@click.option("--json", "as_json", is_flag=True, help="Print what the server says as JSON.")
@admin_options(timeout=5.0)
@click.pass_context
def status(
    context: click.Context,
    fleet: bool,
    as_json: bool,
    admin: str | None,
    config: Path | None,
    timeout: float,
) -> None:
    """Show how a running server is: upstreams, queue, cache, and its fleet.

    The exit code is 0 when the server answers, else 1; with --fleet also 1 when it is in none, or
    when its directory is down.
    """
    try:
        address = admin_address(admin, config)
        code, text = ask(address, "/api/v1/status", timeout, limit=MAX_ANSWER)
        answer = json.loads(text)
        if code != http.client.OK:
            raise ValueError(f"the server answered {code}: {answer['error']}")
        shown = answer["fleet"] if fleet else answer
        if shown is None:
            raise ValueError("the server is in no fleet")
        if not as_json:
            _show(_of_fleet(shown) if fleet else _of_node(answer))
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        click.echo(f"no status: {str(error) or type(error).__name__}", err=True)
        context.exit(1)
    if as_json:
        click.echo(json.dumps(shown, indent=2, ensure_ascii=False))
    context.exit(1 if fleet and not shown["directory"]["up"] else 0)


def _show(parts: Iterable[Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def _of_node(answer: Mapping[str, Any]) -> Iterable[Any]:
    cache, flights, fleet = answer["cache"], answer["flights"], answer["fleet"]
    draining = ", draining" if answer["draining"] else ""
    yield f"pullpool {answer['version']}, {answer['role']}{draining}"
    connections = answer.get("connections")
    if connections is not None:
        paused = ", none accepted now" if connections["paused"] else ""
        yield f"clients   {connections['open']} of {connections['limit']} connections{paused}"
    readers = sum(flight["readers"] for flight in flights)
    yield f"flights   {len(flights)}, {readers} readers"
    yield f"cache     {_size(cache['bytes'])} of {_size(cache['limit'])}, {cache['blobs']} blobs"
    if fleet is not None:
        yield f"fleet     {_directory(fleet)}, {len(fleet['nodes'])} nodes"
    yield _upstreams(answer)
    for url in answer["urls"]:
        if url["error"]:
            yield f"{url['upstream']}: {url['url']} is {url['state']}: {url['error']}"


def _upstreams(answer: Mapping[str, Any]) -> Any:
    table = _table(("upstream", "sockets", "limit", "waiting", "breaker"), numbers=(1, 2, 3))
    for origin in answer["upstreams"]:
        breaker = origin["breaker"]
        table.add_row(
            origin["upstream"],
            str(sum(origin["connections"].values())),
            str(origin["limit"]),
            str(sum(answer["queue"].get(origin["upstream"], {}).values())),
            f"{breaker['state']}: {breaker['reason']}" if breaker["reason"] else breaker["state"],
        )
    return table


def _of_fleet(fleet: Mapping[str, Any]) -> Iterable[Any]:
    as_of = fleet["as_of"]
    age = "not read yet" if as_of is None else f"read {as_of:g} s ago"
    yield f"{fleet['directory']['url']}: {_directory(fleet)}; nodes: {len(fleet['nodes'])}, {age}"
    table = _table(("node", "zone", "url", "version", "lends", "flights"), numbers=(4, 5))
    for node in fleet["nodes"]:
        own = "*" if node["id"] == fleet["node"] else ""
        load = node["load"]
        table.add_row(
            f"{node['name']}{own}",
            node["zone"] or "-",
            node["url"],
            node["version"],
            f"{_size(load['lending'])}/s",
            str(load["flights"]),
        )
    yield table


def _directory(fleet: Mapping[str, Any]) -> str:
    directory = fleet["directory"]
    return "up" if directory["up"] else f"DOWN ({directory['error']})"


def _table(columns: Iterable[str], numbers: Iterable[int]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place in numbers else "left", overflow="fold")
    return table


def _size(count: int) -> str:
    """A size for people: 53687091200 is 50.0 GiB."""
    number, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            break
        number, unit = number / 1024, larger
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
