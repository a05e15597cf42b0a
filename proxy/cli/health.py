"""`pullpool healthcheck`: is the server in this container ready?

For Dockerfile's HEALTHCHECK, where neither curl nor a shell need exist. It runs often, so it
imports little: the settings model only when a file has to tell the address.
"""

import http.client
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from proxy.settings.values import HostPort

F = TypeVar("F", bound=Callable[..., Any])

_DEFAULT = HostPort("127.0.0.1", 5051)
#: Bytes that are read of an answer: to a question, and to an order.
_MAX_TEXT, _MAX_ANSWER = 4096, 1 << 20
_EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def admin_options(*, timeout: float) -> Callable[[F], F]:
    """The options of commands that ask a running server; `timeout` is the default."""

    def add(command: F) -> F:
        for option in reversed(_options(timeout)):
            command = option(command)
        return command

    return add


def _options(timeout: float) -> Sequence[Callable[[F], F]]:
    return (
        click.option(
            "--admin",
            envvar="PULLPOOL_ADMIN",
            metavar="HOST:PORT",
            help="The server's admin address; from the file, or 127.0.0.1:5051.  [PULLPOOL_ADMIN]",
        ),
        click.option(
            "--config",
            type=click.Path(path_type=Path),
            envvar="PULLPOOL_CONFIG",
            metavar="FILE",
            help="The server's TOML file.  [PULLPOOL_CONFIG]",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(0, min_open=True),
            default=timeout,
            show_default=True,
            metavar="SECONDS",
            help="How long to wait for the answer.",
        ),
    )


@click.command()
@admin_options(timeout=5.0)
@click.pass_context
def healthcheck(
    context: click.Context, admin: str | None, config: Path | None, timeout: float
) -> None:
    """Exit with 0 when the server is ready, else 1."""
    try:
        address = admin_address(admin, config)
        status, text = ask(address, "/readyz", timeout)
    except (OSError, http.client.HTTPException, ValueError) as error:
        click.echo(f"not ready: {str(error) or type(error).__name__}", err=True)
        context.exit(1)
    if status != http.client.OK:
        click.echo(f"not ready: {status} {text}", err=True)
        context.exit(1)
    click.echo("ready")


def ask(
    address: HostPort,
    path: str,
    timeout: float,
    *,
    body: bytes | None = None,
    limit: int | None = None,
) -> tuple[int, str]:
    """GET a path of a local server, or POST JSON to it: status and text, without any proxy."""
    host = reachable(address.host)
    connection = http.client.HTTPConnection(host, address.port, timeout=timeout)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        limit = limit or (_MAX_TEXT if body is None else _MAX_ANSWER)
        return response.status, response.read(limit).decode(errors="replace").strip()
    finally:
        connection.close()


def reachable(host: str) -> str:
    """Where a server can be asked that listens on ``host``."""
    return _EVERY_INTERFACE.get(host, host)


def admin_address(admin: str | None, config: Path | None) -> HostPort:
    """The admin address by flag, variable, file or default; ValueError when it is no use."""
    if admin is not None:
        address = HostPort.parse(admin)
    elif config is None:
        return _DEFAULT
    else:
        address = _configured(config)
    if address.port == 0:
        raise ValueError("the admin port is chosen by the system: give it with --admin")
    return address


def _configured(config: Path) -> HostPort:
    from proxy.config import ConfigError, load_settings

    try:
        return load_settings(config, {}, os.environ).admin
    except ConfigError as error:
        raise ValueError(str(error)) from error
