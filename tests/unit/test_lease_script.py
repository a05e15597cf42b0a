"""What the directory decides, call by call, at the test's own time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import redis

from proxy.fleet.lease_call import Call, CapNews, Granted, reserve_of
from proxy.fleet.ledger import Terms
from tests.unit.lease_kit import Desk
from tests.unit.redis_kit import Server, needs_redis

pytestmark = needs_redis

TERMS = Terms(lease=10.0, margin=2.0, hold=60.0)


@pytest.fixture
def port(shared_redis: Server) -> int:
    return shared_redis.port


class Talk:
    """Nodes that call, each with the right number, and hold what they were given."""

    def __init__(self, desk: Desk, cap: int) -> None:
        self.desk = desk
        self.cap = cap
        self.seqs: dict[str, int] = {}
        self.held: dict[str, int] = {}
        self.owned: dict[str, frozenset[int]] = {}

    def call(self, node: str, want: int, *, held: int | None = None, **more: object) -> Granted:
        """What ``node`` is told that wants so much and has what it was given, or ``held``."""
        self.seqs[node] = self.seqs.get(node, 0) + 1
        held = self.held.get(node, 0) if held is None else held
        owned = self.owned.get(node, frozenset())
        news, metadata = CapNews(limit=self.cap), 0
        call = Call(
            node, self.seqs[node], self.cap, reserve_of(self.cap), held, want, metadata, news, owned
        )
        granted = self.desk.call(replace(call, **more), TERMS)  # type: ignore[arg-type]
        assert granted is not None
        self.held[node], self.owned[node] = granted.most, granted.owned
        return granted

    def wait(self, seconds: float) -> None:
        """Somebody else calls all the time."""
        while seconds > 0:
            step = min(seconds, TERMS.tick)
            self.desk.wall += step
            seconds -= step
            self.call("bystander", 0)

    def settle(self) -> None:
        self.call("bystander", 0)
        self.wait(TERMS.lease + TERMS.lag)


@pytest.fixture
def client(port: int) -> Iterator[redis.Redis]:
    client = redis.Redis(port=port, protocol=2)
    try:
        yield client
    finally:
        client.close()


def talk(client: redis.Redis, cap: int, *, is_settled: bool = True) -> Talk:
    found = Talk(Desk(client), cap)
    if is_settled:
        found.settle()
    return found


def test_a_new_epoch_grants_nothing_for_a_lease_time(client: redis.Redis) -> None:
    here = talk(client, 3, is_settled=False)
    first = here.call("a", 3)
    assert (first.most, first.calm) == (0, TERMS.lease + TERMS.lag)
    here.wait(TERMS.lease + TERMS.lag - 0.1)
    assert here.call("a", 3).most == 0
    here.wait(0.2)
    assert here.call("a", 3).most == 3


@pytest.mark.parametrize("how", ["flushed", "restarted", "failed over"])
def test_who_holds_leases_is_entered_again_by_another_server(client: redis.Redis, how: str) -> None:
    here = talk(client, 4)
    old = here.desk.state()
    assert here.call("a", 2).most == 2
    if how == "flushed":
        here.desk.flush()
    else:
        here.desk.replace(old if how == "failed over" else None)
    assert here.call("b", 3).most == 0
    assert here.call("a", 3).most == 2
    here.wait(TERMS.lease + TERMS.lag)
    here.call("a", 2)
    assert here.call("b", 3, metadata=1).most == 1  # the rest; one is the reserve


def test_a_claim_of_nobody_knows_what_is_worth_nothing_in_a_settled_epoch(
    client: redis.Redis,
) -> None:
    here = talk(client, 3)
    assert here.call("a", 0, held=3).most == 0


def test_a_call_that_a_later_one_has_overtaken_changes_nothing(client: redis.Redis) -> None:
    here = talk(client, 3)
    assert here.call("a", 3).most == 3
    before = here.desk.state()
    late = Call("a", 1, 3, 0, held=0, want=0, metadata=0, news=CapNews(limit=3))
    assert here.desk.call(late, TERMS) is None
    assert here.desk.state() == before


def test_shares_are_equal_and_what_nobody_wants_goes_to_who_wants_it(client: redis.Redis) -> None:
    here = talk(client, 13)  # one is the reserve, one is kept
    assert here.call("greedy", 500).most == 11
    assert here.call("modest", 3).most == 0
    told = here.call("greedy", 500)
    assert told.keep == 9  # three are wanted, of which one would be the last one
    assert here.call("greedy", 500, held=9).most == 9
    assert here.call("modest", 3).most == 2


def test_nobody_with_five_hundred_waiting_gets_more_than_one_with_five(
    client: redis.Redis,
) -> None:
    here = talk(client, 9)
    assert here.call("greedy", 500).most == 7
    here.call("modest", 5)
    assert here.call("greedy", 500).keep == 4
    here.call("greedy", 500, held=4)
    assert here.call("modest", 5).most == 3  # one is kept for metadata
    assert here.call("modest", 5, metadata=1).most == 4


def test_idle_leases_go_to_who_can_use_them(client: redis.Redis) -> None:
    here = talk(client, 3)
    here.call("a", 3)
    assert here.call("a", 0).keep == 3  # nobody wants them
    here.call("b", 2)
    assert here.call("a", 0).keep == 1
    here.call("a", 0, held=1)
    assert here.call("b", 2).most == 2


def test_one_lease_goes_round_among_those_that_want_it(client: redis.Redis) -> None:
    here = talk(client, 1)
    order = []
    assert here.call("a", 9).most == 1
    for node in "bc":
        assert here.call(node, 9).most == 0
    assert here.call("a", 9).keep == 1  # not yet
    for _ in range(6):
        holder = next(node for node in "abc" if here.held[node])
        order.append(holder)
        here.wait(TERMS.quantum)
        assert here.call(holder, 9).keep == 0
        assert here.call(holder, 9, held=0).most == 0
        for node in "abc":
            here.call(node, 9)
        assert sum(here.held[node] for node in "abc") == 1
    assert order == list("abcabc")


def test_the_last_lease_is_for_metadata(client: redis.Redis) -> None:
    here = talk(client, 5)
    assert here.call("a", 9).most == 3
    told = here.call("b", 1, metadata=1)
    assert (told.most, told.bulk) == (1, 0)
    assert here.call("c", 1, metadata=1).most == 0


def test_leases_that_are_not_renewed_end(client: redis.Redis) -> None:
    here = talk(client, 2)
    here.call("a", 2)
    here.wait(TERMS.lease - 0.1)
    assert here.call("b", 2).most == 0
    here.wait(0.2)
    assert here.call("b", 2).most == 2


def test_a_clock_that_is_set_forward_ends_no_lease(client: redis.Redis) -> None:
    here = talk(client, 2)
    here.call("a", 2)
    here.desk.wall += 86_400
    assert here.call("b", 2).most == 0
    here.desk.wall -= 86_400
    assert here.call("b", 2).most == 0


def test_a_fleet_of_more_nodes_than_rows_stands_in_line_and_everybody_gets_on(
    client: redis.Redis,
) -> None:
    here = talk(client, 1)
    nodes = [f"node-{number}" for number in range(150)]
    served: set[str] = set()
    for _ in range(400):
        if len(served) == len(nodes):
            break
        for node in nodes:
            if node in served and not here.held.get(node):
                continue
            told = here.call(node, 1)
            if told.most:
                served.add(node)
                here.call(node, 0, held=0)
        here.wait(1.0)
    assert len(served) == len(nodes)


def test_the_first_to_tell_of_an_overload_is_heard_and_the_others_meant_the_same(
    client: redis.Redis,
) -> None:
    here = talk(client, 8)
    version = here.call("a", 1).version
    here.call("b", 1)
    lower = CapNews(version, limit=4, ceiling=8, is_changed=True)
    told = here.call("a", 1, news=lower)
    assert (told.limit, told.ceiling) == (4, 8)
    assert here.call("b", 1, news=lower).limit == 4
    again = replace(lower, base=told.version, limit=2, ceiling=4)
    assert here.call("b", 1, news=again).limit == 2


def test_a_lower_cap_is_made_room_for(client: redis.Redis) -> None:
    here = talk(client, 3)
    version = here.call("a", 3).version
    told = here.call("a", 3, news=CapNews(version, limit=1, is_changed=True))
    assert (told.most, told.keep) == (3, 1)


def test_the_cap_grows_by_one_on_the_successes_of_all(client: redis.Redis) -> None:
    here = talk(client, 8)
    version = here.call("a", 1).version
    lower = CapNews(version, limit=2, ceiling=4, is_changed=True)
    version = here.call("a", 1, news=lower).version
    went_well = CapNews(version, went_well=3, needed=4)
    assert here.call("a", 1, news=went_well).limit == 2
    assert here.call("b", 1, news=replace(went_well, base=version - 1)).limit == 2
    told = here.call("b", 1, news=replace(went_well, went_well=100))
    assert (told.limit, told.ceiling) == (3, 4)


def test_a_part_of_the_reserve_has_one_owner_until_its_time_is_over(client: redis.Redis) -> None:
    here = talk(client, 4)
    here.wait(TERMS.hold)
    assert here.call("a", 0, may_own=True).owned == {1}
    assert here.call("b", 0, may_own=True).owned == set()
    here.wait(TERMS.hold - 1)
    assert here.call("b", 0, may_own=True).owned == set()
    assert here.call("a", 0).owned == {1}  # renewed
    here.desk.replace()
    here.wait(20)
    assert here.call("b", 0, may_own=True).owned == set()
    assert here.call("a", 0).owned == {1}  # entered again
    here.call("a", 0, leaves=True)
    here.wait(TERMS.hold)
    assert here.call("b", 0, may_own=True).owned == {1}


def test_permits_come_at_the_rate_whoever_asks(client: redis.Redis) -> None:
    here = talk(client, 3)
    here.call("a", 1, permits=0, rate=10.0, burst=10.0)
    got = here.call("a", 1, permits=100, rate=10.0, burst=10.0).permits
    assert got == 10
    assert here.call("b", 1, permits=100, rate=10.0, burst=10.0).permits == 0
    here.desk.wall += 1.0
    got = here.call("b", 1, permits=100, rate=10.0, burst=10.0).permits
    got += here.call("a", 1, permits=100, rate=10.0, burst=10.0).permits
    assert got == 10
