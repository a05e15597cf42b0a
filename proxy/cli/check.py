"""`pullpool check-config` and `pullpool config schema`: look at a configuration without serving."""

import json
import os
from pathlib import Path

import click


@click.command("check-config")
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_context
def check_config(context: click.Context, file: Path) -> None:
    """Report every fault in FILE at its key.

    PULLPOOL_ variables count as they would for `serve`, and files that the settings name must be
    there. The exit code is 0 when `serve` would start with it, else 1. Then it says how many
    clients that holds with the limit of open files that there is here.
    """
    from proxy.config import ConfigError, load_usable, unknown_variables
    from proxy.web.descriptors import reachable_limit
    from proxy.wiring import client_room

    try:
        settings = load_usable(file, {}, os.environ)
    except ConfigError as error:
        for fault in error.faults:
            click.echo(fault, err=True)
        context.exit(1)
    for text in (*settings.warnings(), *unknown_variables(os.environ)):
        click.echo(f"warning: {text}", err=True)
    click.echo("ok")
    limit = reachable_limit()
    of_each = f" in each of {settings.workers} workers" if settings.workers > 1 else ""
    room = client_room(settings, limit)
    click.echo(f"max_clients: at least {room}{of_each}, with {limit} open files")


@click.group("config")
def config_group() -> None:
    """About the configuration file."""


@config_group.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file, for editors."""
    from proxy.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))
