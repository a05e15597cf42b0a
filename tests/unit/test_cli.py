"""The commands: exit codes, words and streams."""

import gc
import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from proxy import __version__
from proxy.cli.health import ask
from proxy.cli.main import cli
from proxy.cli.serve import overrides, start
from proxy.config import HostPort, Settings
from proxy.web.descriptors import BASE


def invoke(*arguments: str, env: Mapping[str, str | None] | None = None) -> Result:
    # CliRunner adds to the environment of the tests: what counts here is set or taken away.
    clean = dict.fromkeys(("PULLPOOL_CONFIG", "PULLPOOL_ADMIN", "PULLPOOL_LISTEN"))
    return CliRunner().invoke(cli, arguments, env={**clean, **(env or {})})


def write(directory: Path, text: str) -> str:
    path = directory / "pullpool.toml"
    path.write_text(text)
    return str(path)


class Recorder:
    """Stands in for the server: keeps the settings it was started with."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.started: list[Settings] = []

    def __call__(self, settings: Settings) -> int:
        self.started.append(settings)
        return self.code


@contextmanager
def readiness(status: int, text: str) -> Iterator[HostPort]:
    """A server that answers /readyz so, and everything else 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield HostPort("127.0.0.1", server.server_port)
        finally:
            server.shutdown()
            thread.join()


def test_the_version_is_told() -> None:
    assert invoke("--version").output == f"pullpool, version {__version__}\n"


def test_help_names_every_command() -> None:
    output = invoke("--help").output
    for command in ("serve", "demo", "check-config", "config", "healthcheck"):
        assert f"  {command} " in output


def test_help_of_serve_names_the_variable_of_every_flag() -> None:
    output = invoke("serve", "--help").output
    flags = (
        "config",
        "listen",
        "admin",
        "cache-dir",
        "cache-size",
        "max-connections",
        "workers",
        "log-format",
    )
    for flag in flags:
        assert f"--{flag} " in output
        assert f"[PULLPOOL_{flag.replace('-', '_').upper()}]" in output


# --- check-config -----------------------------------------------------------------------------


def test_a_right_file_is_ok(tmp_path: Path) -> None:
    result = invoke("check-config", write(tmp_path, "max_connections = 4"))
    assert (result.exit_code, result.stdout.splitlines()[0], result.stderr) == (0, "ok", "")


ROOM = re.compile(
    r"ok\nmax_clients: at least (\d+)( in each of 3 workers)?, with (\d+) open files\n"
)


def under_limits(*arguments: str) -> list[str]:
    """The command, where 256 files may be open, and 2048 if one asks for it."""
    limits = 'ulimit -Sn 256 && ulimit -Hn 2048 && exec "$@"'
    return ["sh", "-c", limits, "sh", sys.executable, "-m", "proxy", *arguments]


def without_variables() -> dict[str, str]:
    return {key: text for key, text in os.environ.items() if not key.startswith("PULLPOOL_")}


