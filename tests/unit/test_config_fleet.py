"""[fleet] in the configuration: where the directory is, and every way to have it wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from proxy.config import ConfigError, load_usable
from proxy.fleet.place import Address, Place
from tests.unit.configs import faults, load, write

BASE = {
    "directory": "redis://redis:6379/0",
    "listen": "0.0.0.0:5052",
    "advertise": "http://10.0.0.7:5052",
    "secret": "0123456789abcdef",
}
SENTINELS = "redis+sentinel://s1,s2/fleet"


def fleet(**changes: object) -> str:
    """A [fleet] that is right but for `changes`; None takes a key out."""
    keys = {**BASE, **changes}
    lines = [f'{key} = "{value}"' for key, value in keys.items() if value is not None]
    return "\n".join(["[fleet]", *lines, ""])


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://redis", Place("server", False, (Address("redis", 6379),))),
        ("rediss://[::1]:7000/3", Place("server", True, (Address("::1", 7000),), database=3)),
        (
            "redis+sentinel://s1,s2:26380/fleet/2",
            Place("sentinel", False, (Address("s1", 26379), Address("s2", 26380)), "fleet", 2),
        ),
        ("redis+sentinel://s1/fleet", Place("sentinel", False, (Address("s1", 26379),), "fleet")),
        (
            "rediss+cluster://a:1,10.0.0.2",
            Place("cluster", True, (Address("a", 1), Address("10.0.0.2", 6379))),
        ),
    ],
)
def test_a_directory_is_known_by_its_url(url: str, place: Place) -> None:
    assert Place.parse(url) == place
    assert Place.parse(str(place)) == place


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://redis:6379", "must be the URL of a Redis"),
        ("redis+tls://redis:6379", "must be the URL of a Redis"),
        ("redis:6379", "must be the URL of a Redis"),
        ("redis://redis/0?timeout=3", "must be the URL of a Redis"),
        ("redis://:secret@redis/0", "keys of their own"),
        ("redis://a,b/0", "must name one server"),
        ("redis://redis:0", "ports between 1 and 65535"),
        ("redis://redis:99999", "ports between 1 and 65535"),
        ("redis://redis:", "ports between 1 and 65535"),
        ("redis://", "must name hosts"),
        ("redis://::1", "must name hosts"),
        ("redis+sentinel://s1,,s2/fleet", "must name hosts"),
        ("redis://redis/x", "number of a database"),
        ("redis+sentinel://s1", "must name the service"),
        ("redis+sentinel://s1/a b", "must name the service"),
        ("redis+cluster://a/1", "must have database 0"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused(tmp_path: Path, url: str, words: str) -> None:
    found = faults(tmp_path, fleet(directory=url))
    assert words in found["fleet.directory"].message
    assert "secret" not in str(found["fleet.directory"])


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"listen": None}, "fleet.directory", "needs listen beside it"),
        ({"advertise": None}, "fleet.directory", "needs advertise beside it"),
        ({"directory": None}, "fleet.secret", "needs directory beside it"),
        ({"directory": None}, "fleet.listen", "needs directory beside it"),
        ({"secret": None}, "fleet.listen", "everybody who reaches 0.0.0.0:5052"),
        ({"secret": "short"}, "fleet.secret", "at least 16 characters"),
        ({"secret_env": "X"}, "fleet.secret_env", "only one of secret and secret_env"),
        ({"ca_file": "/ca.pem"}, "fleet.ca_file", "needs cert_file and key_file beside it"),
        ({"advertise": "https://10.0.0.7:5052"}, "fleet.advertise", "must begin with http://"),
        ({"advertise": "http://0.0.0.0:5052"}, "fleet.advertise", "other nodes can reach"),
        ({"advertise": "http://10.0.0.7:5052/x"}, "fleet.advertise", "must have no path"),
        ({"advertise": "10.0.0.7:5052"}, "fleet.advertise", "must begin with https://"),
        ({"listen": "127.0.0.1:5050"}, "fleet.listen", "the same address as listen"),
        ({"listen": "127.0.0.1:5051"}, "fleet.listen", "the same address as admin"),
        ({"zone": "two words"}, "fleet.zone", "must be a short name"),
        ({"directory_username": "pullpool"}, "fleet.directory_username", "needs directory_pass"),
        (
            {"directory_password": "a", "directory_password_env": "B"},
            "fleet.directory_password_env",
            "only one of",
        ),
        (
            {"directory": SENTINELS, "directory_sentinel_username": "pullpool"},
            "fleet.directory_sentinel_username",
            "needs directory_sentinel_password, directory_sentinel_password_env or directory_s",
        ),
        (
            {
                "directory": SENTINELS,
                "directory_sentinel_username": "pullpool",
                "directory_password": "a",
            },
            "fleet.directory_sentinel_username",
            "needs directory_sentinel_password",
        ),
        (
            {
                "directory": SENTINELS,
                "directory_sentinel_password": "a",
                "directory_sentinel_password_file": "/b",
            },
            "fleet.directory_sentinel_password_file",
            "only one of directory_sentinel_password and directory_sentinel_password_file",
        ),
        (
            {"directory": None, "directory_sentinel_password": "a"},
            "fleet.directory_sentinel_password",
            "needs directory beside it",
        ),
        ({"directory_ca_file": "/ca.pem"}, "fleet.directory_ca_file", "needs a directory with TLS"),
        (
            {"directory": "rediss://redis", "directory_cert_file": "/cert.pem"},
            "fleet.directory_cert_file",
            "needs directory_key_file beside it",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_at_its_key(
    tmp_path: Path, changes: dict[str, object], path: str, words: str
) -> None:
    found = faults(tmp_path, fleet(**changes))
    assert words in found[path].message
    assert str(changes.get("secret", "0123456789abcdef")) not in str(found[path])


@pytest.mark.parametrize("directory", ["redis://redis", "rediss+cluster://r1,r2"])
@pytest.mark.parametrize("form", ["", "_env", "_file"])
def test_a_login_of_sentinels_is_refused_where_there_are_none(
    tmp_path: Path, directory: str, form: str
) -> None:
    user, password = "directory_sentinel_username", f"directory_sentinel_password{form}"
    found = faults(tmp_path, fleet(directory=directory, **{user: "pullpool", password: "HIDDEN"}))
    for key in (user, password):
        assert "needs a directory that Sentinels know" in found[f"fleet.{key}"].message
    assert "HIDDEN" not in "".join(map(str, found.values()))


def test_sentinels_have_a_login_of_their_own(tmp_path: Path) -> None:
    keys = {"directory_sentinel_username": "pullpool", "directory_sentinel_password": "hidden"}
    settings = load(tmp_path, fleet(directory="rediss+sentinel://s1,s2/fleet", **keys))
    assert settings.fleet.directory_sentinel_username == "pullpool"
    assert settings.fleet.directory_sentinel_password is not None
    assert settings.fleet.directory_sentinel_password.get_secret_value() == "hidden"
    assert settings.fleet.directory_password is None
    assert settings.warnings() == []
    assert "hidden" not in repr(settings)


def test_a_fleet_that_is_right_is_loaded(tmp_path: Path) -> None:
    settings = load(tmp_path, fleet(zone="a", uplink="100MiB/s"))
    assert settings.fleet.directory == Place.parse("redis://redis")
    assert settings.fleet.uplink is not None
    assert settings.fleet.uplink.per_second == 100 << 20
    assert settings.warnings() == []
    assert load(tmp_path).fleet.directory is None


def test_without_a_fleet_its_client_is_not_even_imported() -> None:
    words = "import sys, proxy.app, proxy.config; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0


def test_a_client_that_is_not_installed_is_a_fault_at_the_directory(tmp_path: Path) -> None:
    settings = load(tmp_path, fleet())
    found = settings.fleet.missing({}, is_installed=lambda _: False)
    assert [(fault.path, fault.message) for fault in found] == [
        (
            "fleet.directory",
            "needs the package redis, which is not installed: pip install 'pullpool[fleet]'",
        )
    ]


def test_without_a_secret_only_this_machine_may_reach_a_node(tmp_path: Path) -> None:
    text = fleet(secret=None, listen="127.0.0.1:5052", advertise="http://127.0.0.1:5052")
    assert load(tmp_path, text).fleet.files is None


def test_certificates_do_instead_of_a_secret(tmp_path: Path) -> None:
    files = {"ca_file": "/ca.pem", "cert_file": "/cert.pem", "key_file": "/key.pem"}
    text = fleet(secret=None, advertise="https://10.0.0.7:5052", **files)
    assert load(tmp_path, text).fleet.files is not None
    found = faults(tmp_path, fleet(secret=None, **files))
    assert "must begin with https://" in found["fleet.advertise"].message


def test_what_is_likely_regretted_is_said(tmp_path: Path) -> None:
    text = fleet(directory_password="pw", advertise="http://127.0.0.1:5052")
    password, loopback = load(tmp_path, text).warnings()
    assert "fleet.directory: its password goes over a connection" in password
    assert "fleet.advertise: other machines" in loopback


def test_a_password_for_sentinels_without_tls_is_regretted_too(tmp_path: Path) -> None:
    text = fleet(directory=SENTINELS, directory_sentinel_password="pw")
    (password,) = load(tmp_path, text).warnings()
    assert "fleet.directory: its password goes over a connection" in password


@pytest.mark.parametrize(
    ("form", "value", "words"),
    [
        ("env", "NO_SUCH", "names an environment variable that is not set"),
        ("file", "/no/such/file", "is not a file that can be read"),
    ],
)
def test_what_holds_the_password_of_sentinels_has_to_be_there(
    tmp_path: Path, form: str, value: str, words: str
) -> None:
    key = f"directory_sentinel_password_{form}"
    text = fleet(directory="rediss+sentinel://s1/fleet", **{key: value})
    with pytest.raises(ConfigError) as caught:
        load_usable(write(tmp_path, text), {}, {})
    found = {fault.path: fault.message for fault in caught.value.faults}
    assert found == {f"fleet.{key}": words}


def test_files_and_variables_of_a_fleet_have_to_be_there(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("short\n")
    text = fleet(
        directory="rediss://redis",
        secret=None,
        secret_file=secret,
        directory_password_env="NO_SUCH",
        directory_ca_file=tmp_path / "none.pem",
    )
    with pytest.raises(ConfigError) as caught:
        load_usable(write(tmp_path, text), {}, {})
    found = {fault.path: fault.message for fault in caught.value.faults}
    assert found == {
        "fleet.secret_file": "holds fewer than 16 characters",
        "fleet.directory_password_env": "names an environment variable that is not set",
        "fleet.directory_ca_file": "is not a file that can be read",
    }


def test_a_variable_with_a_short_secret_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, fleet(secret=None, secret_env="SECRET"))
    with pytest.raises(ConfigError, match="fewer than 16 characters") as caught:
        load_usable(path, {}, {"SECRET": "hunter2"})
    assert "hunter2" not in str(caught.value)
