"""Which proxy a socket goes through, and that its password is never shown."""

from __future__ import annotations

import pytest

from proxy.upstream.egress import DIRECT, EgressProxy, choose_egress, environment_faults
from proxy.upstream.hosts import HostPattern


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://proxy.example.com:3128", "http://proxy.example.com:3128"),
        ("https://proxy.example.com/", "https://proxy.example.com:443"),
        ("proxy.example.com:3128", "http://proxy.example.com:3128"),
        ("http://[fd00::1]:3128", "http://[fd00::1]:3128"),
        ("http://proxy", "http://proxy:80"),
    ],
)
def test_a_proxy_is_a_url_with_a_port(text: str, url: str) -> None:
    proxy = EgressProxy.parse(text)
    assert (proxy.url, proxy.authorization, str(proxy)) == (url, None, url)


def test_a_password_is_sent_and_never_shown() -> None:
    proxy = EgressProxy.parse("http://us%40er:p%3Aw@proxy:3128")
    assert proxy.authorization == "Basic dXNAZXI6cDp3"  # us@er:p:w
    assert (str(proxy), proxy.url, proxy.label) == (
        "http://***@proxy:3128",
        "http://proxy:3128",
        "proxy:3128",
    )
    assert "dXNA" not in repr(proxy)


@pytest.mark.parametrize(
    "text",
    [
        *("socks5://u:secret@p:1", "http://", "http://a b", "http://u:secret@p:x", "http://p/path"),
        *("http://u:secret@[::1", "http://u:secret@h℀", "http://u:secret@p:0"),
        7,
    ],
)
def test_what_is_no_proxy_is_refused_without_being_repeated(text: object) -> None:
    with pytest.raises(ValueError, match=r"must|port 0") as caught:
        EgressProxy.parse(text)
    assert "secret" not in str(caught.value)


def proxy_for(url: str, environ: dict[str, str], *no_proxy: str) -> str | None:
    egress = choose_egress(None, [HostPattern.parse(one) for one in no_proxy], environ)
    scheme, _, rest = url.partition("://")
    host, _, port = rest.rpartition(":")
    proxy = egress.proxy_for(scheme, host.strip("[]"), int(port))
    return proxy.label if proxy else None


def test_the_environment_decides_by_scheme() -> None:
    environ = {"HTTPS_PROXY": "http://s:1", "http_proxy": "p:2"}
    assert proxy_for("https://harbor.example.com:443", environ) == "s:1"
    assert proxy_for("http://harbor.example.com:80", environ) == "p:2"
    assert proxy_for("https://harbor.example.com:443", {}) is None
    assert proxy_for("http://harbor.example.com:80", {"https_proxy": "s:1"}) is None


def test_no_proxy_of_both_counts_and_this_machine_is_spared() -> None:
    environ = {"HTTPS_PROXY": "http://s:1", "no_proxy": " .corp.example.com, 10.0.0.0/8,"}
    for near in ("a.corp.example.com:443", "10.1.1.1:443", "mirror.example.com:8443"):
        assert proxy_for(f"https://{near}", environ, "mirror.example.com:8443") is None
    for loopback in ("localhost:5000", "127.0.0.1:5000", "[::1]:5000"):
        assert proxy_for(f"https://{loopback}", environ) is None
    assert proxy_for("https://mirror.example.com:443", environ, "mirror.example.com:8443") == "s:1"


def test_an_upstreams_own_proxy_takes_the_place_of_the_environment() -> None:
    mine = EgressProxy.parse("http://mine:3128")
    environ = {"HTTPS_PROXY": "not a url", "NO_PROXY": "harbor.example.com"}
    egress = choose_egress(mine, [HostPattern.parse("*.svc")], environ)
    assert egress.proxy_for("https", "harbor.example.com", 443) is mine
    assert egress.proxy_for("http", "127.0.0.1", 5000) is mine
    assert egress.proxy_for("http", "minio.svc", 9000) is None
    assert DIRECT.proxy_for("https", "harbor.example.com", 443) is None


def test_variables_that_are_no_use_are_named() -> None:
    environ = {"https_proxy": "socks5://u:secret@p:1", "HTTP_PROXY": "ok:1", "NO_PROXY": "a,b c"}
    faults = dict(environment_faults(environ))
    assert set(faults) == {"https_proxy", "NO_PROXY"}
    assert "secret" not in str(faults)
    with pytest.raises(ValueError, match="https_proxy"):
        choose_egress(None, (), environ)
