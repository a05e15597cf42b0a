"""The command `pullpool`.

A command imports what it runs inside its function: `pullpool healthcheck`, which a container runs
every few seconds, must not pay for the server, nor `--help` for the settings.
"""

import click

from proxy import __version__
from proxy.cli.check import check_config, config_group
from proxy.cli.health import healthcheck
from proxy.cli.refresh import refresh
from proxy.cli.serve import serve
from proxy.cli.status import status
from proxy.cli.tasks import prefetch, tasks_group
from proxy.settings.values import parse_size


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="pullpool")
def cli() -> None:
    """Many pulls, few connections: a caching pull-through proxy for container registries."""


def _size(context: click.Context, parameter: click.Parameter, text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if not size:
        raise click.BadParameter("must be above zero")
    return size


@click.command()
@click.option(
    "--clients",
    type=click.IntRange(1, 1000),
    default=200,
    show_default=True,
    metavar="N",
    help="Clients that pull at the same moment.",
)
@click.option(
    "--limit",
    type=click.IntRange(1, 1000),
    default=8,
    show_default=True,
    metavar="N",
    help="Connections that the registry allows; beyond them it answers 401.",
)
@click.option(
    "--images",
    type=click.IntRange(1, 1000),
    default=20,
    show_default=True,
    metavar="N",
    help="Images that the clients share.",
)
@click.option(
    "--layer-size",
    callback=_size,
    default="2MiB",
    show_default=True,
    metavar="SIZE",
    help="Size of each of an image's four layers.",
)
@click.option(
    "--rate",
    callback=_size,
    default="4MiB",
    show_default=True,
    metavar="SIZE",
    help="What the registry sends each second on one connection.",
)
@click.pass_context
def demo(context: click.Context, /, **options: int) -> None:
    """Overrun a registry's limit, with and without pullpool.

    Starts a registry that allows few connections, and lets a crowd of clients pull from it: first
    directly, then through pullpool. Everything runs on this machine.
    """
    from proxy.cli.demo import LAYERS, Plan, run_demo

    context.exit(run_demo(Plan(layers=LAYERS, **options)))


for _command in (
    serve,
    demo,
    check_config,
    config_group,
    healthcheck,
    refresh,
    status,
    prefetch,
    tasks_group,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; ends the process with the command's exit code."""
    cli(prog_name="pullpool")
