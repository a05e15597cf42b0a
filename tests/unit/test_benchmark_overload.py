"""What the overload benchmark counts, and its clients that know a login."""

from __future__ import annotations

from benchmarks.load import Plan, Want
from benchmarks.overload import Round
from benchmarks.overload_clients import crowd_with_login
from proxy.testing import FakeRegistry, Overload, make_image
from tests.unit.fake_kit import IMAGE


def harbor() -> FakeRegistry:
    registry = FakeRegistry(
        auth="bearer", harbor=True, users={"ann": "pw"}, private={"team/app": ["ann"]}
    )
    registry.push(IMAGE)
    return registry


def plan(registry: FakeRegistry, clients: int) -> Plan:
    want = Want("manifest", IMAGE.name, IMAGE.tag, str(IMAGE.digest), len(IMAGE.manifest))
    return Plan(registry.host, registry.port, (want,) * clients, verify=True)


async def test_each_client_pulls_a_private_image_with_one_token() -> None:
    async with harbor() as registry:
        report = await crowd_with_login(plan(registry, clients=3), "ann:pw")
        assert [answer.is_served for answer in report.answers] == [True] * 3 * 4
        assert registry.counters.tokens_issued == 3


async def test_a_wrong_login_ends_at_the_manifest() -> None:
    async with harbor() as registry:
        report = await crowd_with_login(plan(registry, clients=2), "ann:wrong")
        assert [(answer.kind, answer.status) for answer in report.answers] == [
            ("manifest", 401)
        ] * 2


async def test_an_overloaded_harbor_fails_its_clients() -> None:
    async with harbor() as registry:
        registry.overload = Overload(0, {"reset": 1.0}, refusal_time=0)
        report = await crowd_with_login(plan(registry, clients=2), "ann:pw")
        assert [(answer.status, answer.fault) for answer in report.answers] == [(0, "reset")] * 2
        assert registry.counters.overloads == {"reset": 2}


async def test_each_client_pulls_every_image_beginning_with_its_own() -> None:
    async with harbor() as registry:
        other = make_image("team/other", "v1", layers=(700,), seed=5)
        registry.push(other)
        wants = tuple(
            Want("manifest", image.name, image.tag, str(image.digest), len(image.manifest))
            for image in (IMAGE, other)
        )
        plan = Plan(registry.host, registry.port, wants, verify=True, each=2)
        report = await crowd_with_login(plan, "ann:pw")
        assert {answer.is_served for answer in report.answers} == {True}
        parts = sum(1 + len(image.blobs) for image in (IMAGE, other))
        assert [answer.client for answer in report.answers] == [0] * parts + [1] * parts
        assert plan.wants_of(1) == [wants[1], wants[0]]


def test_a_round_tells_the_first_seconds_from_those_after() -> None:
    timeline = [(0.0, "500"), (9.9, None), (10.0, None), (11.0, None), (12.0, "poisoned-token")]
    played = Round("pullpool", (), 0, timeline, 30, 20, 1, 1)
    assert (str(played.early), str(played.late)) == ("50.0% of 2", "33.3% of 3")
    assert played.upstream_ratio == 1.5
