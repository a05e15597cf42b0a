"""What a configuration may not hold: every fault at its key, and no secret in any message."""

import re
from pathlib import Path

import pytest
import trustme

from proxy.config import ConfigError, load_settings, load_usable
from tests.unit.configs import HARBOR, faults, load, write

# --- what is refused --------------------------------------------------------------------------


def test_every_fault_is_reported_at_once_with_its_key(tmp_path: Path) -> None:
    text = """
        listen = "0.0.0.0"
        default_upstream = "harbr"
        [cache]
        max_size = "50 apples"
        high_water = 0.5
        [tags]
        immutable = ["v.*", "("]
        [upstreams.harbor]
        rate = "fast"
        username = "x"
        password = "p"
        password_env = "X"
        [upstreams."b.example.com"]
        access = "passthrough"
        max_connections = true
    """
    environ = {"PULLPOOL_QUEUE_MAX_WAITING": "many"}
    found = faults(tmp_path, text, environ, log_format="xml")
    assert set(found) == {
        "listen",
        "log_format",
        "default_upstream",
        "cache.max_size",
        "cache.low_water",
        "queue.max_waiting",
        "tags.immutable[1]",
        "upstreams.harbor.rate",
        "upstreams.harbor.password_env",
        'upstreams."b.example.com".access',
        'upstreams."b.example.com".max_connections',
    }
    assert "'harbor'" in found["default_upstream"].message
    assert found["cache.max_size"].got == "'50 apples'"
    assert found["queue.max_waiting"].source == "PULLPOOL_QUEUE_MAX_WAITING"
    assert found["log_format"].source == "the command line"
    assert str(found["upstreams.harbor.rate"]) == (
        "upstreams.harbor.rate: must be a rate such as '100/s', '600/m' or '100/6h', got 'fast'"
    )


