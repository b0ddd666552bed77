"""`make instructions`: machine instructions of one request, counted, so without noise.

One request is two messages in and two out: its headers, answered with an endpoint that has room, and its answer's
headers; then the stream ends. Nobody waits. Each has an id and a length of its own; all else is alike. Counted twice:
through session, gate and core alone, at four endpoints; and all that is ours, as the sidecar has it: the stream's
batches, classes, fair tenants, Envoy's attributes, metrics, the log, stories. Not gRPC's own core. valgrind counts a
process that forks once all is warm: the first child ends there, of the others each serves the requests that are
counted. The difference is their cost.

What a change is compared with stands in instructions.json, for each build of Python, and for the core compiled or pure;
a rise of 5 % fails. Another build has another interpreter loop: there is nothing to compare with, and that is said.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEPT = Path(__file__).with_name("instructions.json")
WARM, COUNTED = 150, 300
ID = "7a1f6c1e-5b3b-4e0e-9d3d-3d3d3d3d{:04d}"
RISE = 1.05


class _Loop:
    """A clock that stands still, and timers that never ring: nothing waits here."""

    now = 1000.0

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: object) -> _Loop:
        del when, callback
        return self

    def call_soon(self, callback: object) -> None:
        del callback
        raise AssertionError("a burst that does not fit into one turn")

    def cancel(self) -> None:
        pass


def each_its_own(make: Callable[[dict[str, str]], bytes]) -> Iterator[bytes]:
    """Return the messages with which requests begin: what `make` makes of headers that are others in each."""
    owns = (
        {"content_length": str(1000 + number), "x_request_id": ID.format(number)} for number in range(WARM + COUNTED)
    )
    return iter([make(own) for own in owns])


def decided() -> Callable[[int], None]:
    """Return what has so many requests decided, one after the other: session, gate and core, and nothing else."""
    from bench.messages import message
    from extproc.admission.controller import Controller
    from extproc.admission.values import EndpointSpec, Policy
    from extproc.stream.ages import Ages
    from extproc.stream.gate import Gate
    from extproc.stream.reception import Reception
    from extproc.stream.request import Headers
    from extproc.stream.session import Session

    plain = {"method": "POST", "path": "/v1/chat/completions", "content_type": "application/json"}
    plain |= {"user_agent": "x", "accept": "*/*", "x_model": "m", "x_tenant_id": "t", "x_session_id": "s"}
    begun = each_its_own(lambda own: message("request_headers", **plain, **own))
    answered = message("response_headers", status="200", content_type="text/event-stream", server="uvicorn")
    loop = _Loop()
    gate = Gate(Controller(Policy()), loop)
    reception = Reception(gate, Headers(), Ages(30.0))
    for name in "abcd":
        reception.put_cluster(name, name)
        gate.put_endpoint(EndpointSpec(name, max_running_requests=8))

    def serve(count: int) -> None:
        replies: list[bytes] = []
        for _ in range(count):
            session = Session(reception, replies.append)
            session.receive(next(begun))
            session.receive(answered)
            loop.now += 0.01
            session.end()
        if len(replies) != 2 * count:
            raise AssertionError(f"{count} requests had {len(replies)} replies")

    return serve


class _Call:
    """Stands for gRPC's core: takes a batch, and has it done when it is told what the client says next."""

    success = True
    _then: Callable[[_Call], None]
    _data: bytes | None

    def __init__(self) -> None:
        self.batch_operations = (self,)
        self.batches = 0

    def start_server_batch(self, operations: object, then: Callable[[_Call], None]) -> int:
        del operations
        self._then = then
        self.batches += 1
        return 0

    def done(self, data: bytes | None = None) -> None:
        self._data = data
        self._then(self)

    def message(self) -> bytes | None:
        return self._data


