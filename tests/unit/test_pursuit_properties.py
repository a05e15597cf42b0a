"""Random lives of a fleet on the deciding code: every node that stays ends with exact bytes.

Nodes join, die, stall, lie about stripes and about whole blobs; the directory answers late, loses
answers, forgets everything or is gone. Bytes are the stripes' numbers with a salt: salt 0 is right.
Only what decides is under test, so a transfer is one or two steps here: passing on, and arriving.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from benchmarks.fleet_time import at_once
from proxy.fleet.board import Board
from proxy.fleet.claims import WHOLE, Giver, Grant, Outcome, Taken, Terms
from proxy.fleet.local_claims import LocalClaims
from proxy.fleet.peers import PATIENCE
from proxy.fleet.pursuit import Pursuit
from proxy.fleet.shunned import Shunned, Why
from proxy.fleet.steps import Ask, Fresh, Step
from proxy.fleet.stripes import MIB, lowest_zero
from proxy.oci.digest import Digest
from proxy.testing import FakeClock

DIGEST = Digest.of(b"a blob")
COUNT = 16
SIZE = COUNT * MIB
RIGHT, WRONG = 0, 1


def hash_of(stripe: int, salt: int = RIGHT) -> bytes:
    return hashlib.sha256(bytes([stripe, salt])).digest()


@dataclass(slots=True, eq=False)
class Node:
    """A node as its owner would drive it; `content` are the salts of its stripes' bytes."""

    giver: Giver
    claims: LocalClaims
    pursuit: Pursuit
    shunned: Shunned
    lies: str = ""  # "" | "stripes" | "blob"
    is_alive: bool = True
    is_stalled: bool = False
    is_done: bool = False
    content: dict[int, int] = field(default_factory=dict)
    fetched: Counter[int] = field(default_factory=Counter)  # of the upstream, by stripe
    leads: int = 0  # how often it became the filler
    errors: int = 0  # how often it found the blob wrong
    waits: dict[int, float] = field(default_factory=dict)  # since when a transfer stands still

    def __repr__(self) -> str:
        return f"<{self.giver.name} {self.lies or 'honest'} {self.pursuit!r}>"


