"""What a sharing says to the fleet's directory, and when it has to say it again (D16).

One call after the other, by the stepper of ``sharing.py``; only a grant that came to nothing is
given back beside that, at once. What an answer says goes to the pursuit, which decides what comes
next. All calls may raise ``DirectoryDown``; ``told`` makes that the pursuit's news, too.

Grants that ended well wait here for the next call that takes. Unless the directory answers that,
they are told again with a later one, if only at the end: what is given back twice does nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from proxy.fleet.claims import WHOLE, Grant, Outcome, Taken, View, Wish
from proxy.fleet.pursuit import Pursuit
from proxy.fleet.steps import Fresh, Step
from proxy.oci.digest import Digest
from proxy.oci.errors import DirectoryDown, SizeMismatch
from proxy.pull.ground import Fellows

T = TypeVar("T")


class Claiming:
    """Of one sharing: its part of the directory's ``Claims``."""

    def __init__(self, fellows: Fellows, pursuit: Pursuit, digest: Digest, size: int) -> None:
        self._fellows = fellows
        self._claims = fellows.claims
        self._pursuit = pursuit
        self._digest = digest
        self._size = size
        self._held_at = self._led_at = fellows.clock()  # when the directory was told last
        self._granted: dict[int, float] = {}  # when a stripe was, or was renewed
        self._ended: list[tuple[Grant, Outcome]] = []  # grants to give back with the next call
        self._is_to_settle = False  # the directory may take us for the filler

    async def told(self, saying: Coroutine[Any, Any, bool]) -> bool:
        """Say something; false if nothing came of it, or there is no directory."""
        try:
            return await saying
        except DirectoryDown:
            self._pursuit.directory_gone(self._fellows.clock())
            return False

    async def _timed(self, call: Coroutine[Any, Any, T]) -> T:
        """What a call returns; how long it takes shows how busy the directory is."""
        began = self._fellows.clock()
        answer = await call
        now = self._fellows.clock()
        self._pursuit.answered(now - began, now)
        return answer

    async def look(self, known: int) -> bool:
        """Raises ``SizeMismatch`` when others say another size: who is right the upstream knows."""
        view = await self._timed(self._claims.look(self._digest, known))
        if not self._pursuit.saw(view):
            self._pursuit.saw(view := await self._claims.look(self._digest))
        self._check_size(view)
        return True

    def _check_size(self, view: View) -> None:
        if view.published and view.size not in (None, self._size):
            raise SizeMismatch(self._size, view.size or 0)

    # -- as the filler ---------------------------------------------------------------------

    async def lead(self) -> None:
        self._is_to_settle = True  # even if this is cancelled in the middle
        self._pursuit.led(await self._claims.fill(self._digest, self._size))
        self._led_at = self._fellows.clock()

    async def publish(self, fresh: Fresh) -> bool:
        """False: it was not for this node to do, the directory has lost what was before it, or
        another one has published it, which filled while this node was late and thought it did."""
        count = await self._claims.publish(
            self._digest, self._size, fresh.first, fresh.hashes, fresh.by
        )
        self._pursuit.was_published(fresh, count)
        self._led_at = self._fellows.clock()
        if count == fresh.first + len(fresh.hashes):
            return True
        await self.look(0)  # in another generation, perhaps
        return False

    async def let_others(self) -> bool:
        """Another one may fill."""
        self._pursuit.gave_up()
        await self._claims.settle(self._digest)
        return True

    # -- as one that takes -----------------------------------------------------------------

    async def take(self, step: Step) -> Sequence[Grant]:
        """What is granted, once it is known what those stripes have to be.

        Raises ``SizeMismatch`` as ``look`` does: of givers of another blob's size an honest one
        would be taken for a liar.
        """
        pursuit = self._pursuit
        taken = await self._timed(self._with_ended(step.wishes, step.room, step.avoid))
        granted: list[Grant] = []
        try:
            self._check_size(taken.view)
            if not pursuit.took(taken):  # its hashes are those of another generation
                view = await self._claims.look(self._digest)
                self._check_size(view)
                pursuit.took(replace(taken, view=view))
            granted = [one for one in taken.grants if one.generation == pursuit.generation]
        finally:
            left = [grant for grant in taken.grants if grant not in granted]
            self._ended += [(grant, Outcome.FAILED) for grant in left]
        return granted

    def begun(self, stripe: int) -> None:
        """It is being received."""
        self._granted[stripe] = self._fellows.clock()

    async def ended(self, stripe: int, grant: Grant | None, outcome: Outcome) -> None:
        """It is not any more; ``grant``: what for, if the directory knows of it."""
        self._granted.pop(stripe, None)
        if grant is None:
            return
        if outcome is Outcome.DONE:
            self._ended.append((grant, outcome))
            return
        # At once: as long as the directory takes us for one who receives it, it sends others.
        try:
            await self._claims.give_back(grant, outcome)
        except DirectoryDown:
            self._ended.append((grant, outcome))

    async def give_back(self) -> bool:
        """The grants that have ended, when there is nothing to take with them."""
        if not self._ended:
            return False
        await self._with_ended((), 0, ())
        return True

    async def _with_ended(self, wishes: Sequence[Wish], room: int, avoid: Collection[str]) -> Taken:
        ended, self._ended = self._ended, []
        try:
            return await self._claims.take(
                self._digest, wishes, room, self._pursuit.published, avoid, ended
            )
        except BaseException:  # it is down, or we are cancelled
            self._ended = ended + self._ended
            raise

    # -- what is here ----------------------------------------------------------------------

    async def hold(self) -> None:
        pursuit = self._pursuit
        grants = [one for one in pursuit.receiving.values() if isinstance(one, Grant)]
        is_entered = await self._claims.hold(
            self._digest, pursuit.generation, pursuit.announced, grants
        )
        self._held_at = now = self._fellows.clock()
        self._granted = dict.fromkeys(self._granted, now)
        if is_entered:
            pursuit.held()
        else:
            await self.look(0)  # that generation is over

    async def renew(self) -> bool:
        """Say that we are still there, often enough. Whether that told who fills now."""
        terms, now = self._fellows.terms, self._fellows.clock()
        was_filler = self._pursuit.is_filler
        is_leading = self._pursuit.is_filler and now - self._led_at >= terms.renewal
        if is_leading:
            self._led_at = now
            self._pursuit.led(await self._claims.fill(self._digest, self._size))
        is_due = now - min(self._granted.values(), default=now) >= terms.grant / 3
        is_due = is_due or now - self._held_at >= terms.part / 3
        if is_due and (self._pursuit.receiving or self._pursuit.announced):
            await self.hold()
        return was_filler != self._pursuit.is_filler

    async def hold_whole(self) -> bool:
        """It is in the store, whole. Whether the directory has entered that."""
        generation = self._pursuit.generation
        if not generation:
            return False
        is_entered = await self._claims.hold(self._digest, generation, WHOLE)
        if is_entered:
            self._fellows.kept(self._digest, generation)
        return is_entered

    async def drop(self, generation: str) -> bool:
        """Its stripes did not make up the blob."""
        await self._claims.drop(self._digest, generation)
        return False

    async def settle(self) -> None:
        """The end: others may fill, if this one did."""
        if self._is_to_settle:
            self._is_to_settle = False
            await self._claims.settle(self._digest)

    def __repr__(self) -> str:
        return f"<Claiming of {self._digest}: {len(self._ended)} to give back>"