def carried() -> Callable[[int], None]:
    """Return what serves so many requests with all that is ours: `decided` is within it."""
    from datetime import UTC, datetime
    from functools import partial
    from itertools import repeat

    from bench.messages import message
    from extproc.admission.controller import Controller
    from extproc.admission.values import EndpointSpec, Policy, RequestClass
    from extproc.observe.log import QueueLog
    from extproc.observe.metrics import Metrics
    from extproc.observe.stories import Stories
    from extproc.stream.ages import Ages
    from extproc.stream.gate import Gate
    from extproc.stream.reception import Reception
    from extproc.stream.request import Headers
    from extproc.stream.session import Session
    from extproc.transport.completion.stream import Stream

    plain = {"method": "POST", "path": "/v1/chat/completions", "content_type": "application/json"}
    plain |= {"x_model": "sim", "x_tenant_id": "tenant-1", "x_request_class": "interactive"}
    came = datetime.now(UTC)
    told = {"request.time": came.isoformat()}
    begun = each_its_own(lambda own: message("request_headers", told, **plain, **own))
    plain = {"status": "200", "content_type": "application/octet-stream", "content_length": "2"}
    answered = message("response_headers", {"response.code_details": "via_upstream"}, **plain)
    loop = _Loop()
    core = Controller(Policy(classes=(RequestClass("batch"), RequestClass("interactive", priority=10))))
    observers = (Metrics(core, lambda: reception.streams, clock=loop.time), QueueLog(core, loop.time))
    gate = Gate(core, loop, (*observers, Stories(core, loop.time)))
    ages = Ages(30.0, repeat(came.timestamp() + 0.001).__next__, repeat(loop.now).__next__)  # clocks that stand still
    reception = Reception(gate, Headers(), ages)
    for name in ("e0", "e1"):
        reception.put_cluster(name, name)
        gate.put_endpoint(EndpointSpec(name, max_running_requests=256, models=frozenset({"sim"})))

    def serve(count: int) -> None:
        for _ in range(count):
            call = _Call()
            Stream(call, partial(Session, reception), one_message=False, resets=True)
            call.done(next(begun))
            call.done(answered)
            loop.now += 0.01
            call.done()  # the client's end
            call.done()  # ours is out
            if call.batches != 4:
                raise AssertionError(f"a request took {call.batches} batches")

    return serve


COUNTED_AS = {"": decided, ", all that is ours": carried}
"""What is counted, by what it is called beside the build."""


def serve_and_fork() -> None:
    """Be the processes of which valgrind counts the instructions, and tell which is which."""
    serves = [None, *(make() for make in COUNTED_AS.values())]
    for serve in serves[1:]:
        serve(WARM)
    gc.collect()
    gc.freeze()  # else what was made before decides how much a collection walks, and whether one comes
    for serve in serves:
        child = os.fork()
        if not child:
            if serve is not None:
                serve(COUNTED)
            os._exit(0)  # all end alike, and at once
        os.waitpid(child, 0)
        print(child, flush=True)
    os._exit(0)


def each() -> dict[str, int]:
    """Return the instructions of one request, as valgrind counts them, by what is counted."""
    done = subprocess.run(
        [
            *("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"),
            *(sys.executable, "-m", "bench.instructions", "--serve"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        check=False,
    )
    told = re.findall(r"==(\d+)== I\s+refs:\s+([\d,]+)", done.stderr)
    found = {int(process): int(count.replace(",", "")) for process, count in told}
    children = [int(child) for child in done.stdout.split()]
    if done.returncode or len(children) != 1 + len(COUNTED_AS) or not found.keys() >= set(children):
        raise SystemExit(f"valgrind says nothing that is known here:\n{done.stderr[-1000:]}")
    nothing, *counts = (found[child] for child in children)
    return {name: (count - nothing) // COUNTED for name, count in zip(COUNTED_AS, counts, strict=True)}


def build() -> str:
    """Return which Python this is, and whether the core is compiled."""
    from extproc.pure import is_compiled

    python = f"{platform.python_version()} {platform.python_compiler()} {platform.machine()}"
    return f"{python} {'compiled' if is_compiled() else 'pure'}"


def main() -> int:
    """Measure, and compare with what is kept; the exit code is 1 if it rose by more than 5 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="serve requests in two processes, uncounted, and end")
    parser.add_argument("--keep", action="store_true", help="keep what is measured as the figure to compare with")
    arguments = parser.parse_args()
    if arguments.serve:
        serve_and_fork()
    kept, risen = json.loads(KEPT.read_text()), False
    for what, now in each().items():
        name = build() + what
        before = kept.get(name)
        compared = f"{now / before - 1:+.1%}" if before else "nothing to compare"
        print(f"{name}: {now:,} instructions per request, {compared}")
        risen |= bool(before) and now > before * RISE
        kept[name] = now
    if arguments.keep:
        KEPT.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
        return 0
    return int(risen)


if __name__ == "__main__":
    sys.exit(main())