class Fleet(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.board = Board(clock=self.clock, rng=random.Random(1), terms=Terms(most=3, each=2))
        self.nodes: dict[str, Node] = {}
        self.is_gone = False
        self.was_gone = False

    # Joining, dying, lying.

    @initialize(seed=st.integers(0, 99))
    def begin(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._join("", "a")
        self._join("", "b")

    @precondition(lambda self: len(self.nodes) < 7)
    @rule(lies=st.sampled_from(["", "", "stripes"]), zone=st.sampled_from("ab"))
    def join(self, lies: str, zone: str) -> None:
        self._join(lies, zone)

    @precondition(lambda self: len(self.nodes) < 7 and not self._liars("blob"))
    @rule()
    def a_publisher_of_wrong_bytes_joins(self) -> None:
        self._join("blob", "a")

    def _join(self, lies: str, zone: str) -> None:
        number = len(self.nodes)
        giver = Giver(f"{number:016x}", f"node-{number}", zone, f"http://{number}")
        shunned = Shunned()
        pursuit = Pursuit(giver, shunned=shunned, rng=random.Random(number), size=SIZE)
        claims = LocalClaims(self.board, giver)
        self.nodes[giver.node] = Node(giver, claims, pursuit, shunned, lies)

    def _liars(self, how: str) -> list[Node]:
        return [node for node in self.nodes.values() if node.lies == how]

    @property
    def living(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.is_alive]

    @precondition(lambda self: len(self.living) > 2)
    @rule(pick=st.integers(0, 99))
    def one_dies(self, pick: int) -> None:
        node = self.living[pick % len(self.living)]
        node.is_alive = False

    @rule(pick=st.integers(0, 99))
    def one_stalls(self, pick: int) -> None:
        node = self.living[pick % len(self.living)]
        node.is_stalled = not node.is_stalled

    # The directory.

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0, 20.0, 130.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def the_directory_comes_or_goes(self) -> None:
        self.is_gone = not self.is_gone
        self.was_gone = True

    @rule()
    def the_directory_forgets_everything(self) -> None:
        self.board.forget()

    # What a node does.

    @rule(pick=st.integers(0, 99), loses=st.integers(0, 9))
    def one_acts(self, pick: int, loses: int) -> None:
        node = self.living[pick % len(self.living)]
        if not node.is_done:
            self.act(node, loses_answer=loses == 0)

    @rule(pick=st.integers(0, 99))
    def one_looks(self, pick: int) -> None:
        node = self.living[pick % len(self.living)]
        if not node.is_done:
            self.look(node)

    @rule(pick=st.integers(0, 99))
    def a_transfer_moves(self, pick: int) -> None:
        node = self.living[pick % len(self.living)]
        self.move(node)

    @rule(pick=st.integers(0, 99), stripes=st.integers(1, 4))
    def the_upstream_brings(self, pick: int, stripes: int) -> None:
        node = self.living[pick % len(self.living)]
        for _ in range(stripes):
            self.bring(node)

    def look(self, node: Node) -> None:
        pursuit = node.pursuit
        if self.is_gone:
            pursuit.directory_gone(self.clock())
        elif not pursuit.saw(at_once(node.claims.look(DIGEST, pursuit.published))):
            assert pursuit.saw(at_once(node.claims.look(DIGEST)))

    def act(self, node: Node, loses_answer: bool = False) -> None:
        pursuit = node.pursuit
        if not pursuit.generation and not self.is_gone:
            self.look(node)
        step = pursuit.step(lowest_zero(pursuit.have), self.clock())
        if self.is_gone:
            pursuit.directory_gone(self.clock())
        else:
            self.call(node, step, loses_answer)
        for ask in step.asks:
            pursuit.asked(ask)
        if step.stop:
            pursuit.fill_ended(None, self.clock())
        elif step.fill is not None and pursuit.filling is None:
            pursuit.begun(step.fill)
        if pursuit.is_complete:
            self.prove(node)

    def call(self, node: Node, step: Step, loses_answer: bool) -> None:
        """One round of the directory; the answer to the last call may be lost on its way."""
        pursuit, claims = node.pursuit, node.claims
        if step.drop is not None:
            at_once(claims.drop(DIGEST, step.drop))
            self.look(node)
            return
        if step.lead:
            pursuit.led(at_once(claims.fill(DIGEST, SIZE)))
            node.leads += pursuit.is_filler
        if step.publish is not None:
            self.publish(node, step.publish)
        if step.hold:
            grants = [grant for grant in pursuit.receiving.values() if isinstance(grant, Grant)]
            if at_once(claims.hold(DIGEST, pursuit.generation, pursuit.announced, grants)):
                pursuit.held()
            else:
                self.look(node)
        if step.wishes:
            call = claims.take(DIGEST, step.wishes, step.room, pursuit.published, step.avoid)
            taken = at_once(call)
            if loses_answer:
                return
            self.took(node, taken)

    def took(self, node: Node, taken: Taken) -> None:
        if not node.pursuit.took(taken):
            for grant in taken.grants:
                at_once(node.claims.give_back(grant, Outcome.FAILED))
            self.look(node)

    def publish(self, node: Node, fresh: Fresh) -> None:
        call = node.claims.publish(DIGEST, SIZE, fresh.first, fresh.hashes, fresh.by)
        node.pursuit.was_published(fresh, at_once(call))

    def bring(self, node: Node) -> None:
        span = node.pursuit.filling
        if span is None:
            return
        if node.lies == "blob" and span.of is None:
            node.content[span.first] = WRONG
        elif span.of is None:
            node.fetched[span.first] += 1
            node.content[span.first] = RIGHT
        else:
            source = self.nodes[span.of]
            if not source.is_alive or source.is_stalled:
                node.pursuit.fill_ended(Why.DIED, self.clock())
                return
            salt = WRONG if source.lies == "stripes" else source.content[span.first]
            node.content[span.first] = salt
        found = hash_of(span.first, node.content[span.first])
        if not node.pursuit.filled(span.first, found):
            node.pursuit.fill_ended(Why.LIED if span.of else None, self.clock())
            if span.of is None:  # what was published is not what the upstream has
                self.wrong(node)

    def move(self, node: Node) -> None:
        """Each transfer of the node's ends, or stands still, or is found to be broken."""
        for stripe, received in list(node.pursuit.receiving.items()):
            giver = self.nodes[received.giver.node]
            if not giver.is_alive:
                self.end(node, stripe, Why.DIED)
            elif not giver.pursuit.may_pass_on(stripe, received.rank) and not giver.is_done:
                self.end(node, stripe, Why.BUSY)
            elif giver.is_stalled or stripe not in giver.content:
                since = node.waits.setdefault(stripe, self.clock())
                if self.clock() - since >= PATIENCE:
                    self.end(node, stripe, Why.STALLED)
            else:
                self.arrive(node, giver, stripe)

    def arrive(self, node: Node, giver: Node, stripe: int) -> None:
        salt = WRONG if giver.lies == "stripes" else giver.content[stripe]
        expected = node.pursuit.expected(stripe)
        if expected is None:  # of an earlier generation
            self.end(node, stripe, Why.BUSY)
        elif expected != hash_of(stripe, salt):
            # A giver that has other bytes than the hash says refuses; a liar does not.
            self.end(node, stripe, Why.LIED if giver.lies == "stripes" else Why.BUSY)
        else:
            node.content[stripe] = salt
            self.end(node, stripe, None)

    def end(self, node: Node, stripe: int, why: Why | None) -> None:
        node.waits.pop(stripe, None)
        received = node.pursuit.receiving[stripe]
        outcome = node.pursuit.ended(stripe, why, self.clock())
        if isinstance(received, Grant) and not self.is_gone:
            at_once(node.claims.give_back(received, outcome))
        assert isinstance(received, Grant | Ask)

    def prove(self, node: Node) -> None:
        pursuit = node.pursuit
        is_right = all(node.content[stripe] == RIGHT for stripe in range(COUNT))
        if not is_right and node.lies != "blob":
            self.wrong(node)
            return
        pursuit.found_right(self.clock())
        fresh = pursuit.step(0, self.clock()).publish
        if not self.is_gone:
            if fresh is not None:
                self.publish(node, fresh)
            at_once(node.claims.settle(DIGEST))
            at_once(node.claims.hold(DIGEST, pursuit.generation, WHOLE))
        node.is_done = True

    def wrong(self, node: Node) -> None:
        """All its transfers end, and all it has is forgotten."""
        node.errors += 1
        for stripe in list(node.pursuit.receiving):
            self.end(node, stripe, Why.BUSY)
        node.pursuit.found_wrong()
        node.content.clear()

    # What must be so at any time.

    @invariant()
    def no_ring_of_receivers(self) -> None:
        for node in self.living:
            for stripe in node.pursuit.receiving:
                seen: set[Node] = set()
                at = node
                while stripe in at.pursuit.receiving and at.pursuit.rank(stripe) != 0:
                    assert at not in seen, f"a ring for stripe {stripe}: {seen}"
                    seen.add(at)
                    received = at.pursuit.receiving[stripe]
                    giver = self.nodes[received.giver.node]
                    if not giver.pursuit.may_pass_on(stripe, received.rank):
                        break  # it refuses, or has ended what it passed on
                    at = giver

    @invariant()
    def only_liars_are_shunned(self) -> None:
        for node in self.living:
            if node.lies:
                continue
            for shunned in node.shunned.liars(self.clock()):
                assert self.nodes[shunned].lies, f"{shunned} is shunned by {node}"

    def teardown(self) -> None:
        """From here on the directory answers, nobody stalls and nobody else dies: all must end."""
        if not self.nodes:
            return
        self.is_gone = False
        for node in self.living:
            node.is_stalled = False
        for _ in range(400):
            waiting = [node for node in self.living if not node.is_done]
            if not waiting:
                break
            self.rng.shuffle(waiting)
            for node in waiting:
                self.look(node)
                self.act(node)
                self.move(node)
                for _ in range(4):
                    self.bring(node)
                if node.pursuit.is_complete and not node.is_done:
                    self.prove(node)
            self.clock.advance(1.0)
            self.no_ring_of_receivers()
            self.only_liars_are_shunned()
        self.check_the_end()

    def check_the_end(self) -> None:
        for node in self.living:
            assert node.is_done, f"{node} does not end"
            if node.lies != "blob":
                assert all(node.content[stripe] == RIGHT for stripe in range(COUNT))
        if self.was_gone or any(node.errors for node in self.nodes.values()):
            return  # then nodes go to the upstream by themselves
        for node in self.nodes.values():
            assert all(times <= node.leads for times in node.fetched.values()), node
        if sum(node.leads for node in self.nodes.values()) == 1 and not self._liars("blob"):
            upstream = sum((node.fetched for node in self.nodes.values()), Counter[int]())
            assert all(upstream[stripe] == 1 for stripe in range(COUNT)), upstream


Fleet.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestFleet = Fleet.TestCase
