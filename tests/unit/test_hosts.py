"""The grammar of no_proxy and redirect_hosts: Go's, as container tools read NO_PROXY."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.hosts import HostPattern


@pytest.mark.parametrize(
    ("entry", "meant", "others"),
    [
        ("*", ["a.example.com:1", "10.0.0.1:443"], []),
        (
            "example.com",
            ["example.com:443", "a.b.example.com:80", "EXAMPLE.com.:1"],
            ["badexample.com:443", "example.com.evil.org:443", "com:1"],
        ),
        (".example.com", ["a.example.com:443"], ["example.com:443", "xexample.com:443"]),
        ("*.example.com", ["a.example.com:443"], ["example.com:443"]),
        ("example.com:8443", ["example.com:8443", "a.example.com:8443"], ["example.com:443"]),
        ("10.0.0.0/8", ["10.255.0.1:1", "::ffff:10.0.0.1:1"], ["11.0.0.1:1", "ten.example.com:1"]),
        ("10.1.2.3", ["10.1.2.3:5"], ["10.1.2.4:5"]),
        ("10.1.2.3:80", ["10.1.2.3:80"], ["10.1.2.3:81"]),
        ("::1", ["::1:443"], ["::2:443"]),
        ("[::1]:5000", ["::1:5000"], ["::1:5001"]),
        ("fd00::/8", ["fd12::1:443"], ["fe80::1:443"]),
        ("*:3128", ["a:3128"], ["a:3129"]),
    ],
)
def test_what_an_entry_means(entry: str, meant: list[str], others: list[str]) -> None:
    pattern = HostPattern.parse(entry)
    for place, expected in [(one, True) for one in meant] + [(one, False) for one in others]:
        host, _, port = place.rpartition(":")
        assert pattern.matches(host, int(port)) is expected, place


@pytest.mark.parametrize(
    "entry", ["", " ", "http://a", "a b", "a/b", "10.0.0.0/33", "a:0", "a:70000", "[::1", ".", 7]
)
def test_what_is_no_entry_is_refused(entry: object) -> None:
    with pytest.raises(ValueError, match="must"):
        HostPattern.parse(entry)


@given(
    st.sampled_from(
        ["*", "a.example.com", ".example.com", "10.1.2.3", "10.0.0.0/8", "[::1]", "fd00::/8"]
    ),
    st.none() | st.integers(1, 65535),
)
def test_an_entry_is_read_back_from_what_it_shows(host: str, port: int | None) -> None:
    if port is not None and "::/" in host:
        host = f"[{host}]"
    pattern = HostPattern.parse(host if port is None else f"{host}:{port}")
    assert HostPattern.parse(str(pattern)) == pattern
