"""What a task is, and what becomes of it; pure (DESIGN D19). ``tasks.py`` acts.

A *task* is work that lasts longer than a request. So far there is one kind, ``prefetch``: images
are brought into the cache before anybody asks for them. Its states:

    PENDING -> RUNNING -> SUCCEEDED | FAILED | CANCELLED

A task waits PENDING until fewer than the most are RUNNING, and is never refused for what others do.
It FAILED if one of its images did; the others are brought all the same. When the process ends, what
was RUNNING is PENDING again, at its old place in the order.

A task with ``nodes`` is one for the fleet: other nodes do it (``giving_orders.py``), each as a task
of its own, and it has no part in the number of those that bring images here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from proxy.fleet.orders import check_wanted
from proxy.oci.digest import Digest
from proxy.oci.errors import PullError, RequestInvalid
from proxy.oci.platform import Platform

PREFETCH = "prefetch"
#: Images and platforms of one task, at most; characters of an image's name: its registry may have
#: 255, its repository as many, its tag 128 and a digest 135.
MAX_IMAGES = 100
MAX_PLATFORMS = 20
MAX_NAME = 1000
#: Tasks that are over are forgotten after so many seconds, and beyond so many.
KEEP_SECONDS = 7 * 24 * 3600.0
KEEP_TASKS = 500

Document = dict[str, Any]


class TaskState(StrEnum):
    """Of a task, and of each of its images; the same words in the API, logs and metrics."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_over(self) -> bool:
        return self not in _GOING_ON


_GOING_ON = frozenset({TaskState.PENDING, TaskState.RUNNING})


@dataclass(frozen=True, slots=True)
class Order:
    """What somebody wants done, validated; ``nodes`` by which nodes of the fleet (``all``, how
    many, ``zone=Z``), None: here."""

    images: tuple[str, ...]
    platforms: tuple[Platform, ...] = ()
    kind: str = PREFETCH
    nodes: str | None = None

    @classmethod
    def parse(cls, document: object) -> Order:
        """Read ``{"kind": "prefetch", "images": [...], "platforms": [...], "nodes": "all"}``. What
        is wrong with one image's name is told when it is its turn, as it stops no other. Raises
        ``RequestInvalid``."""
        if not isinstance(document, dict):
            raise RequestInvalid('send {"kind": "prefetch", "images": ["NAME", …]}')
        if unknown := document.keys() - {"kind", "images", "platforms", "nodes"}:
            raise RequestInvalid(f"there is no key {min(unknown)[:100]!a} of a task")
        if document.get("kind") != PREFETCH:
            raise RequestInvalid('the kind of a task is "prefetch"')
        images = _texts(document, "images", MAX_IMAGES)
        if not images:
            raise RequestInvalid(f"name 1 to {MAX_IMAGES} images, not 0")
        platforms = [Platform.parse(text) for text in _texts(document, "platforms", MAX_PLATFORMS)]
        nodes = _nodes(document.get("nodes"))
        return cls(tuple(dict.fromkeys(images)), tuple(dict.fromkeys(platforms)), nodes=nodes)

    def document(self) -> Document:
        """The same as JSON."""
        document: Document = {
            "kind": self.kind,
            "images": list(self.images),
            "platforms": [str(platform) for platform in self.platforms],
        }
        return document if self.nodes is None else {**document, "nodes": self.nodes}


def _nodes(value: object) -> str | None:
    try:
        return None if value is None else check_wanted(str(value))
    except ValueError as error:
        raise RequestInvalid(str(error)) from error


def _texts(document: Mapping[str, object], key: str, most: int) -> list[str]:
    value = document.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise RequestInvalid(f"the {key} of a task are a list of names")
    if len(value) > most:
        raise RequestInvalid(f"name 1 to {most} {key}, not {len(value)}")
    # Printable ASCII: they are shown on terminals, and a hundred fit into a frame of ``team/``.
    if any(not (0 < len(t) <= MAX_NAME and t.isascii() and t.isprintable()) for t in value):
        raise RequestInvalid(f"each of the {key} has 1 to {MAX_NAME} printable ASCII characters")
    return value


