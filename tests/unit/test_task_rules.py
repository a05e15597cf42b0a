"""What a task is and what becomes of it, and platforms: the pure parts."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.digest import Digest
from proxy.oci.errors import (
    Denied,
    NotFound,
    QueueTimeout,
    RequestInvalid,
    Throttled,
    UpstreamUnavailable,
)
from proxy.oci.manifest import OCI_INDEX, OCI_MANIFEST, Manifest, parse_manifest
from proxy.oci.platform import Platform, missing_of, platforms_of, wanted_of
from proxy.pull.images import PATIENCE, TRIES, pause_after
from proxy.pull.task import (
    ImageResult,
    Order,
    Task,
    TaskState,
    cancelled,
    counts,
    finished,
    forgotten,
    fresh,
    listed,
    next_ones,
    started,
    stopped,
)

ORDER = Order(("team/app:v1", "team/other"), (Platform("linux", "arm", "v7"),))
DIGEST = Digest.of(b"x")
STATES = st.sampled_from(TaskState)


def a_task(number: int, state: TaskState = TaskState.PENDING, ended: float | None = None) -> Task:
    return replace(fresh(f"{number:016x}", number, ORDER, 1.0), state=state, ended=ended)


class TestSteps:
    def test_a_task_succeeds_only_with_all_of_its_images(self) -> None:
        task = started(a_task(1), 2.0)
        good = ImageResult("a", TaskState.SUCCEEDED)
        bad = ImageResult("b").failed(NotFound("manifest"))
        assert finished(replace(task, images=(good, good)), 3.0).state is TaskState.SUCCEEDED
        ended = finished(replace(task, images=(good, bad)), 3.0)
        assert (ended.state, ended.started, ended.ended) == (TaskState.FAILED, 2.0, 3.0)

    def test_what_is_stopped_begins_anew_and_what_is_over_stays(self) -> None:
        images = (ImageResult("team/app:v1", TaskState.RUNNING, DIGEST, 3, 1, 30, 10),)
        again = stopped(replace(started(a_task(1), 2.0), images=images))
        assert again == a_task(1)
        over = a_task(1, TaskState.FAILED, 3.0)
        assert stopped(over) is over

    def test_of_a_cancelled_task_what_is_done_is_done(self) -> None:
        images = (ImageResult("a", TaskState.SUCCEEDED), ImageResult("b", TaskState.RUNNING))
        ended = cancelled(replace(started(a_task(1), 2.0), images=images), 3.0)
        assert ended.state is TaskState.CANCELLED
        assert [image.state for image in ended.images] == ["SUCCEEDED", "CANCELLED"]

    @given(st.lists(st.tuples(STATES, st.booleans()), max_size=20), st.integers(1, 6))
    def test_the_oldest_start_and_never_too_many(
        self, kinds: list[tuple[TaskState, bool]], most: int
    ) -> None:
        tasks = [
            replace(a_task(n, state), order=Order(("a",), nodes="all" if is_for_fleet else None))
            for n, (state, is_for_fleet) in enumerate(kinds)
        ]
        running = [task for task in tasks if task.state is TaskState.RUNNING]
        pending = [task for task in tasks if task.state is TaskState.PENDING]
        both = next_ones(pending, running, most, 2)
        for nodes, limit in ((None, most), ("all", 2)):
            waiting = [task for task in pending if task.order.nodes == nodes]
            chosen = [task for task in both if task.order.nodes == nodes]
            busy = sum(task.order.nodes == nodes for task in running)
            assert chosen == waiting[: len(chosen)]
            assert len(chosen) + busy <= max(limit, busy)
            assert len(chosen) == len(waiting) or len(chosen) + busy >= limit

    @given(st.lists(st.integers(0, 100), max_size=20).map(sorted), st.integers(0, 5))
    def test_what_is_old_or_beyond_the_number_is_forgotten(
        self, ends: list[int], most: int
    ) -> None:
        tasks = [a_task(number, TaskState.FAILED, float(end)) for number, end in enumerate(ends)]
        gone = forgotten(tasks, 100.0, age=50.0, most=most)
        young = [task for task in tasks if 100.0 - (task.ended or 0.0) <= 50.0]
        kept = young[max(0, len(young) - most) :]
        assert gone == [task.id for task in tasks if task not in kept]

    def test_a_list_is_of_the_newest(self) -> None:
        tasks = [a_task(n, TaskState.FAILED if n % 2 else TaskState.PENDING) for n in range(9)]
        assert [task.number for task in listed(tasks, None, 3)] == [8, 7, 6]
        assert [task.number for task in listed(tasks, TaskState.FAILED, 9)] == [7, 5, 3, 1]
        assert counts(tasks) == {
            "PENDING": 5,
            "RUNNING": 0,
            "SUCCEEDED": 0,
            "FAILED": 4,
            "CANCELLED": 0,
        }


class TestKeeping:
    @given(STATES, st.none() | st.floats(0, 1e10), st.text(), st.integers(0, 2**60))
    def test_a_task_is_read_as_it_was_written(
        self, state: TaskState, when: float | None, words: str, size: int
    ) -> None:
        images = (
            ImageResult("team/app:v1", state, DIGEST, 3, 2, size, size // 2),
            replace(ImageResult("team/other", state), error=("DENIED", words)),
        )
        task = Task("0" * 16, 7, ORDER, 1.5, state, when, when, images)
        assert Task.read(task.id, task.number, task.text()) == task

    @pytest.mark.parametrize("key", sorted(json.loads(a_task(1).text()).keys() - {"failed"}))
    @pytest.mark.parametrize("value", [{}, "x", None])
    def test_what_no_version_has_written_is_no_task(self, key: str, value: object) -> None:
        document = json.loads(a_task(1).text())
        document[key] = value
        sums = {"id", "blobs", "blobs_done", "bytes", "bytes_done"}  # are not read
        if key in sums or (value is None and key in ("started", "ended")):
            assert Task.read("1", 1, json.dumps(document)).number == 1
            return
        with pytest.raises(ValueError, match="no task"):
            Task.read("1", 1, json.dumps(document))

    @pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", "[" * 100_000])
    def test_nor_is_anything_else(self, text: str) -> None:
        with pytest.raises(ValueError, match="no task"):
            Task.read("1", 1, text)


class TestTrying:
    def test_later_is_waited_for_within_limits(self) -> None:
        assert pause_after(QueueTimeout(10.0), 50, 100.0, 1.0) == 10.0
        assert pause_after(Throttled(), 1, 0.0, 1.0) == 1.0
        assert pause_after(QueueTimeout(10.0), 2, PATIENCE - 5, 1.0) is None
        assert pause_after(Throttled(6 * 3600.0), 1, 0.0, 1.0) is None

    def test_what_fails_is_tried_a_few_times_and_what_is_denied_never(self) -> None:
        error = UpstreamUnavailable()
        assert [pause_after(error, n, 0.0, 1.0) for n in (1, TRIES - 1, TRIES)] == [1.0, 1.0, None]
        assert pause_after(Denied(), 1, 0.0, 1.0) is None


class TestPlatforms:
    def test_written_and_read(self) -> None:
        for text in ("linux/amd64", "linux/arm/v7", "windows/amd64"):
            assert str(Platform.parse(text)) == text

    @pytest.mark.parametrize(
        "text", ["", "linux", "linux/", "/amd64", "linux/amd64/", "a/b/c/d", "Linux/amd64", "a/b c"]
    )
    def test_what_is_none_is_refused(self, text: str) -> None:
        with pytest.raises(RequestInvalid, match=r"os/architecture\[/variant\]"):
            Platform.parse(text)

    @pytest.mark.parametrize(
        ("asked", "other", "expected"),
        [
            ("linux/amd64", "linux/amd64", True),
            ("linux/amd64", "linux/arm64", False),
            ("linux/amd64", "windows/amd64", False),
            ("linux/arm64", "linux/arm64/v8", True),
            ("linux/arm64/v8", "linux/arm64", True),
            ("linux/arm64/v9", "linux/arm64", False),
            ("linux/arm", "linux/arm/v6", True),
            ("linux/arm/v7", "linux/arm", True),
            ("linux/arm/v7", "linux/arm/v6", False),
            ("linux/amd64/v3", "linux/amd64", False),
        ],
    )
    def test_which_image_is_meant(self, asked: str, other: str, expected: bool) -> None:
        assert Platform.parse(asked).covers(Platform.parse(other)) is expected

    def test_of_an_index(self) -> None:
        index, (amd64, arm64, attestation, unsaid) = an_index(
            {"os": "linux", "architecture": "amd64"},
            {"os": "linux", "architecture": "arm64", "variant": "v8"},
            {"os": "unknown", "architecture": "unknown"},
            None,
        )

        def wanted(*names: str) -> list[Digest]:
            chosen = wanted_of(index, [Platform.parse(name) for name in names])
            return [child.digest for child in chosen]

        assert wanted() == [amd64, arm64, unsaid]
        assert wanted("linux/amd64") == [amd64, unsaid]
        assert wanted("linux/arm64", "linux/amd64") == [amd64, arm64, unsaid]
        assert wanted("unknown/unknown") == [attestation, unsaid]
        assert missing_of(index, [Platform("linux", "s390x")]) == []  # it may be the unsaid one

    def test_what_is_missing_is_known_of_an_index_that_says_what_it_has(self) -> None:
        index, _ = an_index({"os": "linux", "architecture": "amd64"})
        s390x = Platform("linux", "s390x")
        assert missing_of(index, [s390x, Platform("linux", "amd64")]) == [s390x]

    @pytest.mark.parametrize("platform", [1, "linux/amd64", {}, {"os": 1, "architecture": "a"}, []])
    def test_what_cannot_be_read_says_nothing(self, platform: object) -> None:
        index, [digest] = an_index(platform)
        assert platforms_of(index) == {}
        assert [child.digest for child in wanted_of(index, [Platform("a", "b")])] == [digest]


def an_index(*platforms: object) -> tuple[Manifest, list[Digest]]:
    """An index with a manifest for each of these, and their digests."""
    digests = [Digest.of(bytes([place])) for place in range(len(platforms))]
    entries = [
        {"mediaType": OCI_MANIFEST, "digest": str(digest), "size": 1, "platform": platform}
        for digest, platform in zip(digests, platforms, strict=True)
    ]
    raw = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    return parse_manifest(raw, OCI_INDEX, Digest.of(raw)), digests
