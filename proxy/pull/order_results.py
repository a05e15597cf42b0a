"""How an order to the fleet's nodes is doing, from what they report; pure.

A node reports the state of its task and of each of its images. What is said of an image of the
whole task is the sum over the nodes that are to have it. A node that has gone counts for nothing,
unless it was done; a task whose nodes are all gone has failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from proxy.oci.digest import Digest
from proxy.oci.errors import PullError
from proxy.oci.errors.base import ErrorCode
from proxy.pull.task import Document, ImageResult, NodeResult, TaskState

#: Nodes that an error names, and characters of each one's words.
MOST_NAMED, MOST_WORDS = 10, 200
_SUMS = ("blobs", "blobs_done", "bytes", "bytes_done")


@dataclass(frozen=True, slots=True)
class Part:
    """One node's part of an order, and what is known of it: ``images`` by their place in the
    order. ``error`` is why it is not done, other than for its images."""

    node: str
    zone: str
    images: Mapping[int, ImageResult]
    state: TaskState = TaskState.PENDING
    is_gone: bool = False
    error: str | None = None

    @property
    def counts(self) -> bool:
        """Does it matter to the whole?"""
        return self.state.is_over or not self.is_gone

    def result(self) -> NodeResult:
        sums = {key: sum(getattr(one, key) for one in self.images.values()) for key in _SUMS}
        words = [f"{one.image}: {one.error[1]}" for one in self.images.values() if one.error]
        error = self.error or ("; ".join(words)[:MOST_WORDS] or None)
        return NodeResult(self.node, self.zone, self.state, self.is_gone, error=error, **sums)


def not_done(part: Part, words: str) -> Part:
    """It will not be done there."""
    failed = PullError(words, code=ErrorCode.UNAVAILABLE)
    images = {
        place: one if one.state.is_over else one.failed(failed)
        for place, one in part.images.items()
    }
    return replace(part, images=images, state=TaskState.FAILED, error=words)


def image_of(place: int, image: str, parts: Iterable[Part]) -> ImageResult:
    """How far one image of the order is, at all nodes that are to have it."""
    mine = [
        (part.node, part.images[place]) for part in parts if part.counts and place in part.images
    ]
    if not mine:
        words = "the nodes that were to have it are gone"
        return ImageResult(image).failed(PullError(words, code=ErrorCode.UNAVAILABLE))
    results = [one for _, one in mine]
    sums = {key: sum(getattr(one, key) for one in results) for key in _SUMS}
    digest = next((one.digest for one in results if one.digest is not None), None)
    whole = ImageResult(image, _state(results), digest, **sums)
    if whole.state is not TaskState.FAILED:
        return whole
    bad = [(node, one) for node, one in mine if one.state is not TaskState.SUCCEEDED]
    code = next((one.error[0] for _, one in bad if one.error), ErrorCode.UNKNOWN.value)
    named = [
        f"{node}: {one.error[1][:MOST_WORDS] if one.error else 'it was cancelled there'}"
        for node, one in bad[:MOST_NAMED]
    ]
    more = [f"and {len(bad) - MOST_NAMED} nodes more"] if len(bad) > MOST_NAMED else []
    return replace(whole, error=(code, "; ".join(named + more)))


def _state(results: Sequence[ImageResult]) -> TaskState:
    states = {one.state for one in results}
    if all(state.is_over for state in states):
        return TaskState.SUCCEEDED if states == {TaskState.SUCCEEDED} else TaskState.FAILED
    return TaskState.PENDING if states == {TaskState.PENDING} else TaskState.RUNNING


# -- reports ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reported:
    """What a node says of its part."""

    state: TaskState
    images: Mapping[int, ImageResult] = field(default_factory=dict)
    error: str | None = None

    def applied(self, part: Part) -> Part:
        """The part as it is by this."""
        if self.error is not None:
            return not_done(part, self.error)
        images = {
            place: replace(self.images[place], image=one.image) if place in self.images else one
            for place, one in part.images.items()
        }
        return replace(part, images=images, state=self.state, error=None)

    def document(self) -> Document:
        """As it is told: short, for there may be thousands of nodes with a hundred images."""
        images = []
        for place, one in self.images.items():
            digest = None if one.digest is None else str(one.digest)
            sums = [getattr(one, key) for key in _SUMS]
            error = None if one.error is None else [one.error[0], one.error[1][:MOST_WORDS]]
            images.append([place, one.state.value, digest, *sums, error])
        return {"state": self.state.value, "images": images, "error": self.error}

    @classmethod
    def of(cls, task: Document, places: Sequence[int]) -> Reported:
        """What there is to say of a task whose images are those of an order at ``places``."""
        results = map(ImageResult.read, task["results"])
        return cls(TaskState(task["state"]), dict(zip(places, results, strict=True)))

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Reported | None:
        """What ``document`` told; None for what another version of us may have meant."""
        try:
            images = {}
            for place, state, digest, blobs, blobs_done, size, come, error in document["images"]:
                images[int(place)] = ImageResult(
                    "",
                    TaskState(state),
                    None if digest is None else Digest.parse(digest),
                    int(blobs),
                    int(blobs_done),
                    int(size),
                    int(come),
                    None if error is None else (str(error[0]), str(error[1])),
                )
            return cls(TaskState(document["state"]), images, document["error"])
        except (PullError, KeyError, TypeError, ValueError, IndexError):
            return None
