"""A crowd on a Harbor that breaks under load: straight, through docker-registry, and pullpool.

`python -m benchmarks overload` starts every part itself. 120 clients pull 12 cold private images
each, every client beginning with another one, of a Harbor that breaks beyond 6 requests in
progress, token requests included, in all the ways that the bundled one knows (see
`proxy.testing.overload`). Whoever goes there has a login: the clients that go straight,
docker-registry's proxy, and pullpool, which is told a cap of 32 and has to find out that 6 is what
the upstream bears.

What counts: answers that failed, and how much of what the upstream was asked it broke on, in the
first 10 s, when nobody can know its limit, and afterwards. A crowd that is served from a cache asks
the upstream once for everything: its requests are as many as the images have parts. The images have
many layers, as images of applications have, so that a broken answer or two is not a tenth of all.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.load import Answer, Plan, Want
from benchmarks.overload_clients import unleash
from benchmarks.parts import (
    KIB,
    LOOPBACK,
    MIB,
    TIMES,
    await_http,
    free_port,
    prime_pages,
    request,
    running,
    shown,
    until,
)
from benchmarks.scenario import Findings, Options, Promise, Sheet
from benchmarks.setups import fill
from benchmarks.subjects import NOTHING, Front, Place, Subject, chosen, with_absent
from benchmarks.tables import NONE, failures_text
from benchmarks.upstreams import registry_config

BREAKS_BEYOND = 6  # requests in progress
CAP = 32  # what pullpool is told
EARLY = 10.0  # seconds
USER, PASSWORD = "robot", "pull-only"  # of a registry that lives for a minute
TOKEN_TTL = 60  # seconds
QUIET_LOOKS, QUIET_STEP = 10, 0.1  # seconds
ROUNDS = 2
RIVAL_ROUNDS = 1  # they take minutes, and fail most whatever the round

ABOUT = """\
120 clients pull 12 cold private images each, every client beginning with another one, of a Harbor
that breaks beyond 6 requests in progress, token requests included: empty challenges, Basic
challenges to good tokens, database text, tokens that grant nothing, 500, resets, all alike. The
clients that go straight have a login, docker-registry and pullpool have it in their configuration.
pullpool is told that it may open 32 sockets. An answer that failed is not asked for again.
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Clients, images, layers of an image, bytes of a layer, and the upstream's pace.

    `rate`: bytes a second for each connection; `service_time`: seconds before an answer.
    """

    clients: int
    images: int
    layers: int
    layer_sizes: tuple[int, ...]
    rate: int
    service_time: float

    @property
    def answers(self) -> int:
        """A manifest, a config and the layers of every image for each client."""
        return self.clients * self.images * (2 + self.layers)

    def title(self) -> str:
        smallest, largest = min(self.layer_sizes), max(self.layer_sizes)
        return (
            f"overload: {self.clients} clients {TIMES} {self.images} cold images of {self.layers} "
            f"layers ({smallest / KIB:g} to {largest / KIB:g} KiB), breaks beyond"
            f" {BREAKS_BEYOND} requests, pullpool's cap {CAP}"
        )


FULL = Size(
    120,
    12,
    24,
    (16 * KIB, 64 * KIB, 256 * KIB, 64 * KIB, 32 * KIB, 3 * MIB // 2),
    rate=MIB,
    service_time=0.1,
)
FAST = Size(12, 4, 2, (MIB // 4,), rate=2 * MIB, service_time=0.02)


@dataclass(frozen=True, slots=True)
class Harbor:
    """The overloaded Harbor in a process of its own."""

    port: int
    control: int
    pulls: tuple[Want, ...]
    unique_size: int

    def begin(self) -> None:
        """Counts from here on."""
        request(self.control, "/_reset", method="POST")

    def settle(self) -> None:
        """Returns once nothing has been asked and sent for a second."""
        before, quiet = "", 0
        while quiet < QUIET_LOOKS:
            counted = self.counters()
            now = f"{counted['bytes_sent']} {counted['requests']}"
            quiet = quiet + 1 if now == before else 0
            before = now
            time.sleep(QUIET_STEP)

    def counters(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(request(self.control, "/_counters").body)
        return found

    def timeline(self) -> list[tuple[float, str | None]]:
        """Each request's seconds since the first one, and what overload made of it."""
        return [(at, kind) for at, kind in json.loads(request(self.control, "/_timeline").body)]


def harbor_command(size: Size) -> tuple[str, ...]:
    """How it is started."""
    layer_sizes = ",".join(map(str, size.layer_sizes))
    return (
        *("python", "-m", "proxy.testing", "harbor", f"--users={USER}:{PASSWORD}"),
        *(f"--breaks-beyond={BREAKS_BEYOND}", f"--token-ttl={TOKEN_TTL}"),
        *(f"--images={size.images}", f"--layers={size.layers}", f"--layer-size={layer_sizes}"),
        *(f"--rate={size.rate}", f"--service-time={size.service_time}"),
    )


