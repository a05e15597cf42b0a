"""The directory against real servers: what is asked, what fails, how it heals, who may leave."""

import asyncio
import random
from pathlib import Path

import pytest

from proxy.fleet.crowd import AT_ONCE
from proxy.fleet.directory import FIRST_PAUSE, LONGEST_PAUSE, pause_before
from proxy.fleet.link import Login
from proxy.fleet.script import Script
from proxy.fleet.server import MOST_LINKS
from proxy.oci.errors import DirectoryDown
from tests.unit.directory_kit import ECHO, SHORT, WHO, WRITE, Asking, asking
from tests.unit.redis_kit import (
    PASSWORD,
    SENTINEL_ACL,
    SENTINEL_PASSWORD,
    SENTINEL_RULES,
    SENTINEL_USER,
    USER,
    Cable,
    Server,
    needs_redis,
    redis_cluster,
    redis_server,
    redis_with_sentinel,
    redis_with_sentinel_and_tls,
    redis_with_tls,
    until,
)

pytestmark = needs_redis


async def clients(server: Server) -> int:
    """Connections of directories to this server."""
    listed = (await server.ask("CLIENT", "LIST")).decode().splitlines()
    return sum("name=pullpool" in line for line in listed)


async def connections(server: Server) -> set[str]:
    """The same by their ids, which no other connection gets again."""
    listed = (await server.ask("CLIENT", "LIST")).decode().splitlines()
    return {line.split()[0] for line in listed if "name=pullpool" in line}


class TestAsking:
    async def test_a_script_gets_its_key_its_arguments_and_its_answer(self, tmp_path: Path) -> None:
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            assert await ours.run(ECHO, "x", ["a", b"\xff\0", 7, 0.5]) == [
                b"a",
                b"\xff\0",
                b"7",
                b"0.5",
            ]
            assert await ours.run(WRITE, "members") == 1
            assert await server.ask("GET", "pp:{members}:n") == b"1"
            assert ours.count("directory_operations_total", script="echo", result="ok") == 1
            assert ours.count("directory_operation_duration_seconds_count", script="echo") == 1

    async def test_a_script_is_sent_once_and_again_when_the_server_forgot_it(
        self, tmp_path: Path
    ) -> None:
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            assert [await ours.run(WRITE) for _ in range(3)] == [1, 2, 3]
            assert await server.calls("eval") == 1
            await server.flush()
            assert await ours.run(WRITE) == 1
            assert await server.calls("eval") == 2

    async def test_a_tag_that_would_mean_another_slot_is_refused(self, tmp_path: Path) -> None:
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            for tag in ("", "a}b", "{"):
                with pytest.raises(ValueError, match="hash tag"):
                    await ours.run(ECHO, tag)

    async def test_a_script_that_asks_for_it_is_told_which_process_answers(
        self, tmp_path: Path
    ) -> None:
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            before = await ours.run(WHO)
            assert before.decode() == await server.info("server", "run_id")
            await server.restart()
            await ours.healed()
            after = await ours.run(WHO)
            assert after.decode() == await server.info("server", "run_id")
            assert before != after

    async def test_a_script_that_is_wrong_fails_alone(self, tmp_path: Path) -> None:
        wrong = Script("wrong", "return redis.call('HGET', KEYS[1])")
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            with pytest.raises(DirectoryDown, match="Wrong number of args"):
                await ours.run(wrong)
            assert ours.directory.is_up
            assert [e["script"] for e in ours.events("directory_script_failed")] == ["wrong"]
            assert await ours.answers()

    async def test_a_crowd_of_calls_shares_a_few_connections(self, tmp_path: Path) -> None:
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            found = await asyncio.gather(*(ours.run(ECHO, args=[n]) for n in range(200)))
            assert found == [[str(n).encode()] for n in range(200)]
            assert await clients(server) <= MOST_LINKS

    async def test_another_database_holds_other_keys(self, tmp_path: Path) -> None:
        async with redis_server(tmp_path) as server:
            async with asking(server.url.replace("/0", "/5")) as ours:
                assert await ours.run(WRITE) == 1
            assert await server.ask("GET", "pp:{x}:n") is None

    async def test_nothing_is_left_open(self, tmp_path: Path) -> None:
        async with redis_server(tmp_path) as server:
            async with asking(server.url) as ours:
                await asyncio.gather(*(ours.run(ECHO) for _ in range(10)))

            async def gone() -> bool:
                return await clients(server) == 0

            await until(gone)


