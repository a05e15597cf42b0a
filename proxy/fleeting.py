"""The fleet layer of a node, put together: imported only where there is a fleet, as what speaks to
its directory is an extra."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from proxy import __version__
from proxy.config import Fleet
from proxy.fleet.directory import Directory
from proxy.fleet.link import Access, Login
from proxy.fleet.members import Load, Members, Node, new_id
from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics


async def open_fleet(
    settings: Fleet,
    stack: contextlib.AsyncExitStack,
    *,
    flights: Callable[[], int],
    metrics: Metrics,
    log: Logger,
    clock: Callable[[], float],
    environ: Mapping[str, str],
) -> Members | None:
    """Join the fleet until the stack ends, if there is one; that it is down is no error."""
    if settings.directory is None:
        return None
    name = settings.name or socket.gethostname()
    node = Node(new_id(), name, settings.zone or "", settings.advertise or "", __version__)
    access = Access(
        tls=settings.directory.tls,
        ca_file=settings.directory_ca_file,
        cert_file=settings.directory_cert_file,
        key_file=settings.directory_key_file,
        login=_login(settings, environ),
        client_name=f"pullpool-{node.id}",
    )
    directory = await stack.enter_async_context(
        Directory(settings.directory, access, metrics=metrics, log=log, clock=clock)
    )
    members = Members(
        directory, node, load=lambda: Load(flights=flights()), metrics=metrics, clock=clock
    )
    return await stack.enter_async_context(members)


def _login(settings: Fleet, environ: Mapping[str, str]) -> Callable[[], Awaitable[Login | None]]:
    """Who to log in as, asked before every connection: a file is read each time."""
    username = settings.directory_username or ""
    password, file = settings.directory_password, settings.directory_password_file
    variable = settings.directory_password_env

    async def login() -> Login | None:
        if file is not None:
            return Login(username, await asyncio.to_thread(_read, file))
        if variable is not None:
            return Login(username, environ.get(variable, ""))
        return None if password is None else Login(username, password.get_secret_value())

    return login


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8").rstrip("\r\n")
