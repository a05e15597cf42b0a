"""Brings whole images into the cache: the work of a task of kind ``prefetch`` (DESIGN D19).

What is brought of an image is what its clients will ask for: the tag's answer, which the upstream
is asked for now, whatever is known of it; its manifest; of an index the manifests of the wanted
platforms, or of all that something runs on; and everything that those name. Afterwards each of it
is a hit, for as long as a tag is believed and nothing is evicted. That all of it is held is looked
at once more at the end, so an image that a small cache has lost again has failed.

It goes through the same parts as a client's pull: permission by repository, one flight for
everybody, the origin's gate. Manifests are asked for in the task's name, one after the other. Blobs
are flights that it *backs* (flight.py): behind everything that somebody waits for, and shared with
whoever asks. What a client would be told to come back for, it waits for, within limits.

What fails stops nothing else: neither the other images, nor the other blobs of its own image.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from proxy.observe.logs import Logger
from proxy.oci.digest import Digest
from proxy.oci.errors import (
    ManifestInvalid,
    NotFound,
    Overloaded,
    PullError,
    StoreFailed,
)
from proxy.oci.image import ImageName
from proxy.oci.manifest import DOCKER_MANIFEST, OCI_MANIFEST, Descriptor, Manifest
from proxy.oci.platform import Platform, missing_of, wanted_of
from proxy.oci.ranges import ByteRange
from proxy.oci.reference import Tag
from proxy.pull.asking import PASSING, Pause
from proxy.pull.asks import Ask, BlobAnswer
from proxy.pull.fetching import SMALL
from proxy.pull.flight import Flights, State
from proxy.pull.manifests import Checked
from proxy.pull.task import ImageResult, Task, TaskState
from proxy.store.store import Store
from proxy.upstream.mirrored import MirroredClient
from proxy.upstream.routing import Route, Routes

V = TypeVar("V")

#: Images of one task that are brought at once, and blobs.
IMAGES_AT_ONCE = 4
BLOBS_AT_ONCE = 16
#: How deep indexes may lie in indexes, and manifests of one image, at most.
MAX_DEPTH = 4
MAX_MANIFESTS = 1000
#: Seconds for which one answer is waited for that is "later", and tries of one that fails.
PATIENCE = 600.0
TRIES = 3

#: Is told how the image at that place of the task is doing.
Report = Callable[[int, ImageResult], None]


class Pulls(Protocol):
    """What answers: a ``Puller``."""

    async def alone(self, ask: Ask, digest: Digest) -> Manifest: ...

    async def refresh(self, ask: Ask, tag: Tag) -> Checked: ...

    async def blob(
        self, ask: Ask, digest: Digest, wanted: ByteRange | None, *, head: bool
    ) -> BlobAnswer: ...


def pause_after(error: PullError, tries: int, waited: float, own: float) -> float | None:
    """Seconds until another try, when ``tries`` have failed within ``waited`` seconds, the last one
    with ``error``; None: there is no use. ``own`` is the pause if the upstream names none."""
    pause = max(own, error.retry_after or 0.0)
    if isinstance(error, Overloaded):
        return pause if waited + pause < PATIENCE else None
    return pause if isinstance(error, PASSING) and tries < TRIES and waited < PATIENCE else None


class Images:
    """Brings images of all upstreams."""

    def __init__(
        self,
        *,
        pulls: Pulls,
        flights: Flights,
        clients: Mapping[str, MirroredClient],
        store: Store,
        routes: Routes,
        clock: Callable[[], float],
        pause: Pause,
        log: Logger,
    ) -> None:
        """``clock`` is monotonic, ``pause`` gives the seconds before a try, both as elsewhere."""
        self.pulls = pulls
        self.flights = flights
        self.clients = clients
        self.store = store
        self.routes = routes
        self._clock = clock
        self._pause = pause
        self._log = log

    async def run(self, task: Task, report: Report) -> None:
        """Bring all images of a task; each one's result is reported."""
        images = asyncio.Semaphore(IMAGES_AT_ONCE)
        blobs = asyncio.Semaphore(BLOBS_AT_ONCE)

        async def bring(place: int, name: str) -> None:
            def told(result: ImageResult) -> None:
                report(place, result)

            async with images:
                await _Image(self, task.client, name, task.order.platforms, blobs, told).bring()

        async with asyncio.TaskGroup() as group:
            for place, name in enumerate(task.order.images):
                _ = group.create_task(bring(place, name), name=f"{task.client} image {place}")

    async def patiently(self, work: Callable[[], Awaitable[V]]) -> V:
        """What ``work`` gives, tried again where that may help. Raises ``PullError``."""
        tries, began = 0, self._clock()
        while True:
            try:
                return await work()
            except PullError as error:
                tries += 1
                pause = pause_after(error, tries, self._clock() - began, self._pause(tries))
                if pause is None:
                    raise
                self._log.debug("prefetch_waits", seconds=pause, cause=str(error))
            await asyncio.sleep(pause)

    def __repr__(self) -> str:
        return f"<Images by {self.routes!r}>"


@dataclass(slots=True)
class _Found:
    """What an image consists of, as far as it is known."""

    manifests: dict[Digest, Manifest] = field(default_factory=dict)
    blobs: dict[Digest, Descriptor] = field(default_factory=dict)


