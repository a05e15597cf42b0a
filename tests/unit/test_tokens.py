"""The authenticator: what is sent, what a refusal leads to, and one refresh for everybody."""

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.challenge import parse_challenges
from proxy.oci.errors import Denied, RealmRefused, TokenServiceFailed, UpstreamTimeout
from proxy.upstream.answering import Action, decide
from proxy.upstream.credentials import Credentials, CredentialsUnavailable
from proxy.upstream.token_service import WITHOUT_OAUTH
from proxy.upstream.tokens import Authenticator

ROBOT = Credentials("robot$pull", "s3cr3t-of-the-robot")
REALM = "https://harbor.example.com/service/token"
BEARER = f'Bearer realm="{REALM}",service="harbor-registry",scope="repository:a:pull,push"'
BASIC = 'Basic realm="harbor"'
APP = "team/app"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Source:
    """Credentials that change, and may be missing."""

    def __init__(self, credentials: Credentials | None) -> None:
        self.now: Credentials | Exception | None = credentials

    async def get(self) -> Credentials | None:
        if isinstance(self.now, Exception):
            raise self.now
        return self.now


class Service:
    """A token service: answers in turn, keeps what it was asked, holds answers while shut."""

    def __init__(self, *answers: tuple[int, bytes] | Exception) -> None:
        self.answers = list(answers)
        self.urls: list[str] = []
        self.sent: list[Mapping[str, str]] = []
        self.forms: list[Mapping[str, str] | None] = []
        self.asked = asyncio.Semaphore(0)
        self.open = asyncio.Event()
        self.open.set()
        self.running = 0

    async def __call__(
        self, url: str, headers: Mapping[str, str], form: Mapping[str, str] | None = None, /
    ) -> tuple[int, bytes]:
        self.urls.append(url)
        self.sent.append(headers)
        self.forms.append(form)
        answer = self.answers.pop(0) if self.answers else token(f"token-{len(self.urls)}")
        self.running += 1
        self.asked.release()
        try:
            await self.open.wait()
        finally:
            self.running -= 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def queries(self) -> list[dict[str, list[str]]]:
        return [parse_qs(urlsplit(url).query) for url in self.urls]


class Setting:
    """An authenticator with everything around it."""

    def __init__(
        self, credentials: Credentials | None = ROBOT, auth_realms: Sequence[str] = ()
    ) -> None:
        self.clock = Clock()
        self.source = Source(credentials)
        self.results: list[str] = []
        self.authenticator = Authenticator(
            name="harbor.example.com",
            url="https://harbor.example.com",
            credentials=self.source,
            auth_realms=auth_realms,
            clock=self.clock,
            on_refresh=self.results.append,
        )
        self.headers = self.authenticator.headers
        self.challenged = self.authenticator.challenged


def token(value: str, **more: object) -> tuple[int, bytes]:
    return 200, json.dumps({"token": value, **more}).encode()


def jwt(*access: Mapping[str, object]) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'RS256'})}.{part({'access': list(access)})}.c2ln"


def bearer(value: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {value}"}


async def never(
    url: str, headers: Mapping[str, str], form: Mapping[str, str] | None = None, /
) -> tuple[int, bytes]:
    raise AssertionError(f"nobody should ask {url}")


async def waiting(*tasks: asyncio.Task[Any]) -> None:
    """One turn of the loop: whatever could run has run, and these tasks wait for something."""
    turned = asyncio.Event()
    asyncio.get_running_loop().call_soon(turned.set)
    await turned.wait()
    assert not any(task.done() for task in tasks)


# -- decide ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "sent", "has_credentials", "action"),
    [
        ([BEARER], None, False, Action.BEARER),
        ([BEARER], None, True, Action.BEARER),
        ([BEARER], "Bearer t", True, Action.BEARER),
        ([BEARER], "Basic x", True, Action.BEARER),
        ([BASIC, BEARER], None, True, Action.BEARER),
        ([f"{BASIC}, {BEARER}"], "Basic x", True, Action.BEARER),
        ([BASIC], None, True, Action.BASIC),
        ([BASIC], None, False, Action.DENY),
        ([BASIC], "Basic x", True, Action.DENY),
        ([BASIC], "Bearer t", True, Action.DENY),
        ([BASIC], "bearer t", False, Action.DENY),
        ([""], "Bearer t", True, Action.DENY),
        ([""], None, True, Action.DENY),
        ([], None, True, Action.DENY),
        (["Negotiate"], None, True, Action.DENY),
        (["Bearer"], None, True, Action.DENY),
    ],
)
def test_a_refusal_is_decided_by_what_it_offers_and_what_was_sent(
    headers: list[str], sent: str | None, has_credentials: bool, action: Action
) -> None:
    decision = decide(parse_challenges(headers), sent, has_credentials)
    assert decision.action is action
    assert (decision.bearer is not None) == (action is Action.BEARER)
    assert bool(decision.reason) == (action is Action.DENY)


