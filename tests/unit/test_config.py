"""The configuration: what is read from where, and what follows from it."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from proxy.config import (
    HostPort,
    Rate,
    Settings,
    json_schema,
    settings_table,
    unknown_variables,
)
from tests.unit.configs import HARBOR, load

# --- where values come from -------------------------------------------------------------------


def test_a_flag_beats_a_variable_and_a_variable_beats_the_file(tmp_path: Path) -> None:
    text = "max_connections = 1\nlog_level = 'debug'\n[cache]\nmax_size = 1\nmin_free = 1"
    environ = {"PULLPOOL_MAX_CONNECTIONS": "2", "PULLPOOL_CACHE_MAX_SIZE": "2KiB"}
    settings = load(tmp_path, text, environ, max_connections=3)
    assert settings.max_connections == 3
    assert settings.cache.max_size == 2048
    assert settings.cache.min_free == 1
    assert settings.log_level == "debug"


def test_every_key_outside_the_upstreams_has_a_variable(tmp_path: Path) -> None:
    default = load(tmp_path)
    values = {
        "size": "7KiB", "duration": "25s", "host:port": "[::1]:7", "true or false": "true",
        "path": "/seven", "list": '["seven"]', "URL": "https://docker.io", "text": "docker.io",
        "byte rate": "7KiB/s",
    }  # fmt: skip
    choices = {"log_level": "error", "log_format": "json", "cache.on_abandon": "cancel"}
    choices |= {"cache.durability": "file", "cache.prefetch": "manifest"}
    water = {"cache.low_water": "0.07", "cache.high_water": "0.97"}
    off = {"fast_transport": "false", "hot_path": "false", "proxy_from_env": "false"}
    networks = {"trusted_proxies": "10.0.0.0/8"}
    of_the_fleet = {"fleet.directory": "redis://redis", "fleet.secret": "7" * 16}
    of_the_fleet["fleet.advertise"] = "http://seven"
    variables = ("secret_env", "directory_password_env", "directory_sentinel_password_env")
    of_the_fleet |= {f"fleet.{key}": "SEVEN" for key in variables}
    fleet = {
        "PULLPOOL_FLEET_DIRECTORY": "rediss+sentinel://seven/fleet",
        "PULLPOOL_FLEET_LISTEN": "127.0.0.1:8",
        "PULLPOOL_FLEET_ADVERTISE": "http://eight",
    }
    for row in settings_table():
        if row.key.startswith("upstreams."):
            continue
        text = (choices | water | off | networks).get(row.key) or values.get(row.type, "7")
        variable = "PULLPOOL_" + row.key.replace(".", "_").upper()
        extra = {"PULLPOOL_UPSTREAMS": '{"docker.io": {}, "a": {}}'} if "default" in row.key else {}
        if row.key == "proxy_protocol":
            extra = {"PULLPOOL_TRUSTED_PROXIES": "10.0.0.0/8"}
        if row.key.startswith("tls."):
            extra = {"PULLPOOL_TLS_CERT_FILE": "/cert", "PULLPOOL_TLS_KEY_FILE": "/key"}
        if row.key.startswith("fleet."):
            text = of_the_fleet.get(row.key, text)
            extra = {**fleet}
            if row.key in ("fleet.ca_file", "fleet.cert_file", "fleet.key_file"):
                extra |= {f"PULLPOOL_FLEET_{one}_FILE": "/it" for one in ("CA", "CERT", "KEY")}
                extra["PULLPOOL_FLEET_ADVERTISE"] = "https://eight"
            if row.key in ("fleet.directory_cert_file", "fleet.directory_key_file"):
                extra["PULLPOOL_FLEET_DIRECTORY_CERT_FILE"] = "/cert"
                extra["PULLPOOL_FLEET_DIRECTORY_KEY_FILE"] = "/key"
            if row.key == "fleet.directory_username":
                extra["PULLPOOL_FLEET_DIRECTORY_PASSWORD"] = "password"
            if row.key == "fleet.directory_sentinel_username":
                extra["PULLPOOL_FLEET_DIRECTORY_SENTINEL_PASSWORD"] = "password"
            extra.pop(variable, None)
        settings = load(tmp_path, "", {variable: text, **extra})
        assert settings != default, variable


def test_a_variable_may_be_named_after_its_flag(tmp_path: Path) -> None:
    assert load(tmp_path, "", {"PULLPOOL_CACHE_SIZE": "3MiB"}).cache.max_size == 3 << 20


def test_an_empty_variable_counts_as_none(tmp_path: Path) -> None:
    environ = {"PULLPOOL_LISTEN": "", "PULLPOOL_CACHE_DIR": "", "PULLPOOL_UPSTREAM_URL": ""}
    assert load(tmp_path, "", environ) == load(tmp_path)


def test_the_variables_that_kubernetes_sets_beside_a_service_are_no_settings(
    tmp_path: Path,
) -> None:
    environ = {
        "PULLPOOL_PORT": "tcp://10.0.0.1:5050",
        "PULLPOOL_SERVICE_HOST": "10.0.0.1",
        "PULLPOOL_CACHE_SERVICE_HOST": "10.0.0.2",
        "PULLPOOL_CACHE_PORT_5050_TCP": "tcp://10.0.0.2:5050",
    }
    assert load(tmp_path, "", environ) == load(tmp_path)
    assert unknown_variables(environ) == []


def test_a_misspelt_variable_is_named() -> None:
    (text,) = unknown_variables({"PULLPOOL_MAX_CONECTIONS": "1", "PULLPOOL_CONFIG": "x"})
    assert text.startswith("PULLPOOL_MAX_CONECTIONS")
    assert "PULLPOOL_MAX_CONNECTIONS" in text


def test_upstreams_can_come_from_a_variable_as_json(tmp_path: Path) -> None:
    environ = {"PULLPOOL_UPSTREAMS": '{"harbor": {"url": "http://h:1", "rate": "5/s"}}'}
    (upstream,) = load(tmp_path, "", environ).upstreams.values()
    assert (upstream.url, upstream.rate) == ("http://h:1", Rate(5, 1))


def test_trusted_proxies_are_networks_or_addresses(tmp_path: Path) -> None:
    settings = load(tmp_path, "trusted_proxies = ['10.0.0.0/8', 'fd00::/8', '192.0.2.7']")
    found = [str(network) for network in settings.trusted_proxies]
    assert found == ["10.0.0.0/8", "fd00::/8", "192.0.2.7/32"]
    for text in ("10.0.0.0/8", '["10.0.0.0/8"]'):
        settings = load(tmp_path, "", {"PULLPOOL_TRUSTED_PROXIES": text})
        assert [str(network) for network in settings.trusted_proxies] == ["10.0.0.0/8"]


def test_one_pattern_of_immutable_tags_needs_no_json_in_its_variable(tmp_path: Path) -> None:
    settings = load(tmp_path, "", {"PULLPOOL_TAGS_IMMUTABLE": r"v\d{1,3}"})
    assert [pattern.pattern for pattern in settings.tags.immutable] == [r"v\d{1,3}"]


def test_the_cache_is_in_the_users_cache_directory(tmp_path: Path) -> None:
    home = {"HOME": "/home/ann"}
    assert load(tmp_path, "", home).cache.dir == Path("/home/ann/.cache/pullpool")
    xdg = {**home, "XDG_CACHE_HOME": "/fast"}
    assert load(tmp_path, "", xdg).cache.dir == Path("/fast/pullpool")
    relative = {**home, "XDG_CACHE_HOME": "not/absolute"}
    assert load(tmp_path, "", relative).cache.dir == Path("/home/ann/.cache/pullpool")


def test_settings_built_in_code_read_nothing_but_their_arguments() -> None:
    assert Settings(max_connections=3).max_connections == 3
    assert Settings().listen == HostPort("127.0.0.1", 5050)


def test_settings_are_frozen_at_every_level(tmp_path: Path) -> None:
    settings = load(tmp_path)
    with pytest.raises(ValidationError):
        settings.max_connections = 1
    with pytest.raises(ValidationError):
        settings.cache.max_size = 1
    with pytest.raises(ValidationError):
        settings.upstreams["quay.io"].library = True


# --- which upstreams there are ----------------------------------------------------------------


def test_without_any_upstream_the_public_registries_are_served(tmp_path: Path) -> None:
    settings = load(tmp_path)
    assert settings.default_upstream == "docker.io"
    assert {"docker.io", "quay.io", "ghcr.io", "registry.k8s.io"} <= set(settings.upstreams)
    docker = settings.upstreams["docker.io"]
    assert docker.url == "https://registry-1.docker.io"
    assert docker.aliases == ("index.docker.io", "registry-1.docker.io")
    assert docker.library
    assert docker.access == "public"
    assert settings.upstreams["quay.io"].url == "https://quay.io"


def test_an_upstream_url_answers_at_the_root_under_its_host(tmp_path: Path) -> None:
    settings = load(tmp_path, upstream_url="http://127.0.0.1:5000/")
    assert settings.default_upstream == "127.0.0.1:5000"
    assert {name: one.url for name, one in settings.upstreams.items()} == {
        "127.0.0.1:5000": "http://127.0.0.1:5000"
    }


def test_an_upstream_url_joins_those_of_the_file(tmp_path: Path) -> None:
    text = "default_upstream = 'quay.io'\n[upstreams.'quay.io']"
    settings = load(tmp_path, text, upstream_url="https://harbor.example.com")
    assert settings.default_upstream == "harbor.example.com"
    assert set(settings.upstreams) == {"quay.io", "harbor.example.com"}


def test_an_upstream_url_that_the_file_has_already_keeps_its_settings(tmp_path: Path) -> None:
    text = """
        [upstreams.harbor]
        url = "https://harbor.example.com/"
        max_connections = 3
        [upstreams."docker.io"]
        rate = "1/s"
    """
    settings = load(tmp_path, text, upstream_url="https://harbor.example.com")
    assert settings.default_upstream == "harbor"
    assert settings.upstreams["harbor"].max_connections == 3
    hub = load(tmp_path, text, upstream_url="https://registry-1.docker.io")
    assert hub.default_upstream == "docker.io"


def test_a_registry_that_is_known_by_name_brings_what_is_known_of_it(tmp_path: Path) -> None:
    settings = load(tmp_path, "[upstreams.'docker.io']\nmax_connections = 2")
    docker = settings.upstreams["docker.io"]
    assert (docker.url, docker.max_connections) == ("https://registry-1.docker.io", 2)
    assert docker.auth_realms == ("auth.docker.io",)


def test_a_mirror_of_a_known_registry_keeps_its_names_but_not_its_token_service(
    tmp_path: Path,
) -> None:
    text = """
        [upstreams."docker.io"]
        url = "https://harbor.example.com"
        repository_prefix = "dockerhub-proxy"
    """
    docker = load(tmp_path, text).upstreams["docker.io"]
    assert docker.url == "https://harbor.example.com"
    assert docker.repository_prefix == "dockerhub-proxy/"
    assert docker.library
    assert docker.auth_realms == ()


def test_the_only_upstream_is_the_default_and_of_several_none_is(tmp_path: Path) -> None:
    one = load(tmp_path, f"[{HARBOR}]")
    assert one.default_upstream == "harbor.example.com"
    two = load(tmp_path, f"[{HARBOR}]\n[upstreams.'quay.io']")
    assert two.default_upstream is None
    assert any("default_upstream" in text for text in two.warnings())


def test_what_an_upstream_leaves_out_follows_from_the_rest(tmp_path: Path) -> None:
    text = """
        max_connections = 8
        [upstreams."a.example.com"]
        [upstreams."b.example.com"]
        max_connections = 5
        username = "robot$pull"
        password = "secret"
        [upstreams."c.example.com"]
        max_redirect_connections = 7
        docker_config = "~/config.json"
        access = "public"
    """
    a, b, c = load(tmp_path, text).upstreams.values()
    assert (a.url, a.max_connections, a.max_redirect_connections) == (
        "https://a.example.com", 8, 32,
    )  # fmt: skip
    assert (b.max_connections, b.max_redirect_connections) == (5, 20)
    assert (c.max_connections, c.max_redirect_connections) == (8, 7)
    assert (a.access, b.access, c.access) == ("public", "shared", "public")
    assert c.docker_config == Path("~/config.json").expanduser()


def test_the_whole_of_a_real_file_is_read(tmp_path: Path) -> None:
    text = """
        listen = "0.0.0.0:5050"
        admin = "127.0.0.1:5051"
        default_upstream = "harbor.example.com"
        allow_anonymous = true
        shutdown_grace = "10s"
        [cache]
        dir = "/var/lib/pullpool"
        max_size = "50GiB"
        on_abandon = "cancel"
        [queue]
        header_deadline = "20s"
        blob_deadline = "180s"
        [tags]
        immutable = ['v\\d+']
        [upstreams."harbor.example.com"]
        url = "https://harbor.example.com"
        max_connections = 16
        rate = "100/s"
        username = "robot$pull"
        password_env = "HARBOR_PASSWORD"
        repository_prefix = ""
        overload = "spill"
    """
    settings = load(tmp_path, text)
    assert settings.warnings() == []
    assert settings.cache.dir == Path("/var/lib/pullpool")
    assert settings.shutdown_grace == 10
    assert settings.tags.immutable[0].fullmatch("v12")
    assert settings.upstreams["harbor.example.com"].rate == Rate(100, 1)


# --- what is told about the settings ----------------------------------------------------------


def test_every_setting_is_described() -> None:
    rows = settings_table()
    assert all(row.meaning.endswith(".") and row.type and row.default for row in rows)
    by_key = {row.key: row for row in rows}
    assert len(by_key) == len(rows)
    assert (by_key["cache.max_size"].type, by_key["cache.max_size"].default) == ("size", "50GiB")
    assert by_key["tags.stale_if_error"].default == "24h"
    assert by_key["upstreams.NAME.url"].default == "https://NAME"
    assert by_key["upstreams.NAME.access"].type == "public or shared or passthrough"


SECTIONS = ("cache", "queue", "tags", "tls", "auth", "fleet")


def test_the_schema_names_every_key_and_no_default_that_the_file_could_not_hold() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["properties"]["listen"]["default"] == "127.0.0.1:5050"
    assert schema["additionalProperties"] is False
    tables = {"": schema["properties"]}
    for section in SECTIONS:
        tables[f"{section}."] = schema["$defs"][section.capitalize()]["properties"]
    tables["upstreams.NAME."] = schema["$defs"]["Upstream"]["properties"]
    named = {prefix + key for prefix, table in tables.items() for key in table}
    assert {row.key for row in settings_table()} == named - {*SECTIONS, "upstreams"}
