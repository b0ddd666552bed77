"""What a burst took is given back once, when it is over; what clients make up is not kept."""

from __future__ import annotations

import asyncio
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

from extproc.memory import MANY, Ebb
from extproc.stream.routes import REMEMBERED, Action, Routes, Shape


def given_back(*streams: int) -> list[int]:
    """At which look, by its number, memory was given back while there were so many streams."""
    now, at = [0, 0], []

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        ebb = Ebb(lambda: now[0], lambda: at.append(now[1]))
        for number, count in enumerate(streams):
            now[:] = count, number
            ebb.look()
            await asyncio.get_running_loop().run_in_executor(None, int)

    asyncio.run(main())
    return at


def test_the_memory_of_a_burst_is_given_back_when_its_streams_have_gone_and_once():
    assert given_back(0, 9000, 9000, 40, 40, 40, 40) == [4]


def test_while_they_go_it_is_awaited():
    assert given_back(9000, 7000, 4000, 1000, 10, 10) == [5]


def test_a_second_burst_is_one_again():
    assert given_back(9000, 0, 0, 0, 9000, 0, 0) == [2, 6]


def test_few_streams_and_a_burst_that_is_half_there_are_none():
    assert given_back(MANY - 1, 0, 0) == []
    assert given_back(20_000, 11_000, 11_000, 11_000) == []


def test_long_paths_that_clients_make_up_are_not_remembered():
    """Envoy lets headers of 60 KiB through: one kept for each of 1,024 requests is 60 MiB."""
    routes = Routes()
    tracemalloc.start()
    try:
        for number in range(REMEMBERED):
            assert routes.find("POST", f"/v1/{number}{'x' * 10_000}") == (Action.QUEUE, Shape.OPENAI)
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 1_000_000


def test_a_path_is_remembered_and_no_query_of_one():
    routes = Routes()
    for path in ("/v1/chat/completions", "/v1/chat/completions?key=secret"):
        assert routes.find("POST", path) == (Action.QUEUE, Shape.OPENAI)
    assert list(routes._known) == [("POST", "/v1/chat/completions")]
