"""Manifests: by digest from the store, by tag as fresh as the policy asks (DESIGN D12, D13).

The bytes of a manifest are kept by digest, like any blob; a tag is only a name that led to one. A
pull by tag is therefore two questions: what is the tag now (``tags.judge``), and do we hold that
manifest (if not, one GET for everybody who waits). HEADs, checks and GETs of one reference are each
asked once, whatever the number of clients.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.errors import (
    Denied,
    NotFound,
    Overloaded,
    PullError,
    UpstreamDown,
    UpstreamTimeout,
)
from proxy.oci.manifest import Manifest
from proxy.oci.paths import Kind
from proxy.oci.reference import Reference, Tag
from proxy.pull.asking import PATIENCE, Key, Pause, Questions, short_pause
from proxy.pull.asks import Ask, CacheWord, ManifestAnswer
from proxy.pull.fetching import Fetching
from proxy.pull.hearsay import Alone
from proxy.pull.permissions import Permissions
from proxy.pull.tags import (
    Fresh,
    Standing,
    TagBook,
    TagEntry,
    TagKey,
    TagPolicy,
    Verdict,
    covers,
    fresh_for,
    judge,
)
from proxy.store.store import Store
from proxy.upstream.mirrored import MirroredClient
from proxy.upstream.turns import Ticket

#: Manifests below an index that are looked at to see whether any of them can be served.
MAX_CHILDREN = 64


@dataclass(frozen=True, slots=True)
class Checked:
    """What asking for a tag found, and what it was before, if it was known."""

    digest: Digest
    was: Digest | None


class Manifests:
    """Answers for manifests, of all upstreams."""

    def __init__(
        self,
        *,
        store: Store,
        clients: Mapping[str, MirroredClient],
        permissions: Permissions,
        book: TagBook,
        policy: TagPolicy,
        memory: int,
        metrics: Metrics,
        log: Logger,
        clock: Callable[[], float],
        pause: Pause = short_pause,
        patience: float = PATIENCE,
        hearsay: Alone | None = None,
    ) -> None:
        """``memory`` is how many bytes of manifests are kept in memory; ``patience`` as for
        ``Questions``; ``hearsay``: of the fleet, if there is one."""
        self._store = store
        self._clients = clients
        self._permissions = permissions
        self._book = book
        self._policy = policy
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._hearsay = hearsay or Alone()
        self._fetching = Fetching(
            store=store,
            clients=clients,
            permissions=permissions,
            book=book,
            hearsay=self._hearsay,
            tag_ttl=policy.ttl,
            memory=memory,
            metrics=metrics,
            log=log,
            clock=clock,
            pause=pause,
            patience=patience,
        )
        self._checks: Questions[Checked] = Questions(log=log, pause=pause, patience=patience)
        self._background: set[asyncio.Task[None]] = set()
        self._refreshes = itertools.count(1)

    # -- asking ----------------------------------------------------------------------------

    async def answer(self, ask: Ask, reference: Reference, *, head: bool) -> ManifestAnswer:
        """The manifest that ``reference`` names. Raises ``PullError``."""
        if isinstance(reference, Tag):
            return await self._by_tag(ask, reference, head=head)
        return await self._by_digest(ask, reference, CacheWord.HIT, head=head)

    def fresh_for(self, ask: Ask, tag: Tag, digest: Digest) -> float:
        """Seconds for which ``tag`` is ``digest`` without a question."""
        entry = self._book.known((ask.upstream, ask.repository, str(tag)))
        if entry is None or entry.digest != digest:
            return 0.0
        return fresh_for(entry, str(tag), self._clock(), self._policy)

    async def _by_digest(
        self, ask: Ask, digest: Digest, word: CacheWord, *, head: bool, warning: str | None = None
    ) -> ManifestAnswer:
        """The manifest ``digest``; ``word`` says how, if it is held."""
        manifest = await self.held(digest)
        linked = await self._permissions.link(ask, digest)
        if manifest is not None:
            if linked is None:
                await self._permissions.prove_manifest(ask, digest, self._clients[ask.upstream])
                word = CacheWord.REVALIDATED
            self._store.touch(digest)
            return _answer(manifest, word, warning)
        if linked is None:
            self._permissions.check(ask, Kind.MANIFEST, str(digest))
        named = linked is not None
        if head:
            known = await self._fetching.head(ask, str(digest), digest, named=named)
            if known is not None:
                return known
        manifest, word = await self._fetching.fetch(ask, str(digest), digest, named=named)
        return _answer(manifest, word, warning)

    async def _by_tag(self, ask: Ask, tag: Tag, *, head: bool) -> ManifestAnswer:
        key = (ask.upstream, ask.repository, str(tag))
        entry = await self._book.get(key)
        verdict = judge(entry, str(tag), self._clock(), self._policy)
        if entry is None or verdict is Verdict.FETCH:
            return await self._unknown_tag(ask, tag, head=head)
        if verdict is Verdict.FRESH:
            return await self._by_digest(ask, entry.digest, CacheWord.HIT, head=head)
        if verdict is Verdict.BACKGROUND:
            self._check_in_background(ask, key, entry)
            return await self._by_digest(ask, entry.digest, CacheWord.STALE, head=head)
        if verdict is Verdict.STALE and covers(await self._standing(ask, entry), entry.failure):
            return await self._stale(ask, entry, "the upstream failed a moment ago", head=head)
        return await self._checked_tag(ask, key, entry, head=head)

    async def _unknown_tag(self, ask: Ask, tag: Tag, *, head: bool) -> ManifestAnswer:
        self._permissions.check(ask, Kind.MANIFEST, str(tag))
        if head:
            known = await self._fetching.head(ask, str(tag), None, named=False)
            if known is not None:
                return known
        manifest, word = await self._fetching.fetch(ask, str(tag), None, named=False)
        return _answer(manifest, word)

    # -- freshness -------------------------------------------------------------------------

    async def _checked_tag(
        self, ask: Ask, key: TagKey, entry: TagEntry, *, head: bool
    ) -> ManifestAnswer:
        """Ask the upstream what the tag is now; an upstream that fails does not fail the pull."""
        self._permissions.check(ask, Kind.MANIFEST, key[2])
        standing = await self._standing(ask, entry)
        client = self._clients[ask.upstream]
        if client.is_down(ask.repository) and covers(standing, UpstreamDown()):
            if client.wants_probe(ask.repository):
                self._check_in_background(ask, key, entry)
            return await self._stale(ask, entry, "the upstream is down", head=head)
        try:
            checked = await self._check_quickly(ask, key, entry, standing)
        except PullError as error:
            # Another question may have been refused meanwhile: then nothing stands in.
            if not covers(standing, error) or await self._book.get(key) is None:
                raise
            self._book.failed(key, error)
            return await self._stale(ask, entry, error.message, head=head)
        word = CacheWord.REVALIDATED if checked.digest == checked.was else CacheWord.MISS
        return await self._by_digest(ask, checked.digest, word, head=head)

    async def _check_quickly(
        self, ask: Ask, key: TagKey, entry: TagEntry, standing: Standing
    ) -> Checked:
        """Ask what the tag is now; whoever can be answered otherwise does not wait for long."""
        patience = self._policy.upstream_timeout
        try:
            async with asyncio.timeout(patience if standing else None):
                return await self._check(ask, key, entry.digest)
        except TimeoutError:
            message = f"no answer about this tag within {patience:g} s"
            error: PullError = UpstreamTimeout(message)
            if isinstance(ask.timing.failure, Overloaded):
                error = ask.timing.failure.bare()
            if covers(standing, error):
                raise error from None
        return await self._check(ask, key, entry.digest)  # the question is still there

    async def _check(
        self, ask: Ask, key: TagKey, known: Digest | None, *, question: Key | None = None
    ) -> Checked:
        """``question`` is what others join who ask the same; by default one for the tag."""
        client = self._clients[ask.upstream]

        async def check(ticket: Ticket) -> Checked:
            asked = self._clock()
            try:
                return await put(ticket, asked)
            except (Denied, NotFound) as error:
                # Here and not where it is waited for: it is heard also when nobody waits any more.
                if await self._book.refuse(key, asked=asked):
                    self._permissions.remember(ask, Kind.MANIFEST, key[2], error)
                raise

        async def put(ticket: Ticket, asked: float) -> Checked:
            listen = question is None
            async with self._hearsay.about(key, self._policy.ttl, listen=listen) as word:
                if word.told is not None:
                    return Checked(await self._fetching.believe(ask, key, word.told), known)
                found = await client.head_manifest(ask.repository, key[2], ticket, known=known)
                if question is None and found.digest != known:
                    await self._keep_last_pulls(ask, key, found.digest)
                if found.digest is not None:
                    await self._permissions.grant(ask, found.digest, found.size)
                    await self._book.confirm(key, found.digest, asked=asked)
                    self._fetching.tell(word, found, asked)
                    return Checked(found.digest, known)
            # An upstream that does not say it: ask for the bytes.
            fetched = await self._fetching.get(ask, key[2], None, ticket, listen=listen)
            return Checked(fetched.manifest.digest, known)

        linger = ask.arrived + self._policy.check_deadline
        checked, _ = await self._checks.ask(ask, question or key, check, linger=linger)
        return checked

    async def refresh(self, ask: Ask, tag: Tag) -> Checked:
        """Forget what is known of the tag and what was refused, and ask the upstream now.

        What the tag was stays known in case the upstream fails. A check that is under way was
        perhaps answered before the tag moved: this one is not shared. Raises ``PullError``.
        """
        key = (ask.upstream, ask.repository, str(tag))
        entry = await self._book.get(key)
        self._book.doubt(key)
        self._permissions.forget(ask)
        question = (*key, f"refresh {next(self._refreshes)}")
        known = None if entry is None else entry.digest
        checked = await self._check(ask, key, known, question=question)
        was, now = str(known), str(checked.digest)
        self._log.info("tag_refreshed", tag=":".join(key[1:]), was=was, now=now)
        return checked

    async def _keep_last_pulls(self, ask: Ask, key: TagKey, digest: Digest | None) -> None:
        """The tag has moved: the last pulls of a quota are not for what the old manifest can
        stand in for. Raises ``Throttled``."""
        pulls = self._clients[ask.upstream].pulls
        if not pulls.is_last or (digest is not None and await self.held(digest) is not None):
            return
        entry, error = await self._book.get(key), pulls.kept()
        if entry is not None and covers(await self._standing(ask, entry), error):
            raise error

    def _check_in_background(self, ask: Ask, key: TagKey, entry: TagEntry) -> None:
        async def check() -> None:
            try:
                async with asyncio.timeout_at(ask.arrived + self._policy.check_deadline):
                    await self._check(ask, key, entry.digest)
            except TimeoutError:
                self._book.failed(key, UpstreamTimeout())
            except PullError as error:
                self._book.failed(key, error)
                self._log.info("tag_check_failed", tag=":".join(key[1:]), cause=str(error))
            except Exception:  # a defect of ours, which nobody waits for
                self._log.exception("tag_check_defect", tag=":".join(key[1:]))

        task = asyncio.create_task(check(), name=f"check {':'.join(key)}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _standing(self, ask: Ask, entry: TagEntry) -> Standing:
        """What the old answer would lead to, if it is young enough."""
        if not self._book.is_usable(entry, self._policy):
            return Standing.NOTHING
        if await self._permissions.link(ask, entry.digest) is None:
            return Standing.NOTHING
        manifest = await self.held(entry.digest)
        return Standing.NOTHING if manifest is None else await self._standing_of(manifest)

    async def _standing_of(self, manifest: Manifest) -> Standing:
        """What we hold of what it names: all of an image, any one image of an index."""
        if not manifest.is_index:
            whole = all(self._store.size_of(c.digest) is not None for c in manifest.children)
            return Standing.WHOLE if whole else Standing.MANIFEST
        best = Standing.NOTHING
        for child in manifest.children[:MAX_CHILDREN]:
            below = await self.held(child.digest)
            if below is not None and not below.is_index:
                best = max(best, await self._standing_of(below))
            if best is Standing.WHOLE:
                break
        return best

    async def _stale(self, ask: Ask, entry: TagEntry, reason: str, *, head: bool) -> ManifestAnswer:
        text = f"served stale: {reason}"
        return await self._by_digest(ask, entry.digest, CacheWord.STALE, head=head, warning=text)

    def fresh(self, upstream: str, repository: str, reference: Reference) -> Fresh | None:
        """Which manifest a reference names, if that needs no question and no look into the store;
        the client's own words for it are enough when it is a digest."""
        if not isinstance(reference, Tag):
            return Fresh(reference)
        return self._book.fresh((upstream, repository, str(reference)), self._policy)

    async def held(self, digest: Digest) -> Manifest | None:
        """The manifest from memory or store, whoever may have it."""
        return await self._fetching.held(digest)

    def in_memory(self, digest: Digest) -> Manifest | None:
        """The manifest, if it needs no look into the store."""
        return self._fetching.in_memory(digest)

    @property
    def waiting(self) -> int:
        """Requests that wait for the upstream's word about a manifest."""
        return self._checks.waiting + self._fetching.waiting

    async def close(self) -> None:
        """Stop what is under way."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._checks.close()
        await self._fetching.close()


def _answer(manifest: Manifest, word: CacheWord, warning: str | None = None) -> ManifestAnswer:
    return ManifestAnswer(
        manifest.digest, manifest.media_type, len(manifest.raw), word, manifest, warning
    )
