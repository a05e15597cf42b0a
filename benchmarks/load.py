"""A crowd of clients in one process of its own.

`python -m benchmarks.load` reads one line of JSON (a plan) from standard input, answers `ready`,
waits for another line, lets all clients go at once and writes what each of them saw as JSON. A
process of its own, because its loop must not share an interpreter with whoever starts and watches
the parts. With `verify` the clients hash every byte (and their timings mean little); without, they
compare lengths. Each client has an address of its own in 127.0.0.0/8, as in a real crowd.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass

import uvloop

from benchmarks.wire import Received, ShortAnswer, Wire

STREAMS = 3  # blobs that containerd and docker fetch at a time for one image


@dataclass(frozen=True, slots=True)
class Want:
    """One thing a client asks for; `size` in bytes."""

    kind: str  # "manifest" or "blob"
    repository: str
    reference: str  # what stands in the path: a tag or a digest
    digest: str
    size: int

    @property
    def path(self) -> str:
        return f"/v2/{self.repository}/{self.kind}s/{self.reference}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A crowd: where it goes, what each client begins with, how long an answer may take (s).

    Each client asks for `each` things, one after another: its own, and those of the clients after.
    `rate`: the bytes a second that each client's line carries.
    """

    host: str
    port: int
    wants: tuple[Want, ...]
    verify: bool
    patience: float = 300.0
    each: int = 1
    rate: int | None = None

    def wants_of(self, number: int) -> list[Want]:
        """What client `number` asks for, in its order."""
        return [self.wants[(number + step) % len(self.wants)] for step in range(self.each)]

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Plan:
        fields = json.loads(text)
        wants = tuple(Want(**want) for want in fields.pop("wants"))
        return cls(wants=wants, **fields)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request; times in seconds since the crowd was let go."""

    client: int
    kind: str
    status: int  # 0 when no answer came
    fault: str  # "" or "reset", "short", "digest", "timeout", "not http"
    size: int
    began: float
    first_byte: float | None  # of the body: headers alone are no service yet
    ended: float

    @property
    def is_served(self) -> bool:
        return self.status == 200 and not self.fault


@dataclass(frozen=True, slots=True)
class Report:
    """All answers of a crowd, what the clients themselves cost (CPU seconds), and when they were
    let go, on the clock that all processes of this machine share (`time.monotonic`)."""

    answers: tuple[Answer, ...]
    cpu: float
    epoch: float = 0.0

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Report:
        fields = json.loads(text)
        answers = tuple(Answer(**answer) for answer in fields["answers"])
        return cls(answers, fields["cpu"], fields["epoch"])


class Client:
    """One member of the crowd: begins with one want; a manifest leads it to config and layers."""

    def __init__(self, number: int, plan: Plan, epoch: float) -> None:
        self._number = number
        self._plan = plan
        self._epoch = epoch
        self._source = f"127.1.{number // 250}.{1 + number % 250}"
        self._idle: list[Wire] = []
        self.answers: list[Answer] = []

    async def run(self) -> None:
        try:
            for want in self._plan.wants_of(self._number):
                await self._pull(want)
        finally:
            for wire in self._idle:
                wire.close()

    async def _pull(self, want: Want) -> None:
        manifest = await self._answer(want)
        wants = deque(_children(want.repository, manifest) if manifest else ())
        async with asyncio.TaskGroup() as streams:
            for _ in range(min(STREAMS, len(wants))):
                streams.create_task(self._stream(wants))

    async def _stream(self, wants: deque[Want]) -> None:
        while wants:
            await self._answer(wants.popleft())

    async def _answer(self, want: Want) -> bytes | None:
        """Asks once and notes what came; gives the bytes of a manifest that is right."""
        is_manifest = want.kind == "manifest"
        received = Received(hashed=is_manifest or self._plan.verify, kept=is_manifest)
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._plan.patience):
                await self._exchange(want, received)
        except (ShortAnswer, OSError, ValueError) as error:
            fault = _fault(error)
        else:
            fault = _mismatch(want, received) if received.status == 200 else ""
        self._note(want, received, fault, began)
        right = received.status == 200 and not fault
        return b"".join(received.kept) if right and received.kept is not None else None

    async def _exchange(self, want: Want, received: Received) -> None:
        """One request on an idle connection or a new one; a dead idle one costs one more try."""
        wire = self._idle.pop() if self._idle else None
        if wire is not None:
            try:
                await self._use(wire, want, received)
            except (ShortAnswer, ConnectionError):
                if received.status:
                    raise
            else:
                return
        plan = self._plan
        fresh = await Wire.dial(plan.host, plan.port, self._source, plan.rate)
        await self._use(fresh, want, received)

    async def _use(self, wire: Wire, want: Want, received: Received) -> None:
        reusable = False
        try:
            host = f"{self._plan.host}:{self._plan.port}"
            reusable = await wire.get(want.path, host, received)
        finally:
            if reusable:
                self._idle.append(wire)
            else:
                wire.close()

    def _note(self, want: Want, received: Received, fault: str, began: float) -> None:
        first = received.first_byte
        self.answers.append(
            Answer(
                client=self._number,
                kind=want.kind,
                status=received.status,
                fault=fault,
                size=received.count,
                began=began - self._epoch,
                first_byte=None if first is None else first - self._epoch,
                ended=time.monotonic() - self._epoch,
            )
        )


def _children(repository: str, manifest: bytes) -> list[Want]:
    """The config and the layers that a manifest names."""
    document = json.loads(manifest)
    return [
        Want("blob", repository, item["digest"], item["digest"], item["size"])
        for item in (document["config"], *document["layers"])
    ]


def _fault(error: Exception) -> str:
    match error:
        case TimeoutError():
            return "timeout"
        case ShortAnswer():
            return "short"
        case OSError():
            return "reset"
    return "not http"


def _mismatch(want: Want, received: Received) -> str:
    if received.count != want.size:
        return "short"
    if received.digest is not None and received.digest != want.digest:
        return "digest"
    return ""


async def crowd(plan: Plan) -> Report:
    """Lets all clients of a plan go at once and waits for the last of them."""
    before = time.process_time()
    epoch = time.monotonic()
    clients = [Client(number, plan, epoch) for number in range(len(plan.wants))]
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run())
    answers = tuple(answer for client in clients for answer in client.answers)
    return Report(answers, time.process_time() - before, epoch)


def main() -> None:
    """Speaks with the process that started it over standard input and output."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    plan = Plan.load(sys.stdin.readline())
    print("ready", flush=True)
    sys.stdin.readline()
    report = uvloop.run(crowd(plan)).dump()
    # Not print(): with PYTHONUNBUFFERED it writes once, and loses what a full pipe did not take.
    with open(sys.stdout.fileno(), "w", closefd=False) as out:
        out.write(report + "\n")


if __name__ == "__main__":
    main()