def test_a_check_says_for_how_many_clients_a_start_has_room(tmp_path: Path) -> None:
    text = f"""
        listen = "127.0.0.1:0"
        admin = "127.0.0.1:0"
        log_format = "json"
        cache.dir = "{tmp_path / "cache"}"
        [upstreams.h]
        max_connections = 100
        max_redirect_connections = 200
    """
    file, env = write(tmp_path, text), without_variables()
    checked = subprocess.run(
        under_limits("check-config", file), env=env, capture_output=True, text=True, check=True
    )
    found = ROOM.fullmatch(checked.stdout)
    assert found is not None, checked.stdout
    assert found[3] == "2048"
    serving = under_limits("serve", "--config", file)
    with subprocess.Popen(serving, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = map(json.loads, process.stderr)
        started = next(line for line in lines if line["event"] == "serving")
        process.terminate()
    assert 0 <= started["max_clients"] - int(found[1]) <= BASE


def test_a_check_leaves_the_limit_as_it_is_and_says_it_of_each_worker(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = min(200, before[0]), before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, low)
    try:
        result = invoke("check-config", write(tmp_path, "workers = 3"))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == low
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    found = ROOM.fullmatch(result.stdout)
    assert found is not None, result.stdout
    assert found[2]
    assert int(found[3]) == before[1]


def test_every_fault_of_a_file_is_on_its_own_line(tmp_path: Path) -> None:
    text = "lisen = 1\nmax_connections = 0\n[upstreams.h]\nca_file = '/nowhere'\nrate = 'x'"
    result = invoke("check-config", write(tmp_path, text))
    assert result.exit_code == 1
    assert result.stdout == ""
    keys = {line.split(":")[0] for line in result.stderr.splitlines()}
    assert keys == {"lisen", "max_connections", "upstreams.h.rate", "upstreams.h.ca_file"}


def test_a_file_that_the_settings_name_has_to_be_there(tmp_path: Path) -> None:
    result = invoke("check-config", write(tmp_path, "[upstreams.h]\nca_file = '/nowhere'"))
    assert result.exit_code == 1
    assert result.stderr.startswith("upstreams.h.ca_file: ")


def test_a_missing_configuration_is_a_fault_and_no_traceback(tmp_path: Path) -> None:
    result = invoke("check-config", str(tmp_path / "none.toml"))
    assert result.exit_code == 1
    assert "none.toml: cannot be read" in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_a_warning_is_shown_and_the_file_is_still_ok(tmp_path: Path) -> None:
    result = invoke("check-config", write(tmp_path, "[queue]\nblob_deadline = '10m'"))
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "ok")
    assert result.stderr.startswith("warning: queue.blob_deadline")


def test_variables_count_when_a_file_is_checked(tmp_path: Path) -> None:
    result = invoke("check-config", write(tmp_path, ""), env={"PULLPOOL_LISTEN": "nowhere"})
    assert result.exit_code == 1
    assert "listen (from PULLPOOL_LISTEN)" in result.stderr


def test_the_schema_is_json() -> None:
    schema = json.loads(invoke("config", "schema").stdout)
    assert "listen" in schema["properties"]


# --- serve ------------------------------------------------------------------------------------


def test_flags_become_settings(tmp_path: Path) -> None:
    flags = {
        "upstream_url": "https://harbor.example.com",
        "listen": "127.0.0.1:0",
        "admin": None,
        "cache_dir": str(tmp_path),
        "cache_size": "1MiB",
        "max_connections": "3",
        "log_format": "json",
    }
    server = Recorder(code=7)
    assert start(None, flags, server, {}) == 7
    (settings,) = server.started
    assert settings.default_upstream == "harbor.example.com"
    assert settings.listen == HostPort("127.0.0.1", 0)
    assert settings.admin == HostPort("127.0.0.1", 5051)
    assert (settings.cache.dir, settings.cache.max_size) == (tmp_path, 1 << 20)
    assert (settings.max_connections, settings.log_format) == (3, "json")


def test_flags_that_are_not_given_set_nothing() -> None:
    assert overrides({"listen": None, "cache_dir": None, "cache_size": None}) == {}


def test_variables_reach_the_server_as_flags_do(tmp_path: Path) -> None:
    server = Recorder()
    environ = {
        "PULLPOOL_UPSTREAM_URL": "https://harbor.example.com",
        "PULLPOOL_LISTEN": "127.0.0.1:1",
        "PULLPOOL_ADMIN": "127.0.0.1:2",
        "PULLPOOL_CACHE_DIR": str(tmp_path),
        "PULLPOOL_CACHE_SIZE": "1MiB",
        "PULLPOOL_MAX_CONNECTIONS": "3",
        "PULLPOOL_LOG_FORMAT": "json",
    }
    flags = {name.removeprefix("PULLPOOL_").lower(): text for name, text in environ.items()}
    assert start(None, {}, server, environ) == start(None, flags, server, {}) == 0
    by_variable, by_flag = server.started
    assert by_variable == by_flag