@contextlib.contextmanager
def harbor(directory: Path, size: Size) -> Iterator[Harbor]:
    """Starts it with its images. Raises PartFailed."""
    command = (sys.executable, *harbor_command(size)[1:])
    with running("harbor", command, directory) as part:

        def has_spoken() -> bool:
            part.check()
            return "\n" in part.output.read_text()

        until(has_spoken, "the bundled Harbor")
        ready = json.loads(part.output.read_text().splitlines()[0])
        images = ready["images"]
        sizes = [image["size"] + sum(blob["size"] for blob in image["blobs"]) for image in images]
        port, control = (urlsplit(ready[name]).port for name in ("url", "control"))
        assert port is not None
        assert control is not None
        yield Harbor(port, control, tuple(_pull(image) for image in images), sum(sizes))


def _pull(image: Mapping[str, Any]) -> Want:
    return Want("manifest", image["name"], image["tag"], image["digest"], image["size"])


@contextlib.contextmanager
def registry_proxy(place: Place) -> Iterator[Front]:
    """docker-registry as a pull-through cache with a login; it has no limit to set."""
    port, directory = free_port(), place.directory
    config = directory / "proxy.yml"
    url = f"http://{LOOPBACK}:{place.upstream}\n  username: {USER}\n  password: {PASSWORD}"
    text = registry_config(port, directory / "cache", proxied=url)
    config.write_text(text)
    with running("registry-proxy", ("docker-registry", "serve", str(config)), directory) as part:
        await_http(part, port, "/v2/", ready=lambda status: status == 200)
        yield Front(port, part, shown(text, directory))


@contextlib.contextmanager
def pullpool(place: Place) -> Iterator[Front]:
    """The product, told the cap and the login and otherwise as it comes."""
    port, admin, directory = free_port(), free_port(), place.directory
    config = directory / "pullpool.toml"
    text = fill(
        "pullpool.toml",
        port=port,
        admin=admin,
        log="",
        settings="",
        tls="",
        directory=directory,
        size=place.cache_size,
        upstream=place.upstream,
        cap=place.cap,
    )
    text += f'username = "{USER}"\npassword = "{PASSWORD}"\n'
    config.write_text(text)
    command = (sys.executable, "-m", "proxy", "serve", "--config", str(config))
    with running("pullpool", command, directory) as part:
        await_http(part, admin, "/readyz", ready=lambda status: status == 200)
        yield Front(port, part, shown(text, directory))


SUBJECTS = (
    NOTHING,
    Subject("registry", "docker-registry proxy", "docker-registry", registry_proxy),
    Subject("pullpool", "pullpool", "", pullpool),
)


@dataclass(frozen=True, slots=True)
class Share:
    """How many of the requests that the upstream got it broke on."""

    broken: int
    requests: int

    @property
    def part(self) -> float | None:
        return self.broken / self.requests if self.requests else None

    def __str__(self) -> str:
        return f"{self.part:.1%} of {self.requests}" if self.part is not None else NONE


@dataclass(frozen=True, slots=True)
class Round:
    """One subject's round; times in seconds, sizes in bytes."""

    subject: str
    answers: tuple[Answer, ...]
    expected: int
    timeline: Sequence[tuple[float, str | None]]
    sent: int
    unique: int
    peak_sockets: int
    peak_requests: int
    configuration: str = ""

    @property
    def served(self) -> int:
        return sum(answer.is_served for answer in self.answers)

    @property
    def failures(self) -> Counter[str]:
        """Answers that are no service, by status, or by what broke where that tells nothing."""
        failed = (answer for answer in self.answers if not answer.is_served)
        return Counter(a.fault if a.status in (0, 200) else str(a.status) for a in failed)

    @property
    def early(self) -> Share:
        return _share(kind for at, kind in self.timeline if at < EARLY)

    @property
    def late(self) -> Share:
        return _share(kind for at, kind in self.timeline if at >= EARLY)

    @property
    def upstream_ratio(self) -> float:
        return self.sent / self.unique

    @property
    def wall(self) -> float:
        return max(answer.ended for answer in self.answers)

    def figures(self) -> Mapping[str, object]:
        """The round in plain JSON types."""
        return {
            "subject": self.subject,
            "answers_expected": self.expected,
            "answers": len(self.answers),
            "served": self.served,
            "failures": dict(self.failures),
            "upstream_requests": len(self.timeline),
            "overload_early": {"broken": self.early.broken, "requests": self.early.requests},
            "overload_late": {"broken": self.late.broken, "requests": self.late.requests},
            "overload_kinds": dict(Counter(kind for _, kind in self.timeline if kind)),
            "upstream_ratio": self.upstream_ratio,
            "peak_accepted": self.peak_sockets,
            "peak_requests": self.peak_requests,
            "wall": self.wall,
        }