@pytest.mark.parametrize(
    ("text", "path", "near"),
    [
        ("lisen = '127.0.0.1:1'", "lisen", "listen"),
        ("[cache]\nmaxsize = 1", "cache.maxsize", "max_size"),
        ("[upstreams.harbor]\nmax_conections = 1", "upstreams.harbor.max_conections", "max_conn"),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(
    tmp_path: Path, text: str, path: str, near: str
) -> None:
    found = faults(tmp_path, text)
    assert set(found) == {path}
    assert f"did you mean '{near}" in found[path].message


def test_an_unknown_key_that_resembles_none_is_just_refused(tmp_path: Path) -> None:
    assert faults(tmp_path, "zzz = 1")["zzz"].message == "is not a known key"


def test_a_syntax_error_is_reported_with_line_and_column(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, "listen = '127.0.0.1:1'\nmax_connections 3\n").values()
    assert fault.path.endswith("pullpool.toml")
    assert re.search(r"line 2, column \d+", fault.message)


def test_a_file_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.toml", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ConfigError, match=words):
            load_settings(path, {}, {})
    (tmp_path / "latin.toml").write_bytes(b"log_level = '\xe9'")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_settings(tmp_path / "latin.toml", {}, {})


@pytest.mark.parametrize(
    ("keys", "path", "words"),
    [
        ("password = 'p'", "password", "username"),
        ("password_file = '/p'", "password_file", "username"),
        ("username = 'u'", "username", "password"),
        ("username = 'u'\npassword = ''", "password", "must not be empty"),
        ("username = ''\npassword = 'p'", "username", "must not be empty"),
        ("username = 'a:b'\npassword = 'p'", "username", "colon"),
        ('username = "a\\u0007"\npassword = "p"', "username", "control"),
        ('username = "a"\npassword = "p\\n"', "password", "control"),
        ('ca_file = "/a\\u0000b"', "ca_file", "NUL"),
        ("proxy = 'http://p:0'", "proxy", "port 0"),
        ("proxy = 'http://u:x@[::1'", "proxy", "URL of a proxy, such as"),
        ("url = 'https://h:0'", "url", "port 0"),
        ("stall_time = '999ms'", "stall_time", "at least 1s"),
        ("stall_time = 0", "stall_time", "at least 1s"),
        ("stall_rate = '10241KiB/s'", "stall_rate", "at most 10MiB/s"),
        ("stall_rate = '1MiB/s'\nmax_rate = '2047KiB/s'", "stall_rate", "max_rate (2047KiB/s)"),
        ("username = 'u'\npassword = 'p'\ndocker_config = '/c'", "docker_config", "only one"),
        ("username = 'u'\ncredential_helper = 'x'", "username", "leave it out"),
        ("credential_helper = '../x'", "credential_helper", "docker-credential"),
        ("password_env = 'A B'", "password_env", "variable"),
        ("access = 'passthrough'", "access", "not available yet"),
        ("url = 'https://u:p@h'", "url", "user name"),
        ("aliases = ['Upper.example.com']", "aliases[0]", "lower case"),
        ("aliases = 'a'", "aliases", "list"),
        ("repository_prefix = '/x'", "repository_prefix", "beginning"),
        ("read_timeout = '0s'", "read_timeout", "greater than 0"),
        ("library = 'perhaps'", "library", "true or false"),
    ],
)
def test_a_wrong_upstream_is_refused(tmp_path: Path, keys: str, path: str, words: str) -> None:
    found = faults(tmp_path, f"[upstreams.harbor]\n{keys}")
    assert set(found) == {f"upstreams.harbor.{path}"}
    assert words in found[f"upstreams.harbor.{path}"].message


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("[queue]\nheader_deadline = 200", "queue.header_deadline", "blob_deadline (3m)"),
        ("[cache]\nlow_water = 0.95", "cache.low_water", "high_water"),
        ("[cache]\nhigh_water = 1.5", "cache.high_water", "less than or equal to 1"),
        ("[cache]\nhigh_water = true", "cache.high_water", "number"),
        ("cache = 3", "cache", "table"),
        ('[cache]\ndir = "/c\\u0000"', "cache.dir", "NUL"),
        ("[upstreams]\nharbor = 'https://h'", "upstreams.harbor", "table"),
        ("[upstreams.'Harbor']", "upstreams.Harbor", "lower case"),
        ("[upstreams.'a b']", 'upstreams."a b"', "lower case"),
        ("[upstreams.'h:99999']", 'upstreams."h:99999"', "needs url"),
        ("default_upstream = 'nowhere'", "default_upstream", "not one of upstreams"),
        ("max_connections = 0", "max_connections", "greater than or equal to 1"),
        ("max_connections = 1.5", "max_connections", "whole number"),
        ("admin = '127.0.0.1:5050'", "admin", "same address"),
        ("trusted_proxies = '10.0.0.0/8'", "trusted_proxies", "list"),
        ("trusted_proxies = ['10.0.0.0/33']", "trusted_proxies[0]", "network such as"),
        ("trusted_proxies = ['10.0.0.1/8']", "trusted_proxies[0]", "'10.0.0.0/8'"),
        ("trusted_proxies = [10]", "trusted_proxies[0]", "network such as"),
        ("proxy_protocol = true", "proxy_protocol", "trusted_proxies"),
        ("[tls]\ncert_file = '/c'", "tls.cert_file", "key_file"),
        ("[tls]\nkey_file = '/k'", "tls.key_file", "cert_file"),
        ("[tls]\nclient_ca_file = '/a'", "tls.client_ca_file", "cert_file and key_file"),
        ("upstream_url = 'harbor.example.com'", "upstream_url", "https://"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, text: str, path: str, words: str) -> None:
    found = faults(tmp_path, text)
    assert set(found) == {path}
    assert words in found[path].message


def test_a_name_belongs_to_one_upstream(tmp_path: Path) -> None:
    text = "[upstreams.a]\naliases = ['c', 'b']\n[upstreams.b]\naliases = ['c']"
    found = faults(tmp_path, text)
    assert set(found) == {"upstreams.a.aliases", "upstreams.b.aliases"}


def test_upstreams_at_one_address_have_one_cap(tmp_path: Path) -> None:
    text = """
        [upstreams.a]
        url = "https://h/one"
        max_connections = 3
        [upstreams.b]
        url = "https://h:443/two"
    """
    found = faults(tmp_path, text)
    assert set(found) == {"upstreams.b.max_connections"}
    assert "must be 3, as 'a'" in found["upstreams.b.max_connections"].message


CREDENTIALS = f"[{HARBOR}]\nusername = 'u'\npassword = 'p'"


@pytest.mark.parametrize(
    ("listen", "extra", "accepted"),
    [
        ("127.0.0.1:5050", "", True),
        ("[::1]:5050", "", True),
        ("0.0.0.0:5050", "", False),
        ("10.0.0.1:5050", "access = 'shared'", False),
        ("0.0.0.0:5050", "access = 'public'", True),
    ],
)
def test_credentials_are_not_lent_to_strangers_by_accident(
    tmp_path: Path, listen: str, extra: str, accepted: bool
) -> None:
    text = f"listen = '{listen}'\n{CREDENTIALS}\n{extra}"
    if accepted:
        load(tmp_path, text)
        return
    found = faults(tmp_path, text)
    assert set(found) == {f"{HARBOR}.access"}
    assert "allow_anonymous = true" in found[f"{HARBOR}.access"].message
    load(tmp_path, f"allow_anonymous = true\n{text}")
    tls = "cert_file = '/c'\nkey_file = '/k'"
    assert set(faults(tmp_path, f"{text}\n[tls]\n{tls}")) == {f"{HARBOR}.access"}
    load(tmp_path, f"{text}\n[tls]\n{tls}\nclient_ca_file = '/a'")
    load(tmp_path, f"{text}\n[auth]\nhtpasswd_file = '/h'")


def test_a_rule_is_silent_about_keys_that_are_wrong_themselves(tmp_path: Path) -> None:
    text = f"listen = '0.0.0.0:5050'\nallow_anonymous = 'maybe'\n{CREDENTIALS}"
    assert set(faults(tmp_path, text)) == {"allow_anonymous"}


def test_long_waits_are_allowed_with_a_warning(tmp_path: Path) -> None:
    text = "[queue]\nblob_deadline = '271s'\nheader_deadline = '31s'\nmanifest_deadline = '1m'"
    warned = [text.split(":")[0] for text in load(tmp_path, text).warnings()]
    assert warned == ["queue.header_deadline", "queue.manifest_deadline", "queue.blob_deadline"]
    assert load(tmp_path, "[queue]\nblob_deadline = '270s'").warnings() == []


def test_credentials_over_http_are_allowed_with_a_warning(tmp_path: Path) -> None:
    settings = load(tmp_path, f"{CREDENTIALS}\nurl = 'http://harbor.example.com'")
    assert [text.split(":")[0] for text in settings.warnings()] == [f"{HARBOR}.url"]


def test_files_and_variables_that_are_named_have_to_be_there(tmp_path: Path) -> None:
    text = f"""
        [{HARBOR}]
        username = "u"
        password_env = "HARBOR_PASSWORD"
        ca_file = "{tmp_path}/ca.pem"
        [upstreams.other]
        docker_config = "{tmp_path}"
    """
    settings = load(tmp_path, text)
    paths = {fault.path for fault in settings.missing({})}
    assert paths == {f"{HARBOR}.password_env", f"{HARBOR}.ca_file", "upstreams.other.docker_config"}
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    (left,) = settings.missing({"HARBOR_PASSWORD": "p"})
    assert left.path == "upstreams.other.docker_config"


def test_the_slowest_that_an_answer_may_be_is_well_below_what_all_may_have(tmp_path: Path) -> None:
    keys = "stall_time = '1s'\nstall_rate = '10MiB/s'\nmax_rate = '20MiB/s'"
    load(tmp_path, f"[{HARBOR}]\n{keys}")
    load(tmp_path, f"[{HARBOR}]\nmax_rate = '1B/s'")  # the default is not in its way


def test_the_pem_files_of_an_upstream_have_to_be_some(tmp_path: Path) -> None:
    ca, cert, key = (tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem"))
    text = f"""
        [{HARBOR}]
        ca_file = "{ca}"
        client_cert_file = "{cert}"
        client_key_file = "{key}"
    """
    for file in (ca, cert, key):
        file.write_text("root:x:0:0:root:/root:/bin/sh\n")
    settings = load(tmp_path, text)
    assert {str(fault) for fault in settings.missing({})} == {
        f"{HARBOR}.ca_file: {ca}: no certificate or crl found",
        f"{HARBOR}.client_cert_file: {cert} with {key}: no PEM, or of something else",
    }
    authority = trustme.CA()
    authority.cert_pem.write_to_path(ca)
    issued = authority.issue_cert("node.example.com")
    issued.cert_chain_pems[0].write_to_path(cert)
    authority.issue_cert("node.example.com").private_key_pem.write_to_path(key)
    (fault,) = settings.missing({})
    assert str(fault) == f"{HARBOR}.client_cert_file: {cert} with {key}: key values mismatch"
    issued.private_key_pem.write_to_path(key)
    assert settings.missing({}) == []


# --- faults of several kinds ------------------------------------------------------------------


def all_faults(directory: Path, text: str, environ: dict[str, str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_usable(write(directory, text), {}, environ)
    return [fault.path for fault in caught.value.faults]


def test_wrong_keys_rules_files_and_variables_are_told_together(tmp_path: Path) -> None:
    text = f"""
        log_format = "xml"
        default_upstream = "nowhere"
        [tls]
        cert_file = "/nowhere/c"
        [auth]
        htpasswd_file = "/nowhere/h"
        [{HARBOR}]
        rate = "x"
        ca_file = "/nowhere/a"
        [upstreams.other]
        proxy = "http://p:1"
        client_cert_file = "/nowhere/n"
    """
    assert all_faults(tmp_path, text, {"HTTPS_PROXY": "socks5://p", "NO_PROXY": "a b"}) == [
        "log_format",
        f"{HARBOR}.rate",
        "tls.cert_file",
        "upstreams.other.client_cert_file",
        "default_upstream",
        "tls.cert_file",
        "auth.htpasswd_file",
        f"{HARBOR}.ca_file",
        "upstreams.other.client_cert_file",
        "HTTPS_PROXY",
        "NO_PROXY",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("proxy_from_env = 'x'", ["proxy_from_env"]),
        ("upstreams = 'x'", ["upstreams"]),
        ("[upstreams.h]\nproxy = 'socks5://x'", ["upstreams.h.proxy"]),
        ("proxy_from_env = false\nlog_format = 'x'", ["log_format"]),
        ("[upstreams.h]\nproxy = 'http://p:1'\nrate = 'x'", ["upstreams.h.rate"]),
        ("log_format = 'x'", ["log_format", "HTTPS_PROXY"]),
        (
            "[upstreams.h]\nproxy = 'socks5://x'\n[upstreams.g]",
            ["upstreams.h.proxy", "HTTPS_PROXY"],
        ),
    ],
)
def test_what_may_follow_from_a_wrong_key_alone_is_not_told(
    tmp_path: Path, text: str, told: list[str]
) -> None:
    assert all_faults(tmp_path, text, {"HTTPS_PROXY": "socks5://p"}) == told


def test_what_cannot_be_read_at_all_is_told_alone(tmp_path: Path) -> None:
    (path,) = all_faults(tmp_path, "listen", {"HTTPS_PROXY": "socks5://p"})
    assert path.endswith("pullpool.toml")


def test_what_is_right_is_loaded(tmp_path: Path) -> None:
    assert load_usable(write(tmp_path, "max_connections = 3"), {}, {}).max_connections == 3


def test_a_certificate_has_to_go_with_its_key(tmp_path: Path) -> None:
    ca = trustme.CA()
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    settings = load(tmp_path, f"[tls]\ncert_file = '{cert}'\nkey_file = '{key}'")
    assert {fault.path for fault in settings.missing({})} == {"tls.cert_file", "tls.key_file"}
    issued = ca.issue_cert("pullpool.example.com")
    issued.cert_chain_pems[0].write_to_path(cert)
    ca.issue_cert("pullpool.example.com").private_key_pem.write_to_path(key)
    (fault,) = settings.missing({})
    assert str(fault) == f"tls: {cert} with {key}: key values mismatch"
    issued.private_key_pem.write_to_path(key)
    assert settings.missing({}) == []


def test_an_htpasswd_file_has_to_hold_bcrypt(tmp_path: Path) -> None:
    file = tmp_path / "htpasswd"
    settings = load(tmp_path, f"[auth]\nhtpasswd_file = '{file}'")
    assert [fault.path for fault in settings.missing({})] == ["auth.htpasswd_file"]
    file.write_text("anna:{SHA}hunter2\n")
    (fault,) = settings.missing({})
    assert (
        str(fault)
        == f"auth.htpasswd_file: {file}: line 1 does not hold a bcrypt hash (htpasswd -B)"
    )
    file.write_text(f"anna:$2y$05${'.' * 53}\n")
    assert settings.missing({}) == []


def test_passwords_of_clients_over_http_are_allowed_with_a_warning(tmp_path: Path) -> None:
    text = "[auth]\nhtpasswd_file = '/h'"
    assert load(tmp_path, text).warnings() == []
    settings = load(tmp_path, f"listen = '0.0.0.0:5050'\n{text}")
    assert [one.split(":")[0] for one in settings.warnings()] == ["auth.htpasswd_file"]


# --- secrets ----------------------------------------------------------------------------------


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    settings = load(tmp_path, f"[{HARBOR}]\nusername = 'u'\npassword = 'hunter2'")
    password = settings.upstreams["harbor.example.com"].password
    assert password is not None
    assert password.get_secret_value() == "hunter2"
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump_json()}"


@pytest.mark.parametrize(
    "text",
    [
        "[upstreams.h]\npasswrod = 'hunter2'",
        "[upstreams.h]\npassword = ['hunter2']",
        "[upstreams.h]\npassword_env = 'hunter2!'",
        "[upstreams.h]\npassword = {is = 'hunter2'}",
        "[upstreams.h]\nurl = 'https://u:hunter2@h'",
        "[upstreams.h]\nurl = 'https://u:hunt/hunter2@h'",
        "[upstreams.h]\nurl = 'u:hunter2@h'",
        "[upstreams.h]\nurl = 'https://h/?token=hunter2'",
        "[upstreams.h]\nusername = 'u'\npassword = 'hunter2'\npassword_file = '/x'",
        "upstreams = 'hunter2'",
        "upstreams = ['hunter2']",
        "upstream_url = 'https://u:hunter2@h'",
    ],
)
def test_a_fault_never_shows_what_may_be_a_secret(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert "hunter2" not in str(caught.value)


def test_a_broken_variable_with_secrets_is_not_shown(tmp_path: Path) -> None:
    found = faults(tmp_path, "", {"PULLPOOL_UPSTREAMS": '{"h": {"password": "hunter2"}'})
    assert "JSON object" in found["upstreams"].message
    assert "hunter2" not in str(found["upstreams"])