def test_wrong_settings_never_reach_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Recorder()
    config = Path(write(tmp_path, "[cache]\nmax_size = 'x'"))
    assert start(config, {"listen": "5050", "max_connections": "no"}, server, {}) == 2
    assert server.started == []
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0].split(" ")[0] for line in lines] == [
        "listen", "max_connections", "cache.max_size",
    ]  # fmt: skip


def test_a_secret_that_is_not_there_stops_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Recorder()
    config = Path(write(tmp_path, "[upstreams.h]\nusername = 'u'\npassword_env = 'SECRET'"))
    assert start(config, {}, server, {}) == 2
    assert capsys.readouterr().err.startswith("upstreams.h.password_env: ")
    assert start(config, {}, server, {"SECRET": "p"}) == 0


def test_warnings_are_shown_before_the_server_starts(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"PULLPOOL_QUEUE_BLOB_DEADLINE": "10m", "PULLPOOL_LISTN": "x"}
    assert start(None, {}, Recorder(), environ) == 0
    blob, variable = capsys.readouterr().err.splitlines()
    assert blob.startswith("warning: queue.blob_deadline")
    assert variable.startswith("warning: PULLPOOL_LISTN")


def test_a_start_does_not_load_what_only_screens_need() -> None:
    """And what was kept from structlog is there for those who want it."""
    script = (
        "import sys, proxy.workers, proxy.config, structlog.dev\n"
        "assert structlog.dev.rich is None and 'rich' not in sys.modules\n"
        "import rich.console"
    )
    done = subprocess.run((sys.executable, "-c", script), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_garbage_is_collected_again_when_a_server_could_not_start(tmp_path: Path) -> None:
    assert gc.isenabled()
    result = invoke("serve", "--config", write(tmp_path, "nonsense = 1"))
    assert result.exit_code == 2
    assert gc.isenabled()


# --- healthcheck ------------------------------------------------------------------------------


def test_a_ready_server_is_healthy() -> None:
    with readiness(200, "ok") as address:
        result = invoke("healthcheck", "--admin", str(address))
    assert (result.exit_code, result.stdout) == (0, "ready\n")


def test_a_server_that_is_not_ready_is_not_healthy_and_says_why() -> None:
    with readiness(503, "draining") as address:
        result = invoke("healthcheck", env={"PULLPOOL_ADMIN": str(address)})
    assert (result.exit_code, result.stderr) == (1, "not ready: 503 draining\n")


def test_a_server_that_is_not_there_is_not_healthy() -> None:
    with readiness(200, "ok") as address:
        pass
    result = invoke("healthcheck", "--admin", str(address))
    assert result.exit_code == 1
    assert result.stderr.startswith("not ready: ")


def test_a_server_that_listens_everywhere_is_asked_on_this_machine() -> None:
    with readiness(200, "ok") as address:
        assert ask(HostPort("0.0.0.0", address.port), "/readyz", 5)[0] == 200


def test_the_address_is_found_in_the_servers_file(tmp_path: Path) -> None:
    with readiness(200, "ok") as address:
        config = write(tmp_path, f"admin = '{address}'")
        assert invoke("healthcheck", "--config", config).exit_code == 0
        assert invoke("healthcheck", env={"PULLPOOL_CONFIG": config}).exit_code == 0


@pytest.mark.parametrize(
    ("admin", "words"), [("127.0.0.1:0", "chosen by the system"), ("nowhere", "host:port")]
)
def test_an_address_that_cannot_be_asked_is_explained(admin: str, words: str) -> None:
    result = invoke("healthcheck", "--admin", admin)
    assert result.exit_code == 1
    assert words in result.stderr


# --- demo -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["0", "big"])
def test_a_demo_needs_layers_of_some_size(size: str) -> None:
    result = invoke("demo", "--layer-size", size)
    assert result.exit_code == 2
    assert "--layer-size" in result.stderr
