"""One upstream, asked: tokens inside the turn, redirects by hand, and failures in our words."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from yarl import URL

from benchmarks.parts import free_port
from proxy.oci.digest import Digest
from proxy.oci.errors import (
    Denied,
    NotFound,
    PullError,
    QueueFull,
    RedirectRefused,
    Throttled,
    TooLarge,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.oci.manifest import MAX_MANIFEST
from proxy.oci.paths import Kind
from proxy.testing import (
    Answer,
    Cut,
    Disconnect,
    FakeImage,
    FakeRegistry,
    Fault,
    Hang,
    Oversize,
    Reset,
    Stall,
    make_image,
)
from proxy.upstream.client import MAX_REDIRECTS, Head
from proxy.upstream.credentials import Credentials
from proxy.upstream.endpoint import OriginSettings
from proxy.upstream.login import MAX_TOKEN_BODY
from proxy.upstream.reply import drain, next_hop
from tests.unit.upstream_kit import ROBOT, Mute, Puller, sample, ticket, tls, until

IMAGE = make_image("team/app", "v1", layers=(3000, 0), seed=7)
LAYER = IMAGE.layers[0]
USERS = {ROBOT.username: ROBOT.password}
PRIVATE = {"team/app": {ROBOT.username}}


def holding(registry: FakeRegistry, image: FakeImage = IMAGE) -> FakeRegistry:
    registry.push(image)
    return registry


def private(
    *, token_service: FakeRegistry | None = None, redirect_blobs_to: FakeRegistry | None = None
) -> FakeRegistry:
    """A registry that wants a token for the image."""
    registry = FakeRegistry(
        auth="bearer",
        users=USERS,
        private=PRIVATE,
        token_service=token_service,
        redirect_blobs_to=redirect_blobs_to,
    )
    return holding(registry)


async def manifest(puller: Puller, reference: str = "v1") -> bytes:
    body, _, _ = await puller.client.manifest("team/app", reference, ticket())
    return body


async def head_blob(puller: Puller, digest: Digest = LAYER.digest) -> Head:
    return await puller.client.head_blob("team/app", digest, ticket())


# -- manifests, HEADs, listings ----------------------------------------------------------------


async def test_a_manifest_comes_with_its_type_and_the_digest_claimed_for_it() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        found = await puller.client.manifest("team/app", "v1", ticket())
        assert found == (IMAGE.manifest, IMAGE.media_type, IMAGE.digest)
        (seen,) = registry.counters.seen
        assert IMAGE.media_type in seen.headers["Accept"]
        assert seen.headers["Accept-Encoding"] == "identity"


async def test_a_manifest_is_not_read_beyond_the_bound() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Oversize(MAX_MANIFEST + 1)))
        with pytest.raises(TooLarge):
            await manifest(puller)
        assert await manifest(puller) == IMAGE.manifest


async def test_a_head_tells_digest_type_and_size() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        head = await puller.client.head_manifest("team/app", "v1", ticket())
        assert head == Head(IMAGE.digest, IMAGE.media_type, len(IMAGE.manifest))
        again = await puller.client.head_manifest("team/app", "v1", ticket(), known=IMAGE.digest)
        assert again == Head(IMAGE.digest, None, None, not_modified=True)
        assert registry.counters.peak_sockets == 1


async def test_a_size_is_not_taken_from_an_encoded_answer() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(200, {"Content-Encoding": "gzip"}, b"x"), method="HEAD"))
        assert (await head_blob(puller)).size is None


async def test_an_encoded_body_is_refused() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(200, {"Content-Encoding": "gzip"}, b"x")))
        with pytest.raises(UpstreamUnavailable, match="gzip"):
            await manifest(puller)


async def test_what_is_missing_is_missing_however_that_is_encoded() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(404, {"Content-Encoding": "gzip"}, b"x")))
        with pytest.raises(NotFound):
            await manifest(puller)
        with pytest.raises(NotFound):
            await manifest(puller, "v2")


async def test_a_listing_comes_with_what_leads_on() -> None:
    async with holding(FakeRegistry(page_size=1)) as registry, Puller(registry) as puller:
        registry.retag("team/app", "v2", IMAGE)
        page = await puller.client.page(
            Kind.TAGS, "team/app", "tags/list", [("n", "5"), ("last", "a b&c")], ticket()
        )
        assert b'"v1"' in page.body
        assert page.link is not None
        assert registry.counters.seen[0].query == {"n": "5", "last": "a b&c"}
        with pytest.raises(NotFound):
            await puller.client.page(Kind.TAGS, "team/none", "tags/list", [], ticket())


async def test_a_blob_is_known_by_its_head() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        head = await head_blob(puller)
        assert (head.digest, head.size) == (LAYER.digest, LAYER.size)
        assert registry.counters.count("blob", "GET") == 0


@pytest.mark.parametrize("status", [400, 401, 403, 405, 501])
async def test_a_head_that_is_refused_says_nothing_about_a_get(status: int) -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(status), method="HEAD", times=None))
        head = await head_blob(puller)
        assert (head.digest, head.size) == (LAYER.digest, LAYER.size)
        assert registry.counters.bytes_sent == 1


async def test_a_head_refused_for_an_empty_blob_finds_it_empty() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        empty = registry.put_blob("team/app", b"")
        registry.script(Fault(Answer(401), method="HEAD", times=None))
        assert (await head_blob(puller, empty)).size == 0


async def test_a_head_refused_where_ranges_are_ignored_reads_no_body() -> None:
    async with holding(FakeRegistry(ranges=False)) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(401), method="HEAD", times=None))
        assert (await head_blob(puller)).size == LAYER.size


@pytest.mark.parametrize(("status", "error"), [(404, NotFound), (429, Throttled)])
async def test_a_head_that_failed_otherwise_is_not_asked_again(
    status: int, error: type[PullError]
) -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(status), method="HEAD"))
        with pytest.raises(error):
            await head_blob(puller)
        assert registry.counters.count("blob", "GET") == 0


# -- tokens ------------------------------------------------------------------------------------


async def test_a_token_is_fetched_inside_the_turn_on_the_same_socket() -> None:
    async with private() as registry, Puller(registry, cap=1, credentials=ROBOT) as puller:
        pulls = await asyncio.gather(*(manifest(puller) for _ in range(12)))
        assert set(pulls) == {IMAGE.manifest}
        assert registry.counters.peak_sockets == 1
        assert registry.counters.tokens_issued == 1
        assert puller.refreshes == ["ok"]


IDENTITY = Credentials("<token>", "identity-of-the-robot")


async def test_an_identity_token_is_exchanged_in_the_same_turn() -> None:
    identities = {IDENTITY.password: ROBOT.username}
    async with (
        holding(FakeRegistry(auth="bearer", private=PRIVATE, identities=identities)) as registry,
        Puller(registry, cap=1, credentials=IDENTITY) as puller,
    ):
        assert await manifest(puller) == IMAGE.manifest
        [asked] = [seen for seen in registry.counters.seen if seen.kind == "token"]
        assert asked.method == "POST"
        assert IDENTITY.password not in f"{asked.path} {asked.headers}"
        assert registry.counters.peak_sockets == 1


async def test_an_identity_token_that_is_wrong_is_denied_without_another_try() -> None:
    async with (
        holding(
            FakeRegistry(auth="bearer", private=PRIVATE, identities={"another": ROBOT.username})
        ) as registry,
        Puller(registry, credentials=IDENTITY) as puller,
    ):
        with pytest.raises(Denied) as denial:
            await manifest(puller)
        assert IDENTITY.password not in str(denial.value)
        assert registry.counters.count("token") == 1


async def test_where_the_token_service_knows_no_exchange_the_identity_token_goes_by_get() -> None:
    users = {IDENTITY.username: IDENTITY.password}
    private = {"team/app": {IDENTITY.username}}
    async with (
        holding(FakeRegistry(auth="bearer", users=users, private=private)) as registry,
        Puller(registry, cap=1, credentials=IDENTITY) as puller,
    ):
        assert await manifest(puller) == IMAGE.manifest
        asked = [seen for seen in registry.counters.seen if seen.kind == "token"]
        assert [(seen.method, seen.status) for seen in asked] == [("POST", 405), ("GET", 200)]
        assert registry.counters.peak_sockets == 1


async def test_an_exchange_is_not_read_beyond_the_bound() -> None:
    async with (
        holding(FakeRegistry(auth="bearer", private=PRIVATE)) as registry,
        Puller(registry, credentials=IDENTITY) as puller,
    ):
        registry.script(Fault(Answer(200, {}, b"x" * (MAX_TOKEN_BODY + 1)), kind="token"))
        with pytest.raises(TooLarge):
            await manifest(puller)
        assert puller.origin.state().active == 0


async def test_a_token_service_elsewhere_has_a_gate_of_its_own() -> None:
    async with (
        FakeRegistry() as service,
        private(token_service=service) as registry,
        Puller(registry, cap=1, credentials=ROBOT) as puller,
    ):
        pulls = await asyncio.gather(*(manifest(puller) for _ in range(12)))
        assert set(pulls) == {IMAGE.manifest}
        assert service.counters.tokens_issued == 1
        assert registry.counters.peak_sockets == 1
        assert service.counters.peak_sockets == 1
        labels = {state.upstream for state in puller.origins.states()}
        assert labels == {registry.netloc, service.netloc}


async def test_a_refused_token_is_renewed_once_for_all_and_the_request_sent_again() -> None:
    async with private() as registry, Puller(registry, credentials=ROBOT) as puller:
        await manifest(puller)
        registry.tokens.revoke_all()
        pulls = await asyncio.gather(*(manifest(puller) for _ in range(8)))
        assert set(pulls) == {IMAGE.manifest}
        assert registry.counters.tokens_issued == 2


async def test_a_second_refusal_is_meant_and_no_challenge_leaves() -> None:
    async with private() as registry, Puller(registry, credentials=ROBOT) as puller:
        await manifest(puller)
        challenge = f'Bearer realm="{registry.url}/service/token",service="{registry.netloc}"'
        refused = Answer(401, {"WWW-Authenticate": challenge})
        registry.script(Fault(refused, kind="manifest", times=2))
        with pytest.raises(Denied) as denial:
            await manifest(puller)
        assert denial.value.status == 403
        assert not denial.value.headers
        assert registry.counters.count("manifest") == 4  # one without a token, one with, two


@pytest.mark.parametrize(
    "text", [b"Your Authorization Token has expired. Reauthenticate.", b"token expired"]
)
async def test_a_403_that_says_the_token_expired_is_a_reason_to_renew_it(text: bytes) -> None:
    async with private() as registry, Puller(registry, credentials=ROBOT) as puller:
        await manifest(puller)
        registry.script(Fault(Answer(403, {}, text), kind="manifest"))
        assert await manifest(puller) == IMAGE.manifest
        assert registry.counters.tokens_issued == 2


async def test_another_403_is_a_denial() -> None:
    async with private() as registry, Puller(registry, credentials=ROBOT) as puller:
        registry.script(Fault(Answer(403, {}, b"no"), kind="manifest"))
        with pytest.raises(Denied):
            await manifest(puller)
        assert registry.counters.tokens_issued == 1


async def test_a_token_answer_is_not_read_beyond_the_bound() -> None:
    async with private() as registry, Puller(registry, credentials=ROBOT) as puller:
        registry.script(Fault(Answer(200, {}, b"x" * (MAX_TOKEN_BODY + 1)), kind="token"))
        with pytest.raises(TooLarge):
            await manifest(puller)
        assert puller.origin.state().active == 0


async def test_who_leaves_while_a_token_is_fetched_leaves_the_gate_free() -> None:
    async with private() as registry, Puller(registry, cap=1, credentials=ROBOT) as puller:
        with registry.hold(kind="token") as hold:
            leaver = asyncio.create_task(manifest(puller))
            stayer = asyncio.create_task(manifest(puller))
            await hold.arrived()
            leaver.cancel()
            await asyncio.wait([leaver])
            await hold.arrived()  # the other one asks now, in its own turn
        assert await stayer == IMAGE.manifest
        assert registry.counters.peak_sockets == 1
        assert puller.origin.state().active == 0


# -- redirects ---------------------------------------------------------------------------------


async def test_authorization_does_not_cross_an_origin() -> None:
    async with (
        FakeRegistry() as cdn,
        private(redirect_blobs_to=cdn) as registry,
        Puller(registry, credentials=ROBOT) as puller,
    ):
        assert (await head_blob(puller)).size == LAYER.size
        assert cdn.counters.authorization_leaks == 0
        assert cdn.counters.count("blob") == 1
        assert "Authorization" in registry.counters.seen[-1].headers


async def test_authorization_is_not_sent_once_another_origin_chose_the_way() -> None:
    async with (
        FakeRegistry() as other,
        private() as registry,
        Puller(registry, credentials=ROBOT) as puller,
    ):
        away = Answer(307, {"Location": f"{other.url}/v2/team/app/manifests/v1"})
        back = Answer(307, {"Location": f"{registry.url}/v2/team/app/manifests/v1"})
        registry.script(Fault(away, kind="manifest"))
        other.script(Fault(back))
        with pytest.raises(Denied):
            await manifest(puller)
        assert "Authorization" not in registry.counters.seen[-1].headers


async def test_a_relative_location_is_followed_on_the_same_socket() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry, cap=1) as puller:
        body = b"<a href='v1'>moved</a>" * 100
        moved = Answer(301, {"Location": "v1"}, body)
        registry.script(Fault(moved, reference="latest"))
        assert await manifest(puller, "latest") == IMAGE.manifest
        assert registry.counters.peak_sockets == 1
        assert puller.origin.state().idle == 1


async def test_the_body_of_a_redirect_is_read_to_keep_its_socket() -> None:
    """Head and body come apart, and the second request on the same connection is the last."""
    connections: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 307 Moved\r\nLocation: v1\r\nContent-Length: 5\r\n\r\n")
        for _ in range(20):
            await asyncio.sleep(0)
        writer.write(b"moved")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async with (
        await asyncio.start_server(serve, "127.0.0.1", 0) as server,
        Puller(FakeRegistry(port=server.sockets[0].getsockname()[1])) as puller,
    ):
        assert await manifest(puller, "latest") == b"{}"
        assert len(connections) == 1


async def test_a_redirect_with_a_long_body_is_followed_without_reading_it() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry, cap=1) as puller:
        moved = Answer(307, {"Location": "v1"}, bytes(32 << 20))
        registry.script(Fault(moved, reference="latest"))
        assert await manifest(puller, "latest") == IMAGE.manifest
        assert registry.counters.peak_sockets == 1


async def test_redirects_in_a_circle_are_refused() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(302, {"Location": "v1"}), times=None))
        with pytest.raises(RedirectRefused):
            await manifest(puller)
        assert registry.counters.manifests == MAX_REDIRECTS + 1
        assert puller.origin.state().active == 0


async def test_https_does_not_lead_to_http() -> None:
    async with (
        FakeRegistry() as plain,
        holding(FakeRegistry(ssl_context=tls().server)) as registry,
        Puller(registry) as puller,
    ):
        registry.script(Fault(Answer(307, {"Location": f"{plain.url}/v2/"})))
        with pytest.raises(RedirectRefused, match="https to http"):
            await manifest(puller)
        assert not plain.counters.seen


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/other?x=%2F", "https://harbor.example.com/other?x=%2F"),
        ("b", "https://harbor.example.com/v2/a/blobs/b"),
        ("//cdn.example.com/b", "https://cdn.example.com/b"),
        (
            "https://cdn.example.com/b?X-Amz=a%2Fb+c%20d&sig=%3D%3d",
            "https://cdn.example.com/b?X-Amz=a%2Fb+c%20d&sig=%3D%3d",
        ),
        ("https://user:secret@cdn.example.com/b?s=%3d", "https://cdn.example.com/b?s=%3d"),
        ("https://cdn.example.com/a b?q=ü", "https://cdn.example.com/a%20b?q=%C3%BC"),
    ],
)
def test_a_location_stays_as_it_is_as_far_as_it_can_be_sent(location: str, expected: str) -> None:
    start = URL("https://harbor.example.com/v2/a/blobs/sha256:1", encoded=True)
    assert str(next_hop(start, location)) == expected


@pytest.mark.parametrize(
    "location",
    ["", "ftp://cdn.example.com/", "http://cdn.example.com/", "https://cdn.example.com:99999/"],
)
def test_a_location_that_leads_nowhere_safe_is_refused(location: str) -> None:
    with pytest.raises(RedirectRefused):
        next_hop(URL("https://harbor.example.com/v2/"), location)


async def test_what_comes_too_late_is_not_worth_waiting_for() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Stall(10)))
        url = puller.client.url("team/app", "manifests/v1")
        async with puller.origin.turn(ticket()) as turn:
            response = await turn.request("GET", url)
            assert len(await drain(response, patience=0)) <= 10
        await until(lambda: registry.counters.sockets_now == 0)


# -- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(Disconnect()), "reset"),
        (Fault(Disconnect(reset=True)), "reset"),
        (Fault(Cut(5)), "body"),
        (Fault(Reset(5)), "body"),
    ],
)
async def test_a_connection_that_breaks_is_an_upstream_that_cannot_be_reached(
    fault: Fault, kind: str
) -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry, cap=1) as puller:
        registry.script(fault)
        with pytest.raises(UpstreamUnavailable):
            await manifest(puller)
        label = puller.origin.key.label
        assert sample(puller.metrics, "upstream_errors_total", upstream=label, kind=kind) == 1
        assert await manifest(puller) == IMAGE.manifest
        assert registry.counters.peak_sockets == 1


async def test_an_upstream_that_says_nothing_is_waited_for_a_bounded_time() -> None:
    settings = OriginSettings(read_timeout=0.01)
    async with holding(FakeRegistry()) as registry, Puller(registry, settings=settings) as puller:
        registry.script(Fault(Hang()))
        with pytest.raises(UpstreamTimeout):
            await manifest(puller)
        await until(lambda: registry.counters.sockets_now == 0)


async def test_a_handshake_that_hangs_is_waited_for_a_bounded_time() -> None:
    settings = OriginSettings(tls=tls().client, connect_timeout=0.01)
    with Mute() as mute:
        async with Puller(
            FakeRegistry(port=mute.port, ssl_context=tls().server), settings=settings
        ) as puller:
            with pytest.raises(UpstreamTimeout, match="no connection in time"):
                await manifest(puller)
        await until(lambda: mute.established == 0)


async def test_a_certificate_that_is_not_trusted_ends_there() -> None:
    settings = OriginSettings(tls=tls().stranger)
    async with (
        holding(FakeRegistry(ssl_context=tls().server)) as registry,
        Puller(registry, settings=settings) as puller,
    ):
        with pytest.raises(UpstreamUnavailable, match="TLS failed"):
            await manifest(puller)
        assert not registry.counters.seen


async def test_a_port_where_nobody_listens_is_an_upstream_that_cannot_be_reached() -> None:
    async with Puller(FakeRegistry(port=free_port())) as puller:
        with pytest.raises(UpstreamUnavailable, match="cannot connect"):
            await manifest(puller)
        assert puller.origin.state().active == 0


async def test_what_is_not_http_is_an_upstream_that_cannot_be_reached() -> None:
    async def babble(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Puller(FakeRegistry(port=port)) as puller:
            with pytest.raises(UpstreamUnavailable, match="not an HTTP answer"):
                await manifest(puller)


async def test_a_full_queue_is_told_at_once() -> None:
    settings = OriginSettings(max_waiting=1)
    async with (
        holding(FakeRegistry()) as registry,
        Puller(registry, cap=1, settings=settings) as puller,
    ):
        with registry.hold() as hold:
            pulls = [asyncio.create_task(manifest(puller)) for _ in range(2)]
            await hold.arrived()
            with pytest.raises(QueueFull):
                await manifest(puller)
        assert await asyncio.gather(*pulls) == [IMAGE.manifest] * 2


@pytest.mark.parametrize("ask", [manifest, head_blob])
async def test_a_request_given_up_at_any_moment_leaves_the_gate_free(
    ask: Callable[[Puller], Awaitable[object]],
) -> None:
    async with (
        FakeRegistry() as cdn,
        private(redirect_blobs_to=cdn) as registry,
        Puller(registry, cap=1, credentials=ROBOT) as puller,
    ):
        for steps in range(0, 120, 3):
            task = asyncio.ensure_future(ask(puller))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert puller.origin.state().active == 0
        await ask(puller)
        assert registry.counters.peak_sockets == 1
        assert cdn.counters.peak_sockets <= 2
