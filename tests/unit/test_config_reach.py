"""The keys that say how upstreams are reached: proxy, certificates, further URLs, near hosts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from proxy.cli.check import check_config
from proxy.config import json_schema
from tests.unit.configs import faults, load

KEY = 'upstreams."harbor.example.com".'


def harbor(keys: str) -> str:
    return f'[upstreams."harbor.example.com"]\n{keys}'


def test_all_of_it_is_read(tmp_path: Path) -> None:
    text = harbor(
        """
        fallback_urls = ["https://Mirror.example.com/", "http://[fd00::1]:5000"]
        proxy = "http://us%40er:p%3Aw@proxy:3128"
        no_proxy = [".corp.example.com", "10.0.0.0/8", "mirror.example.com:8443"]
        redirect_hosts = ["minio:9000", "10.0.0.0/8"]
        client_cert_file = "/c"
        client_key_file = "/k"
        """
    )
    upstream = load(tmp_path, text).upstreams["harbor.example.com"]
    assert upstream.urls == (
        "https://harbor.example.com",
        "https://mirror.example.com",
        "http://[fd00::1]:5000",
    )
    assert upstream.proxy is not None
    assert (upstream.proxy.url, str(upstream.proxy)) == (
        "http://proxy:3128",
        "http://***@proxy:3128",
    )
    assert [str(one) for one in upstream.no_proxy][2] == "mirror.example.com:8443"
    assert [str(one) for one in upstream.redirect_hosts] == ["minio:9000", "10.0.0.0/8"]
    shown = repr(upstream) + upstream.model_dump_json()
    assert "p%3Aw" not in shown
    assert "p:w" not in shown
    assert "dXNA" not in shown  # nor in base 64


@pytest.mark.parametrize(
    ("keys", "path", "words"),
    [
        ("proxy = 'socks5://u:s3cret@p:1080'", "proxy", "http://"),
        ("proxy = 's3cret'\nread_timeout = 0", "read_timeout", "greater than 0"),
        ("proxy = 'http://s3cret word'", "proxy", "URL of a proxy"),
        ("no_proxy = ['http://a']", "no_proxy[0]", "a host"),
        ("redirect_hosts = ['a/b']", "redirect_hosts[0]", "a host"),
        ("fallback_urls = ['ftp://a']", "fallback_urls[0]", "https://"),
        ("fallback_urls = ['https://u:s3cret@a']", "fallback_urls[0]", "user name"),
        ("fallback_urls = ['https://a', 'https://a/']", "fallback_urls[1]", "already"),
        ("fallback_urls = ['https://harbor.example.com']", "fallback_urls[0]", "already"),
        ("client_cert_file = '/c'", "client_cert_file", "client_key_file"),
        ("client_key_file = '/c'", "client_key_file", "client_cert_file"),
    ],
)
def test_what_is_wrong_is_said_at_its_key(tmp_path: Path, keys: str, path: str, words: str) -> None:
    found = faults(tmp_path, harbor(keys))
    assert set(found) == {KEY + path}
    assert words in found[KEY + path].message
    assert "s3cret" not in str(found[KEY + path])


@pytest.mark.parametrize(
    ("ours", "key"),
    [
        ("max_connections = 3", "max_connections"),
        ("proxy = 'http://user:s3cret@p:1'", "proxy"),
        ("client_cert_file = '/c'\nclient_key_file = '/k'", "client_cert_file"),
    ],
)
def test_upstreams_at_one_address_agree_on_what_belongs_to_its_sockets(
    tmp_path: Path, ours: str, key: str
) -> None:
    text = f"""
        [upstreams."a.example.com"]
        fallback_urls = ["https://shared.example.com"]
        [upstreams."b.example.com"]
        url = "https://shared.example.com/base"
        {ours}
    """
    found = faults(tmp_path, text)
    assert f'upstreams."b.example.com".{key}' in found
    assert "'a.example.com'" in str(found[f'upstreams."b.example.com".{key}'])
    assert "s3cret" not in str(found)


def test_files_that_are_not_there_and_variables_that_are_no_use_are_missing(
    tmp_path: Path,
) -> None:
    settings = load(tmp_path, harbor("client_cert_file = '/no/c'\nclient_key_file = '/no/k'"))
    environ = {"HTTPS_PROXY": "socks5://u:s3cret@p:1", "NO_PROXY": "a b"}
    found = settings.missing(environ)
    assert [fault.path for fault in found] == [
        f"{KEY}client_cert_file",
        f"{KEY}client_key_file",
        "HTTPS_PROXY",
        "NO_PROXY",
    ]
    assert "s3cret" not in str(found)
    off = load(tmp_path, "proxy_from_env = false\n" + harbor(""))
    assert off.missing(environ) == []
    own = load(tmp_path, harbor("proxy = 'http://p:1'"))
    assert own.missing(environ) == []


def test_check_config_tells_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "pullpool.toml"
    file.write_text(harbor(""))
    result = CliRunner().invoke(
        check_config, [str(file)], env={"HTTPS_PROXY": "socks5://u:s3cret@p:1"}
    )
    assert result.exit_code == 1
    assert "HTTPS_PROXY" in result.output
    assert "s3cret" not in result.output


def test_credentials_over_plain_http_to_a_mirror_are_warned_of(tmp_path: Path) -> None:
    text = harbor("fallback_urls = ['http://m']\nusername = 'u'\npassword = 'p'")
    [warning] = [one for one in load(tmp_path, text).warnings() if "credentials go" in one]
    assert warning.startswith(f"{KEY}fallback_urls")


def test_the_schema_knows_the_keys() -> None:
    text = json.dumps(json_schema())
    for key in ("fallback_urls", "proxy", "no_proxy", "redirect_hosts", "client_cert_file"):
        assert f'"{key}"' in text