def _share(kinds: Iterator[str | None]) -> Share:
    found = list(kinds)
    return Share(sum(kind is not None for kind in found), len(found))


def play(subject: Subject, upstream: Harbor, size: Size, directory: Path) -> Round:
    """Runs one round from cold. Raises PartFailed."""
    wants = tuple(upstream.pulls[number % size.images] for number in range(size.clients))
    login = f"{USER}:{PASSWORD}" if subject.name == "nothing" else ""
    with (
        tempfile.TemporaryDirectory(prefix=f"{subject.name}-", dir=directory) as own,
        subject.start(Place(upstream.port, CAP, Path(own))) as front,
    ):
        upstream.settle()
        upstream.begin()
        report = unleash(Plan(LOOPBACK, front.port, wants, verify=True, each=size.images), login)
        upstream.settle()
        if front.part is not None:
            front.part.check()
        counted = upstream.counters()
        return Round(
            subject=subject.name,
            answers=report.answers,
            expected=size.answers,
            timeline=upstream.timeline(),
            sent=counted["bytes_sent"],
            unique=upstream.unique_size,
            peak_sockets=counted["peak_sockets"],
            peak_requests=counted["peak_requests"],
            configuration=front.configuration,
        )


def overload_table(title: str, rounds: Sequence[Round]) -> Sheet:
    """One row for each round."""
    columns = (
        "in front",
        "answers served",
        "failed answers",
        f"overload replies, first {EARLY:.0f} s",
        "after",
        "upstream / unique bytes",
        "peak sockets",
        "wall",
    )
    titles = {subject.name: subject.title for subject in SUBJECTS}
    found = [
        (
            titles[played.subject],
            f"{played.served} of {played.expected}",
            failures_text(played.failures) or "0",
            str(played.early),
            str(played.late),
            f"{played.upstream_ratio:.2f}",
            str(played.peak_sockets),
            f"{played.wall:.1f} s",
        )
        for played in rounds
    ]
    caption = (
        "overload replies: the share of the upstream's requests that it broke on; "
        "a manifest that failed leaves its blobs unasked"
    )
    return Sheet(title, columns, tuple(found), caption)


def play_rounds(subjects: Sequence[Subject], size: Size, options: Options) -> list[Round]:
    """Plays all rounds, the subjects in turn. Raises PartFailed."""
    number = 1 if options.fast else options.rounds or ROUNDS
    played = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name,
        harbor(Path(name), size) as upstream,
    ):
        for turn in range(number):
            for subject in subjects:
                if turn >= RIVAL_ROUNDS and subject.name != "pullpool" and not options.rounds:
                    continue
                options.log(f"overload {turn + 1}/{number}: {subject.title}")
                if not options.fast:
                    prime_pages(Path(name))
                played.append(play(subject, upstream, size, Path(name)))
    return sorted(played, key=lambda one: [subject.name for subject in subjects].index(one.subject))


def measure(options: Options) -> Findings:
    """Plays the crowd before each subject. Raises PartFailed."""
    size = FAST if options.fast else FULL
    rounds = play_rounds(chosen(SUBJECTS, options), size, options)
    titles = {subject.name: subject.title for subject in SUBJECTS}
    fronts = {titles[each.subject]: each.configuration for each in rounds if each.configuration}
    return Findings(
        about=ABOUT,
        sheets=(with_absent(overload_table(size.title(), rounds), SUBJECTS, options),),
        promises=tuple(promises([one for one in rounds if one.subject == "pullpool"])),
        configurations={"the overloaded Harbor": " ".join(harbor_command(size)), **fronts},
        figures=[one.figures() for one in rounds],
    )


def promises(rounds: Sequence[Round]) -> Iterator[Promise]:
    """What pullpool has to reach, in its worst round; nothing when it did not run."""
    if not rounds:
        return
    failed = max(one.expected - one.served for one in rounds)
    yield Promise("fail no answer", "0", str(failed), not failed)
    for what, most, shares in (
        (f"overload replies in the first {EARLY:.0f} s", 0.1, [one.early for one in rounds]),
        (f"overload replies after {EARLY:.0f} s", 0.02, [one.late for one in rounds]),
    ):
        worst = max(shares, key=lambda share: share.part or 0.0)
        yield Promise(what, f"≤ {most:.0%}", str(worst), (worst.part or 0.0) <= most)
    ratio = max(one.upstream_ratio for one in rounds)
    yield Promise("upstream bytes / unique bytes", "≤ 1.1", f"{ratio:.2f}", ratio <= 1.1)


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["overload", *sys.argv[1:]])
