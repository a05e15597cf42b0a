"""`pullpool prefetch` and `pullpool tasks`: work that a running server does by itself."""

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from proxy.cli.health import admin_address, admin_options

if TYPE_CHECKING:
    from proxy.cli.task_client import TaskServer

#: What a shell says of a command that ^C has ended.
INTERRUPTED = 130


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--platform",
    "platforms",
    multiple=True,
    metavar="OS/ARCH[/VARIANT]",
    help="Of an image for several platforms, only this one; may be given again.  [all]",
)
@click.option(
    "--nodes",
    metavar="all|K|zone=Z",
    help="On all nodes of the server's fleet, on K of them, or on those of a zone.  [the server]",
)
@click.option("--wait", is_flag=True, help="Show how far it is, and exit when it is over.")
@admin_options(timeout=60.0)
@click.pass_context
def prefetch(
    context: click.Context,
    images: tuple[str, ...],
    platforms: tuple[str, ...],
    nodes: str | None,
    wait: bool,
    admin: str | None,
    config: Path | None,
    timeout: float,
) -> None:
    """Make a running server fetch IMAGEs before anybody asks for them.

    IMAGE is written as for a client (alpine, quay.io/team/app:v1, team/app@sha256:...); without a
    registry it is the server's default upstream's. Prints the id of the task, which goes on by
    itself. With --wait exits with 1 when an image failed; ^C ends the waiting, not the task.
    """
    with _server(context, admin, config, timeout) as server:
        task = server.add(images, platforms, nodes)
        if wait:
            context.exit(_watch(server, task["id"]))
        click.echo(task["id"])
        click.echo(f"queued: pullpool tasks wait {task['id']} shows how far it is", err=True)


@click.group("tasks")
def tasks_group() -> None:
    """What a running server does by itself: prefetches."""


@tasks_group.command("ls")
@click.option(
    "--limit", type=click.IntRange(1, 200), default=50, show_default=True, help="Tasks, at most."
)
@admin_options(timeout=10.0)
@click.pass_context
def list_tasks(
    context: click.Context, limit: int, admin: str | None, config: Path | None, timeout: float
) -> None:
    """Print the newest tasks, newest first."""
    with _server(context, admin, config, timeout) as server:
        for task in server.newest(limit)["tasks"]:
            click.echo(_line(task))


@tasks_group.command("cancel")
@click.argument("tasks", nargs=-1, required=True, metavar="ID...")
@admin_options(timeout=10.0)
@click.pass_context
def cancel_tasks(
    context: click.Context,
    tasks: tuple[str, ...],
    admin: str | None,
    config: Path | None,
    timeout: float,
) -> None:
    """End tasks that are not over. What they have brought stays in the cache."""
    with _server(context, admin, config, timeout) as server:
        for task in tasks:
            click.echo(f"{task}: {server.cancel(task)['state']}")


@tasks_group.command("wait")
@click.argument("task", metavar="ID")
@admin_options(timeout=60.0)
@click.pass_context
def wait_for_task(
    context: click.Context, task: str, admin: str | None, config: Path | None, timeout: float
) -> None:
    """Show how far a task is, and exit when it is over: with 1 when an image failed."""
    with _server(context, admin, config, timeout) as server:
        context.exit(_watch(server, task))


@contextmanager
def _server(
    context: click.Context, admin: str | None, config: Path | None, timeout: float
) -> Iterator["TaskServer"]:
    """The server; what it cannot do ends the command with 1."""
    from proxy.cli.task_client import Refused, TaskServer

    try:
        yield TaskServer(admin_address(admin, config), timeout)
    except Refused as error:
        click.echo(str(error), err=True)
        context.exit(1)
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        click.echo(f"cannot ask the server: {str(error) or type(error).__name__}", err=True)
        context.exit(1)


def _watch(server: "TaskServer", task: str) -> int:
    """Show a task until it is over; the exit code."""
    from rich.console import Console

    from proxy.cli.task_screen import screen_for

    out, err, state = Console(), Console(stderr=True), ""
    try:
        with screen_for(out, err) as screen:
            for document in server.follow(task):
                state = document["state"]
                screen.show(document)
    except KeyboardInterrupt:
        click.echo(
            f"task {task} goes on; pullpool tasks wait {task} shows it, "
            f"pullpool tasks cancel {task} ends it",
            err=True,
        )
        return INTERRUPTED
    return 0 if state == "SUCCEEDED" else 1


def _line(task: dict[str, Any]) -> str:
    """A task in one line."""
    created = datetime.fromtimestamp(task["created"]).astimezone().isoformat(timespec="seconds")
    first, *others = task["images"]
    more = f" and {len(others)} more" if others else ""
    share = f"{task['bytes_done']}/{task['bytes']}"
    where = f" on nodes: {task['nodes']}" if "nodes" in task else ""
    return f"{task['id']}  {task['state']:<9}  {created}  {share:>21} bytes  {first}{more}{where}"