@dataclass(frozen=True, slots=True)
class ImageResult:
    """How far one image is. Blobs are its configurations and layers, of all wanted platforms, each
    once; their numbers grow while its manifests come."""

    image: str
    state: TaskState = TaskState.PENDING
    digest: Digest | None = None
    blobs: int = 0
    blobs_done: int = 0
    bytes: int = 0
    bytes_done: int = 0
    error: tuple[str, str] | None = None  # code and message

    def failed(self, error: PullError) -> ImageResult:
        """The same after ``error``."""
        said = (error.code.value, error.message)
        return replace(self, state=TaskState.FAILED, error=said)

    def document(self) -> Document:
        """As JSON."""
        error = None
        if self.error is not None:
            error = {"code": self.error[0], "message": self.error[1]}
        return {
            "image": self.image,
            "state": self.state.value,
            "digest": None if self.digest is None else str(self.digest),
            "blobs": self.blobs,
            "blobs_done": self.blobs_done,
            "bytes": self.bytes,
            "bytes_done": self.bytes_done,
            "error": error,
        }

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> ImageResult:
        """What ``document`` wrote. Raises ``KeyError``, ``TypeError``, ``ValueError``."""
        error, digest = document["error"], document["digest"]
        return cls(
            str(document["image"]),
            TaskState(document["state"]),
            None if digest is None else Digest.parse(digest),
            int(document["blobs"]),
            int(document["blobs_done"]),
            int(document["bytes"]),
            int(document["bytes_done"]),
            None if error is None else (str(error["code"]), str(error["message"])),
        )


@dataclass(frozen=True, slots=True)
class NodeResult:
    """How far one node is with a task for the fleet; ``is_gone``: nobody has heard of it of late.
    Numbers are those of its images together."""

    node: str
    zone: str
    state: TaskState = TaskState.PENDING
    is_gone: bool = False
    blobs: int = 0
    blobs_done: int = 0
    bytes: int = 0
    bytes_done: int = 0
    error: str | None = None

    def document(self) -> Document:
        """As JSON."""
        document = {**asdict(self), "state": self.state.value}
        document["gone"] = document.pop("is_gone")
        return document

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> NodeResult:
        """What ``document`` wrote. Raises ``KeyError``, ``TypeError``, ``ValueError``."""
        fields = {**document, "state": TaskState(document["state"])}
        return cls(is_gone=bool(fields.pop("gone")), **fields)


@dataclass(frozen=True, slots=True)
class Task:
    """A task at one moment. Times are seconds since the epoch; ``number`` is its place in the order
    in which tasks came."""

    id: str
    number: int
    order: Order
    created: float
    state: TaskState = TaskState.PENDING
    started: float | None = None
    ended: float | None = None
    images: tuple[ImageResult, ...] = ()
    nodes: tuple[NodeResult, ...] = ()  # of one for the fleet
    note: str | None = None  # what keeps it from going on

    @property
    def client(self) -> str:
        """Who asks, for the queues."""
        return f"task {self.id}"

    def document(self, *, whole: bool = True) -> Document:
        """As JSON; without ``whole`` without what became of each image."""
        sums = {
            key: sum(getattr(image, key) for image in self.images)
            for key in ("blobs", "blobs_done", "bytes", "bytes_done")
        }
        document = {
            "id": self.id,
            **self.order.document(),
            "state": self.state.value,
            "created": self.created,
            "started": self.started,
            "ended": self.ended,
            **sums,
            "failed": sum(image.state is TaskState.FAILED for image in self.images),
        }
        if whole:
            document["results"] = [image.document() for image in self.images]
        if self.order.nodes is not None:
            document["note"] = self.note
            if whole:
                document["by_node"] = [node.document() for node in self.nodes]
        return document

    def text(self) -> str:
        """As it is kept."""
        return json.dumps(self.document(), separators=(",", ":"))

    @classmethod
    def read(cls, id: str, number: int, text: str) -> Task:
        """What ``text`` wrote. Raises ``ValueError`` for what no version has written."""
        try:
            document = json.loads(text)
            keys = ("kind", "images", "platforms", *(("nodes",) if "nodes" in document else ()))
            order = Order.parse({key: document[key] for key in keys})
            images = tuple(ImageResult.read(image) for image in document["results"])
            if tuple(image.image for image in images) != order.images:
                raise ValueError("results of other images")
            return cls(
                id,
                number,
                order,
                float(document["created"]),
                TaskState(document["state"]),
                _time(document["started"]),
                _time(document["ended"]),
                images,
                tuple(NodeResult.read(node) for node in document.get("by_node", ())),
                document.get("note"),
            )
        except (PullError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"no task: {error!r}") from error


