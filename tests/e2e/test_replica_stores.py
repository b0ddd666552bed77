"""How sidecars find each other: by a real Redis or Valkey, and by Leases of an imitated Kubernetes API."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from extproc.config import LeaseConfig, ValkeyConfig
from extproc.replicas.messages import LAST, Member
from extproc.replicas.stores import StoreError
from extproc.replicas.stores.lease import ALIVE_S, FORGOTTEN_S, LeaseStore
from extproc.replicas.stores.valkey import ValkeyStore

from .kit.awake import awake
from .kit.kube_api import KubeApi
from .kit.pool import Pool
from .kit.pool import Store as Server
from .kit.processes import PATIENCE_S, wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

NEW = LAST - 1
TOKEN = "of-a-pod"  # noqa: S105 - of an imitation


def member(name: str, joined: int = NEW) -> Member:
    return Member(name, f"10.0.0.1:{len(name)}", joined)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("store")) as running:
        yield running


def store(server: Server, pool: str = "default", **more: str) -> ValkeyStore:
    return ValkeyStore(ValkeyConfig(url=server.url, **more), pool)


def cli(server: Server, *words: str) -> str:
    done = subprocess.run(
        ["redis-cli", "-p", str(server.port), *words], capture_output=True, text=True, timeout=PATIENCE_S
    )
    return done.stdout.strip()


@pytest.fixture
def empty(server) -> Server:
    cli(server, "FLUSHALL")
    return server


def run(what: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(what(), 2 * PATIENCE_S))


def test_members_see_each_other_in_the_order_in_which_they_joined(empty):
    async def check() -> None:
        one, two = store(empty), store(empty)
        (first,) = await one.beat(member("a"))
        assert first.joined == 1
        found = {each.id: each for each in await two.beat(member("bb"))}
        assert found == {"a": member("a", 1), "bb": member("bb", 2)}
        await one.close()
        await two.close()

    run(check)


def test_pools_do_not_see_each_other(empty):
    async def check() -> None:
        one, two = store(empty), store(empty, "other")
        await one.beat(member("a"))
        assert [each.id for each in await two.beat(member("b"))] == ["b"]
        await one.close()
        await two.close()

    run(check)


def test_who_is_silent_for_three_seconds_of_the_servers_clock_is_gone(empty):
    async def check() -> None:
        one = store(empty)
        await one.beat(member("dead"))
        key = "{extproc:default}:alive"
        cli(empty, "ZADD", key, str(float(cli(empty, "ZSCORE", key, "dead")) - 3001), "dead")
        assert [each.id for each in await one.beat(member("a"))] == ["a"]
        await one.close()

    run(check)


def test_who_lives_is_seen_and_who_died_is_not_though_the_servers_clock_went_back(empty):
    """Or another server took over, whose clock is behind: who died would count until that time comes again."""

    async def check() -> None:
        one = store(empty)
        await one.beat(member("dead"))
        await one.beat(member("a"))
        key = "{extproc:default}:alive"
        for name in ("dead", "a"):
            cli(empty, "ZADD", key, str(float(cli(empty, "ZSCORE", key, name)) + 60_000), name)
        assert await one.beat(member("a", 2)) == [member("a", 2)]
        assert {each.id for each in await one.beat(member("late"))} == {"a", "late"}
        assert {each.id: each.joined for each in await one.beat(member("dead", 1))} == {"a": 2, "late": 3, "dead": 1}
        await one.close()

    run(check)


def test_who_leaves_is_listed_without_an_address_for_a_while(empty):
    async def check() -> None:
        one, two = store(empty), store(empty)
        await one.beat(member("a"))
        await two.beat(member("b"))
        await two.leave(member("b", 2))
        assert {each.id: bool(each.address) for each in await one.beat(member("a", 1))} == {"a": True, "b": False}
        await one.close()
        await two.close()

    run(check)


def test_a_place_in_the_order_survives_a_server_that_comes_back_empty(empty):
    async def check() -> None:
        one = store(empty)
        cli(empty, "FLUSHALL")
        assert await one.beat(member("old", 7)) == [member("old", 7)]
        found = {each.id: each.joined for each in await one.beat(member("new"))}
        assert found == {"old": 7, "new": 8}
        await one.close()

    run(check)


def kill(server: Server) -> None:
    server.child.signal(signal.SIGKILL)
    server.child.wait_exit()
    server.child.stop()


TROUBLES: dict[str, tuple[Callable[[Server], object], Callable[[Server], object]]] = {
    "read-only": (
        lambda server: cli(server, "REPLICAOF", "127.0.0.1", "1"),
        lambda server: cli(server, "REPLICAOF", "NO", "ONE"),
    ),
    "out of memory": (
        lambda server: cli(server, "CONFIG", "SET", "maxmemory", "1"),
        lambda server: cli(server, "CONFIG", "SET", "maxmemory", "0"),
    ),
    "hung": (lambda server: server.child.signal(signal.SIGSTOP), lambda server: server.child.signal(signal.SIGCONT)),
    "gone": (kill, lambda server: server.start()),
    "no hash": (
        lambda server: cli(server, "SET", "{extproc:default}:members", "something else"),
        lambda server: cli(server, "DEL", "{extproc:default}:members"),
    ),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_server_in_trouble_is_one_named_error_within_two_seconds_and_works_again_after(empty, trouble):
    harm, mend = TROUBLES[trouble]

    async def check() -> None:
        one = store(empty)
        await one.beat(member("a"))
        harm(empty)
        began = awake()
        try:
            with pytest.raises(StoreError):
                await one.beat(member("a", 1))
            assert awake() - began < 2.0
        finally:
            mend(empty)
        assert [each.id for each in await one.beat(member("a", 1))] == ["a"]
        await one.close()

    run(check)


def test_a_password_is_read_from_its_file(empty, tmp_path):
    async def check() -> None:
        cli(empty, "CONFIG", "SET", "requirepass", "secret")
        try:
            without = store(empty)
            with pytest.raises(StoreError, match="Auth"):
                await without.beat(member("a"))
            (tmp_path / "password").write_text("secret\n")
            knowing = store(empty, password_file=str(tmp_path / "password"))
            assert await knowing.beat(member("a"))
            await knowing.close()
        finally:
            cli(empty, "-a", "secret", "CONFIG", "SET", "requirepass", "")

    run(check)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def leases(api: KubeApi, clock: Clock, directory, pool: str = "default") -> LeaseStore:
    token = directory / "token"
    token.write_text(TOKEN)
    config = LeaseConfig(namespace="ns", api=api.url, token_file=str(token), ca_file="/nowhere")
    return LeaseStore(config, pool, {}, clock)


def test_whose_lease_changes_is_alive_whatever_its_clock_says(tmp_path):
    async def check() -> None:
        with KubeApi() as api:
            api.token = TOKEN
            clock = Clock()
            one, two = leases(api, clock, tmp_path), leases(api, clock, tmp_path)
            assert [each.id for each in await one.beat(member("a"))] == ["a"]
            for _ in range(5):
                clock.now += ALIVE_S - 1
                assert {each.id for each in await two.beat(member("b"))} == {"a", "b"}
                api.leases["default-b"]["spec"]["renewTime"] = "1970-01-01T00:00:00.000000Z"
                assert {each.id for each in await one.beat(member("a"))} == {"a", "b"}
            clock.now += ALIVE_S + 1
            assert {each.id for each in await one.beat(member("a"))} == {"a"}
            await one.close()
            await two.close()

    run(check)


def test_a_lease_that_somebody_left_is_deleted_by_who_notices(tmp_path):
    async def check() -> None:
        with KubeApi() as api:
            clock = Clock()
            one = leases(api, clock, tmp_path)
            await one.beat(member("dead"))
            await one.beat(member("a"))
            clock.now += FORGOTTEN_S + 1
            await one.beat(member("a"))
            assert list(api.leases) == ["default-a"]
            await one.close()

    run(check)


def test_who_leaves_takes_its_address_out_of_its_lease(tmp_path):
    async def check() -> None:
        with KubeApi() as api:
            clock = Clock()
            one, two = leases(api, clock, tmp_path), leases(api, clock, tmp_path)
            await one.beat(member("a"))
            await two.beat(member("b"))
            await two.leave(member("b"))
            assert {each.id: bool(each.address) for each in await one.beat(member("a"))} == {"a": True, "b": False}
            await one.close()
            await two.close()

    run(check)


def test_an_api_that_refuses_or_is_gone_is_one_named_error(tmp_path):
    async def check() -> None:
        with KubeApi() as api:
            one = leases(api, Clock(), tmp_path)
            api.token = TOKEN[:-1]
            with pytest.raises(StoreError, match="403"):
                await one.beat(member("a"))
            api.token = None
            assert await one.beat(member("a"))
        with pytest.raises(StoreError):
            await one.beat(member("a"))
        await one.close()

    run(check)


def test_sidecars_that_find_each_other_by_leases_become_one_group_and_a_dead_one_is_missed(tmp_path):
    with KubeApi() as api:
        found = {"kubernetes_lease": {"namespace": "ns", "api": api.url}}
        with Pool(tmp_path, sidecars=2, engines=("one",), replicas=found) as pool:
            assert len(api.leases) == 2
            one, two = pool.in_order()
            one.sidecar.child.signal(signal.SIGKILL)
            wait_until(lambda: two.replicas["role"] == "leading")
            wait_until(lambda: two.replicas["members"] == 1, message="the dead one is counted out")
            addresses = {json.dumps(lease["metadata"]["annotations"]) for lease in api.leases.values()}
            assert len(addresses) == 2
