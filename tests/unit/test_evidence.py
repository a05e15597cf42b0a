"""A token that grants nothing: for want of rights, or of time? What counts as evidence (D5)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.oci.errors import Denied, UpstreamBusy
from proxy.upstream.credentials import Credentials
from proxy.upstream.evidence import DOUBT, OTHERS, SECOND_LOOK, Evidence
from proxy.upstream.token_service import REFUSED_FOR
from tests.unit.test_tokens import APP, BEARER, Service, Setting, bearer, jwt, never, token

OTHER = "team/other"


def empty() -> tuple[int, bytes]:
    """What Harbor says to who may not, and to everybody when it is too busy to look."""
    return token(jwt())


def full(repository: str) -> tuple[int, bytes]:
    return token(jwt({"type": "repository", "name": repository, "actions": ["pull"]}))


class Case(Setting):
    """An authenticator that has been challenged, and what its token service says from now on."""

    @classmethod
    async def challenged_once(cls, *worked: str) -> Case:
        case = cls()
        await case.challenged(APP, [BEARER], None, Service(empty()))
        for repository in worked:
            case.authenticator.worked(repository)
        return case

    async def weigh(self, *answers: tuple[int, bytes], is_stressed: bool = False) -> Evidence:
        service = Service(*answers)
        found = await self.authenticator.weigh(APP, service, is_stressed=lambda: is_stressed)
        assert not service.answers, "it asked for less than was expected"
        return found

    def later(self, seconds: float) -> None:
        self.clock.now += seconds


async def test_the_first_look_asks_nothing_and_decides_nothing() -> None:
    case = await Case.challenged_once(OTHER)
    assert await case.weigh() is Evidence.NONE


async def test_the_second_look_is_a_denial_when_others_still_get_what_they_may() -> None:
    case = await Case.challenged_once(OTHER)
    await case.weigh()
    case.later(SECOND_LOOK)
    assert await case.weigh(empty(), empty(), full(OTHER)) is Evidence.DENIAL


async def test_it_is_an_overload_when_what_worked_fails_as_well() -> None:
    case = await Case.challenged_once(OTHER)
    await case.weigh()
    case.later(SECOND_LOOK)
    assert await case.weigh(empty(), empty(), empty()) is Evidence.OVERLOAD


async def test_it_is_an_overload_when_another_token_grants_it() -> None:
    case = await Case.challenged_once()
    await case.weigh()
    case.later(SECOND_LOOK)
    assert await case.weigh(full(APP)) is Evidence.OVERLOAD


async def test_credentials_that_get_no_token_at_all_are_wrong() -> None:
    case = await Case.challenged_once()
    await case.weigh()
    case.later(SECOND_LOOK)
    assert await case.weigh(empty(), (401, b"")) is Evidence.DENIAL


@pytest.mark.parametrize("answers", [[(500, b"")], [empty(), (500, b"")], [empty(), (429, b"")]])
async def test_a_token_service_that_does_not_decide_is_no_evidence(
    answers: list[tuple[int, bytes]],
) -> None:
    case = await Case.challenged_once(OTHER)
    await case.weigh()
    case.later(SECOND_LOOK)
    with pytest.raises(UpstreamBusy):
        await case.weigh(*answers)


async def test_credentials_that_were_refused_are_not_shown_again_for_a_while() -> None:
    """Behind the token service there may be a directory that locks accounts."""
    case = await Case.challenged_once()
    await case.weigh()
    case.later(SECOND_LOOK)
    await case.weigh(empty(), (401, b""))
    with pytest.raises(Denied):
        await case.headers(APP, never)
    case.later(REFUSED_FOR)
    assert await case.headers(APP, Service(token("new"))) == bearer("new")


async def test_a_password_that_was_refused_says_nothing_of_the_next_one() -> None:
    case = await Case.challenged_once()
    with pytest.raises(Denied):
        await case.headers(APP, Service((401, b"")))
    case.source.now = Credentials("robot$pull", "another")
    assert await case.headers(APP, Service(token("new"))) == bearer("new")


async def test_what_worked_lately_is_an_overload_at_the_first_look() -> None:
    case = await Case.challenged_once(APP)
    assert await case.weigh(empty(), empty()) is Evidence.OVERLOAD
    case.later(DOUBT)
    case.authenticator.worked(OTHER)
    assert await case.weigh(empty(), empty(), empty()) is Evidence.OVERLOAD


async def test_what_worked_lately_is_denied_if_others_are_granted_for_long_enough() -> None:
    """Rights are taken away too; bad luck does not last, and is not seen by this one only."""
    case = await Case.challenged_once(OTHER, APP)
    for _ in range(2):
        assert await case.weigh(empty(), empty(), full(OTHER)) is Evidence.NONE
        case.later(DOUBT / 2)
    assert await case.weigh(empty(), empty(), full(OTHER)) is Evidence.DENIAL
    # It is no evidence against others any more.
    assert await case.weigh(empty(), empty(), full(OTHER)) is Evidence.DENIAL


async def test_one_that_was_revoked_is_no_evidence_while_others_are_granted() -> None:
    case = await Case.challenged_once(OTHER, "team/gone")
    await case.weigh()
    case.later(SECOND_LOOK)
    assert await case.weigh(empty(), empty(), empty(), full(OTHER)) is Evidence.DENIAL
    assert await case.weigh(empty(), empty(), full(OTHER)) is Evidence.DENIAL  # it is forgotten


async def test_a_few_others_are_asked_and_the_latest_first() -> None:
    case = await Case.challenged_once(*(f"team/w{number}" for number in range(9)))
    await case.weigh()
    case.later(SECOND_LOOK)
    assert await case.weigh(empty(), empty(), full("team/w8")) is Evidence.DENIAL
    failed = (empty() for _ in range(OTHERS))
    assert await case.weigh(empty(), empty(), *failed) is Evidence.OVERLOAD


@pytest.mark.parametrize(
    ("worked", "is_stressed", "answers"),
    [
        ((), False, lambda: (empty(), empty())),
        ((OTHER,), True, lambda: (empty(), empty(), full(OTHER))),
    ],
    ids=["nothing has worked yet", "overloaded a moment ago"],
)
async def test_what_may_be_bad_luck_is_doubted_for_longer_but_not_for_ever(
    worked: tuple[str, ...], is_stressed: bool, answers: Callable[[], tuple[tuple[int, bytes], ...]]
) -> None:
    case = await Case.challenged_once(*worked)
    await case.weigh(is_stressed=is_stressed)
    case.later(SECOND_LOOK)
    assert await case.weigh(*answers(), is_stressed=is_stressed) is Evidence.NONE
    case.later(DOUBT)
    assert await case.weigh(*answers(), is_stressed=is_stressed) is Evidence.DENIAL


async def test_what_is_granted_after_a_refusal_was_refused_for_want_of_time() -> None:
    case = await Case.challenged_once(OTHER)
    await case.weigh()
    assert case.authenticator.worked(APP)
    assert not case.authenticator.worked(APP)
    assert not case.authenticator.worked(OTHER)
