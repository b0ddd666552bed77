"""The config file that is followed: swapped, touched, half written, bad, or no file at all."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from extproc.admission.events import PolicySet
from extproc.app import App
from extproc.commands.cli import run_loop
from extproc.config import Config, load_config
from extproc.endpoints.discovery import file
from extproc.endpoints.discovery.file import ConfigFile
from extproc.errors import ConfigError
from tests.unit.endpoint_lists import config, endpoint, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Followed:
    """A config file that is followed, and what was taken over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adopted: list[Config] = []
        self.count = {"success": 0, "failure": 0}
        self.file = ConfigFile(path, lambda: load_config(path, {}), self.adopt, self.count)

    async def adopt(self, fresh: Config) -> None:
        if fresh.max_queued_requests == 13:
            raise ConfigError("adopt", ["13 is bad luck"])
        self.adopted.append(fresh)

    def run(self, story: Callable[[Followed], Any]) -> None:
        async def main() -> None:
            task = asyncio.create_task(self.file.run(load_config(self.path, {})))
            try:
                await story(self)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(file, "POLL_S", 0.02)
    monkeypatch.setattr(file, "STILL_S", 0.01)


def test_a_config_map_whose_symlink_is_swapped_is_read_again(tmp_path):
    """As the kubelet does it: file -> ..data/file, ..data -> a dated directory, replaced by a rename."""
    for version, limit in (("v1", 1), ("v2", 2)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "c.yaml").write_text(f"max_running_requests: {limit}")
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "c.yaml").symlink_to("..data/c.yaml")

    async def story(here: Followed) -> None:
        (tmp_path / "..new").symlink_to("v2")
        (tmp_path / "..new").replace(tmp_path / "..data")
        await until(lambda: [one.max_running_requests for one in here.adopted] == [2])

    Followed(tmp_path / "c.yaml").run(story)


def test_each_way_to_be_bad_is_counted_once_and_a_good_file_is_taken_over_again(tmp_path, caplog):
    path = tmp_path / "c.yaml"
    path.write_text("max_running_requests: 1")

    async def story(here: Followed) -> None:
        for number, text in enumerate(("max_running_requests: x", "endpoints: [", "max_queued_requests: 13"), 1):
            path.write_text(text)
            await until(lambda n=number: here.count["failure"] == n)
        path.unlink()
        await until(lambda: here.count["failure"] == 4)
        path.write_text("max_running_requests: 2")
        await until(lambda: here.count["success"] == 1)

    here = Followed(path)
    here.run(story)
    assert here.count == {"success": 1, "failure": 4}
    assert [one.max_running_requests for one in here.adopted] == [2]
    assert "13 is bad luck" in caplog.text
    assert "can't be read" in caplog.text


def test_a_file_that_is_only_touched_is_not_taken_over_but_a_signal_always_reads(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("max_running_requests: 1")
    reads: list[int] = []

    async def story(here: Followed) -> None:
        real = here.file._content
        here.file._content = lambda: reads.append(1) or real()
        for number in (1, 2):
            os.utime(path, (number, number))
            await until(lambda n=number: len(reads) >= n)
        assert here.adopted == []
        here.file.poke()
        await until(lambda: len(here.adopted) == 1)

    Followed(path).run(story)


def test_a_file_that_is_being_written_is_read_when_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(file, "STILL_S", 2.0)
    path = tmp_path / "c.yaml"
    path.write_text("max_running_requests: 1")

    async def story(here: Followed) -> None:
        with path.open("w") as writing:  # truncated: valid YAML, and no endpoints
            for letter in "max_running_requests: 2\n":
                writing.write(letter)
                writing.flush()
                await asyncio.sleep(0.01)
        await until(lambda: here.adopted)

    here = Followed(path)
    here.run(story)
    assert [one.max_running_requests for one in here.adopted] == [2]
    assert here.count["failure"] == 0


def test_a_fifo_where_the_file_was_is_a_failed_reload_and_what_replaces_it_is_read(tmp_path):
    path = tmp_path / "sidecar.yaml"
    path.write_text("max_queued_requests: 1\n")

    async def story(here: Followed) -> None:
        path.unlink()
        os.mkfifo(path)
        here.file.poke()
        await until(lambda: here.count["failure"] >= 1)
        assert here.file.is_refused
        path.unlink()
        path.write_text("max_queued_requests: 2\n")
        await until(lambda: [one.max_queued_requests for one in here.adopted] == [2])

    Followed(path).run(story)


def test_a_thread_that_reads_a_file_keeps_the_loop_waiting_for_half_a_millisecond_and_not_for_five():
    """Python's own interval came with each turn; `python -m bench.turns --reading` shows what requests saw of it."""
    before = sys.getswitchinterval()

    async def main() -> int:
        return int(sys.getswitchinterval() * 1e6)

    try:
        assert run_loop(main(), "asyncio") == 500
    finally:
        sys.setswitchinterval(before)


def test_a_file_that_loses_all_endpoints_is_refused_unless_it_says_so():
    keys = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"}

    async def main() -> None:
        app = App(config(**keys, endpoints=[endpoint("a")]), asyncio.get_running_loop())
        with pytest.raises(ConfigError, match=r"endpoints: all are gone.*say `endpoints: \[\]`"):
            app.adopt(config(**keys))
        app.adopt(config(**keys, endpoints=[]))
        assert app.config.endpoints == []

    asyncio.run(main())


def test_a_reload_sets_the_rules_of_the_core_only_if_they_are_others():
    keys = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "endpoints": [endpoint("a")]}

    async def main() -> None:
        app = App(config(**keys), asyncio.get_running_loop())
        told: list[PolicySet] = []
        app.gate.controller.watch(lambda event, _: told.append(event) if isinstance(event, PolicySet) else None)
        app.adopt(config(**keys, drain_timeout="9s"))
        assert told == []
        app.adopt(config(**keys, classes=[{"name": "default", "budget": "9s"}]))
        assert [event.policy.classes[0].budget_s for event in told] == [9.0]

    asyncio.run(main())


@pytest.mark.parametrize(
    "changed",
    [
        {"session_affinity": False},
        {"adapter_affinity": False},
        {"no_endpoint_budget": "5m"},
        {"tenants": {"others": {"max_in_flight": 3}}},
        {"adaptive_limit": {"start": 32}},
        {"learning": {"kv": {"fill": 50}}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_reload_gives_the_core_the_rule_of_each_feature_of_admission_without_a_restart(changed):
    keys = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "endpoints": [endpoint("a")]}

    async def main() -> None:
        app = App(config(**keys), asyncio.get_running_loop())
        app.adopt(config(**keys, **changed))
        assert app.gate.controller.policy == config(**keys, **changed).policy() != config(**keys).policy()

    asyncio.run(main())