class TestLeaving:
    @pytest.mark.parametrize("turns", [1, 2, 4])
    async def test_a_caller_that_leaves_stops_neither_its_script_nor_a_connection(
        self, tmp_path: Path, turns: int
    ) -> None:
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            await ours.run(ECHO)
            before = await connections(server)
            call = asyncio.create_task(ours.run(WRITE))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

            async def ended() -> bool:
                return bool(await server.ask("GET", "pp:{x}:n") == b"1")

            await until(ended)
            await ours.run(ECHO)  # over another one, if the answer to that has not been read yet
            assert before <= await connections(server)

    async def test_the_answer_of_one_that_left_is_never_anothers(self, tmp_path: Path) -> None:
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            for turn in range(40):
                calls = [
                    asyncio.create_task(ours.run(ECHO, args=[f"{turn}.{n}"])) for n in range(9)
                ]
                for _ in range(turn % 7):
                    await asyncio.sleep(0)
                for call in calls[::2]:
                    call.cancel()
                kept = await asyncio.gather(*calls[1::2])
                assert kept == [[f"{turn}.{n}".encode()] for n in range(1, 9, 2)]
                await asyncio.gather(*calls[::2], return_exceptions=True)
            assert await clients(server) <= MOST_LINKS
            assert ours.events("directory_down") == []

    async def test_the_end_of_the_directory_answers_who_waits(self, tmp_path: Path) -> None:
        async with redis_server(tmp_path) as server:
            async with asking(server.url) as ours:
                server.pause()
                calls = [asyncio.create_task(ours.run(ECHO)) for _ in range(MOST_LINKS + 2)]
                await asyncio.sleep(0.05)
            for call in calls:
                with pytest.raises(DirectoryDown, match="being closed"):
                    await call
            with pytest.raises(DirectoryDown):
                await ours.run(ECHO)
            server.resume()


