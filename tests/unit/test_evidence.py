"""A token that grants nothing: for want of rights, or of time? What counts as evidence (D5)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.oci.errors import Denied, UpstreamBusy
from proxy.upstream.credentials import Credentials
from proxy.upstream.evidence import BARREN, BARREN_ROUNDS, DOUBT, OTHERS, SECOND_LOOK, Evidence
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

    async def weigh(
        self, *answers: tuple[int, bytes], is_stressed: bool = False, is_quiet: bool = False
    ) -> Evidence:
        service = Service(*answers)
        found = await self.authenticator.weigh(
            APP, service, is_stressed=lambda: is_stressed, is_quiet=lambda: is_quiet
        )
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
    assert await case.weigh(empty(), empty(), full(OTHER), empty()) is Evidence.DENIAL


async def test_but_not_if_it_gets_it_too_after_them() -> None:
    """Transfers may have ended between its refusal and the others' grant."""
    case = await Case.challenged_once(OTHER)
    await case.weigh()
    case.later(DOUBT)
    found = await case.weigh(empty(), empty(), full(OTHER), full(APP))
    assert found is Evidence.OVERLOAD


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
    assert await case.weigh(empty(), empty(), full(OTHER), empty()) is Evidence.DENIAL
    # It is no evidence against others any more.
    assert await case.weigh(empty(), empty(), full(OTHER), empty()) is Evidence.DENIAL


async def test_one_that_was_revoked_is_no_evidence_while_others_are_granted() -> None:
    case = await Case.challenged_once(OTHER, "team/gone")
    await case.weigh()
    case.later(SECOND_LOOK)
    assert await case.weigh(empty(), empty(), empty(), full(OTHER), empty()) is Evidence.DENIAL
    # It is forgotten.
    assert await case.weigh(empty(), empty(), full(OTHER), empty()) is Evidence.DENIAL


async def test_a_few_others_are_asked_and_the_latest_first() -> None:
    case = await Case.challenged_once(*(f"team/w{number}" for number in range(9)))
    await case.weigh()
    case.later(SECOND_LOOK)
    assert await case.weigh(empty(), empty(), full("team/w8"), empty()) is Evidence.DENIAL
    failed = (empty() for _ in range(OTHERS))
    assert await case.weigh(empty(), empty(), *failed) is Evidence.OVERLOAD


@pytest.mark.parametrize(
    ("worked", "is_stressed", "answers", "once_more"),
    [
        ((), False, lambda: (empty(), empty()), ()),
        ((OTHER,), True, lambda: (empty(), empty(), full(OTHER)), (empty(),)),
    ],
    ids=["nothing has worked yet", "overloaded a moment ago"],
)
async def test_what_may_be_bad_luck_is_doubted_for_longer_but_not_for_ever(
    worked: tuple[str, ...],
    is_stressed: bool,
    answers: Callable[[], tuple[tuple[int, bytes], ...]],
    once_more: tuple[tuple[int, bytes], ...],
) -> None:
    case = await Case.challenged_once(*worked)
    await case.weigh(is_stressed=is_stressed)
    case.later(SECOND_LOOK)
    assert await case.weigh(*answers(), is_stressed=is_stressed) is Evidence.NONE
    case.later(DOUBT)
    found = await case.weigh(*answers(), *once_more, is_stressed=is_stressed)
    assert found is Evidence.DENIAL


async def test_what_is_granted_after_a_refusal_was_refused_for_want_of_time() -> None:
    case = await Case.challenged_once(OTHER)
    await case.weigh()
    assert case.authenticator.worked(APP)
    assert not case.authenticator.worked(APP)
    assert not case.authenticator.worked(OTHER)


async def in_quiet(case: Case, *, rounds: int, **manners: bool) -> list[Evidence]:
    """So many rounds, over the time after which nothing is a witness any more."""
    found = []
    for number in range(rounds):
        if number:
            case.later(BARREN / (rounds - 1))
        found.append(await case.weigh(empty(), empty(), empty(), is_quiet=True, **manners))
    return found