@given(
    headers=st.lists(st.one_of(st.text(), st.sampled_from([BEARER, BASIC, ""])), max_size=4),
    sent=st.sampled_from([None, "", "Basic x", "Bearer t", "junk"]),
    has_credentials=st.booleans(),
)
def test_credentials_are_sent_only_when_asked_for_and_never_instead_of_a_token(
    headers: list[str], sent: str | None, has_credentials: bool
) -> None:
    decision = decide(parse_challenges(headers), sent, has_credentials)
    if decision.action is Action.BASIC:
        assert has_credentials
        assert any("basic" in header.lower() for header in headers)
        assert sent not in ("Basic x", "Bearer t")


# -- what is sent ----------------------------------------------------------------------------------


async def test_nothing_is_sent_before_the_first_challenge() -> None:
    assert await Setting().headers(APP, never) == {}


async def test_a_bearer_challenge_is_answered_with_a_token_and_remembered() -> None:
    setting, service = Setting(), Service()
    assert await setting.challenged(APP, [BASIC, BEARER], None, service) == bearer("token-1")
    assert await setting.headers(APP, service) == bearer("token-1")
    assert await setting.headers("team/other", service) == bearer("token-2")
    assert setting.results == ["ok", "ok"]


async def test_the_token_request_names_service_scope_and_account() -> None:
    setting, service = Setting(), Service()
    await setting.challenged(APP, [BEARER], None, service)
    assert service.urls[0].startswith(f"{REALM}?")
    assert service.queries == [
        {
            "service": ["harbor-registry"],
            "scope": ["repository:team/app:pull"],
            "account": ["robot$pull"],
        }
    ]
    assert service.sent == [{"Authorization": ROBOT.authorization}]


async def test_what_the_realm_already_asks_stays_and_awkward_words_are_quoted() -> None:
    setting, service = Setting(), Service()
    challenge = f'Bearer realm="{REALM}?tenant=a%26b#x",service="a&scope=b c+d"'
    await setting.challenged(APP, [challenge], None, service)
    assert "#" not in service.urls[0]
    assert service.queries[0]["tenant"] == ["a&b"]
    assert service.queries[0]["service"] == ["a&scope=b c+d"]
    assert service.queries[0]["scope"] == ["repository:team/app:pull"]


@pytest.mark.parametrize("source", ["none", "empty"])
async def test_without_credentials_the_token_is_asked_for_anonymously(source: str) -> None:
    setting, service = Setting(credentials=None), Service()
    authenticator = setting.authenticator
    if source == "none":
        authenticator = Authenticator(
            name="hub",
            url="https://harbor.example.com",
            credentials=None,
            clock=setting.clock,
            on_refresh=setting.results.append,
        )
    assert await authenticator.challenged(APP, [BEARER], None, service) == bearer("token-1")
    assert service.sent == [{}]
    assert "account" not in service.queries[0]


IDENTITY = Credentials("<token>", "identity-of-the-robot")
EXCHANGE = {
    "grant_type": "refresh_token",
    "service": "harbor-registry",
    "client_id": "pullpool",
    "scope": "repository:team/app:pull",
    "refresh_token": "identity-of-the-robot",
}


async def test_an_identity_token_is_exchanged_in_the_body_of_a_post() -> None:
    setting, service = Setting(IDENTITY), Service((200, b'{"access_token":"new","scope":""}'))
    assert await setting.challenged(APP, [BEARER], None, service) == bearer("new")
    assert (service.urls, service.sent, service.forms) == ([REALM], [{}], [EXCHANGE])