class TestFailing:
    async def test_a_directory_that_is_not_there_fails_calls_at_once(self, tmp_path: Path) -> None:
        server = Server(tmp_path)
        async with asking(server.url, wait=False) as ours:
            with pytest.raises(DirectoryDown):
                await ours.run(ECHO)
            try:
                await server.start()
                await ours.directory.wait_up()
                assert await ours.answers()
                assert len(ours.events("directory_up")) == 1
            finally:
                await server.kill()

    async def test_a_server_that_is_silent_is_left_alone_until_it_goes_on(
        self, tmp_path: Path
    ) -> None:
        async with (
            redis_server(tmp_path) as server,
            asking(server.url, answer_timeout=SHORT, connect_timeout=SHORT) as ours,
        ):
            server.pause()
            error = await ours.fails()
            assert error.status == 503
            assert not ours.directory.is_up
            assert ours.count("directory_up") == 0
            asked_before = ours.count("directory_operations_total", script="echo", result="refused")
            for _ in range(100):
                assert not await ours.answers()
            asked = ours.count("directory_operations_total", script="echo", result="refused")
            assert asked == asked_before + 100
            server.resume()
            await ours.directory.wait_up()
            assert await ours.answers()
            assert ours.count("directory_up") == 1
            assert len(ours.events("directory_down")) == 1
            assert len(ours.events("directory_up")) == 2

    async def test_in_a_large_fleet_a_late_answer_is_no_sign_of_anything(
        self, tmp_path: Path
    ) -> None:
        # Nobody asks another second of a server; it answers late as one does that is asked a lot.
        late = Script(
            "late",
            "local t = redis.call('TIME') repeat local n = redis.call('TIME')"
            " until (n[1] - t[1]) * 1000000 + n[2] - t[2] > 400000 return 'here'",
        )
        async with (
            redis_server(tmp_path) as server,
            asking(server.url, answer_timeout=SHORT, patience=SHORT) as ours,
        ):
            ours.directory.nodes = AT_ONCE
            await ours.fails(late)
            await ours.directory.wait_up()
            ours.directory.nodes = 20 * AT_ONCE
            assert await ours.run(late) == b"here"
            assert ours.directory.is_up

    async def test_a_server_that_is_started_again_is_found_again(self, tmp_path: Path) -> None:
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            assert await ours.run(WRITE) == 1
            await server.restart()
            await ours.healed()
            assert await ours.run(WRITE) == 1

    async def test_a_cable_that_is_cut_is_noticed_and_healed(self, tmp_path: Path) -> None:
        async with redis_server(tmp_path) as server, Cable(server.port) as cable:
            url = f"redis://127.0.0.1:{cable.port}"
            async with asking(url, answer_timeout=SHORT, connect_timeout=SHORT) as ours:
                cable.cut()
                await ours.fails()
                cable.mend()
                await ours.healed()

    async def test_a_full_server_is_down_and_says_so(self, tmp_path: Path) -> None:
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            await server.ask("CONFIG", "SET", "maxmemory", "1")
            assert "maxmemory" in str(await ours.fails(WRITE))
            assert not ours.directory.is_up
            await server.ask("CONFIG", "SET", "maxmemory", "0")
            await ours.healed()
            assert await ours.run(WRITE) == 1

    async def test_idle_connections_that_the_server_closed_cost_no_call(
        self, tmp_path: Path
    ) -> None:
        async with redis_server(tmp_path) as server, asking(server.url) as ours:
            await asyncio.gather(*(ours.run(ECHO) for _ in range(10)))
            await server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.sleep(0.05)  # the news of it arrives

            assert await ours.answers()
            assert ours.events("directory_down") == []

    async def test_a_hundred_nodes_come_back_without_a_storm(self, tmp_path: Path) -> None:
        """While it is away each asks rarely; when it is back, each dials once or twice."""
        nodes = 100
        async with redis_server(tmp_path) as server, asyncio.TaskGroup() as group:
            killed, stop = asyncio.Event(), asyncio.Event()
            ready, lost, back = [[asyncio.Event() for _ in range(nodes)] for _ in range(3)]

            async def node(number: int) -> None:
                async with asking(server.url, chance=random.Random(number)) as ours:
                    ready[number].set()
                    await killed.wait()
                    await ours.fails()
                    lost[number].set()
                    await ours.directory.wait_up()
                    assert await ours.answers()
                    back[number].set()
                    await stop.wait()

            for number in range(nodes):
                group.create_task(node(number))

            for event in ready:
                await event.wait()
            await server.kill()
            killed.set()
            for event in lost:
                await event.wait()
            await server.start()
            for event in back:
                await event.wait()
            # INFO is asked once for each connection: one of the mender's, seldom one more.
            assert nodes <= await server.calls("info") <= 2 * nodes
            assert nodes <= await server.calls("eval", "evalsha") <= 2 * nodes
            stop.set()

    def test_pauses_grow_and_are_drawn_in_full(self) -> None:
        assert pause_before(0, 0.0) == 0.0
        assert pause_before(0, 1.0) == FIRST_PAUSE
        assert pause_before(3, 0.5) == 4 * FIRST_PAUSE
        assert pause_before(10_000, 1.0) == LONGEST_PAUSE


class TestTls:
    async def test_a_user_over_tls_may_do_what_a_node_must(self, tmp_path: Path) -> None:
        passwords = ["wrong", PASSWORD]

        async def login() -> Login:
            return Login(USER, passwords[0])

        async with redis_with_tls(tmp_path) as server:
            papers = server.papers
            assert papers is not None
            async with asking(
                server.url,
                ca_file=papers.ca_file,
                cert_file=papers.client_cert_file,
                key_file=papers.client_key_file,
                login=login,
                wait=False,
            ) as ours:
                assert "invalid username" in str(await ours.fails())
                del passwords[0]  # it is asked for at every connection
                await ours.directory.wait_up()
                assert await ours.run(WRITE) == 1
                assert (await ours.run(WHO)).decode() == await server.info("server", "run_id")

    async def test_a_server_that_a_stranger_vouches_for_is_not_talked_to(
        self, tmp_path: Path
    ) -> None:
        async with redis_with_tls(tmp_path) as server, asking(server.url, wait=False) as ours:
            error = await ours.fails()
            assert "self-signed certificate" in str(error)


