"""`pullpool demo`: what a crowd does to a registry with a limit, and what pullpool does about it.

Everything runs on this machine and over loopback: the bundled registry and a pullpool as child
processes, the clients in this one.
"""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Coroutine

import click
import uvloop
from rich.console import Console

from proxy.cli.demo.children import ChildFailed
from proxy.cli.demo.figures import Outcome, outcome_table
from proxy.cli.demo.plan import LAYERS, Plan
from proxy.cli.demo.screen import OutputClosed, PipeConsole, Screen
from proxy.cli.demo.stage import TITLES, play
from proxy.settings.values import format_size

__all__ = ["LAYERS", "Plan", "run_demo"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Open files beside those of the clients' connections.
_OTHER_FILES = 200


def run_demo(plan: Plan) -> int:
    """Play it, and print the table.

    The exit code: 0 when pullpool served every pull, 1 when it did not or a child failed, 128 and
    the signal's number after a signal.
    """
    try:
        _allow_files(plan.clients)
        console = PipeConsole(highlight=False)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_until_signal(_demo(plan, console)))
    except OutputClosed:
        return 1
    except (ChildFailed, OSError) as error:
        click.echo(f"pullpool demo: {error}", err=True)
        return 1


def _allow_files(clients: int) -> None:
    """Raise this process's limit of open files, which the children inherit, as far as it needs.

    Raises OSError when it may not. In a child each connection of a client may come with a file.
    """
    needed = 2 * clients + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise OSError(f"{clients} clients need {needed} open files, and {hard} are allowed")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


async def _until_signal(work: Coroutine[None, None, int]) -> int:
    """The work's exit code, or 128 + N when signal N ended it; it has unwound by then."""
    loop, caught = asyncio.get_running_loop(), list[int]()
    task = asyncio.ensure_future(work)

    def stop(number: int) -> None:
        # Only the first: a second one would break off the unwinding, and leave children behind.
        if not caught:
            caught.append(number)
            task.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop, number)
    try:
        await asyncio.wait({task})
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
    if caught and task.cancelled():
        return 128 + caught[0]
    return task.result()


async def _demo(plan: Plan, console: Console) -> int:
    size = format_size(plan.layer_size)
    console.print(
        f"{plan.clients} clients pull at once, each one of {plan.images} images "
        f"({plan.layers} layers of {size}),\n"
        f"from a registry that allows {plan.limit} connections and answers 401 beyond them.\n"
    )
    outcomes = await play(plan, Screen(console, TITLES, plan.limit))
    console.print(outcome_table(outcomes, plan.limit))
    _tell_how_to_serve(console, plan, outcomes[-1])
    return 0 if outcomes[-1].is_whole else 1


def _tell_how_to_serve(console: Console, plan: Plan, through: Outcome) -> None:
    console.print()
    if not through.is_whole:
        console.print("[bold red]pullpool did not serve every pull.[/]")
    console.print("To put it in front of your own registry, and pull through it:")
    console.print(
        f"  [bold]pullpool serve https://harbor.example.com --max-connections {plan.limit}[/]"
    )
    console.print("  [bold]podman pull --tls-verify=false 127.0.0.1:5050/team/app:v1[/]")