@pytest.mark.parametrize(
    "answer", [(404, b""), (405, b"no"), (400, b'{"error":"unsupported_grant_type"}')]
)
async def test_where_that_is_unknown_it_goes_as_a_password_without_an_account(
    answer: tuple[int, bytes],
) -> None:
    setting, service = Setting(IDENTITY), Service(answer)
    await setting.challenged(APP, [BEARER], None, service)
    await setting.headers("team/other", service)  # for which nobody asks in vain again
    assert service.forms == [EXCHANGE, None, None]
    assert service.sent == [{}] + [{"Authorization": IDENTITY.authorization}] * 2
    assert "account" not in service.queries[1]
    setting.clock.now += WITHOUT_OAUTH
    await setting.headers("team/third", service)
    assert service.forms[3] is not None


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((400, b'{"error":"invalid_grant","refresh_token":"identity-of-the-robot"}'), Denied),
        ((401, b"identity-of-the-robot"), Denied),
        ((403, b""), Denied),
        ((400, b'{"error":"invalid_scope"}'), Denied),
        ((400, b'{"error":"invalid_request"}'), TokenServiceFailed),
        ((400, b'{"error":["invalid_grant"]}'), TokenServiceFailed),
        ((302, b""), TokenServiceFailed),
        ((503, b""), TokenServiceFailed),
    ],
)
async def test_a_refused_exchange_is_not_tried_in_another_way_and_quotes_no_secret(
    answer: tuple[int, bytes], error: type[Exception]
) -> None:
    setting, service = Setting(IDENTITY), Service(answer)
    with pytest.raises(error) as caught:
        await setting.challenged(APP, [BEARER], None, service)
    assert "identity-of" not in f"{caught.value!r} {caught.value} {setting.authenticator!r}"
    assert len(service.urls) == 1


@pytest.mark.parametrize("answer", [(401, b""), (400, b'{"error":"invalid_grant"}')])
async def test_an_identity_token_that_was_refused_is_not_shown_again_for_a_while(
    answer: tuple[int, bytes],
) -> None:
    setting = Setting(IDENTITY)
    with pytest.raises(Denied):
        await setting.challenged(APP, [BEARER], None, Service(answer))
    with pytest.raises(Denied, match="just refused"):
        await setting.headers("team/other", never)


async def test_an_identity_token_is_not_shown_to_a_foreign_realm() -> None:
    setting = Setting(IDENTITY)
    foreign = 'Bearer realm="https://evil.example.net/token",service="x"'
    with pytest.raises(RealmRefused):
        await setting.challenged(APP, [foreign], None, never)


async def test_a_basic_challenge_makes_every_request_carry_the_credentials() -> None:
    setting = Setting()
    basic = {"Authorization": ROBOT.authorization}
    assert await setting.challenged(APP, [BASIC], None, never) == basic
    assert await setting.headers("team/other", never) == basic
    setting.source.now = Credentials("robot", "rotated")
    assert await setting.headers(APP, never) == {
        "Authorization": Credentials("robot", "rotated").authorization
    }
    setting.source.now = None
    assert await setting.headers(APP, never) == {}


async def test_an_upstream_may_change_from_basic_to_bearer() -> None:
    setting, service = Setting(), Service()
    await setting.challenged(APP, [BASIC], None, never)
    sent = ROBOT.authorization
    assert await setting.challenged(APP, [BEARER], sent, service) == bearer("token-1")
    assert await setting.headers(APP, never) == bearer("token-1")


async def test_credentials_that_cannot_be_read_are_an_error() -> None:
    setting = Setting()
    setting.source.now = CredentialsUnavailable("cannot read /x")
    with pytest.raises(CredentialsUnavailable):
        await setting.challenged(APP, [BEARER], None, never)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("challenges", "sent"),
    [
        ([], "Bearer t"),
        ([""], "Bearer t"),
        ([BASIC], ROBOT.authorization),
        (["Negotiate"], None),
    ],
)
async def test_a_refusal_without_a_way_out_is_a_denial(
    challenges: list[str], sent: str | None
) -> None:
    setting, service = Setting(), Service()
    learned = await setting.challenged(APP, [BEARER], None, service)
    with pytest.raises(Denied) as caught:
        await setting.challenged(APP, challenges, sent, never)
    assert caught.value.status == 403
    assert "WWW-Authenticate" not in caught.value.headers
    assert ROBOT.authorization not in str(caught.value)
    # Nothing has been unlearned by it.
    assert await setting.headers(APP, never) == learned


async def test_a_basic_challenge_to_a_token_is_answered_with_a_new_token() -> None:
    """Harbor says so to a token that is out of date, and when it is too busy to look."""
    setting, service = Setting(), Service()
    learned = await setting.challenged(APP, [BEARER], None, service)
    renewed = await setting.challenged(APP, [BASIC], learned["Authorization"], service)
    assert renewed["Authorization"].startswith("Bearer ")
    assert renewed != learned


