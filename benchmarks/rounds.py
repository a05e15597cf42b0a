"""One round: a subject from cold, a crowd through it, and what everybody counted meanwhile."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import Answer, Plan, Report, Want
from benchmarks.parts import (
    LOOPBACK,
    PROJECT,
    PartFailed,
    SocketSampler,
    prime_pages,
    resident_bytes,
)
from benchmarks.subjects import Place, Subject
from benchmarks.upstreams import Tally, Upstream

TIMED_LOOKS = 0.25  # seconds between two looks at the kernel's sockets; a look costs 5 ms of a core
CLOSE_LOOKS = 0.02


@dataclass(frozen=True, slots=True)
class Crowd:
    """Who comes and what they ask of which upstream; sizes in bytes."""

    upstream: Upstream
    cap: int
    wants: tuple[Want, ...]
    answers_expected: int
    unique_size: int


@dataclass(frozen=True, slots=True)
class Round:
    """The figures of one round. Times in seconds since the crowd was let go, sizes in bytes."""

    subject: str
    verified: bool
    answers: tuple[Answer, ...]
    client_cpu: float
    upstream: Tally
    sampled_peak: int
    samples: int
    resident: int
    configuration: str

    @property
    def served(self) -> int:
        return sum(answer.is_served for answer in self.answers)

    @property
    def failures(self) -> Counter[str]:
        """Answers that are no service, by their status; by what broke where that tells nothing."""
        failed = (answer for answer in self.answers if not answer.is_served)
        return Counter(a.fault if a.status in (0, 200) else str(a.status) for a in failed)

    @property
    def wall(self) -> float:
        """When the last answer was done."""
        return max(answer.ended for answer in self.answers)

    @property
    def first_byte(self) -> float | None:
        """Median of the first body byte over those served."""
        found = [a.first_byte for a in self.answers if a.is_served and a.first_byte is not None]
        return statistics.median(found) if found else None

    def latency(self, percent: int) -> float | None:
        """A percentile of the time from a request to its end, over those served."""
        found = sorted(answer.ended - answer.began for answer in self.answers if answer.is_served)
        return found[min(len(found) - 1, len(found) * percent // 100)] if found else None

    def figures(self) -> Mapping[str, object]:
        """The round as it goes into the JSON file."""
        return {
            "subject": self.subject,
            "verified": self.verified,
            "answers": len(self.answers),
            "served": self.served,
            "failures": dict(self.failures),
            "first_byte_median": self.first_byte,
            "wall": self.wall,
            "p50": self.latency(50),
            "p99": self.latency(99),
            "client_cpu": self.client_cpu,
            "upstream_requests": self.upstream.requests,
            "upstream_refused": self.upstream.refused,
            "upstream_bytes": self.upstream.size,
            "peak_accepted": self.upstream.peak,
            "peak_sampled": self.sampled_peak,
            "samples": self.samples,
            "resident": self.resident,
        }


def play(subject: Subject, crowd: Crowd, directory: Path, *, verify: bool, prime: bool) -> Round:
    """Runs one round in a directory of its own below `directory`. Raises PartFailed."""
    if prime:
        prime_pages(directory)
    upstream = crowd.upstream
    with (
        tempfile.TemporaryDirectory(prefix=f"{subject.name}-", dir=directory) as own,
        subject.start(Place(upstream.port, crowd.cap, Path(own))) as front,
    ):
        upstream.settle()
        upstream.begin()
        plan = Plan(LOOPBACK, front.port, crowd.wants, verify)
        with SocketSampler(upstream.port, CLOSE_LOOKS if verify else TIMED_LOOKS) as sampler:
            report = unleash(plan)
            upstream.settle()
        if front.part is not None:
            front.part.check()
        return Round(
            subject=subject.name,
            verified=verify,
            answers=report.answers,
            client_cpu=report.cpu,
            upstream=upstream.tally(),
            sampled_peak=sampler.peak,
            samples=sampler.looks,
            resident=resident_bytes(front.part.pid) if front.part is not None else 0,
            configuration=front.configuration,
        )


def unleash(plan: Plan) -> Report:
    """Runs the crowd in a process of its own and waits for it. Raises PartFailed."""
    with subprocess.Popen(
        (sys.executable, "-m", "benchmarks.load"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(plan.dump() + "\n")
            process.stdin.flush()
            if process.stdout.readline() != "ready\n":
                raise PartFailed("the load generator did not start")
            process.stdin.write("go\n")
            process.stdin.flush()
            said = process.stdout.read()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise PartFailed(f"the load generator ended with {process.returncode}")
    return Report.load(said)


def rounds_in_turn(
    subjects: Sequence[Subject], number: int, *, verifying: bool
) -> list[tuple[Subject, bool]]:
    """Who runs when: a verifying round of all first, then `number` rounds, each begun by another.

    In turn, so that a slow minute of the machine falls on everybody.
    """
    order = [(subject, True) for subject in subjects] if verifying else []
    for turn in range(number):
        shift = turn % len(subjects)
        order += [(subject, False) for subject in (*subjects[shift:], *subjects[:shift])]
    return order
