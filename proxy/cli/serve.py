"""`pullpool serve`: settings from everywhere, then the server.

Flags are handed on as they were written, so that a wrong flag, a wrong variable and a wrong line in
the file are reported together. The variables are read with the settings, not here.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from proxy.config import Settings


@click.command()
@click.argument("upstream_url", required=False)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar="PULLPOOL_CONFIG",
    metavar="FILE",
    help="TOML file.  [PULLPOOL_CONFIG]",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help="Where clients pull from; 127.0.0.1:5050 by default.  [PULLPOOL_LISTEN]",
)
@click.option(
    "--admin",
    metavar="HOST:PORT",
    help="Health and metrics; 127.0.0.1:5051 by default.  [PULLPOOL_ADMIN]",
)
@click.option(
    "--cache-dir",
    metavar="DIR",
    help="Where blobs are kept; in the user's cache directory by default.  [PULLPOOL_CACHE_DIR]",
)
@click.option(
    "--cache-size",
    metavar="SIZE",
    help="Most bytes to keep; 50GiB by default.  [PULLPOOL_CACHE_SIZE]",
)
@click.option(
    "--max-connections",
    metavar="N",
    help="Most sockets to an upstream without a limit of its own in the file; 16 by default."
    "  [PULLPOOL_MAX_CONNECTIONS]",
)
@click.option(
    "--workers",
    metavar="N",
    help="How many processes serve; 1 by default.  [PULLPOOL_WORKERS]",
)
@click.option(
    "--log-format",
    metavar="console|json",
    help="Form of log lines; console by default.  [PULLPOOL_LOG_FORMAT]",
)
@click.pass_context
def serve(context: click.Context, /, config: Path | None, **flags: str | None) -> None:
    """Serve pulls of UPSTREAM_URL, or of the file's upstreams.

    With neither, the well-known public registries are served, docker.io at the root path.
    """
    with _uncollected():
        from proxy.workers import run

        context.exit(start(config, flags, run, os.environ))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection until the server begins with it (proxy/process.py): all modules that
    are loaded here stay, and every round would look at them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def start(
    config: Path | None,
    flags: Mapping[str, str | None],
    run: Callable[["Settings"], int],
    environ: Mapping[str, str],
) -> int:
    """Load the settings and run the server with them; the exit code, 2 when they are wrong."""
    from proxy.config import ConfigError, load_usable, unknown_variables

    try:
        settings = load_usable(config, overrides(flags), environ)
    except ConfigError as error:
        for fault in error.faults:
            click.echo(fault, err=True)
        return 2
    for text in (*settings.warnings(), *unknown_variables(environ)):
        click.echo(f"warning: {text}", err=True)
    return run(settings)


def overrides(flags: Mapping[str, str | None]) -> dict[str, Any]:
    """The flags that were given, nested like the keys that they set."""
    given: dict[str, Any] = {name: text for name, text in flags.items() if text is not None}
    cache = {
        key: given.pop(flag)
        for flag, key in (("cache_dir", "dir"), ("cache_size", "max_size"))
        if flag in given
    }
    return {**given, "cache": cache} if cache else given
