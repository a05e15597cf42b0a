"""X-Forwarded-For: believed from trusted proxies only, and only as far as they vouch for it."""

from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.web.forwarded import MAX_HOPS, Network, client_address, parse_address
from tests.unit.proxy_kit import RawClient, blob_path, manifest_path, pulling

TRUSTED = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("192.0.2.1", [], "192.0.2.1"),
        ("192.0.2.1", ["198.51.100.7"], "192.0.2.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["203.0.113.9, 198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["198.51.100.7, 10.0.0.2, 10.0.0.3"], "198.51.100.7"),
        ("10.0.0.1", ["203.0.113.9", "198.51.100.7", "10.0.0.2"], "198.51.100.7"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["198.51.100.7:4711"], "198.51.100.7"),
        ("10.0.0.1", ["[2001:db8::7]:4711"], "2001:db8::7"),
        ("10.0.0.1", ["[2001:db8::7]"], "2001:db8::7"),
        ("10.0.0.1", ["2001:DB8::7"], "2001:db8::7"),
        ("fd00::1", ["198.51.100.7, fd00::2"], "198.51.100.7"),
        ("::ffff:10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["::ffff:198.51.100.7"], "198.51.100.7"),
        ("unknown", ["198.51.100.7"], "unknown"),
        ("", ["198.51.100.7"], ""),
    ],
)
def test_the_client_is_the_last_address_that_is_no_trusted_proxy(
    peer: str, forwarded: Sequence[str], client: str
) -> None:
    assert client_address(peer, forwarded, TRUSTED) == client


@pytest.mark.parametrize(
    "junk", ["", "unknown", "_hidden", "1.2.3", "1.2.3.4.5", "1.2.3.4:x", "fe80::1%eth0", "\x00"]
)
def test_nothing_left_of_what_is_malformed_is_believed(junk: str) -> None:
    assert client_address("10.0.0.1", [f"198.51.100.7, {junk}"], TRUSTED) == "10.0.0.1"
    forwarded = [f"198.51.100.7, {junk}, 10.0.0.2"]
    assert client_address("10.0.0.1", forwarded, TRUSTED) == "10.0.0.2"


def test_an_endless_row_of_proxies_is_not_followed() -> None:
    forwarded = [", ".join(["198.51.100.7", *["10.0.0.2"] * MAX_HOPS])]
    assert client_address("10.0.0.1", forwarded, TRUSTED) == "10.0.0.2"
    shorter = [", ".join(["198.51.100.7", *["10.0.0.2"] * (MAX_HOPS - 1)])]
    assert client_address("10.0.0.1", shorter, TRUSTED) == "198.51.100.7"


addresses = st.ip_addresses().map(str)
trusted_addresses = st.integers(0, 2**24 - 1).map(lambda n: str(ip_address(10 << 24 | n)))
strangers = addresses.filter(
    lambda text: not any((parse_address(text) or ip_address(text)) in net for net in TRUSTED)
)
networks = st.lists(st.sampled_from([*TRUSTED, ip_network("0.0.0.0/0"), ip_network("::/0")]))


@given(peer=st.text(), forwarded=st.lists(st.text()), trusted=networks)
def test_whatever_is_sent_the_answer_is_the_peer_or_an_address(
    peer: str, forwarded: list[str], trusted: list[Network]
) -> None:
    client = client_address(peer, forwarded, trusted)
    assert client == peer or parse_address(client) is not None


@given(peer=strangers, forwarded=st.lists(addresses | st.text()))
def test_a_stranger_speaks_for_nobody_else(peer: str, forwarded: list[str]) -> None:
    assert client_address(peer, forwarded, TRUSTED) == peer


@given(
    claimed=st.lists(st.text()),
    client=strangers,
    hops=st.lists(trusted_addresses, min_size=1, max_size=MAX_HOPS - 1),
)
def test_what_a_client_claims_changes_nothing(
    claimed: list[str], client: str, hops: list[str]
) -> None:
    """The peer is the last of ``hops``; each has appended whom it was called by."""
    appended = ", ".join([client, *hops[:-1]])
    truth = str(parse_address(client))
    assert client_address(hops[-1], [*claimed, appended], TRUSTED) == truth
    in_one_line = [", ".join([*claimed, appended])]
    assert client_address(hops[-1], in_one_line, TRUSTED) == truth


async def test_the_log_names_whom_a_trusted_proxy_speaks_for(tmp_path: Path) -> None:
    async with pulling(tmp_path, trusted_proxies=["127.0.0.0/8"]) as (pool, _):
        await pool.get(manifest_path("v1"), X_Forwarded_For="203.0.113.9, 198.51.100.7")
        await pool.get(blob_path())
        assert [line["client"] for line in pool.access_log] == ["198.51.100.7", "127.0.0.1"]


async def test_what_is_no_http_is_the_trusted_proxy_s_own(tmp_path: Path) -> None:
    async with pulling(tmp_path, trusted_proxies=["127.0.0.0/8"]) as (pool, _):
        async with RawClient.connected(pool.address) as client:
            await client.send("no HTTP\nX-Forwarded-For: 198.51.100.7\n\n")
            assert " 400 " in await client.head()
        assert [line["client"] for line in pool.access_log] == ["127.0.0.1"]


async def test_nobody_is_believed_by_default(tmp_path: Path) -> None:
    async with pulling(tmp_path) as (pool, _):
        await pool.get(manifest_path("v1"), X_Forwarded_For="198.51.100.7")
        assert [line["client"] for line in pool.access_log] == ["127.0.0.1"]
