"""Spreading a fill over the slots that nobody else needs (DESIGN D9).

Theory of operation
-------------------
A fill has one *lead*: the turns of its own ticket, which stands in the queue for its readers like
any other, one turn after the other. As soon as the head of an answer has told the size of a large
blob and that ranges work, there is a plan (``segments.py``), and a *spread* of further turns may
bring other parts of the blob at the same time. Theirs are tickets of the class ``segment``, which
go only when nobody else waits, and there the flights of all clients take turns. So the lead loses
nothing by them, and nobody else waits for more than the end of one turn.

A further turn is a task, which ends with its turn:

* *waiting*  until it has a slot. One such task waits at most while no slot is spare; its range is
             the lead's to take if no hole comes before it (``_recall``)
* *begun*    the head of its answer has come, and was right
* *over*     what it did not bring is a hole again, for the lead or the next one to bring

Where all is taken and a turn has much to come, it is *helped*: a further turn is to bring half of
that. Else a flight whose turn comes late, for all that is left, would bring it over one connection
beside idle ones. The connection is lost, as more was asked for; but only if the further turn has a
slot before the first one comes to where it begins. If not, the first one goes on (``trim``).

With a fleet there are further turns only where a trial has shown that several bring more than one
(``trial.py``): what a node fills for others is to come in order.

What goes wrong in one never fails the flight. After a failure there is a pause, and then one
further turn until it has gone well. After ``TRIES`` failures in a row there are no more, nor when
the disk is full: then the flight *goes alone*. Nor when its answers contradict the lead's: then
what was written out of order and not hashed is forgotten, too, the lead asks for whole bodies, and
the origin gets no segments for a while. Two parts of different blobs are found by the digest in the
end. The bytes that readers have by then may be the wrong ones, so the flight fails; who asks again
is served by a flight that goes alone. ETags say nothing of that: two servers of one registry give
different ones for the same bytes.

Cancellation: the tasks belong to the fill, whose ``finally`` calls ``close``. It returns when they
have ended, so that nothing is written to a file that is given back after it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

from proxy.oci.digest import Chunk
from proxy.oci.errors import PullError, SizeMismatch, UnexpectedAnswer, UpstreamUnavailable
from proxy.pull.closing_up import ClosingUp
from proxy.pull.helpers import Helper, Helpers
from proxy.pull.intake import Intake
from proxy.pull.pace import Pace
from proxy.pull.parts import Contradiction, expect_part
from proxy.pull.segments import Segment, Segments, first_cut
from proxy.pull.sources import Source, TurnBody
from proxy.pull.trial import LEAST_TURN, Lead, Trial, lead_of_trial, left_for_trial
from proxy.store.blobs import StoreFull
from proxy.store.work import finish
from proxy.upstream.turns import Ticket, TurnClass

#: Failures in a row of further turns before there are no more.
TRIES = 6
#: Bytes of the first turn to an upstream for a fleet: enough to show how fast it is. On a line that
#: carries 1 MB/s, shared by three turns, it is over before it has to make way.
FIRST = 512 << 10
#: Seconds after which a lead that waits for others looks whether one of them waits for a slot, too,
#: as it does where its first one has led it to another origin.
LOOK_AGAIN = 1.0

#: Moves a turn's body to its segment's place; whether it came to its end.
Carry = Callable[[Segment, TurnBody], Awaitable[bool]]


class Spread:
    """The plan of one fill, and its turns but for the lead.

    ``publish`` is called when more bytes were hashed, ``pause_after`` as a flight's settings have
    it, ``count`` with the outcome of each further turn: ``done``, ``broken`` or ``distrusted``,
    ``moved`` when somebody ceased to bring something, for those who counted on that. ``delay``:
    seconds from the head of the first answer to further turns; what they need to begin (sockets, at
    first) would have the first reader wait for the first bytes. ``pace``: the lead's; there are no
    further turns while its bytes come faster than they are taken in. A turn with ``long`` bytes to
    come is helped. ``trial``: whether several turns bring more; it says nothing while this node
    ``is_disturbed`` by what others send.
    """

    def __init__(
        self,
        name: str,
        *,
        intake: Intake,
        least: int,
        long: int,
        carry: Carry,
        publish: Callable[[bool], None],
        pause_after: Callable[[int, PullError], float],
        count: Callable[[Source, str], None],
        moved: Callable[[], None],
        delay: float,
        pace: Pace,
        stopwatch: Callable[[], float],
        trial: Trial,
        is_disturbed: Callable[[], bool],
    ) -> None:
        self.plan: Segments | None = None
        self._name = name
        self._intake = intake
        self._least = least
        self._long = long
        self._carry = carry
        self._publish = publish
        self._pause_after = pause_after
        self._count = count
        self._moved = moved
        self._delay = delay
        self._leading: list[Segment] = []  # what the lead brings, once it is answered
        self._source: Source | None = None  # the lead's, which has shown to have the blob
        self._givers: set[Source] = set()  # whoever was asked for a part while there was a plan
        self._clients: dict[str, None] = {}
        self._helpers = Helpers()
        self._failures = 0  # in a row
        self._retry = ""
        self._is_alone = False  # there are no further turns any more
        self.is_void = False  # … and the plan has to go
        self._puts = 0  # of others, under way
        self._pause: asyncio.TimerHandle | None = None
        self._pace = pace
        # Do the lead's bytes wait for us, and would those of others? Yes, until it was looked at.
        self._is_behind = bool(delay)
        self._stopwatch = stopwatch
        self._find_out = trial
        self._is_disturbed = is_disturbed
        self._beside: Segment | None = None  # the lead's, that is to have a trial beside it
        self._trial: asyncio.Task[None] | None = None
        self._defect: Exception | None = None
        self._changed = asyncio.Event()
        self._closing_up = ClosingUp(
            name, intake=intake, hashed=self._hashed, idle=self._changed.set
        )

    # -- whose turns they are --------------------------------------------------------------

    def join(self, client: str) -> None:
        """``client`` waits for the blob."""
        self._clients[client] = None
        self._helpers.join(client)
        self.widen()

    def leave(self, client: str) -> None:
        """It does not any more. What nobody waits for gets no further turns."""
        self._clients.pop(client, None)
        self._helpers.leave(client)
        if not self._clients:
            self._helpers.cancel_waiting(0, 0)

    def drop(self, source: Source) -> None:
        """It is not asked any more."""
        if self._source is source:
            self._source = None

    # -- the lead --------------------------------------------------------------------------

    def first_length(self, source: Source, position: int, size: int | None) -> int:
        """Bytes for a turn that begins before there is a plan, of a blob of perhaps ``size``.

        Even with no slot to spare now: there may be some by the time it is granted, and if not, a
        short first turn has everybody's first bytes come soon.
        """
        most = source.turn_bytes
        if not self._may_spread(source):
            return most
        left = None if size is None else max(0, size - position)
        return first_cut(left, parts=source.segments, least=2 * self._least, most=most)

    async def lead(self, source: Source) -> Segment | None:
        """What the lead brings next, through ``source``; ``None``: all is there. Waits while others
        bring all that is left.

        Raises ``StoreFailed``, and whatever was a defect in a further turn.
        """
        while True:
            if self._defect is not None:
                raise self._defect
            self.is_void = self.is_void or not source.ranged
            if self.is_void:
                await self._drop_plan()
            if self.plan is None:
                return Segment(self._intake.received, None)
            self.close_up()
            self.plan.reach(self._intake.received)
            self._recall()
            parts, most = self._share(source)
            if is_beside := self._is_to_begin_trial(source, self.plan):
                most = lead_of_trial(self._next_hole(self.plan), most)
            segment = self.plan.take(parts=parts, most=most)
            self._beside = segment if is_beside else None
            if segment is not None:
                return segment
            if self._intake.received == self.plan.size:
                return None
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AGAIN):
                    await self._changed.wait()

    async def begun(self, source: Source, segment: Segment, body: TurnBody, length: int) -> None:
        """The head of an answer to the lead has come. Makes the plan when it tells enough.

        Raises ``UnexpectedAnswer`` when it does not fit the plan.
        """
        if self.plan is not None and not body.is_part:
            await self._drop_plan()
            if segment.at != self._intake.received:
                raise UnexpectedAnswer(f"{source.key[0]}: a range was answered by a whole body")
            segment.stop = None
        elif self.plan is None and body.is_part and self._may_spread(source):
            stop = segment.at + length
            if body.total is not None and body.total > stop:
                self.plan = Segments(body.total, least=self._least, done=segment.at)
                self.plan.adopt(segment, stop)
                self._pace.forget()
                if self._delay and self._pause is None:
                    loop = asyncio.get_running_loop()
                    self._pause = loop.call_later(self._delay, self._paused)
        self._source = source
        if self.plan is not None:
            self._givers.add(source)
            self._leading = [segment]
            self._try(source, segment)
        self.widen()

    def ended(self, segment: Segment) -> None:
        """The lead's turn is over, or somebody else's who claimed a range."""
        if segment in self._leading:
            self._leading.clear()
        if self.plan is not None:
            self.plan.give_back(segment)
            self._changed.set()
            self._moved()
            self.widen()

    # -- do several turns bring more? ------------------------------------------------------

    def _is_to_begin_trial(self, source: Source, plan: Segments) -> bool:
        """Is the lead's next turn to have a trial beside it?"""
        is_worth_it = left_for_trial(self._next_hole(plan)) and source.turn_bytes >= LEAST_TURN
        could_begin = self._trial is None and source.spare > 1 and source.knows_rate
        return bool(is_worth_it) and could_begin and self._is_to_try(source, turns=0)

    def _is_to_try(self, source: Source, *, turns: int) -> bool:
        """``turns``: ours, under way. With others beside them, or while other nodes send something,
        two would have more of a line than one has."""
        is_unknown = self._is_bound and self._could_spread(source) and source.widens is None
        has_trouble = self._pause is not None or self._failures or len(self._helpers)
        return is_unknown and not has_trouble and self._is_by_itself(source, turns)

    def _is_by_itself(self, source: Source, turns: int) -> bool:
        return source.active <= turns and not self._is_disturbed()

    @staticmethod
    def _next_hole(plan: Segments) -> int:
        start, stop = next(plan.open_holes(), (0, 0))
        return stop - start

    def _try(self, source: Source, lead: Segment) -> None:
        """Begin a trial beside the lead's turn if that was asked for with one in mind."""
        if lead is self._beside:
            trying = self._tried(source, lead)
            self._trial = asyncio.create_task(trying, name=f"trial {self._name}")

    async def _tried(self, source: Source, lead: Segment) -> None:
        def begin(count: int) -> Helper | None:
            is_to_try = source.spare > 0 and self._is_to_try(source, turns=1)
            segment = self.plan.take_last(count) if is_to_try and self.plan is not None else None
            return None if segment is None else self._begin(source, segment)

        turn = Lead(lead, lambda: lead not in self._leading)
        try:
            widens = await self._find_out(turn, begin, clock=self._stopwatch)
        except Exception as error:
            self._defect = error
            self._void()
            self._changed.set()
            return
        finally:
            self._trial = None
        if widens is not None and self._is_by_itself(source, turns=2):
            source.learn_widening(widens)
            self.widen()

    # -- with a fleet ----------------------------------------------------------------------

    def share(self, size: int) -> Segments:
        """Make the plan of a blob of which other nodes bring parts: no turn begins until it is
        ``bound`` to some of it."""
        self.plan = Segments(size, least=self._least, done=self._intake.received)
        self.bind(0, 0)
        return self.plan

    def bind(self, start: int, stop: int) -> None:
        """Turns bring this part from now on, whatever is missing of it. Those under way elsewhere
        end: what they would bring another node brings as well."""
        if self.plan is not None:
            self.plan.bind(start, stop, [*self._helpers.begun, *self._leading])
            self._helpers.cancel_waiting(start, stop)
            self._changed.set()
            self.widen()

    def unbind(self) -> None:
        """Turns bring whatever is missing: the fleet has no part in it any more."""
        if self.plan is not None:
            self.plan.unbind()
            self._changed.set()
            self.widen()

    @property
    def is_helped(self) -> bool:
        """Does anybody else put bytes into the file?"""
        return self._puts > 0 or bool(self._helpers.begun)

    def is_elsewhere(self, segment: Segment) -> bool:
        """Is what ``segment`` brings for another node to bring?"""
        return self.plan is not None and self.plan.is_elsewhere(segment)

    @contextlib.contextmanager
    def putting(self) -> Iterator[None]:
        """Another's bytes go into the file meanwhile: the plan stays until they are there."""
        self._puts += 1
        try:
            yield
        finally:
            self._puts -= 1
            self._changed.set()

    def trim(self, segment: Segment, chunks: list[Chunk]) -> list[Chunk]:
        """What ``segment`` is to bring of the next bytes of its turn. Where it was shortened for
        somebody who has got no slot since, it goes on; what is another node's by now ends it."""
        if self.plan is not None:
            self.plan.end_elsewhere(segment)
        reaches = segment.at + sum(map(len, chunks))
        while self.plan is not None and segment.is_shortened and reaches >= (segment.stop or 0):
            follower = self._helpers.waiting_at(segment.stop or 0)
            if follower is None:
                break
            follower.task.cancel()
            self.plan.stretch(segment, follower.segment)
        return segment.first_of(chunks)

    def wrote(self, segment: Segment, count: int) -> None:
        """So many bytes more of ``segment`` are in the file."""
        if self.plan is None:
            segment.at += count
        else:
            self.plan.wrote(segment, count)

    def close_up(self) -> None:
        """Have what has closed up with the bytes received hashed. Raises what has failed there."""
        if self.plan is not None:
            self._closing_up.begin(self.plan)

    def _hashed(self) -> None:
        self._publish(False)
        self._moved()

    def distrust(self) -> None:
        """The parts did not make up the blob, if it was fetched in parts: one giver was wrong."""
        for source in self._givers:
            source.distrust()

    # -- further turns ---------------------------------------------------------------------

    def widen(self) -> None:
        """Begin as many further turns as there may be, and are slots for; one more waits."""
        source = self._source
        if source is None or self.plan is None or self._pause is not None:
            return
        self.plan.reach(self._intake.received)
        waiting = len(self._helpers) - len(self._helpers.begun)
        most = 1 if self._failures else max(1, source.spare)
        while self._may_spread(source) and waiting < most:
            if len(self._helpers) + 1 >= source.segments:
                return
            segment = self._next(source, self.plan, most - waiting)
            if segment is None:
                return
            self._begin(source, segment)
            waiting += 1

    def _next(self, source: Source, plan: Segments, idle: int) -> Segment | None:
        """What a further turn brings, one of ``idle`` that could begin. When all is taken it helps
        the turn that has most to come."""
        segment = plan.take(parts=source.segments, most=source.turn_bytes)
        if segment is None and not self._failures:
            begun = [*self._helpers.begun, *self._leading]
            if plan.shorten(begun, parts=idle + 1, long=self._long):
                segment = plan.take(parts=idle, most=source.turn_bytes)
        return segment

    def _may_spread(self, source: Source) -> bool:
        return self._could_spread(source) and (source.widens is True or not self._is_bound)

    @property
    def _is_bound(self) -> bool:
        return self.plan is not None and self.plan.bounds is not None

    def _could_spread(self, source: Source) -> bool:
        return (
            bool(self._clients)
            and not self._is_alone
            and source.ranged
            and source.segments > 1
            and self._intake.window is None
        )

    def _share(self, source: Source) -> tuple[int, int]:
        """How many bring something beside the lead, itself included, and the bytes of its turn at
        most. While its bytes outrun us nobody else does; but that may change, and a long turn that
        has begun by then would keep readers to the rate of one connection, with all that others
        bring lying beyond it. So its turns grow with what has come; but not in bounds, where it is
        known that several bring more. And the first of all to an upstream is short there: a fleet
        wants its slots, and what is on its way when a turn is cut comes twice."""
        if self._is_bound and not source.knows_rate:
            return 1, min(source.turn_bytes, FIRST)
        could_be_helped = self._helpers.has_slots or source.spare > 1
        if not (self._may_spread(source) and could_be_helped):
            return 1, source.turn_bytes
        if self._is_bound or not self._is_behind:
            return source.segments, source.turn_bytes
        return 1, min(source.turn_bytes, max(2 * self._least, self._intake.received))

    def _begin(self, source: Source, segment: Segment) -> Helper:
        ticket = Ticket(TurnClass.SEGMENT, self._clients, image=self._name)
        ticket.retry = self._retry
        task = asyncio.create_task(self._run(source, segment, ticket), name=f"segment {self._name}")
        helper = Helper(segment, ticket, task)
        self._helpers.add(helper)
        task.add_done_callback(lambda _: self._over(source, helper))
        return helper

    async def _run(self, source: Source, segment: Segment, ticket: Ticket) -> None:
        if segment.stop is None:
            raise ValueError(f"{segment!r} has no end")
        async with source.open(segment.at, segment.stop - segment.at, ticket) as body:
            expect_part(body, None if self.plan is None else self.plan.size, source)
            self._helpers.begin(segment)
            self.widen()
            await self._carry(segment, body)
            body.learn()
        if segment.at == segment.start:
            raise UpstreamUnavailable(f"{source.key[0]}: an answer without a byte")

    def _over(self, source: Source, helper: Helper) -> None:
        """Its task has ended, perhaps before its first step."""
        self._helpers.discard(helper)
        if self.plan is not None:
            self.plan.give_back(helper.segment)
        if not helper.task.cancelled():
            self._judge(source, helper.segment, helper.task.exception())
        self._changed.set()
        self._moved()
        self.widen()

    def _judge(self, source: Source, segment: Segment, error: BaseException | None) -> None:
        if segment.at > segment.start:
            self._failures, self._retry = 0, ""
        if error is None:
            self._count(source, "done")
        elif isinstance(error, (Contradiction, SizeMismatch)):
            self._count(source, "distrusted")
            source.distrust()
            self._void()
        elif isinstance(error, StoreFull):
            self._is_alone = True  # the lead finds out for itself
        elif isinstance(error, PullError):
            self._count(source, "broken")
            self._failed(error)
        elif isinstance(error, Exception):
            self._defect = error
            self._void()

    def _failed(self, error: PullError) -> None:
        if self._pause is not None:
            return  # it was sent before the first one failed, and so has the same cause
        self._failures += 1
        self._retry = error.retried_as
        if self._failures >= TRIES:
            self._is_alone = True  # those that go well may end
        else:
            seconds = self._pause_after(self._failures, error)
            self._pause = asyncio.get_running_loop().call_later(seconds, self._paused)

    def _paused(self) -> None:
        """Widen, unless the lead alone brings more than is taken in: then look again."""
        self._pause = None
        if self._delay and not self._helpers and (outrun := self._pace.is_outrun()) is not None:
            self._is_behind = outrun
        if self._is_behind and not self._helpers and not self.is_void:
            loop = asyncio.get_running_loop()
            self._pause = loop.call_later(self._delay, self._paused)
        else:
            self.widen()

    # -- the end ---------------------------------------------------------------------------

    def _recall(self) -> None:
        """Take back the first range that still waits for a slot, if it is before any hole."""
        helper = self._helpers.first
        if helper is None or self.plan is None:
            return
        hole, _ = next(self.plan.open_holes(), (self.plan.size, 0))
        if helper.segment.start < hole:
            self.plan.give_back(helper.segment)
            helper.task.cancel()

    def go_alone(self) -> None:
        """Bytes can only be taken in order from now on."""
        self._void()
        self._changed.set()

    def _void(self) -> None:
        """No further turn begins, those under way end, and the lead will drop the plan."""
        self._is_alone = self.is_void = True
        self._helpers.cancel()

    async def _drop_plan(self) -> None:
        """Go on at the first byte that is not hashed."""
        await self.close()
        while self._puts:  # what is appended in two places at once would be in the wrong one
            self._changed.clear()
            await self._changed.wait()
        if self.plan is not None:
            await self._closing_up.run(self.plan)
        self.plan = None
        self._intake.forget_ahead()
        self._moved()

    async def close(self) -> None:
        """End every further turn. Goes to its end when it is cancelled."""
        self._void()
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        trials = [] if self._trial is None else [self._trial]
        for trial in trials:
            trial.cancel()
        if tasks := [*self._closing_up.end(), *self._helpers.tasks, *trials]:
            await finish(asyncio.ensure_future(asyncio.wait(tasks)))

    def __repr__(self) -> str:
        return f"<Spread {self.plan!r}, {len(self._helpers)} further turns>"