async def moved_on(ours: Asking) -> None:
    await ours.healed()
    await ours.directory.wait_up()


@pytest.mark.real_seconds
class TestSentinel:
    async def test_calls_go_to_the_primary_and_follow_it(self, tmp_path: Path) -> None:
        async with redis_with_sentinel(tmp_path) as pair, asking(pair.url) as ours:
            first = await pair.primary()
            assert (await ours.run(WHO)).decode() == await first.info("server", "run_id")
            second = await pair.fail_over()

            async def followed() -> bool:
                try:
                    await ours.run(WRITE)
                    name = await ours.run(WHO)
                except DirectoryDown:
                    return False
                return bool(name.decode() == await second.info("server", "run_id"))

            await until(followed)
            assert await ours.run(WRITE) >= 2

    async def test_a_primary_that_falls_silent_is_replaced(self, tmp_path: Path) -> None:
        async with (
            redis_with_sentinel(tmp_path, patience=SHORT_MS) as pair,
            asking(pair.url, answer_timeout=SHORT, connect_timeout=SHORT) as ours,
        ):
            (await pair.primary()).pause()
            await ours.fails()
            await moved_on(ours)
            name = (await ours.run(WHO)).decode()
            assert name == await pair.servers[1].info("server", "run_id")

    async def test_a_service_that_nobody_knows_is_said_by_name(self, tmp_path: Path) -> None:
        async with redis_with_sentinel(tmp_path) as pair:
            url = pair.url.replace("/fleet/", "/flet/")
            async with asking(url, wait=False) as ours:
                await until(lambda: _is(len(ours.events("directory_down")) == 1))
                assert "knows no service 'flet'" in str(await ours.fails())

    async def test_sentinels_that_want_a_password_are_asked_with_theirs(
        self, tmp_path: Path
    ) -> None:
        passwords = ["wrong", SENTINEL_PASSWORD]

        async def login() -> Login:
            return Login(password=passwords[0])

        async with redis_with_sentinel(tmp_path, password=SENTINEL_PASSWORD) as pair:
            async with asking(pair.url, wait=False) as ours:
                await ours.fails(WRITE)
                await until(lambda: _is(len(ours.events("directory_down")) == 1))
                assert ours.directory.why_down == (
                    "no Sentinel tells the primary:"
                    f" {pair.sentinel.address}: Authentication required."
                    " (directory_sentinel_password is for Sentinels)"
                )
            async with asking(pair.url, sentinel_login=login, wait=False) as ours:
                await until(lambda: _is(len(ours.events("directory_down")) == 1))
                assert "invalid username-password pair" in str(ours.directory.why_down)
                del passwords[0]  # it is asked for at every connection
                await ours.directory.wait_up()
                # The servers themselves have no password: they would refuse the Sentinels' one.
                assert await ours.run(WRITE) == 1
                first = await pair.primary()
                assert (await ours.run(WHO)).decode() == await first.info("server", "run_id")

    async def test_a_user_of_sentinels_needs_no_more_than_to_ask_for_the_primary(
        self, tmp_path: Path
    ) -> None:
        async def login() -> Login:
            return Login(SENTINEL_USER, SENTINEL_PASSWORD)

        async with (
            redis_with_sentinel(tmp_path, SENTINEL_ACL, password="another") as pair,
            asking(pair.url, sentinel_login=login) as ours,
        ):
            denied = await pair.sentinel.ask("ACL", "DRYRUN", SENTINEL_USER, "PING")
            assert b"no permissions" in denied
            assert await ours.run(WRITE) == 1

    async def test_over_tls_sentinels_and_servers_know_different_users(
        self, tmp_path: Path
    ) -> None:
        async def login() -> Login:
            return Login(USER, PASSWORD)

        async def sentinel_login() -> Login:
            return Login(SENTINEL_USER, SENTINEL_PASSWORD)

        async with redis_with_sentinel_and_tls(tmp_path) as pair:
            papers = pair.sentinel.papers
            assert papers is not None
            async with asking(
                pair.url,
                ca_file=papers.ca_file,
                cert_file=papers.client_cert_file,
                key_file=papers.client_key_file,
                login=login,
                sentinel_login=sentinel_login,
            ) as ours:
                assert await ours.run(WRITE) == 1

    async def test_over_tls_sentinels_that_want_no_login_are_asked_without(
        self, tmp_path: Path
    ) -> None:
        async def login() -> Login:
            return Login(USER, PASSWORD)

        async with redis_with_sentinel_and_tls(tmp_path) as pair:
            papers = pair.sentinel.papers
            assert papers is not None
            rules = SENTINEL_RULES.split()
            await pair.sentinel.ask("ACL", "SETUSER", "default", "reset", "on", "nopass", *rules)
            async with asking(
                pair.url,
                ca_file=papers.ca_file,
                cert_file=papers.client_cert_file,
                key_file=papers.client_key_file,
                login=login,
            ) as ours:
                assert await ours.run(WRITE) == 1


