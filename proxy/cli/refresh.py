"""`pullpool refresh`: make a running server ask its upstreams what some tags are now."""

import http.client
import json
from pathlib import Path
from typing import Any

import click

from proxy.cli.health import admin_address, admin_options, ask


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@admin_options(timeout=60.0)
@click.pass_context
def refresh(
    context: click.Context,
    images: tuple[str, ...],
    admin: str | None,
    config: Path | None,
    timeout: float,
) -> None:
    """Ask the upstream now what the tags of IMAGEs are, and forget what was refused.

    IMAGE is written as for a client (alpine, quay.io/team/app:v1); without a registry it is the
    server's default upstream's. Prints each tag's old and new digest. Exits with 1 when one failed.
    """
    body = json.dumps({"images": images}).encode()
    try:
        address = admin_address(admin, config)
        status, text = ask(address, "/api/v1/refresh", timeout, body=body)
        answer = json.loads(text)
        if status != http.client.OK:
            raise ValueError(f"the server answered {status}: {answer['error']}")
        results = answer["images"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        click.echo(f"cannot refresh: {str(error) or type(error).__name__}", err=True)
        context.exit(1)
    for result in results:
        click.echo(_line(result), err="error" in result)
    context.exit(1 if any("error" in result for result in results) else 0)


def _line(result: dict[str, Any]) -> str:
    image = result["image"]
    if "error" in result:
        error = result["error"]
        return f"{image}: {error['code']}: {error['message']}"
    was, now = result["was"], result["now"]
    if was == now:
        return f"{image}: {now} (unchanged)"
    return f"{image}: {was or 'unknown'} -> {now}"
