"""How near an answer may lead: by address, in every spelling, and where a socket is really made."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from proxy.observe.metrics import Metrics
from proxy.oci.errors import RedirectRefused
from proxy.testing import FakeClock, FakeRegistry
from proxy.upstream.endpoint import OriginKey, OriginSettings
from proxy.upstream.hosts import HostPattern
from proxy.upstream.origin import Origin
from proxy.upstream.reach import ANYWHERE, Reach, Scope, allowing, scope_of
from tests.unit.upstream_kit import LOOPS, opened, run_on, ticket

FOUR = st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address)
SIX = st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address)


@pytest.mark.parametrize(
    ("place", "scope"),
    [
        ("93.184.216.34", Scope.PUBLIC),
        ("2606:2800:220:1::1", Scope.PUBLIC),
        ("cdn.example.com", Scope.PUBLIC),
        ("10.0.0.1", Scope.PRIVATE),
        ("172.31.255.255", Scope.PRIVATE),
        ("192.168.0.1", Scope.PRIVATE),
        ("100.100.100.200", Scope.PRIVATE),  # a cloud's metadata service, too
        ("fd00:ec2::254", Scope.PRIVATE),
        ("fec0::1", Scope.PRIVATE),
        ("127.0.0.1", Scope.LOOPBACK),
        ("127.255.255.254", Scope.LOOPBACK),
        ("::1", Scope.LOOPBACK),
        ("[::1]", Scope.LOOPBACK),
        ("localhost", Scope.LOOPBACK),
        ("LOCALHOST.", Scope.LOOPBACK),
        ("app.localhost", Scope.LOOPBACK),
        ("127.1", Scope.LOOPBACK),
        ("2130706433", Scope.LOOPBACK),
        ("0x7f.0.0.1", Scope.LOOPBACK),
        ("0177.0.0.1", Scope.LOOPBACK),
        ("169.254.169.254", Scope.LINK_LOCAL),
        ("2852039166", Scope.LINK_LOCAL),
        ("fe80::1", Scope.LINK_LOCAL),
        ("fe80::1%eth0", Scope.LINK_LOCAL),
        ("0.0.0.0", Scope.NOWHERE),
        ("0.1.2.3", Scope.NOWHERE),
        ("::", Scope.NOWHERE),
        ("224.0.0.1", Scope.NOWHERE),
        ("255.255.255.255", Scope.NOWHERE),
        ("ff02::1", Scope.NOWHERE),
        ("::ffff:127.0.0.1", Scope.LOOPBACK),
        ("::ffff:a9fe:a9fe", Scope.LINK_LOCAL),
        ("::127.0.0.1", Scope.LOOPBACK),
        ("64:ff9b::169.254.169.254", Scope.LINK_LOCAL),
        ("64:ff9b:1::10.0.0.1", Scope.PRIVATE),
        ("2002:a9fe:a9fe::1", Scope.LINK_LOCAL),
        ("2002:5db8:d822::1", Scope.PUBLIC),
    ],
)
def test_the_scope_of_a_place(place: str, scope: Scope) -> None:
    assert scope_of(place) is scope


@given(FOUR)
def test_an_address_of_ipv4_has_one_scope_however_it_is_written(
    four: ipaddress.IPv4Address,
) -> None:
    scope = scope_of(str(four))
    number = int(four)
    assert scope_of(f"::ffff:{four}") is scope
    assert scope_of(f"64:ff9b::{four}") is scope
    assert scope_of(str(ipaddress.IPv6Address(0x2002 << 112 | number << 80))) is scope
    assert scope_of(str(number)) is scope
    assert scope_of(hex(number)) is scope
    first, rest = number >> 24, number & 0xFFFFFF
    assert scope_of(f"0x{first:x}.{rest}") is scope


@given(st.one_of(FOUR, SIX))
def test_what_the_standard_library_calls_special_is_not_public(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    near = address.is_loopback or address.is_link_local or address.is_private
    is_translated = address in ipaddress.ip_network("64:ff9b::/32")  # judged by what is inside
    if (near or address.is_multicast or address.is_unspecified) and not is_translated:
        assert scope_of(str(address)) is not Scope.PUBLIC


PLACES = st.one_of(
    st.one_of(FOUR, SIX).map(str),
    st.sampled_from(["10.1.2.3", "127.0.0.1", "169.254.169.254", "8.8.8.8", "harbor.example.com"]),
)


@given(st.lists(PLACES, min_size=1, max_size=4), PLACES)
def test_a_chain_reaches_no_nearer_than_its_farthest_place(chain: list[str], to: str) -> None:
    reach = ANYWHERE
    for place in chain:
        reach = reach.after(place)
    farthest = min(scope_of(place) for place in chain)
    assert reach.allows(to, 443) == (scope_of(to) <= min(farthest, Scope.LOOPBACK))


@given(st.lists(PLACES, min_size=1, max_size=4), PLACES)
def test_nobody_leads_to_link_local_or_nowhere(chain: list[str], to: str) -> None:
    reach = ANYWHERE
    for place in chain:
        reach = reach.after(place)
    if scope_of(to) >= Scope.LINK_LOCAL:
        assert not reach.allows(to, 80)
        with pytest.raises(RedirectRefused, match="redirect_hosts"):
            reach.expect(to, 80, to)


def test_what_is_listed_is_reached_by_address_or_by_name() -> None:
    listed = [HostPattern.parse("10.0.0.0/8"), HostPattern.parse("minio:9000")]
    reach = allowing(listed).after("93.184.216.34")
    reach.expect("10.3.4.5", 443, "storage.example.com")
    reach.expect("192.168.1.1", 9000, "minio")
    with pytest.raises(RedirectRefused, match=r"minio at 192.168.1.1, a private address"):
        reach.expect("192.168.1.1", 9001, "minio")
    with pytest.raises(RedirectRefused, match=r"link-local"):
        reach.expect("169.254.169.254", 80, "169.254.169.254")


def test_the_operator_leads_anywhere() -> None:
    assert all(ANYWHERE.allows(place, 1) for place in ("169.254.169.254", "::", "127.0.0.1"))
    assert Reach(Scope.PUBLIC).allows("cdn.example.com", 443)


# -- where sockets are made --------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_socket_is_made_nor_an_open_one_used_beyond_the_reach(loop: str, host: str) -> None:
    """A name is judged by the address that it has when it is dialled: no rebinding."""

    async def main() -> None:
        async with FakeRegistry(name=host) as registry:
            digest = registry.put_blob("team/app", b"hello")
            url = URL(f"{registry.url}/v2/team/app/blobs/{digest}")
            settings = OriginSettings(max_connections=1)
            metrics = Metrics()
            key = OriginKey.of(url)
            async with opened(Origin(key, settings, metrics=metrics, clock=FakeClock())) as origin:

                async def ask(reach: Reach) -> bytes:
                    async with origin.turn(ticket()) as turn:
                        return await (await turn.request("GET", url, reach=reach)).read()

                public = Reach(Scope.PUBLIC)
                with pytest.raises(RedirectRefused, match="loopback"):
                    await ask(public)
                assert registry.counters.accepted == 0
                assert await ask(ANYWHERE) == b"hello"
                with pytest.raises(RedirectRefused, match="loopback"):
                    await ask(public)  # although there is a socket that is open already
                assert len(registry.counters.seen) == 1
                assert await ask(Reach(Scope.LOOPBACK)) == b"hello"
                assert origin.state().active == 0

    run_on(loop, main())
