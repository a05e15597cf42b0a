"""Whatever happens to nodes, calls and servers: the sockets that nodes believe they may have never
exceed the cap. The directory's part is the real script in a real server, at the test's own time."""

from __future__ import annotations

from collections.abc import Iterator
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
from tests.unit.lease_kit import Desk, server_apart
from tests.unit.redis_kit import needs_redis

pytestmark = needs_redis

TERMS = Terms(lease=10.0, margin=2.0, hold=60.0)
#: So long after its deadline a node may still be aborting its sockets.
LATE = 0.2 * TERMS.margin
NODES = 4
CAPS = (1, 2, 4, 16)

nodes = st.integers(0, NODES - 1)


@dataclass
class Node:
    """A node: its clock, what it believes, and the sockets that it has."""

    name: str
    offset: float
    speed: float
    ledger: Ledger = field(default_factory=lambda: Ledger(TERMS))
    sockets: int = 0
    want: int = 0
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
            self.desk.call(self.make_call(self.nodes[0], "nobody", 1), TERMS)
            for seq in range(2, 80):
                self.pass_time(1.0)
                self.desk.call(self.make_call(self.nodes[0], "nobody", seq), TERMS)
            self.pass_time(20.0)

    def make_call(self, node: Node, name: str, seq: int) -> Call:
        now = self.clock(node)
        return Call(
            name,
            seq,
            self.cap,
            reserve_of(self.cap),
            held=0 if name == "nobody" else node.ledger.most,
            want=node.want,
            metadata=node.want % 2,
            news=CapNews(limit=self.cap),
            owned=() if name == "nobody" else node.ledger.claims_reserve(now),
            may_own=name != "nobody",
        )

    def clock(self, node: Node) -> float:
        return node.offset + node.speed * self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.desk.wall += seconds
        for node in self.nodes:
            node.sockets = min(node.sockets, node.ledger.allowed(self.clock(node)))

    # -- time and sockets ------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 2.5, 3.4, 7.9, 10.1, 12.5, 70.0]))
    def wait(self, seconds: float) -> None:
        self.pass_time(seconds)

    @precondition(lambda self: self.now - self.jumped_at > TERMS.lease)
    @rule(seconds=st.sampled_from([-4000.0, -3.0, 0.5, 5.0, 11.0, 4000.0]))
    def set_the_clock_of_the_server(self, seconds: float) -> None:
        self.desk.wall += seconds
        self.jumped_at = self.now

    @rule(number=nodes, want=st.integers(0, 20), used=st.integers(0, 20))
    def use(self, number: int, want: int, used: int) -> None:
        """Sockets are opened and closed, as far as the node believes that it may."""
        node = self.nodes[number]
        node.want = want
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
        self.calls.append((number, self.make_call(node, node.name, node.ledger.seq)))

    @rule(number=nodes, seconds=st.sampled_from([0.0, 0.01, 1.0]))
    def ask_and_hear(self, number: int, seconds: float) -> None:
        """The usual case, which leads to states in which the others matter."""
        if self.nodes[number].asked is not None:
            return
        self.ask(number)
        self.arrive(len(self.calls) - 1)
        self.pass_time(seconds)
        self.hear(len(self.answers) - 1)

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

    @precondition(lambda self: self.calls or self.answers)
    @rule(which=st.integers(0, 100))
    def lose(self, which: int) -> None:
        lost = self.calls if which % 2 and self.calls else self.answers
        if lost:
            lost.pop(which % len(lost))

    # -- servers ---------------------------------------------------------------------------

    @rule()
    def forget_everything(self) -> None:
        self.desk.flush()

    @rule()
    def restart_empty(self) -> None:
        self.calls.clear()  # their connections are gone
        self.desk.replace()

    @rule()
    def keep_a_copy(self) -> None:
        self.saved = self.desk.state()

    @rule()
    def fail_over_to_the_copy(self) -> None:
        self.calls.clear()
        self.desk.replace(self.saved)

    @rule(number=nodes)
    def die(self, number: int) -> None:
        """The process ends, and its sockets with it; another one comes in its place."""
        node = self.nodes[number]
        node.ledger, node.sockets, node.asked = Ledger(TERMS), 0, None
        node.name += "'"

    # -- what must hold --------------------------------------------------------------------

    @invariant()
    def nobody_exceeds_the_cap(self) -> None:
        believed = [node.ledger.allowed(self.clock(node) - LATE) for node in self.nodes]
        assert sum(believed) <= getattr(self, "cap", 0), believed


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with server_apart(tmp_path_factory.mktemp("leases")) as server:
        yield server.port


def test_the_sum_of_what_nodes_believe_never_exceeds_the_cap(port: int) -> None:
    run_state_machine_as_test(
        type("AFleet", (Fleet,), {"port": port}),
        settings=settings(
            max_examples=120,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
