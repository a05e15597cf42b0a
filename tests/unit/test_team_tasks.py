"""Tasks when several processes share a cache: each of them speaks for the one that leads."""

import asyncio
import json
from pathlib import Path

import pytest

from proxy.oci.errors import LeaderMissing, TaskUnknown
from proxy.pull.task import MAX_IMAGES, MAX_NAME, Order
from proxy.pull.tasks import Board, new_id
from proxy.team.frames import BadFrame
from proxy.team.tasks import TeamBoard, answer, listen
from tests.unit.proxy_kit import IMAGE, NAME, UPSTREAM, until
from tests.unit.task_kit import Document, all_hits, ask, done, listening, over, prefetch
from tests.unit.team_kit import calls, leading, pair

TAG = f"{NAME}:v1"


async def test_every_question_is_answered_by_a_follower_as_by_the_leader(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, _):
        task = await done(follower, TAG, "Not/A/Name")
        assert task["state"] == "FAILED"
        for path in ("", f"/{task['id']}", f"/{task['id']}/wait", "?state=FAILED&limit=1", "/0"):
            assert await ask(follower, "GET", path) == await ask(leader, "GET", path), path
        assert (await ask(follower, "DELETE", f"/{task['id']}"))[1] == task
        assert (await ask(follower, "POST", body={"kind": "dance"}))[0] == 400
        assert (await ask(follower, "GET", "/0"))[0] == 404
        await all_hits(follower, IMAGE)
        assert leader.count("tasks_total", kind="prefetch", result="FAILED") == 1
        assert follower.count("tasks_total", kind="prefetch", result="FAILED") == 0


async def test_a_follower_cancels_what_the_leader_runs(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, fake):
        with fake.hold(kind="blob") as hold:
            task = await prefetch(leader, TAG)
            await hold.arrived()
            _, ended = await ask(follower, "DELETE", f"/{task['id']}")
            assert ended["state"] == "CANCELLED"
        await calls(leader, 0)


async def test_events_are_heard_at_a_follower(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, _), listening(follower) as listener:
        task = await done(leader, TAG)
        while True:
            event = await listener.event()
            assert event is not None
            if json.loads(event.data)["state"] == "SUCCEEDED":
                break
        assert json.loads(event.data) == task
        assert len(leader.proxy.tasks._listeners) == 1
        listener.response.close()
        await until(lambda: not len(leader.proxy.tasks._listeners))
        await calls(leader, 0)


async def test_a_slow_listener_at_a_follower_is_slow_at_the_leader(tmp_path: Path) -> None:
    """What is not taken there is not asked for here: the leader's queue is what counts."""
    async with pair(tmp_path) as (leader, follower, _):
        watch = await follower.proxy.front.board()
        listener = await watch.watch(None, None)
        try:
            await until(lambda: len(leader.proxy.tasks._listeners) == 1)
            [at_leader] = leader.proxy.tasks._listeners._all
            for number in range(300):
                at_leader.changed(str(number))
            news = await listener.next()
            assert news is not None
            assert news.document == {"reason": "you listen too slowly"}
            assert await listener.next() is None
        finally:
            listener.close()
        await calls(leader, 0)


async def test_tasks_and_those_who_listen_go_on_with_the_next_leader(tmp_path: Path) -> None:
    cap = {UPSTREAM: {"max_connections": 2}}
    async with pair(tmp_path, upstreams=cap) as (leader, follower, fake):
        with fake.hold(kind="blob") as hold:
            task = await prefetch(leader, TAG)
            await hold.arrived()
            async with listening(follower, f"?task={task['id']}") as listener:
                await listener.event()
                waiting = asyncio.create_task(
                    ask(follower, "GET", f"/{task['id']}/wait?timeout=300")
                )
                await calls(leader, 2)
                leader.proxy.drain()  # its listeners hear no end: another one goes on
                await leader.proxy.__aexit__(None, None, None)
                await leading(follower)
                hold.release()
                while True:
                    event = await listener.event()
                    assert event is not None
                    assert event.kind == "task"
                    if json.loads(event.data)["state"] == "SUCCEEDED":
                        break
            status, ended = await waiting
        assert (status, ended["state"]) == (200, "SUCCEEDED")
        await all_hits(follower, IMAGE)


async def test_without_a_leader_it_is_said_so() -> None:
    async def nobody() -> Board:
        never: asyncio.Future[Board] = asyncio.get_running_loop().create_future()
        return await never

    board = TeamBoard(nobody, patience=0.01)
    with pytest.raises(LeaderMissing):
        await board.get("0")
    with pytest.raises(LeaderMissing):
        await board.watch(None, None)


async def test_an_order_that_is_given_again_is_the_same_task(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, _):
        board, task, order = await follower.proxy.front.board(), new_id(), Order((TAG,))
        for _ in range(2):
            assert (await board.add(task, order))["id"] == task
        _, found = await ask(leader, "GET")
        assert [one["id"] for one in found["tasks"]] == [task]
        await over(leader, found["tasks"][0])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"question": "dance"},
        {"question": "add", "id": "0"},
        {"question": "newest", "state": "asleep", "most": 1},
        {"question": "newest", "state": None, "most": "x"},
        {"question": "wait", "id": "0", "seconds": None},
    ],
)
async def test_what_no_follower_asks_is_a_bad_frame(tmp_path: Path, fields: Document) -> None:
    async with pair(tmp_path) as (leader, _, _fake):
        with pytest.raises(BadFrame):
            await answer(leader.proxy.tasks, fields)
        with pytest.raises(TaskUnknown):
            await answer(leader.proxy.tasks, {"question": "get", "id": "0"})


async def test_the_longest_order_gets_to_the_leader(tmp_path: Path) -> None:
    async with pair(tmp_path) as (_, follower, _fake):
        names = [f'{number:03}"' + "\\" * (MAX_NAME - 4) for number in range(MAX_IMAGES)]
        assert (await done(follower, *names))["failed"] == MAX_IMAGES


async def test_nor_does_anybody_listen_so(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, _, _fake):
        for fields in ({"last": 7}, {"only": ["x"]}):
            with pytest.raises(BadFrame):
                await listen(leader.proxy.tasks, fields)
        assert not len(leader.proxy.tasks._listeners)