def _time(value: Any) -> float | None:
    return None if value is None else float(value)


def fresh(id: str, number: int, order: Order, now: float) -> Task:
    """A task that has just come."""
    images = tuple(ImageResult(image) for image in order.images)
    return Task(id, number, order, now, images=images)


def started(task: Task, now: float) -> Task:
    """It is its turn."""
    return replace(task, state=TaskState.RUNNING, started=now)


def stopped(task: Task) -> Task:
    """The process ends, or has ended: it begins again, and finds what is there already."""
    if task.state.is_over:
        return task
    images = tuple(ImageResult(image) for image in task.order.images)
    return replace(task, state=TaskState.PENDING, started=None, images=images, nodes=(), note=None)


def cancelled(task: Task, now: float) -> Task:
    """Nobody wants it any more. What has been brought stays."""
    images = tuple(
        image if image.state.is_over else replace(image, state=TaskState.CANCELLED)
        for image in task.images
    )
    nodes = tuple(
        node if node.state.is_over else replace(node, state=TaskState.CANCELLED)
        for node in task.nodes
    )
    return replace(
        task, state=TaskState.CANCELLED, ended=now, images=images, nodes=nodes, note=None
    )


def finished(task: Task, now: float) -> Task:
    """All that could be done is done."""
    is_whole = all(image.state is TaskState.SUCCEEDED for image in task.images)
    return replace(task, state=TaskState.SUCCEEDED if is_whole else TaskState.FAILED, ended=now)


def next_ones(
    pending: Iterable[Task], running: Collection[Task], most: int, most_for_fleet: int
) -> list[Task]:
    """Which of the ``pending`` tasks, the oldest first, are to start now, so that at most ``most``
    run here and ``most_for_fleet`` elsewhere."""
    elsewhere = sum(task.order.nodes is not None for task in running)
    free = {False: most - (len(running) - elsewhere), True: most_for_fleet - elsewhere}
    found = list[Task]()
    for task in pending:
        if max(free.values()) <= 0:
            break
        lane = task.order.nodes is not None
        if free[lane] > 0:
            free[lane] -= 1
            found.append(task)
    return found


def forgotten(
    over: Collection[Task], now: float, *, age: float = KEEP_SECONDS, most: int = KEEP_TASKS
) -> list[str]:
    """Which tasks are to be forgotten of those that are over, in the order in which they ended: the
    old ones, and the oldest beyond ``most``."""
    surplus = len(over) - most
    gone: list[str] = []
    for place, task in enumerate(over):
        if place >= surplus and now - (task.ended or 0.0) <= age:
            break  # no later one is older
        gone.append(task.id)
    return gone


def counts(tasks: Iterable[Task]) -> dict[str, int]:
    """How many there are in each state."""
    found = {state.value: 0 for state in TaskState}
    for task in tasks:
        found[task.state.value] += 1
    return found


def listed(tasks: Sequence[Task], state: TaskState | None, most: int) -> list[Task]:
    """The newest tasks, of one state or of all, newest first."""
    wanted = [task for task in tasks if state is None or task.state is state]
    return sorted(wanted, key=lambda task: task.number, reverse=True)[:most]
