"""The realm rule: which token services may be asked, and so may see credentials."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from publicsuffixlist import PSLFILE, PublicSuffixList

from proxy.upstream.realm import MOST_LABELS, RULES, realm_allowed, registrable_domain

HARBOR = "https://harbor.example.com"


@pytest.mark.parametrize(
    ("realm", "upstream"),
    [
        ("https://harbor.example.com/service/token", HARBOR),
        ("https://HARBOR.example.COM./service/token", HARBOR),
        ("https://harbor.example.com:8443/token", HARBOR),
        ("https://auth.example.com/token", HARBOR),
        ("https://auth.docker.io/token", "https://registry-1.docker.io"),
        ("https://example.co.uk/token", "https://registry.example.co.uk"),
        ("https://auth.xn--bcher-kva.de/token", "https://registry.bücher.de"),
        ("http://registry.example.com/token", "http://registry.example.com:5000"),
        ("https://registry.example.com/token", "http://registry.example.com:5000"),
        ("http://127.0.0.1:5001/token", "http://127.0.0.1:5000"),
        ("http://localhost:5001/token", "http://localhost:5000"),
        ("https://[2001:db8::1]:5001/token", "https://[2001:db8::1]"),
        ("https://harbor.corp/token?a=b", "https://harbor.corp"),
    ],
)
def test_a_realm_of_the_upstreams_own_is_allowed(realm: str, upstream: str) -> None:
    assert realm_allowed(realm, upstream, ())


@pytest.mark.parametrize(
    ("realm", "upstream"),
    [
        ("https://evil.example.net/token", HARBOR),
        ("https://harbor.example.com.evil.net/token", HARBOR),
        ("https://evilexample.com/token", HARBOR),
        # https upstream, http realm
        ("http://harbor.example.com/token", HARBOR),
        # one public suffix, two owners
        ("https://b.co.uk/token", "https://a.co.uk"),
        ("https://evil.github.io/token", "https://good.github.io"),
        ("https://github.io/token", "https://good.github.io"),
        ("https://com/token", "https://com.com"),
        # addresses and names without a registrable domain
        ("http://127.0.0.2:5000/token", "http://127.0.0.1:5000"),
        ("http://127.0.0.1:5000/token", "http://localhost:5000"),
        ("https://192.0.2.1/token", "https://198.51.2.1"),
        ("https://[2001:db8::2]/token", "https://[2001:db8::1]"),
        ("https://10.evil/token", "https://9.evil"),
        ("https://evil.other.svc.cluster.local/", "https://registry.own.svc.cluster.local"),
        # where parsers disagree about the host
        ("https://harbor.example.com@evil.example.net/", HARBOR),
        ("https://user:pw@harbor.example.com/", HARBOR),
        ("https://@harbor.example.com/", HARBOR),
        ("https://evil.example.net\\@harbor.example.com/", HARBOR),
        ("https://evil.example.net#@harbor.example.com/", HARBOR),
        ("https://evil.example.net?@harbor.example.com/", HARBOR),
        ("https://harbor.example.com\t/", HARBOR),
        (" https://harbor.example.com/", HARBOR),
        ("https://harbor.example.com\r\nX: y/", HARBOR),
        ("https://harbor%2eexample.com/", HARBOR),
        ("https://hărbor.example.com/", HARBOR),
        # not a URL that could be dialled
        ("", HARBOR),
        ("/service/token", HARBOR),
        ("//harbor.example.com/token", HARBOR),
        ("harbor.example.com/token", HARBOR),
        ("file://harbor.example.com/etc/passwd", HARBOR),
        ("https:///token", HARBOR),
        ("https://harbor.example.com:99999/token", HARBOR),
        ("https://harbor.example.com/" + "a" * 3000, HARBOR),
        ("https://harbor.example.com/", "not a url"),
    ],
)
def test_a_realm_of_anybody_elses_is_refused(realm: str, upstream: str) -> None:
    assert not realm_allowed(realm, upstream, ())


def test_a_listed_host_is_allowed_on_any_port() -> None:
    listed = ["Auth.example.net"]
    assert realm_allowed("https://auth.example.net/token", HARBOR, listed)
    assert realm_allowed("https://auth.example.net:8443/token", HARBOR, listed)
    assert not realm_allowed("https://other.example.net/token", HARBOR, listed)
    assert not realm_allowed("https://sub.auth.example.net/token", HARBOR, listed)


def test_a_listed_port_is_the_only_one() -> None:
    listed = ["auth.example.net:8443", "[2001:db8::1]:443"]
    assert realm_allowed("https://auth.example.net:8443/token", HARBOR, listed)
    assert not realm_allowed("https://auth.example.net/token", HARBOR, listed)
    assert realm_allowed("https://[2001:db8::1]/token", HARBOR, listed)
    assert not realm_allowed("https://[2001:db8::1]:444/token", HARBOR, listed)


def test_a_list_entry_may_be_a_url() -> None:
    listed = ["https://auth.example.net/token"]
    assert realm_allowed("https://auth.example.net/token", HARBOR, listed)


def test_a_list_entry_does_not_lift_the_rule_of_https() -> None:
    listed = ["http://auth.example.net", "auth.example.net"]
    assert not realm_allowed("http://auth.example.net/token", HARBOR, listed)
    assert realm_allowed("http://auth.example.net/token", "http://harbor.example.com", listed)


def test_a_list_entry_that_is_nothing_allows_nothing() -> None:
    assert not realm_allowed("https://evil.example.net/token", HARBOR, ["", "://", "*", " "])


@given(realm=st.text(max_size=60), upstream=st.sampled_from([HARBOR, "http://10.0.0.1:5000"]))
def test_no_text_makes_it_raise(realm: str, upstream: str) -> None:
    realm_allowed(realm, upstream, [realm])
    realm_allowed(f"https://{realm}", upstream, [realm])


@given(
    labels=st.lists(st.from_regex(r"[a-z]{1,6}", fullmatch=True), min_size=1, max_size=3),
    owner=st.sampled_from(["example.com", "example.co.uk", "team.github.io"]),
)
def test_names_under_one_registrable_domain_trust_each_other(labels: list[str], owner: str) -> None:
    host = ".".join([*labels, owner])
    assert registrable_domain(host) == owner
    assert realm_allowed(f"https://{host}/token", f"https://registry.{owner}", ())
    assert not realm_allowed(f"https://{host}/token", "https://registry.example.org", ())


def test_a_name_that_is_longer_than_names_are_has_no_domain() -> None:
    assert registrable_domain("a." * 121 + "example.com") == "example.com"  # 253 characters
    assert registrable_domain("a." * 122 + "example.com") is None


def test_no_rule_has_more_labels_than_are_looked_at() -> None:
    assert max(rule.count(".") + 1 for rule in RULES if not rule.startswith("//")) <= MOST_LABELS


def test_domains_are_those_of_the_library_with_the_whole_list() -> None:
    theirs = PublicSuffixList(accept_unknown=False)
    lines = Path(PSLFILE).read_text("utf-8").splitlines()
    rules = [line.split()[0] for line in lines if line and not line.startswith("//")]
    assert len(rules) > 9000
    for rule in rules:
        name = rule.lstrip("!").removeprefix("*.")
        for spelled in (name, name.encode("idna").decode()):
            for host in (spelled, f"one.{spelled}", f"two.one.{spelled}"):
                assert registrable_domain(host) == theirs.privatesuffix(host), host


@pytest.mark.parametrize("host", ["xn--", "a.xn--zzzzzz", "xn--a.com", "a." * 120 + "com", "com"])
def test_names_that_are_strange_have_the_librarys_domain(host: str) -> None:
    assert registrable_domain(host) == PublicSuffixList(accept_unknown=False).privatesuffix(host)
