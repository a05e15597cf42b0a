"""What a flight makes of failures: whom it asks next, how long it goes on, whose "no" is final."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.errors import (
    Denied,
    NotFound,
    PullError,
    QueueFull,
    Throttled,
    TokenServiceFailed,
    UpstreamBusy,
    UpstreamDown,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.pull.sources import BROKEN_SECONDS, LATE_TRIES, TRIES, WAIT_SECONDS, Sources, Verdict
from tests.unit.flight_kit import ScriptedSource

AGAIN, REFUSED, FAILED = Verdict.TRY_AGAIN, Verdict.REFUSED, Verdict.FAILED

OWN: list[Callable[[], PullError]] = [
    UpstreamUnavailable,
    UpstreamTimeout,
    TokenServiceFailed,
]
WAITS: list[Callable[[], PullError]] = [UpstreamDown, UpstreamBusy, QueueFull, Throttled]


def one_source(*, named: bool = True) -> tuple[Sources, ScriptedSource]:
    sources, source = Sources(), ScriptedSource(b"x")
    sources.add(source, named=named)
    return sources, source


def test_a_repository_has_one_source_until_it_is_refused() -> None:
    sources, source = one_source()
    assert sources.find(source.key) is source
    assert sources.add(ScriptedSource(b"x"), named=False) is source
    assert sources.find(("up", "another/repository")) is None
    sources.drop(source)
    assert sources.find(source.key) is None


@pytest.mark.parametrize("first", [UpstreamBusy(), UpstreamDown(), QueueFull(), Throttled()])
def test_waits_do_not_use_up_the_tries_of_a_flight_that_has_begun(first: PullError) -> None:
    sources, source = one_source()
    for second in range(100):
        assert sources.judge(source, first, float(second), has_begun=True) is AGAIN
    assert sources.judge(source, UpstreamUnavailable(), 101.0, has_begun=True) is AGAIN


def test_a_newcomer_of_a_busy_upstream_still_has_all_its_tries() -> None:
    sources, source = one_source()
    for second in range(100):
        assert sources.judge(source, UpstreamBusy(), float(second), has_begun=False) is AGAIN
    for _ in range(TRIES - 1):
        assert sources.judge(source, UpstreamUnavailable(), 101.0, has_begun=False) is AGAIN
    assert sources.judge(source, UpstreamUnavailable(), 101.0, has_begun=False) is FAILED


def test_what_is_late_is_counted_apart() -> None:
    sources, source = one_source()
    for _ in range(TRIES):
        sources.judge(source, UpstreamBusy(), 0.0, has_begun=False)
    for _ in range(LATE_TRIES - 1):
        assert sources.judge(source, NotFound("blob"), 0.0, has_begun=False) is AGAIN
    assert sources.judge(source, NotFound("blob"), 0.0, has_begun=False) is REFUSED


def test_a_source_that_is_only_busy_keeps_a_newcomer_when_the_other_is_down() -> None:
    sources = Sources()
    busy, down = (ScriptedSource(b"x", repository=name) for name in ("a/a", "b/b"))
    sources.add(busy, named=True)
    sources.add(down, named=True)
    assert sources.judge(busy, UpstreamBusy(), 0.0, has_begun=False) is AGAIN
    assert sources.judge(down, UpstreamDown(), 0.0, has_begun=False) is AGAIN
    assert sources.judge(busy, UpstreamDown(), 0.0, has_begun=False) is FAILED


@pytest.mark.parametrize("has_begun", [True, False])
@pytest.mark.parametrize("before", [*OWN, *WAITS])
def test_a_no_is_final_however_late_it_comes(
    before: Callable[[], PullError], has_begun: bool
) -> None:
    sources, source = one_source(named=False)
    for second in range(TRIES - 1):
        sources.judge(source, before(), float(second), has_begun=has_begun)
    assert sources.judge(source, Denied(), 500.0, has_begun=has_begun) is REFUSED
    assert sources.judge(source, NotFound("blob"), 500.0, has_begun=has_begun) is REFUSED


STEPS = st.lists(
    st.tuples(st.sampled_from([*OWN, *WAITS]), st.floats(0.01, 40.0)), min_size=1, max_size=120
)


@given(STEPS, st.integers(0, 120))
def test_a_flight_ends_when_its_failures_say_so_and_no_sooner(
    steps: list[tuple[Callable[[], PullError], float]], begins: int
) -> None:
    """Against the rule in words, looked up in all that has happened."""
    sources, source = one_source()
    now, past = 0.0, list[tuple[float, bool]]()  # when, and whether it was of its own
    for number, (error_type, seconds) in enumerate(steps):
        now, has_begun = now + seconds, number >= begins
        error = error_type()
        is_own = error_type in OWN or (error_type is Throttled and not has_begun)
        past.append((now, is_own))
        verdict = sources.judge(source, error, now, has_begun=has_begun)

        own = sum(one for _, one in past)
        waited = max((when for when, one in past if not one), default=-1.0)
        row = [when for when, _ in past if when > waited]
        if now - past[0][0] >= WAIT_SECONDS:
            expected = FAILED
        elif not has_begun:
            gone = error_type in (UpstreamDown, QueueFull) or own >= TRIES
            expected = FAILED if gone else AGAIN
        else:
            lasted = now - row[0] if row else 0.0
            expected = FAILED if own >= TRIES and lasted >= BROKEN_SECONDS else AGAIN
        assert verdict is expected
        if verdict is FAILED:
            break
    else:
        sources.went_on()
        assert sources.tries(source) == 0
        assert sources.judge(source, UpstreamUnavailable(), now, has_begun=True) is AGAIN
