"""What a large fleet changes for its nodes."""

from hypothesis import given
from hypothesis import strategies as st

from proxy.fleet.crowd import AT_ONCE, FEW, before_first, slack


def test_a_fleet_of_usual_size_waits_no_longer() -> None:
    assert {slack(nodes) for nodes in (0, 1, 100, 1000, AT_ONCE)} == {1.0}


@given(st.integers(0, 100_000), st.integers(0, 100_000))
def test_the_more_nodes_the_longer_an_answer_may_take(one: int, other: int) -> None:
    fewer, more = sorted((one, other))
    assert 1.0 <= slack(fewer) <= slack(more)


def test_all_of_a_very_large_fleet_may_ask_at_once() -> None:
    seconds_for_each = 0.0004
    for nodes in (2500, 5000, 10_000, 20_000):
        assert nodes * seconds_for_each <= 2.0 * slack(nodes)


@given(st.integers(0, 100_000), st.floats(0, 1))
def test_only_in_a_very_large_fleet_a_node_waits_before_it_asks(nodes: int, chance: float) -> None:
    pause = before_first(nodes, chance)
    assert 0.0 <= pause <= nodes / 10_000
    assert pause == 0.0 or nodes > FEW
    assert before_first(10_000, 1.0) > 0.5
