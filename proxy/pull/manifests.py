"""Manifests: by digest from the store, by tag as fresh as the policy asks (DESIGN D12, D13).

The bytes of a manifest are kept by digest, like any blob; a tag is only a name that led to one. A
pull by tag is therefore two questions: what is the tag now (``tags.judge``), and do we hold that
manifest (if not, one GET for everybody who waits).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cachetools import LRUCache

from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.errors import (
    DigestMismatch,
    NotFound,
    PullError,
    StoreFailed,
    Throttled,
    TokenServiceFailed,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.oci.manifest import Manifest, parse_manifest
from proxy.oci.reference import Reference, Tag
from proxy.pull.asks import Ask, CacheWord, ManifestAnswer
from proxy.pull.permissions import Permissions
from proxy.pull.shared import SharedWork
from proxy.pull.tags import TagBook, TagEntry, TagKey, TagPolicy, Verdict, judge
from proxy.store.blobs import StoreFull
from proxy.store.store import Store
from proxy.upstream.client import Head, UpstreamClient
from proxy.upstream.turns import Ticket, TurnClass

#: Tries for one manifest while its deadline lasts.
TRIES = 3
PASSING = (UpstreamUnavailable, UpstreamTimeout, Throttled, TokenServiceFailed)
#: Manifests below an index that are looked at to see whether any of them can be served.
MAX_CHILDREN = 64


@dataclass(frozen=True, slots=True)
class _Fetched:
    """A manifest that has just come, and how long its request waited."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class _Checked:
    """What a freshness check found: the digest, and what else the upstream said."""

    digest: Digest
    changed: bool
    head: Head