async def doubted(*worked: str) -> Case:
    case = await Case.challenged_once(*worked)
    await case.weigh()
    case.later(SECOND_LOOK)
    return case


async def test_what_fails_in_quiet_for_long_enough_was_revoked_and_is_no_witness_any_more() -> None:
    case = await doubted(OTHER)
    *before, last = await in_quiet(case, rounds=BARREN_ROUNDS)
    assert set(before) == {Evidence.NONE}
    assert last is Evidence.REVOKED
    assert not case.authenticator.worked(OTHER)  # by an old token, which proves nothing now
    assert await case.weigh(empty(), empty()) is Evidence.DENIAL


async def test_the_only_one_that_worked_is_denied_when_it_fails_in_quiet_for_long_enough() -> None:
    case = await Case.challenged_once(APP)
    for _ in range(BARREN_ROUNDS - 1):
        assert await case.weigh(empty(), empty(), is_quiet=True) is Evidence.NONE
        case.later(BARREN / (BARREN_ROUNDS - 1))
    assert await case.weigh(empty(), empty(), is_quiet=True) is Evidence.REVOKED
    assert await case.weigh(empty(), empty()) is Evidence.DENIAL


async def test_when_all_were_revoked_the_rest_of_them_need_no_time_of_their_own() -> None:
    case = await doubted(*(f"team/w{number}" for number in range(2 * OTHERS)))
    for _ in range(BARREN_ROUNDS - 1):
        await case.weigh(*(empty() for _ in range(2 + OTHERS)), is_quiet=True)
        case.later(BARREN / (BARREN_ROUNDS - 1))
    found = await case.weigh(*(empty() for _ in range(2 + OTHERS)), is_quiet=True)
    assert found is Evidence.REVOKED
    assert await case.weigh(*(empty() for _ in range(2 + OTHERS))) is Evidence.REVOKED


async def test_few_rounds_or_little_time_are_not_enough() -> None:
    case = await doubted(OTHER)
    assert set(await in_quiet(case, rounds=BARREN_ROUNDS - 1)) == {Evidence.NONE}
    case = await doubted(OTHER)
    for _ in range(2 * BARREN_ROUNDS):
        assert await case.weigh(*[empty()] * 3, is_quiet=True) is Evidence.NONE


async def test_while_others_of_ours_are_under_way_it_stays_an_overload() -> None:
    case = await doubted(OTHER)
    for _ in range(3 * BARREN_ROUNDS):
        assert await case.weigh(empty(), empty(), empty()) is Evidence.OVERLOAD
        case.later(BARREN)


async def test_another_sign_of_an_overload_voids_what_was_found_in_quiet() -> None:
    case = await doubted(OTHER)
    assert set(await in_quiet(case, rounds=BARREN_ROUNDS - 1)) == {Evidence.NONE}
    found = await in_quiet(case, rounds=2 * BARREN_ROUNDS, is_stressed=True)
    assert set(found) == {Evidence.OVERLOAD}
    assert set(await in_quiet(case, rounds=BARREN_ROUNDS - 1)) == {Evidence.NONE}


async def test_a_grant_in_between_voids_it_too() -> None:
    case = await doubted(OTHER)
    assert set(await in_quiet(case, rounds=BARREN_ROUNDS - 1)) == {Evidence.NONE}
    await case.headers("team/third", Service(full("team/third")))
    case.later(BARREN)
    assert set(await in_quiet(case, rounds=BARREN_ROUNDS - 1)) == {Evidence.NONE}


async def test_what_is_granted_anew_is_a_witness_again() -> None:
    case = await doubted(OTHER)
    await in_quiet(case, rounds=BARREN_ROUNDS)
    await case.headers(OTHER, Service(full(OTHER)))
    case.authenticator.worked(OTHER)
    assert await case.weigh(empty(), empty(), empty()) is Evidence.OVERLOAD