SHORT_MS = int(SHORT * 1000)


async def _is(true: bool) -> bool:
    return true


@pytest.mark.real_seconds
class TestCluster:
    async def test_each_tag_is_asked_of_its_server(self, tmp_path: Path) -> None:
        async with redis_cluster(tmp_path) as cluster, asking(cluster.url) as ours:
            for n in range(30):
                assert await ours.run(WRITE, f"sha256:{n}") == 1
                holder = await cluster.holder(f"pp:{{sha256:{n}}}:n")
                assert await holder.ask("GET", f"pp:{{sha256:{n}}}:n") == b"1"
            assert sum([await one.calls("eval") for one in cluster.servers]) == 3

    async def test_a_slot_that_moves_is_followed_and_learnt(self, tmp_path: Path) -> None:
        async with redis_cluster(tmp_path) as cluster, asking(cluster.url) as ours:
            assert await ours.run(WRITE, "x") == 1
            former = await cluster.holder("pp:{x}")
            other = next(one for one in cluster.servers if one is not former)
            await cluster.move("pp:{x}", other)
            assert await ours.run(WRITE, "x") == 1  # not a call is lost
            assert await other.ask("GET", "pp:{x}:n") == b"1"
            assert ours.events("directory_down") == []

    async def test_a_slot_on_its_way_is_asked_where_it_goes(self, tmp_path: Path) -> None:
        async with redis_cluster(tmp_path) as cluster, asking(cluster.url) as ours:
            former = await cluster.holder("pp:{x}")
            other = next(one for one in cluster.servers if one is not former)
            slot = await former.ask("CLUSTER", "KEYSLOT", "pp:{x}")
            there, here = [await one.ask("CLUSTER", "MYID") for one in (other, former)]
            await other.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", here)
            await former.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", there)
            assert [await ours.run(WRITE, "x") for _ in range(2)] == [1, 2]
            assert await other.calls("asking") >= 2

    async def test_one_server_that_is_gone_takes_only_its_own_tags_with_it(
        self, tmp_path: Path
    ) -> None:
        async with redis_cluster(tmp_path) as cluster, asking(cluster.url) as ours:
            lost = await cluster.holder("pp:{x}")
            tags = [f"t{n}" for n in range(20)]
            others = [tag for tag in tags if await cluster.holder(f"pp:{{{tag}}}") is not lost]
            # Or the Cluster as a whole declares itself down.
            for one in cluster.servers:
                await one.ask("CONFIG", "SET", "cluster-require-full-coverage", "no")
            await lost.kill()
            await ours.fails()
            for tag in others:
                assert await ours.run(WRITE, tag) == 1
            assert not ours.directory.is_up