async def test_basic_without_credentials_says_that_some_are_needed() -> None:
    with pytest.raises(Denied, match="none are configured"):
        await Setting(credentials=None).challenged(APP, [BASIC], None, never)


async def test_a_refused_password_that_was_replaced_meanwhile_is_no_denial() -> None:
    setting = Setting()
    await setting.challenged(APP, [BASIC], None, never)
    setting.source.now = Credentials("robot", "rotated")
    found = await setting.challenged(APP, [BASIC], ROBOT.authorization, never)
    assert found == {"Authorization": Credentials("robot", "rotated").authorization}


async def test_a_foreign_realm_sees_no_request_and_is_not_learned() -> None:
    setting = Setting()
    foreign = 'Bearer realm="https://evil.example.net/token?pw=",service="x"'
    with pytest.raises(RealmRefused, match=r"evil\.example\.net") as caught:
        await setting.challenged(APP, [foreign], None, never)
    assert caught.value.status == 502
    assert await setting.headers(APP, never) == {}


async def test_a_realm_that_is_no_url_is_refused() -> None:
    with pytest.raises(RealmRefused, match="malformed"):
        await Setting().challenged(APP, ['Bearer realm="harbor"'], None, never)


async def test_a_listed_realm_is_asked() -> None:
    setting, service = Setting(auth_realms=["auth.example.net"]), Service()
    challenge = 'Bearer realm="https://auth.example.net/token",service="x"'
    assert await setting.challenged(APP, [challenge], None, service) == bearer("token-1")


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("credentials", "who"), [(ROBOT, "configured credentials"), (None, "anonymous access")]
)
async def test_a_token_service_that_refuses_denies(
    status: int, credentials: Credentials | None, who: str
) -> None:
    setting = Setting(credentials)
    body = b'{"details":"bad password s3cr3t-of-the-robot"}'
    with pytest.raises(Denied, match=who) as caught:
        await setting.challenged(APP, [BEARER], None, Service((status, body)))
    assert "s3cr3t" not in str(caught.value)
    assert setting.results == ["denied"]


@pytest.mark.parametrize("status", [204, 302, 400, 404, 429, 500, 503])
async def test_any_other_answer_is_a_failure_of_the_token_service(status: int) -> None:
    setting = Setting()
    with pytest.raises(TokenServiceFailed, match=str(status)) as caught:
        await setting.challenged(APP, [BEARER], None, Service((status, b"s3cr3t")))
    assert caught.value.status == 502
    assert "s3cr3t" not in str(caught.value)
    assert setting.results == ["failed"]


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"token":"a\\r\\nX: y"}', b'{"token":""}'])
async def test_an_answer_without_a_usable_token_is_a_failure(body: bytes) -> None:
    setting = Setting()
    with pytest.raises(TokenServiceFailed):
        await setting.challenged(APP, [BEARER], None, Service((200, body)))
    assert setting.results == ["failed"]


async def test_a_token_without_the_access_asked_for_is_given_but_not_kept() -> None:
    useless, other = jwt(), jwt({"type": "repository", "name": "team/other", "actions": ["pull"]})
    good = jwt({"type": "repository", "name": APP, "actions": ["pull"]})
    setting, service = Setting(), Service(token(useless), token(other), token(good))
    assert await setting.challenged(APP, [BEARER], None, service) == bearer(useless)
    assert await setting.headers(APP, service) == bearer(other)
    assert await setting.headers(APP, service) == bearer(good)
    assert await setting.headers(APP, never) == bearer(good)
    assert setting.results == ["ungranted", "ungranted", "ok"]


# -- freshness -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "fresh_for"),
    [({}, 54.0), ({"expires_in": 1800}, 1790.0), ({"expires_in": 100}, 90.0)],
)
async def test_a_token_is_renewed_a_little_before_its_end(
    reply: Mapping[str, object], fresh_for: float
) -> None:
    setting, service = Setting(), Service(token("old", **reply), token("new"))
    await setting.challenged(APP, [BEARER], None, service)
    setting.clock.now += fresh_for - 0.5
    assert await setting.headers(APP, service) == bearer("old")
    setting.clock.now += 0.5
    assert await setting.headers(APP, service) == bearer("new")


