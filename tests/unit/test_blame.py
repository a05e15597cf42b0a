"""A repository that is broken by itself, told from an origin that has too much to do."""

from __future__ import annotations

from proxy.upstream.blame import KEPT, LATELY, Blame


def test_it_fails_by_itself_once_another_was_answered_between_two_failures() -> None:
    blame = Blame()
    assert not blame.failed("bad", 1.0, sent_at=0.9)
    assert not blame.failed("bad", 2.0, sent_at=1.9)
    blame.answered("good", 3.0, sent_at=2.9)
    assert blame.failed("bad", 4.0, sent_at=3.9)
    assert blame.failed("bad", 5.0, sent_at=4.9)


def test_nobody_fails_by_itself_while_nobody_else_is_answered() -> None:
    blame = Blame()
    assert not any(blame.failed(f"r{n % 3}", float(n), sent_at=n - 0.1) for n in range(1, 50))


def test_its_own_answer_ends_it() -> None:
    blame = Blame()
    blame.failed("app", 1.0, sent_at=0.9)
    blame.answered("other", 2.0, sent_at=1.9)
    assert blame.fails_by_itself("app", 2.0)
    blame.answered("app", 3.0, sent_at=2.9)
    assert not blame.fails_by_itself("app", 3.0)
    assert not blame.failed("app", 4.0, sent_at=3.9)


def test_an_answer_to_what_was_sent_before_the_failure_is_no_evidence() -> None:
    """Of eight requests at once some are answered and some are not: that is an overload."""
    blame = Blame()
    blame.failed("app", 1.0, sent_at=0.5)
    blame.answered("other", 1.2, sent_at=0.6)
    assert not blame.failed("app", 1.3, sent_at=0.7)
    assert not blame.failed("app", 2.0, sent_at=1.9)


def test_a_failure_of_the_same_burst_is_no_second_one() -> None:
    blame = Blame()
    blame.failed("app", 1.0, sent_at=0.5)
    blame.answered("other", 1.2, sent_at=1.1)
    assert not blame.failed("app", 1.3, sent_at=0.6)


def test_when_nobody_else_is_answered_any_more_it_speaks_for_the_origin_again() -> None:
    blame = Blame()
    blame.failed("bad", 1.0, sent_at=0.9)
    blame.answered("good", 2.0, sent_at=1.9)
    assert blame.fails_by_itself("bad", 2.0 + LATELY)
    assert not blame.fails_by_itself("bad", 2.1 + LATELY)
    assert not blame.failed("bad", 100.0, sent_at=99.0)
    blame.answered("good", 101.0, sent_at=100.5)
    assert blame.failed("bad", 102.0, sent_at=101.5)


def test_what_it_remembers_is_bounded() -> None:
    blame = Blame()
    for number in range(KEPT + 10):
        blame.failed(f"r{number}", 1.0, sent_at=0.9)
    blame.answered("good", 2.0, sent_at=1.9)
    assert repr(blame) == f"<Blame {KEPT} repositories fail>"
    assert not blame.fails_by_itself("r0", 2.0)
    assert blame.fails_by_itself(f"r{KEPT}", 2.0)
