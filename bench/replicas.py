"""What forwarding a request to another sidecar costs, and how many requests one leader carries: processes on loopback.

    python -m bench.replicas [--seconds 6] [--out build/bench-replicas]

A request is an offer, its decision and its release, by a follower's gate. No Envoy and no gRPC: it measures what
`replicas` adds. CPU is that of each process, system included; the store is left out, it is asked once a second. The
leader has a core of its own, all followers share the others. `make bench-replicas` runs this before the goodput of
several gateways (`python -m bench.proof --replicas`), whose page has these figures too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extproc.admission.controller import Controller
from extproc.admission.load import Load
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request
from extproc.replicas.gate import SharedGate
from extproc.replicas.links import TcpNetwork
from extproc.replicas.messages import Member
from extproc.replicas.picture import Role
from extproc.replicas.replica import Replica
from extproc.simulate.studies.commit import commit
from tests.e2e.kit.processes import free_port

if TYPE_CHECKING:
    from extproc.admission.values import Decision

ROOT = Path(__file__).resolve().parents[1]
FOLLOWERS = 3
AIM_PER_S = 5000.0
SCRAPE_S = 0.5
TICK_S = 0.002
FILE = "forwarding.json"
LINE = """{load:>20}, {followers} follower(s): {per_s:7,.0f} a second, added p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f}; \
CPU µs: follower {follower_us:.1f}, leader {leader_us:.1f} ({leader_busy:.0%} of its core)"""


# ---- in a sidecar's process


async def started(members: list[Member], number: int) -> tuple[SharedGate, Replica]:
    loop = asyncio.get_running_loop()
    gate = SharedGate(Controller(Policy()), loop)
    network = TcpNetwork(loop)
    replica = Replica(gate, members[number], "bench", network, loop)
    gate.watch()
    for name in "abcd":
        gate.put_endpoint(EndpointSpec(name, max_running_requests=256))
    await network.listen(members[number].address, replica.door)
    replica.store_says(members)
    replica.begin(lambda _: None)
    return gate, replica


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def serve(members: list[Member], number: int) -> None:
    """Be one sidecar: say "ready", then answer each line of JSON with one, until there are no more."""
    gate, replica = await started(members, number)
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    scraping = loop.create_task(scrape(gate, replica, members))
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await answer(json.loads(line), gate, replica)), flush=True)
    scraping.cancel()


async def scrape(gate: SharedGate, replica: Replica, members: list[Member]) -> None:
    while True:
        replica.store_says(members)
        for name, endpoint in gate.controller.endpoints.items():
            gate.observe(name, Load(running=float(len(endpoint.leases)), waiting=0.0))
        await asyncio.sleep(SCRAPE_S)


async def answer(asked: dict[str, Any], gate: SharedGate, replica: Replica) -> dict[str, Any]:
    if "seconds" not in asked:
        return {
            "cpu_s": cpu_s(),
            "role": replica.role.name,
            "group": len(replica.leading.group if replica.leading else ()),
        }
    if replica.role is not Role.FOLLOWING:
        raise SystemExit("no leader found")
    before = cpu_s()
    clients = Clients(gate, asked["seconds"], asked.get("at_once", 0), asked.get("rate", 0.0))
    took_s = await clients.run()
    waits = sorted(clients.waits_s)
    p50, p99 = (1000 * waits[len(waits) * share // 100] for share in (50, 99))
    return {"count": len(waits), "took_s": took_s, "p50_ms": p50, "p99_ms": p99, "cpu_s": cpu_s() - before}


class Clients:
    """Requests through a gate for so many seconds: so many at a time, or so many a second."""

    def __init__(self, gate: SharedGate, seconds: float, at_once: int, rate: float) -> None:
        self._gate = gate
        self._seconds = seconds
        self._at_once = at_once
        self._rate = rate
        self._open = 0
        self._ends_at = 0.0
        self._over = asyncio.Event()
        self.waits_s: list[float] = []

    async def run(self) -> float:
        """Send them all; return how long it took until the last one was decided."""
        began = time.perf_counter()
        self._ends_at = began + self._seconds
        for _ in range(self._at_once):
            self._send()
        sent = 0
        while self._rate and (now := time.perf_counter()) < self._ends_at:
            due = int((now - began) * self._rate)
            for _ in range(due - sent):
                self._send()
            sent = due
            await asyncio.sleep(TICK_S)
        if self._open:
            await self._over.wait()
        return time.perf_counter() - began

    def _send(self) -> None:
        self._open += 1
        request = Request("00000000-0000-0000-0000-000000000000", self._gate.now(), "llama", "std", "tenant-1")
        request.prompt_tokens = 500
        self._gate.offer(Ticket(request, partial(self._decided, time.perf_counter())))

    def _decided(self, began: float, decision: Decision) -> None:
        self.waits_s.append(time.perf_counter() - began)
        asyncio.get_running_loop().call_soon(self._end, decision)

    def _end(self, decision: Decision) -> None:
        self._gate.close(decision.ticket, Answer.OK)
        self._open -= 1
        ended = time.perf_counter() >= self._ends_at
        if self._at_once and not ended:
            self._send()
        elif not self._open and ended:
            self._over.set()


# ---- in the process that measures


class Sidecar:
    """One sidecar's process, on its cores."""

    def __init__(self, members: list[Member], number: int, cores: set[int]) -> None:
        command = [sys.executable, "-m", "bench.replicas", "--serve", str(number), json.dumps(members)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        os.sched_setaffinity(self._process.pid, cores)
        self.hear()

    def tell(self, **words: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit("a sidecar's process ended")
        return None if line == "ready" else json.loads(line)

    def ask(self, **words: object) -> Any:
        self.tell(**words)
        return self.hear()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._process.communicate(timeout=10)


def measure(leader: Sidecar, followers: list[Sidecar], seconds: float, **load: float) -> dict[str, float]:
    """Have all followers send for a while; return the figures of all together."""
    before = leader.ask()["cpu_s"]
    for follower in followers:
        follower.tell(seconds=seconds, **load)
    told = [follower.hear() for follower in followers]
    leader_s, count = leader.ask()["cpu_s"] - before, sum(one["count"] for one in told)
    took_s = max(one["took_s"] for one in told)
    return {
        "per_s": count / took_s,
        "p50_ms": max(one["p50_ms"] for one in told),
        "p99_ms": max(one["p99_ms"] for one in told),
        "follower_us": 1e6 * sum(one["cpu_s"] for one in told) / count,
        "leader_us": 1e6 * leader_s / count,
        "leader_busy": leader_s / took_s,
    }


def rows(seconds: float) -> list[dict[str, Any]]:
    """Run all of it; the figures of each load, with how it is called and how many followers sent."""
    cores = sorted(os.sched_getaffinity(0))
    first, others = {cores[0]}, set(cores[1:]) or {cores[0]}
    members = [Member(str(number), f"127.0.0.1:{free_port()}", number + 1) for number in range(FOLLOWERS + 1)]
    with contextlib.ExitStack() as running:
        sidecars = []
        for number in range(len(members)):
            sidecars.append(Sidecar(members, number, others if number else first))
            running.callback(sidecars[-1].stop)
        leader, *followers = sidecars
        deadline = time.monotonic() + 20
        while leader.ask()["group"] < len(members):
            if time.monotonic() > deadline:
                raise SystemExit("the sidecars did not become one group")
            time.sleep(0.1)
        time.sleep(3.0)  # the leader reads its endpoints before it uses all of their limits
        found = []
        for name, some, load in (
            ("1 at once", followers[:1], {"at_once": 1}),
            ("64 at once", followers[:1], {"at_once": 64}),
            ("256 at once", followers[:1], {"at_once": 256}),
            (f"{AIM_PER_S:,.0f} a second", followers, {"rate": AIM_PER_S / FOLLOWERS}),
            ("as many as it takes", followers, {"at_once": 256}),
        ):
            of = {"load": name, "followers": len(some), "commit": commit(), "date": time.strftime("%F", time.gmtime())}
            found.append(of | measure(leader, some, seconds, **load))
            print(LINE.format(**found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="of each load (%(default)g)")
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench-replicas", help=f"where {FILE} goes")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        asyncio.run(serve([Member(*one) for one in json.loads(asked.serve[1])], int(asked.serve[0])))
        return
    found = rows(asked.seconds)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / FILE).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
