"""What a node may believe of its leases, step by step."""

from proxy.fleet.ledger import Ledger, Terms

TERMS = Terms(lease=10.0, margin=2.0, hold=60.0)


def granted(most: int, now: float = 100.0, *, owned: frozenset[int] = frozenset()) -> Ledger:
    asked = Ledger(TERMS).asking(now, 0)
    return asked.answered(asked.seq, most, owned)


def test_a_call_that_is_on_its_way_has_given_up_what_it_does_not_claim() -> None:
    assert granted(5).asking(101.0, 2).allowed(101.0) == 2


def test_no_call_claims_more_than_is_leased() -> None:
    assert granted(2).asking(101.0, 5).most == 2


def test_leases_end_a_margin_before_the_directory_ends_them_counted_from_the_call() -> None:
    ledger = granted(3, 100.0)
    assert ledger.allowed(107.9) == 3
    assert ledger.allowed(108.0) == 0
    assert ledger.asking(108.0, 3).most == 0


def test_only_the_answer_to_the_latest_call_counts() -> None:
    first = granted(1).asking(101.0, 1)
    second = first.asking(102.0, 1)
    assert second.answered(first.seq, 9, ()).allowed(102.0) == 1
    assert second.answered(second.seq, 9, ()).allowed(102.0) == 9


def test_the_reserve_may_be_used_when_the_directory_was_silent_for_a_lease_time() -> None:
    ledger = granted(3, 100.0, owned=frozenset({1}))
    assert ledger.failed(105.0).allowed(109.0) == 0
    gone = ledger.failed(110.0)
    assert (gone.allowed(110.0), gone.grantable(110.0)) == (1, 1)
    assert gone.allowed(158.0) == 0  # its own time is over
    asked = gone.asking(120.0, 1)
    assert asked.most == 0  # that socket is none of the leased ones
    back = asked.answered(asked.seq, 0, {1})
    assert (back.allowed(120.0), back.grantable(120.0)) == (1, 0)
    assert back.settled(120.0, 0).allowed(120.0) == 0