async def test_a_tokens_life_counts_from_before_its_request() -> None:
    setting = Setting()
    answers = Service(token("old"), token("new"))

    async def slow(
        url: str, headers: Mapping[str, str], form: Mapping[str, str] | None = None, /
    ) -> tuple[int, bytes]:
        setting.clock.now += 30.0
        return await answers(url, headers, form)

    await setting.challenged(APP, [BEARER], None, slow)
    setting.clock.now += 24.0
    assert await setting.headers(APP, answers) == bearer("new")


@pytest.mark.parametrize(
    "failure", [(503, b""), (403, b""), UpstreamTimeout("the token service is silent")]
)
async def test_an_ageing_token_outlives_a_failed_renewal(
    failure: tuple[int, bytes] | Exception,
) -> None:
    setting = Setting()
    await setting.challenged(APP, [BEARER], None, Service(token("old")))
    setting.clock.now += 55.0
    assert await setting.headers(APP, Service(failure)) == bearer("old")
    setting.clock.now += 5.0
    with pytest.raises((Denied, TokenServiceFailed, UpstreamTimeout)):
        await setting.headers(APP, Service(failure))


async def test_a_refused_token_is_kept_when_its_renewal_fails() -> None:
    setting = Setting()
    await setting.challenged(APP, [BEARER], None, Service(token("good")))
    with pytest.raises(TokenServiceFailed):
        await setting.challenged(APP, [BEARER], "Bearer good", Service((500, b"")))
    assert await setting.headers(APP, never) == bearer("good")


async def test_a_refused_token_is_renewed() -> None:
    setting, service = Setting(), Service()
    await setting.challenged(APP, [BEARER], None, service)
    assert await setting.challenged(APP, [BEARER], "Bearer token-1", service) == bearer("token-2")
    assert await setting.headers(APP, never) == bearer("token-2")


async def test_a_refusal_of_an_older_token_than_ours_costs_no_request() -> None:
    setting, service = Setting(), Service()
    await setting.challenged(APP, [BEARER], None, service)
    assert await setting.challenged(APP, [BEARER], "Bearer ancient", never) == bearer("token-1")
    assert await setting.challenged(APP, [BEARER], None, never) == bearer("token-1")


async def test_another_account_gets_another_token() -> None:
    setting, service = Setting(), Service()
    await setting.challenged(APP, [BEARER], None, service)
    setting.source.now = Credentials("somebody", "else")
    assert await setting.headers(APP, service) == bearer("token-2")


async def test_a_token_called_expired_without_a_challenge_is_renewed() -> None:
    setting, service = Setting(), Service()
    await setting.challenged(APP, [BEARER], None, service)
    found = await setting.challenged(APP, [], "Bearer token-1", service, expired=True)
    assert found == bearer("token-2")


async def test_a_password_called_expired_is_renewed_if_there_is_a_newer_one() -> None:
    setting = Setting()
    await setting.challenged(APP, [BASIC], None, never)
    with pytest.raises(Denied):
        await setting.challenged(APP, [], ROBOT.authorization, never, expired=True)
    setting.source.now = newer = Credentials("AWS", "newer")
    found = await setting.challenged(APP, [], ROBOT.authorization, never, expired=True)
    assert found == {"Authorization": newer.authorization}


async def test_expired_before_anything_was_learned_is_a_denial() -> None:
    with pytest.raises(Denied):
        await Setting().challenged(APP, [], None, never, expired=True)


# -- single flight ---------------------------------------------------------------------------------


async def started(
    count: int, setting: Setting, service: Service
) -> list[asyncio.Task[dict[str, str]]]:
    """`count` requests challenged at once; the first leads and waits at the shut service."""
    service.open.clear()
    tasks = [
        asyncio.create_task(setting.challenged(APP, [BEARER], None, service)) for _ in range(count)
    ]
    await service.asked.acquire()
    await waiting(*tasks)
    assert len(service.urls) == 1
    return tasks


def idle(setting: Setting) -> bool:
    return repr(setting.authenticator).endswith(" 0 refreshing>")


async def test_many_challenged_at_once_make_one_request() -> None:
    setting, service = Setting(), Service()
    tasks = await started(20, setting, service)
    assert not idle(setting)
    service.open.set()
    assert await asyncio.gather(*tasks) == [bearer("token-1")] * 20
    assert len(service.urls) == 1
    assert setting.results == ["ok"]
    assert idle(setting)


async def test_other_repositories_do_not_wait() -> None:
    setting, service = Setting(), Service()
    tasks = await started(2, setting, service)
    quick = Service(token("other"))
    assert await setting.challenged("team/other", [BEARER], None, quick) == bearer("other")
    service.open.set()
    await asyncio.gather(*tasks)


