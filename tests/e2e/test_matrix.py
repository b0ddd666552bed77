"""Envoy's configurations against a sidecar that is up, dying, down and back: what becomes of a request in each.

Two promises: failing closed, nothing un-steered reaches an endpoint; failing open, it reaches the configured endpoints
and nothing else. In both, answers under way are untouched.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from .kit.clients import complete_many
from .kit.commands import envoy_config
from .kit.envoy import Envoy, give_up_soon
from .kit.processes import wait_until
from .kit.stack import Sidecar, local
from .kit.upstream import SSE_DONE, Upstream, behave, sse_event

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LONG = os.environ.get("EXTPROC_LONG") == "1"
ANSWER = b"".join(sse_event(number) for number in range(3)) + SSE_DONE
BODY = b'{"model": "sim", "stream": true}'


@dataclass(frozen=True)
class Setting:
    """One way to configure Envoy."""

    fail: str  # "closed" or "open"
    upstream: str  # "h1" or "h2"
    fields: bool  # request_fields: Envoy reads the body before it asks us
    probe: bool  # first_byte_probe: a second ext_proc filter
    socket: str  # "tcp" or "unix", between Envoy and the sidecar

    def __str__(self) -> str:
        return f"{self.fail}-{self.upstream}{'-fields' * self.fields}{'-probe' * self.probe}-{self.socket}"


# What a request gets, (status, x-extproc-outcome), and where it may arrive.
EXPECTED: dict[tuple[str, str], tuple[tuple[int, str | None], bool]] = {
    ("closed", "up"): ((200, None), True),
    ("open", "up"): ((200, None), True),
    ("closed", "held while it dies"): ((503, "unsteered"), False),
    ("open", "held while it dies"): ((200, "unsteered"), True),
    ("closed", "down"): ((503, "unsteered"), False),
    ("open", "down"): ((200, "unsteered"), True),
    ("closed", "back"): ((200, None), True),
    ("open", "back"): ((200, None), True),
}

ALL = [
    Setting(fail, upstream, fields, probe, socket)
    for fail, upstream, fields, probe, socket in itertools.product(
        ("closed", "open"), ("h1", "h2"), (False, True), (False, True), ("tcp", "unix")
    )
]
SLICE = [  # each value of each setting with both ways to fail
    Setting("closed", "h1", fields=False, probe=False, socket="tcp"),
    Setting("open", "h2", fields=True, probe=False, socket="unix"),
    Setting("closed", "h2", fields=True, probe=True, socket="unix"),
]


class Place:
    """Two endpoints of one slot, a third server that nobody names, the sidecar, and Envoy set up as told."""

    def __init__(self, directory: Path, setting: Setting) -> None:
        self.upstreams = {name: Upstream(name) for name in ("a", "b", "secret")}
        endpoints = [{"name": name, "address": self.upstreams[name].address} for name in ("a", "b")]
        config: dict[str, Any] = {
            "enable_queue": True,
            "max_running_requests": 1,
            "drain_timeout": "200ms",
            "endpoints": endpoints,
            "request_fields": setting.fields,
            "first_byte_probe": setting.probe,
        }
        if setting.socket == "unix":
            config["listen"] = f"unix:{directory}/s"
        self.sidecar = Sidecar(config, directory)
        self.sidecar.write_config()
        http = local()
        self.url = f"http://{http}/v1/chat/completions"
        text = envoy_config(
            *("--config", self.sidecar.path, "--http", http, "--envoy-admin", local(), "--access-log", "none"),
            *("--upstream-protocol", setting.upstream, *(["--fail-open"] * (setting.fail == "open"))),
        )
        bootstrap = yaml.load(give_up_soon(text), yaml.CSafeLoader)
        clusters = bootstrap["static_resources"]["clusters"]
        (a,) = (cluster for cluster in clusters if cluster["name"] == "a")
        address = {"socket_address": {"address": "127.0.0.1", "port_value": self.upstreams["secret"].port}}
        assignment = {"cluster_name": "secret", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]}
        clusters.append({**a, "name": "secret", "load_assignment": assignment})
        self.envoy = Envoy(json.dumps(bootstrap), directory)

    @contextlib.contextmanager
    def running(self) -> Iterator[Place]:
        with contextlib.ExitStack() as parts:
            for part in (*self.upstreams.values(), self.sidecar, self.envoy):
                parts.enter_context(part)
            yield self

    def ask(self, name: str, count: int, **how: Any) -> list[Any]:
        """Ask so many times; each asks for the server that nobody may reach, too."""

        def headers(number: int) -> dict[str, str]:
            spoof = {"x-upstream-cluster": "secret", "X-Gateway-Destination-Endpoint": self.upstreams["secret"].address}
            return {"x-test-id": f"{name}-{number}", "x-model": "sim", **spoof, **dict([behave("sse", **how)])}

        return complete_many(self.url, count, headers, body=BODY)

    def arrived(self, name: str) -> Counter[str]:
        """How often requests of this name arrived, by id."""
        reached = (record for key in "ab" for record in self.upstreams[key].records())
        return Counter(one.request_id for one in reached if one.request_id.rpartition("-")[0] == name)

    def expect(self, fail: str, state: str, answers: list[Any], name: str) -> None:
        """Compare with the table."""
        wanted, arrives = EXPECTED[fail, state]
        said = Counter((one.status, one.headers.get("x-extproc-outcome")) for one in answers)
        assert said == {wanted: len(answers)}, state
        assert self.arrived(name) == Counter({f"{name}-{n}": 1 for n in range(len(answers))} if arrives else {}), state
        if arrives:
            assert {(one.body, one.error) for one in answers} == {(ANSWER, "")}


@pytest.mark.parametrize("setting", ALL if LONG else SLICE, ids=str)
def test_what_becomes_of_a_request_while_the_sidecar_is_up_dying_down_and_back(tmp_path, setting):
    with Place(tmp_path, setting).running() as here, ThreadPoolExecutor(2) as pool:
        here.expect(setting.fail, "up", here.ask("up", 6), "up")
        assert max(here.upstreams[name].peak for name in "ab") == 1

        running = pool.submit(here.ask, "run", 2, hold="body")
        wait_until(lambda: len(here.arrived("run")) == 2, message="two answers under way")
        held = pool.submit(here.ask, "held", 5)
        wait_until(lambda: here.sidecar.queues()["waiting_total"] == 5)
        here.sidecar.child.signal(9)
        here.sidecar.child.wait_exit()
        here.sidecar.child.stop()
        here.expect(setting.fail, "held while it dies", held.result(), "held")
        for number in range(2):
            for upstream in here.upstreams.values():
                upstream.release(f"run-{number}")
        answers = running.result()
        assert {(one.status, one.body, one.error) for one in answers} == {(200, ANSWER, "")}, "an answer was touched"

        here.expect(setting.fail, "down", here.ask("down", 4), "down")

        here.sidecar.start()
        here.expect(setting.fail, "back", here.ask("back", 4), "back")
        assert not here.upstreams["secret"].records(), "a server that nobody configured was reached"
