"""What forwarding a request to another sidecar costs: two processes, loopback, the core at the leader.

    python -m bench.replicas [--requests 20000]

A request is an offer, its decision and its release, by a follower's gate. No Envoy and no gRPC: it measures what
`replicas` adds. CPU is that of each process, system included; the store is left out, it is asked once a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from extproc.admission.controller import Controller
from extproc.admission.load import Load
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request
from extproc.replicas.gate import SharedGate
from extproc.replicas.links import TcpNetwork
from extproc.replicas.messages import Member
from extproc.replicas.picture import Role
from extproc.replicas.replica import Replica

if TYPE_CHECKING:
    from extproc.admission.values import Decision

LEADER, FOLLOWER = Member("leader", "127.0.0.1:17551", 1), Member("follower", "127.0.0.1:17552", 2)
SCRAPE_S = 0.5


async def started(me: Member) -> tuple[SharedGate, Replica]:
    loop = asyncio.get_running_loop()
    gate = SharedGate(Controller(Policy()), loop)
    network = TcpNetwork(loop)
    replica = Replica(gate, me, "bench", network, loop)
    gate.watch()
    for name in "abcd":
        gate.put_endpoint(EndpointSpec(name, max_running_requests=256))
    await network.listen(me.address, replica.door)
    replica.store_says([LEADER, FOLLOWER])
    replica.begin(lambda _: None)
    return gate, replica


async def lead() -> None:
    gate, replica = await started(LEADER)
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    stopped = loop.run_in_executor(None, sys.stdin.readline)
    while not stopped.done():
        replica.store_says([LEADER, FOLLOWER])
        for name, endpoint in gate.controller.endpoints.items():
            gate.observe(name, Load(running=float(len(endpoint.leases)), waiting=0.0))
        await asyncio.sleep(SCRAPE_S)
    print(json.dumps({"cpu_s": cpu_s()}), flush=True)


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Clients:
    """So many requests at a time through a gate."""

    def __init__(self, gate: SharedGate, at_once: int, requests: int) -> None:
        self._gate = gate
        self._left = requests
        self._open = 0
        self.waits_s: list[float] = []
        self.done = asyncio.Event()
        for _ in range(at_once):
            self._next()

    def _next(self) -> None:
        if self._left:
            self._left -= 1
            self._open += 1
            request = Request("00000000-0000-0000-0000-000000000000", self._gate.now(), "llama", "std", "tenant-1")
            request.prompt_tokens = 500
            ticket = Ticket(request, partial(self._decided, time.perf_counter()))
            self._gate.offer(ticket)
        elif not self._open:
            self.done.set()

    def _decided(self, began: float, decision: Decision) -> None:
        self.waits_s.append(time.perf_counter() - began)
        asyncio.get_running_loop().call_soon(self._end, decision)

    def _end(self, decision: Decision) -> None:
        self._gate.close(decision.ticket, Answer.OK)
        self._open -= 1
        self._next()


async def measure(requests: int) -> None:
    gate, replica = await started(FOLLOWER)
    await asyncio.sleep(5.0)  # it follows, and the leader has read its endpoints
    if replica.role is not Role.FOLLOWING:
        raise SystemExit("no leader found")
    print(f"{'at once':>8} {'requests/s':>11} {'p50 ms':>8} {'p99 ms':>8} {'follower µs':>12}")
    for at_once, count in ((1, requests // 10), (64, requests), (256, requests)):
        before, began = cpu_s(), time.perf_counter()
        clients = Clients(gate, at_once, count)
        await clients.done.wait()
        took_s, used_us = time.perf_counter() - began, 1e6 * (cpu_s() - before) / count
        waits = sorted(clients.waits_s)
        p50, p99 = (1000 * waits[len(waits) * share // 100] for share in (50, 99))
        print(f"{at_once:>8} {count / took_s:>11.0f} {p50:>8.2f} {p99:>8.2f} {used_us:>12.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--lead", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.lead:
        asyncio.run(lead())
        return
    command = [sys.executable, "-m", "bench.replicas", "--lead"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as leader:
        try:
            assert leader.stdout is not None
            leader.stdout.readline()
            asyncio.run(measure(asked.requests))
        finally:
            said, _ = leader.communicate("\n", timeout=10)
        total = asked.requests // 10 + 2 * asked.requests
        print(f"leader: {1e6 * json.loads(said)['cpu_s'] / total:.1f} µs of CPU a request, its start included")


if __name__ == "__main__":
    main()
