"""Whatever happens to nodes, calls and servers: the sockets that nodes believe they may have never
exceed the cap. The directory's part is the real script in a real server, at the test's own time."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from proxy.fleet.lease_call import Call, CapNews, Granted, reserve_of
from proxy.fleet.ledger import Ledger, Terms
from tests.unit.lease_kit import Desk, plain_call
from tests.unit.redis_kit import Server, needs_redis

pytestmark = needs_redis

TERMS = Terms(lease=10.0, margin=2.0, hold=60.0)
#: So long after its deadline a node may still be aborting its sockets.
LATE = 0.2 * TERMS.margin
NODES = 3
CAPS = (1, 2, 4, 33)

#: Lives of a fleet that are tried.
EXAMPLES = 100

nodes = st.integers(0, NODES - 1)


@dataclass
class Node:
    """A node: its clock, what it believes, and the sockets that it has."""

    name: str
    offset: float
    speed: float
    ledger: Ledger = field(default_factory=lambda: Ledger(TERMS))
    sockets: int = 0
    want: int = 20
    asked: int | None = None  # the call that is waited for


class Fleet(RuleBasedStateMachine):
    """Nodes, one origin's leases, and everything in between that can go wrong."""

    port = 0

    def __init__(self) -> None:
        super().__init__()
        self.client = redis.Redis(port=self.port, protocol=2)
        self.desk = Desk(self.client)
        self.now = 0.0
        self.jumped_at = float("-inf")
        self.nodes: list[Node] = []
        self.calls: list[tuple[int, Call]] = []
        self.answers: list[tuple[int, int, Granted | None]] = []
        self.saved = self.desk.state()
        self.bystander = 0

    def teardown(self) -> None:
        self.desk.flush()
        self.client.close()

    @initialize(
        cap=st.sampled_from(CAPS),
        offsets=st.lists(st.floats(-1e6, 1e6), min_size=NODES, max_size=NODES),
        speeds=st.lists(st.floats(0.995, 1.005), min_size=NODES, max_size=NODES),
        is_calm=st.booleans(),
    )
    def begin(self, cap: int, offsets: list[float], speeds: list[float], is_calm: bool) -> None:
        self.cap = cap
        for number, (offset, speed) in enumerate(zip(offsets, speeds, strict=True)):
            self.nodes.append(Node(f"node-{number}", offset, speed))
        if not is_calm:  # the first epoch is over
            self.pass_in_steps(80.0)

    def pass_in_steps(self, seconds: float) -> None:
        """Time passes while a bystander calls, so that the directory's clock goes on."""
        left = seconds
        while left > 0:
            step = min(left, TERMS.tick)
            self.pass_time(step)
            left -= step
            self.bystander += 1
            call = plain_call("bystander", self.bystander, cap=self.cap)
            self.desk.call(call, TERMS)

    def make_call(self, node: Node) -> Call:
        return Call(
            node.name,
            node.ledger.seq,
            self.cap,
            reserve_of(self.cap),
            held=node.ledger.most,
            want=node.want,
            metadata=node.want % 2,
            news=CapNews(limit=self.cap),
            owned=node.ledger.claims_reserve(self.clock(node)),
            may_own=True,
        )

    def clock(self, node: Node) -> float:
        return node.offset + node.speed * self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.desk.wall += seconds
        for node in self.nodes:
            node.sockets = min(node.sockets, node.ledger.allowed(self.clock(node)))

    # -- time and sockets ------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.05, 1.0, 7.9, 10.1]))
    def wait(self, seconds: float) -> None:
        """Nobody calls."""
        self.pass_time(seconds)

    @rule(seconds=st.sampled_from([2.5, 7.7, 8.2, 9.0, 10.2, 12.1, 13.0, 30.0, 70.0]))
    def wait_while_others_call(self, seconds: float) -> None:
        self.pass_in_steps(seconds)

    @precondition(lambda self: self.now - self.jumped_at > TERMS.hold)
    @rule(seconds=st.sampled_from([-4000.0, -3.0, 0.5, 5.0, 11.0, 4000.0]))
    def set_the_clock_of_the_server(self, seconds: float) -> None:
        self.desk.wall += seconds
        self.jumped_at = self.now

    @rule(number=nodes, want=st.sampled_from([0, 1, 20]), used=st.sampled_from([0, 1, 20]))
    def use(self, number: int, want: int, used: int) -> None:
        """Sockets are opened and closed, as far as the node believes that it may."""
        node = self.nodes[number]
        node.want = want
        self.open(node, used)

    def open(self, node: Node, used: int) -> None:
        node.sockets = min(used, node.ledger.grantable(self.clock(node)))
        node.ledger = node.ledger.settled(self.clock(node), node.sockets)

    # -- calls -----------------------------------------------------------------------------

    @rule(number=nodes)
    def ask(self, number: int) -> None:
        node = self.nodes[number]
        if node.asked is not None:
            return
        now = self.clock(node)
        node.ledger = node.ledger.asking(now, node.sockets)
        node.asked = node.ledger.seq
        self.calls.append((number, self.make_call(node)))

    @rule(number=nodes, seconds=st.sampled_from([0.0, 1.0]))
    def ask_and_hear(self, number: int, seconds: float) -> None:
        """The usual case, which leads to states in which the others matter."""
        if self.nodes[number].asked is not None:
            self.give_up(number)
        self.ask(number)
        self.arrive(-1)
        self.pass_time(seconds)
        self.hear(-1)

    @rule()
    def all_ask_and_hear(self) -> None:
        for number in range(NODES):
            self.ask_and_hear(number, 0.0)

    @rule(number=nodes)
    def give_up(self, number: int) -> None:
        """The node waits no longer for an answer; call or answer may still be on its way."""
        node = self.nodes[number]
        if node.asked is not None:
            node.asked = None
            node.ledger = node.ledger.failed(self.clock(node))

    @precondition(lambda self: self.calls)
    @rule(which=st.integers(0, 100))
    def arrive(self, which: int) -> None:
        number, call = self.calls.pop(which % len(self.calls))
        self.answers.append((number, call.seq, self.desk.call(call, TERMS)))

    @precondition(lambda self: self.answers)
    @rule(which=st.integers(0, 100))
    def hear(self, which: int) -> None:
        number, seq, granted = self.answers.pop(which % len(self.answers))
        node = self.nodes[number]
        if node.asked != seq:
            return
        node.asked = None
        if granted is None:
            node.ledger = node.ledger.failed(self.clock(node))
            return
        node.ledger = node.ledger.answered(seq, granted.most, granted.owned)
        node.sockets = min(node.sockets, node.ledger.allowed(self.clock(node)))
        node.ledger = node.ledger.settled(self.clock(node), node.sockets)
        self.open(node, node.want)

    @precondition(lambda self: self.calls or self.answers)
    @rule(which=st.integers(0, 100))
    def lose(self, which: int) -> None:
        lost = self.calls if which % 2 and self.calls else self.answers
        if lost:
            lost.pop(which % len(lost))

    # -- servers ---------------------------------------------------------------------------

    @rule()
    def keep_a_copy(self) -> None:
        self.saved = self.desk.state()

    @rule(how=st.sampled_from(["flushed", "restarted", "failed over", "failed over", ""]))
    def lose_the_server(self, how: str) -> None:
        if how == "flushed":
            self.desk.flush()
        elif how:
            self.calls.clear()  # their connections are gone
            self.desk.replace(self.saved if how == "failed over" else None)

    @rule(number=nodes)
    def die(self, number: int) -> None:
        """The process ends, and its sockets with it; another one comes in its place."""
        node = self.nodes[number]
        node.ledger, node.sockets, node.asked = Ledger(TERMS), 0, None
        node.name += "'"

    # -- what must hold --------------------------------------------------------------------

    @invariant()
    def leases_leave_the_reserve_alone(self) -> None:
        leased = [node.ledger.leased(self.clock(node) - LATE) for node in self.nodes]
        assert not self.nodes or sum(leased) <= self.cap - reserve_of(self.cap), leased

    @invariant()
    def no_part_of_the_reserve_has_two_owners(self) -> None:
        owned = [
            number
            for node in self.nodes
            for number in node.ledger.claims_reserve(self.clock(node) - LATE)
        ]
        assert len(owned) == len(set(owned)), owned

    @invariant()
    def nobody_exceeds_the_cap(self) -> None:
        believed = [node.ledger.allowed(self.clock(node) - LATE) for node in self.nodes]
        assert sum(believed) <= getattr(self, "cap", 0), believed


@pytest.fixture
def port(shared_redis: Server) -> int:
    return shared_redis.port


def test_the_sum_of_what_nodes_believe_never_exceeds_the_cap(port: int) -> None:
    run_state_machine_as_test(
        type("AFleet", (Fleet,), {"port": port}),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
