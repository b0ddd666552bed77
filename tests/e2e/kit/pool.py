"""Several sidecars, each with an Envoy of its own, one set of simulated engines, and a real Redis or Valkey."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conftest import tool

from .cable import Cable
from .clients import Completion, complete_many
from .envoy import Envoy
from .processes import PATIENCE_S, Child, free_port, http_get, tcp_open, wait_until
from .stack import Sidecar, local

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .machines import Machines


def other_clock(ahead_s: float) -> dict[str, str]:
    """The environment of a Python process whose wall clock is `ahead_s` ahead of ours."""
    return {"PYTHONPATH": str(Path(__file__).with_name("clock")), "AHEAD_S": str(ahead_s)}


def longest_stuck_s(answers: Sequence[Completion]) -> float:
    """How long the most unlucky of these requests, of one class and one Envoy, stood still: in seconds.

    That is: how much later it began than one that was sent after it, or how long nobody began while some waited.
    """
    begun = [one.started_at + one.head_s for one in sorted(answers, key=lambda one: one.started_at) if one.head_s]
    soonest, longest_s = math.inf, 0.0
    for began in reversed(begun):
        soonest = min(soonest, began)
        longest_s = max(longest_s, began - soonest)
    begun.sort()
    return max([longest_s, *(after - before for before, after in itertools.pairwise(begun))])


def body(max_tokens: int) -> bytes:
    message = {"role": "user", "content": "hi"}
    return json.dumps({"model": "sim", "stream": True, "max_tokens": max_tokens, "messages": [message]}).encode()


class Store:
    """A server on loopback that keeps nothing on disk: Valkey's if there is one, else Redis's."""

    def __init__(self, directory: Path, host: str = "127.0.0.1") -> None:
        self.port = free_port()
        self._address = f"{host}:{self.port}"
        self.url = f"valkey://{self._address}"
        program = shutil.which("valkey-server") or tool("redis-server", "redis-server")
        argv = [program, "--port", str(self.port), "--bind", host, "--save", "", "--appendonly", "no"]
        argv += ["--protected-mode", "no"]
        self.child = Child([*argv, "--dir", str(directory)], directory / "store.log", name="store")

    def __enter__(self) -> Store:
        self.start()
        return self

    def start(self) -> None:
        """Start it, empty."""
        self.child.start()
        self.child.wait_ready(lambda: tcp_open(self._address))

    def command(self, *words: str) -> str:
        """What it answers to a command."""
        host, _, port = self._address.rpartition(":")
        program = shutil.which("valkey-cli") or tool("redis-cli", "redis-server")
        done = subprocess.run(
            [program, "-h", host, "-p", port, *words], capture_output=True, text=True, timeout=PATIENCE_S
        )
        return done.stdout.strip()

    def __exit__(self, *_: object) -> None:
        self.child.stop()


class Place:
    """One sidecar and its Envoy."""

    def __init__(self, sidecar: Sidecar, url: str) -> None:
        self.sidecar = sidecar
        self.url = url

    @property
    def replicas(self) -> dict[str, Any]:
        """What /queues says of it among the others."""
        return dict(self.sidecar.queues()["replicas"])


class Pool:
    """All of it, running while `with` lasts."""

    def __init__(
        self,
        directory: Path,
        *,
        sidecars: int = 3,
        engines: Sequence[str] = ("one", "two"),
        config: Mapping[str, Any] | None = None,
        replicas: Mapping[str, Any] | None = None,
        cables: bool = False,
        machines: Machines | None = None,
        clocks_s: Sequence[float] = (),
    ) -> None:
        """`machines`: one for each sidecar, entered already. `clocks_s`: how far each sidecar's clock is ahead."""
        self.directory = directory
        self.places: list[Place] = []
        self.engines: dict[str, str] = {}
        self._names = engines
        self._count = sidecars
        self._config = config or {}
        self._replicas = replicas
        self._has_cables = cables
        self.cables: list[Cable] = []
        self._machines = machines
        self._clocks = [other_clock(seconds) for seconds in clocks_s]
        self._running = contextlib.ExitStack()
        self._pool = ThreadPoolExecutor(16)
        self.store: Store

    def __enter__(self) -> Pool:
        with contextlib.ExitStack() as starting:
            if self._replicas is None:
                host = "127.0.0.1" if self._machines is None else self._machines.store
                self.store = starting.enter_context(Store(self.directory, host))
            for name in self._names:
                command = [sys.executable, "-m", "extproc", "engine", "--preset", "demo", "--port", "0"]
                command += [] if self._machines is None else ["--host", self._machines.engines]
                child = Child([*command, "--max-num-seqs", "64"], self.directory / f"{name}.log")
                starting.enter_context(child)
                self.engines[name] = child.wait_line(r"listening on http://(\S+)").group(1)
            for number in range(self._count):
                config = self._config_of()
                if self._has_cables:
                    self.cables.append(starting.enter_context(Cable(config["replicas"]["listen"])))
                    config["replicas"]["advertise"] = self.cables[-1].address
                sidecar = starting.enter_context(self._sidecar(config, number))
                self.places.append(Place(sidecar, self._envoy(starting, sidecar, number)))
            self._running = starting.pop_all()
        self.wait_one_group()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._running.close()

    def _config_of(self) -> dict[str, Any]:
        found = self._replicas if self._replicas is not None else {"valkey": {"url": self.store.url}}
        return {
            "enable_queue": True,
            "drain_timeout": "10s",
            "endpoints": [{"name": name, "address": address} for name, address in self.engines.items()],
            **self._config,
            "replicas": {"listen": local(), **found},
        }

    def _sidecar(self, config: dict[str, Any], number: int) -> Sidecar:
        inside: list[str] = []
        if self._machines is not None:
            address = self._machines.addresses[number]
            config["replicas"] |= {"listen": f"{address}:{free_port()}", "allow_insecure": True}
            config |= {"admin": f"{address}:{free_port()}", "allow_remote_admin": True}
            inside = self._machines.inside(number)
        env = self._clocks[number] if self._clocks else None
        return Sidecar(config, self.directory, name=f"sidecar-{number}", inside=inside, env=env)

    def _envoy(self, starting: contextlib.ExitStack, sidecar: Sidecar, number: int) -> str:
        address = local()
        text = sidecar.envoy_config(address, local(), self.directory / f"envoy-{number}.access", "h1")
        starting.enter_context(Envoy(text, self.directory, name=f"envoy-{number}"))
        return f"http://{address}/v1/chat/completions"

    # ---- what a test does and asks

    def send(self, place: Place, name: str, count: int, max_tokens: int, **headers: str) -> Future[list[Completion]]:
        """Send `count` requests at once through the Envoy of `place`."""

        def of(number: int) -> dict[str, str]:
            return {"x-test-id": f"{name}-{number}", **headers}

        return self._pool.submit(complete_many, place.url, count, of, body=body(max_tokens), timeout_s=120)

    def wait_one_group(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until all sidecars are in one group and know that it is everybody."""

        def is_one() -> bool:
            seen = [place.replicas for place in self.places]
            whole = all(one["group"] == one["members"] == len(self.places) for one in seen)
            return whole and len({one["leader"] for one in seen}) == 1

        wait_until(is_one, timeout_s, "one group")

    def most_members(self) -> int:
        """How many sidecars there are, by what the one knows that leads the most."""
        seen = [place.replicas for place in self.places]
        return int(max((one for one in seen if one["role"] == "leading"), key=lambda one: one["group"])["members"])

    def rest(self, seconds: float) -> None:
        """Let time pass: how long a fault lasts."""
        time.sleep(seconds)

    def in_order(self) -> list[Place]:
        """The leader, and then those that follow, once it is so: a machine that stalls may part them for a moment."""

        def look() -> list[Place] | None:
            roles = [place.replicas["role"] for place in self.places]
            if sorted(roles) != [*["following"] * (len(roles) - 1), "leading"]:
                return None
            leader = roles.index("leading")
            return [self.places[leader], *self.places[:leader], *self.places[leader + 1 :]]

        return wait_until(look, message="one leads, the others follow")

    @property
    def leader(self) -> Place:
        """The one that leads everybody."""
        return self.in_order()[0]

    def in_flight(self) -> int:
        """What the leader's books say runs."""
        return sum(one["in_flight"] for one in self.leader.sidecar.queues()["endpoints"])

    def waiting(self) -> int:
        """What waits everywhere, by the leader's books."""
        return int(self.leader.sidecar.queues()["waiting_total"])

    def peaks(self) -> dict[str, int]:
        """The most requests that each engine ever held at once, by its own count."""
        found = {}
        for name, address in self.engines.items():
            page = json.loads(http_get(address, "/debug/peaks")[1])
            found[name] = int(page["peak_running"]) + int(page["peak_waiting"])
        return found

    def fullest(self, name: str) -> str:
        """Who ran at an engine when it held the most, and what the sidecars did around that: for a test that fails."""
        page = json.loads(http_get(self.engines[name], "/debug/peaks")[1])
        held = [(one["arrived_s"], one.get("ended_s", math.inf), one["id"]) for one in page["arrivals"]]
        at = max((begun for begun, _, _ in held), key=lambda at: sum(begun <= at < ended for begun, ended, _ in held))
        sent = {}
        for number, place in enumerate(self.places):
            for line in (self.directory / f"envoy-{number}.access").read_text().splitlines():
                entry = json.loads(line)
                came_s = datetime.fromisoformat(entry["time"]).timestamp()
                sent[entry["request_id"]] = (place.sidecar.child.name, came_s, entry["queue"], entry["duration_ms"])
        lines = [f"{name} held the most at {datetime.fromtimestamp(at, UTC)}; seconds before (-) and after that:"]
        for begun, ended, request_id in sorted(held):
            if begun <= at + 1.0 and ended > at - 1.0:
                sidecar, came_s, queue, took_ms = sent.get(request_id, ("nobody's", math.nan, {}, math.nan))
                let_go_s, over_s = came_s + queue.get("wait_ms", math.nan) / 1e3, came_s + took_ms / 1e3
                times = (
                    f"let go {let_go_s - at:+.3f}, ran {begun - at:+.3f} to {ended - at:+.3f}, over {over_s - at:+.3f}"
                )
                lines.append(f"{'*' if begun <= at < ended else ' '} {sidecar} {request_id}: {times}")
        logs = {place.sidecar.child.name: place.sidecar.child.lines()[-40:] for place in self.places}
        return "\n".join(lines + [f"{sidecar}: {line}" for sidecar, lines in logs.items() for line in lines])

    def served(self) -> int:
        """How many requests all engines have answered to the end."""
        total = 0.0
        for address in self.engines.values():
            text = http_get(address, "/metrics")[1].decode()
            lines = [line for line in text.splitlines() if "request_success_total{" in line]
            total += sum(float(line.rpartition(" ")[2]) for line in lines)
        return int(total)