class Manifests:
    """Answers for manifests, of all upstreams."""

    def __init__(
        self,
        *,
        store: Store,
        clients: Mapping[str, UpstreamClient],
        permissions: Permissions,
        book: TagBook,
        policy: TagPolicy,
        memory: int,
        metrics: Metrics,
        log: Logger,
        clock: Callable[[], float],
    ) -> None:
        """``memory`` is how many bytes of manifests are kept in memory."""
        self._store = store
        self._clients = clients
        self._permissions = permissions
        self._book = book
        self._policy = policy
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._memory: LRUCache[Digest, Manifest] = LRUCache(
            memory, getsizeof=lambda manifest: len(manifest.raw)
        )
        self._fetches: SharedWork[tuple[str, str, str], _Fetched] = SharedWork()
        self._checks: SharedWork[TagKey, _Checked] = SharedWork()
        self._background: set[asyncio.Task[None]] = set()

    # -- asking ----------------------------------------------------------------------------

    async def answer(self, ask: Ask, reference: Reference, *, head: bool) -> ManifestAnswer:
        """The manifest that ``reference`` names. Raises ``PullError``."""
        if isinstance(reference, Tag):
            return await self._by_tag(ask, reference, head=head)
        return await self._by_digest(ask, reference, CacheWord.HIT, head=head)

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
            self._permissions.check(ask, str(digest))
        if head:
            known = await self._head(ask, str(digest))
            if known is not None:
                return known
        manifest, word = await self._fetch(ask, str(digest), digest, named=linked is not None)
        return _answer(manifest, word, warning)

    async def _by_tag(self, ask: Ask, tag: Tag, *, head: bool) -> ManifestAnswer:
        key = (ask.upstream, ask.repository, str(tag))
        entry = await self._book.get(key)
        verdict = judge(entry, str(tag), self._clock(), self._policy)
        if entry is None or verdict is Verdict.FETCH:
            return await self._unknown_tag(ask, tag, key, head=head)
        if verdict is Verdict.FRESH:
            return await self._by_digest(ask, entry.digest, CacheWord.HIT, head=head)
        if verdict is Verdict.BACKGROUND:
            self._check_in_background(ask, key, entry)
            return await self._by_digest(ask, entry.digest, CacheWord.STALE, head=head)
        if verdict is Verdict.STALE and await self._can_stand_in(ask, entry):
            return await self._stale(ask, entry, "the upstream failed a moment ago", head=head)
        return await self._checked_tag(ask, key, entry, head=head)

    async def _unknown_tag(self, ask: Ask, tag: Tag, key: TagKey, *, head: bool) -> ManifestAnswer:
        self._permissions.check(ask, str(tag))
        if head:
            known = await self._head(ask, str(tag))
            if known is not None:
                await self._book.confirm(key, known.digest)
                return known
        manifest, word = await self._fetch(ask, str(tag), None, named=False)
        return _answer(manifest, word)

    # -- freshness -------------------------------------------------------------------------

    async def _checked_tag(
        self, ask: Ask, key: TagKey, entry: TagEntry, *, head: bool
    ) -> ManifestAnswer:
        """Ask the upstream what the tag is now; an upstream that fails does not fail the pull."""
        stands_in = await self._can_stand_in(ask, entry)
        patience = self._policy.upstream_timeout if stands_in else None
        try:
            async with asyncio.timeout(patience):
                checked = await self._check(ask, key, entry)
        except TimeoutError:
            self._book.failed(key)
            reason = f"no answer about this tag within {patience:g} s"
            return await self._stale(ask, entry, reason, head=head)
        except UpstreamError as error:
            if not (stands_in and _may_be_covered(error)):
                raise
            self._book.failed(key)
            return await self._stale(ask, entry, error.message, head=head)
        word = CacheWord.MISS if checked.changed else CacheWord.REVALIDATED
        return await self._by_digest(ask, checked.digest, word, head=head)

    async def _check(self, ask: Ask, key: TagKey, entry: TagEntry) -> _Checked:
        async def check(ticket: Ticket) -> _Checked:
            client = self._clients[ask.upstream]
            try:
                found = await client.head_manifest(
                    ask.repository, key[2], ticket, known=entry.digest
                )
            except PullError as error:
                await self._refused(ask, key, error)
                raise
            if found.digest is None:  # an upstream that does not say it: ask for the bytes
                manifest = await self._get(ask, key[2], None, ticket, named=False)
                return _Checked(manifest.digest, manifest.digest != entry.digest, found)
            await self._permissions.grant(ask, found.digest, found.size)
            await self._book.confirm(key, found.digest)
            return _Checked(found.digest, found.digest != entry.digest, found)

        checked, _ = await self._checks.do(key, ask.client, check, linger=True)
        return checked

    async def _refused(self, ask: Ask, key: TagKey, error: PullError) -> None:
        self._permissions.remember(ask, key[2], error)
        if isinstance(error, NotFound):
            await self._book.drop(key)

    def _check_in_background(self, ask: Ask, key: TagKey, entry: TagEntry) -> None:
        async def check() -> None:
            try:
                await self._check(ask, key, entry)
            except PullError as error:
                self._book.failed(key)
                self._log.info("tag_check_failed", tag=":".join(key[1:]), cause=str(error))

        task = asyncio.create_task(check())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _can_stand_in(self, ask: Ask, entry: TagEntry) -> bool:
        """May the old manifest stand in for a failing upstream: young enough, and complete?"""
        if not self._book.is_usable(entry, self._policy):
            return False
        if await self._permissions.link(ask, entry.digest) is None:
            return False
        manifest = await self.held(entry.digest)
        return manifest is not None and await self._is_complete(manifest)

    async def _is_complete(self, manifest: Manifest) -> bool:
        """Do we hold what the manifest names: all of an image, any one image of an index?

        podman takes the mirror that answers its manifest and never goes elsewhere for the blobs.
        """
        if not manifest.is_index:
            return all(self._store.size_of(c.digest) is not None for c in manifest.children)
        for child in manifest.children[:MAX_CHILDREN]:
            below = await self.held(child.digest)
            if below is not None and not below.is_index and await self._is_complete(below):
                return True
        return False

    async def _stale(self, ask: Ask, entry: TagEntry, reason: str, *, head: bool) -> ManifestAnswer:
        text = f"served stale: {reason}"
        return await self._by_digest(ask, entry.digest, CacheWord.STALE, head=head, warning=text)

    # -- fetching --------------------------------------------------------------------------

    async def held(self, digest: Digest) -> Manifest | None:
        """The manifest from memory or store, whoever may have it."""
        manifest = self._memory.get(digest)
        if manifest is not None:
            return manifest
        if self._store.size_of(digest) is None:
            return None
        raw, media_type = await self._store.read(digest), await self._store.manifest_type(digest)
        if raw is None or media_type is None:
            return None
        manifest = parse_manifest(raw, media_type, digest)
        self._keep(manifest)
        return manifest

    def _keep(self, manifest: Manifest) -> None:
        if len(manifest.raw) <= self._memory.maxsize:
            self._memory[manifest.digest] = manifest

    async def _head(self, ask: Ask, reference: str) -> ManifestAnswer | None:
        """What a HEAD says, if it says enough; ``None`` if the bytes are needed for that."""
        ticket = Ticket(TurnClass.METADATA, [ask.client])
        try:
            found = await self._clients[ask.upstream].head_manifest(
                ask.repository, reference, ticket
            )
        except PullError as error:
            self._permissions.remember(ask, reference, error)
            raise
        if found.digest is None or found.size is None or not found.media_type:
            return None
        await self._permissions.grant(ask, found.digest, found.size)
        return ManifestAnswer(found.digest, found.media_type, found.size, CacheWord.MISS)

    async def _fetch(
        self, ask: Ask, reference: str, expected: Digest | None, *, named: bool
    ) -> tuple[Manifest, CacheWord]:
        """GET it, once for everybody who waits."""

        async def fetch(ticket: Ticket) -> _Fetched:
            return _Fetched(await self._get(ask, reference, expected, ticket, named=named))

        key = (ask.upstream, ask.repository, reference)
        try:
            fetched, joined = await self._fetches.do(key, ask.client, fetch)
        except PullError as error:
            if not named:
                self._permissions.remember(ask, reference, error)
            raise
        if joined:
            self._metrics.coalesced.labels("manifest").inc()
        return fetched.manifest, CacheWord.JOINED if joined else CacheWord.MISS

    async def _get(
        self, ask: Ask, reference: str, expected: Digest | None, ticket: Ticket, *, named: bool
    ) -> Manifest:
        """GET with a few tries; verify, keep, link."""
        client = self._clients[ask.upstream]
        for tries in range(1, TRIES + 1):
            try:
                raw, media_type, claimed = await client.manifest(ask.repository, reference, ticket)
                break
            except (*PASSING, NotFound) as error:
                late = named or not isinstance(error, NotFound)
                if tries == TRIES or not late:
                    raise
                self._log.info("manifest_retried", reference=reference, cause=str(error))
                await asyncio.sleep(random.uniform(0, 0.2 * 2**tries))
        else:
            raise AssertionError("the loop returns or raises")
        digest = self._verified(raw, expected or claimed)
        manifest = parse_manifest(raw, media_type, digest)
        await self._admit(ask, reference, manifest, by_tag=expected is None)
        return manifest

    def _verified(self, raw: bytes, expected: Digest | None) -> Digest:
        actual = Digest.of(raw, expected.algorithm if expected else "sha256")
        if expected is not None and actual != expected:
            self._metrics.digest_mismatch.labels("upstream").inc()
            raise DigestMismatch(expected, actual)
        return actual

    async def _admit(self, ask: Ask, reference: str, manifest: Manifest, *, by_tag: bool) -> None:
        """Keep it, and let its repository have what it names. A full disk costs only the copy."""
        self._keep(manifest)
        try:
            await self._store.put_manifest(manifest)
        except (StoreFailed, StoreFull) as error:
            self._log.warning("manifest_not_kept", digest=str(manifest.digest), cause=str(error))
        links = [(child.digest, child.size) for child in manifest.children]
        links.append((manifest.digest, len(manifest.raw)))
        await self._store.link(ask.upstream, ask.repository, links)
        if by_tag:
            await self._book.confirm((ask.upstream, ask.repository, reference), manifest.digest)

    async def close(self) -> None:
        """Stop what is under way."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._checks.close()
        await self._fetches.close()


def _may_be_covered(error: UpstreamError) -> bool:
    """A failure that an old answer may stand in for; "no" and "not there" are answers."""
    return isinstance(error, PASSING) or error.status >= 500


def _answer(manifest: Manifest, word: CacheWord, warning: str | None = None) -> ManifestAnswer:
    return ManifestAnswer(
        manifest.digest, manifest.media_type, len(manifest.raw), word, manifest, warning
    )