class _Image:
    """One image of one task, on its way."""

    def __init__(
        self,
        images: Images,
        client: str,
        name: str,
        platforms: Sequence[Platform],
        slots: asyncio.Semaphore,
        report: Callable[[ImageResult], None],
    ) -> None:
        self._images = images
        self._client = client
        self._platforms = platforms
        self._slots = slots
        self._report = report
        self._result = ImageResult(name, TaskState.RUNNING)
        self._found = _Found()
        self._come: dict[Digest, int] = {}  # bytes of each blob that are here
        self._errors: list[PullError] = []

    async def bring(self) -> None:
        """All of it; says how it went."""
        self._tell(self._result)
        try:
            route, digest = await self._named()
            self._tell(replace(self._result, digest=digest))
            await self._manifest(route, digest, 0)
            async with asyncio.TaskGroup() as group:
                for child in self._found.blobs.values():
                    _ = group.create_task(self._blob(route, child))
            self._check()
        except PullError as error:
            self._errors.append(error)
        if self._errors:
            self._tell(self._result.failed(self._errors[0]))
        else:
            self._tell(replace(self._result, state=TaskState.SUCCEEDED))

    async def _named(self) -> tuple[Route, Digest]:
        """Where it comes from, and what it is."""
        name = ImageName.parse(self._result.image)
        route, reference = self._images.routes.image(name), name.reference
        if not isinstance(reference, Tag):
            return route, reference
        checked = await self._images.patiently(
            lambda: self._images.pulls.refresh(self._ask(route), reference)
        )
        return route, checked.digest

    def _ask(self, route: Route) -> Ask:
        return Ask(route, self._client, asyncio.get_running_loop().time())

    async def _manifest(self, route: Route, digest: Digest, depth: int) -> None:
        """A manifest, and those that it leads to."""
        found = self._found
        if digest in found.manifests:
            return
        if depth > MAX_DEPTH or len(found.manifests) >= MAX_MANIFESTS:
            raise ManifestInvalid("the image's indexes lead to too many manifests, or too deep")
        pulls = self._images.pulls
        manifest = await self._images.patiently(lambda: pulls.alone(self._ask(route), digest))
        found.manifests[digest] = manifest
        if manifest.is_index:
            await self._below(route, manifest, depth)
        elif manifest.children or manifest.media_type in (OCI_MANIFEST, DOCKER_MANIFEST):
            found.blobs.update((child.digest, child) for child in manifest.children)
            size = sum(child.size for child in found.blobs.values())
            self._tell(replace(self._result, blobs=len(found.blobs), bytes=size))
        else:
            kind = manifest.media_type
            raise ManifestInvalid(f"what a manifest of type {kind} consists of is not known here")

    async def _below(self, route: Route, index: Manifest, depth: int) -> None:
        wanted, missing = self._platforms, list[Platform]()
        if len(index.raw) <= SMALL:
            children, missing = wanted_of(index, wanted), missing_of(index, wanted)
        else:
            children = await asyncio.to_thread(wanted_of, index, wanted)
            missing = await asyncio.to_thread(missing_of, index, wanted)
        if missing:
            names = ", ".join(map(str, missing))
            self._errors.append(NotFound("manifest", f"the image is not there for {names}"))
        for child in children:
            try:
                await self._manifest(route, child.digest, depth + 1)
            except PullError as error:  # an index may name what is not there
                self._errors.append(error)

    async def _blob(self, route: Route, child: Descriptor) -> None:
        async with self._slots:
            try:
                if self._images.store.size_of(child.digest) is None:
                    await self._images.patiently(lambda: self._fly(route, child))
                await self._permit(route, child.digest)
            except PullError as error:
                self._came(child, 0)
                self._errors.append(error)
                return
        done = self._result.blobs_done + 1
        self._result = replace(self._result, blobs_done=done)
        self._came(child, child.size)

    async def _fly(self, route: Route, child: Descriptor) -> None:
        """See to it that its flight ends well. Raises its error."""
        client = self._images.clients[route.upstream.name]
        flight = self._images.flights.back(
            client.blob(route.repository, child.digest), self._client, child.size
        )
        try:
            while not flight.is_over:
                self._came(child, min(flight.received, child.size))
                await flight.changed()
        finally:
            flight.unback(self._client)
        if flight.error is not None and flight.state is not State.ABANDONED:
            raise flight.error.bare()
        if flight.state is State.ABANDONED:  # though it was backed: there was no file to go on with
            raise StoreFailed(f"the cache has no room for {child.digest} ({child.size} bytes)")
        if self._images.store.size_of(child.digest) is None:
            raise StoreFailed(f"the cache could not keep {child.digest}")

    async def _permit(self, route: Route, digest: Digest) -> None:
        """The bytes may have come through another repository: a pull through this one is a hit only
        if it is known to have them, too."""
        images = self._images
        if await images.store.linked(route.upstream.name, route.repository, digest) is None:
            ask = self._ask
            answer = await images.patiently(
                lambda: images.pulls.blob(ask(route), digest, None, head=True)
            )
            answer.close()

    def _check(self) -> None:
        """Is it all there still? Raises ``StoreFailed``."""
        if self._errors:
            return
        for digest in (*self._found.manifests, *self._found.blobs):
            if self._images.store.size_of(digest) is None:
                raise StoreFailed(f"{digest} was evicted again: the cache is too small")

    def _came(self, child: Descriptor, count: int) -> None:
        """So many bytes of a blob are here."""
        more = count - self._come.get(child.digest, 0)
        self._come[child.digest] = count
        self._tell(replace(self._result, bytes_done=self._result.bytes_done + more))

    def _tell(self, result: ImageResult) -> None:
        self._result = result
        self._report(result)