async def test_a_token_that_is_not_kept_is_still_shared_by_those_who_waited() -> None:
    setting, service = Setting(), Service(token(jwt()))
    tasks = await started(5, setting, service)
    service.open.set()
    assert await asyncio.gather(*tasks) == [bearer(jwt())] * 5
    assert len(service.urls) == 1


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        ((403, b""), Denied),
        ((500, b""), TokenServiceFailed),
        (UpstreamTimeout("silent"), UpstreamTimeout),
        (ZeroDivisionError("a fault of ours"), ZeroDivisionError),
    ],
)
async def test_the_leaders_failure_is_everybodys_and_the_next_caller_works(
    failure: tuple[int, bytes] | Exception, error: type[Exception]
) -> None:
    setting, service = Setting(), Service(failure)
    tasks = await started(5, setting, service)
    service.open.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in found} == {error}
    assert len(service.urls) == 1
    assert idle(setting)
    assert await setting.challenged(APP, [BEARER], None, service) == bearer("token-2")


async def test_a_cancelled_leader_is_followed_by_one_of_its_followers() -> None:
    setting, service = Setting(), Service()
    leader, *followers = await started(5, setting, service)
    leader.cancel()
    await service.asked.acquire()
    assert leader.cancelled()
    assert (service.running, len(service.urls)) == (1, 2)
    service.open.set()
    assert await asyncio.gather(*followers) == [bearer("token-2")] * 4
    assert setting.results == ["cancelled", "ok"]
    assert idle(setting)


async def test_a_follower_leads_with_its_own_means() -> None:
    setting, first, second = Setting(), Service(), Service(token("of-the-follower"))
    (leader,) = await started(1, setting, first)
    follower = asyncio.create_task(setting.challenged(APP, [BEARER], None, second))
    await waiting(follower)
    leader.cancel()
    assert await follower == bearer("of-the-follower")
    assert len(first.urls) == 1


async def test_a_cancelled_follower_is_noticed_by_nobody() -> None:
    setting, service = Setting(), Service()
    leader, gone, stays = await started(3, setting, service)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert service.running == 1
    service.open.set()
    assert (await leader, await stays) == (bearer("token-1"), bearer("token-1"))
    assert setting.results == ["ok"]


async def test_when_all_are_cancelled_nothing_is_left_and_the_next_caller_works() -> None:
    setting, service = Setting(), Service()
    tasks = await started(5, setting, service)
    for task in tasks:
        task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in found} == {asyncio.CancelledError}
    assert (service.running, len(service.urls)) == (0, 1)
    assert setting.results == ["cancelled"]
    assert idle(setting)
    service.open.set()
    assert await setting.challenged(APP, [BEARER], None, service) == bearer("token-2")


async def test_leaders_cancelled_one_after_another_each_hand_on() -> None:
    setting, service = Setting(), Service()
    tasks = await started(4, setting, service)
    pending = list(tasks)
    for count in range(2, 5):
        # Whoever leads is found by what it holds: the others wait, so they do not run the service.
        pending.pop(0).cancel()
        await service.asked.acquire()
        assert (service.running, len(service.urls)) == (1, count)
    service.open.set()
    assert await pending[0] == bearer("token-4")
    assert setting.results == ["cancelled"] * 3 + ["ok"]
    assert idle(setting)


async def test_a_renewal_that_followers_wait_for_serves_the_old_token_when_it_fails() -> None:
    setting = Setting()
    await setting.challenged(APP, [BEARER], None, Service(token("old")))
    setting.clock.now += 55.0
    service = Service((503, b""))
    service.open.clear()
    tasks = [asyncio.create_task(setting.headers(APP, service)) for _ in range(3)]
    await service.asked.acquire()
    await waiting(*tasks)
    service.open.set()
    assert await asyncio.gather(*tasks) == [bearer("old")] * 3
    assert len(service.urls) == 1


async def test_an_authenticator_shows_its_state_and_no_secret() -> None:
    setting, service = Setting(), Service()
    start = repr(setting.authenticator)
    assert start == "<Authenticator harbor.example.com no challenge yet, 0 tokens, 0 refreshing>"
    await setting.challenged(APP, [BEARER], None, service)
    end = repr(setting.authenticator)
    assert end == "<Authenticator harbor.example.com bearer, 1 tokens, 0 refreshing>"
