"""`make instructions`: machine instructions of one request through session, gate and core: counted, so without noise.

One request is two messages in and two out: its headers, answered with an endpoint that has room, and its answer's
headers; then the stream ends. Four endpoints; nobody waits; no metrics, no log. valgrind counts a process that forks
once all is warm: the child ends there, its parent serves the requests that are counted. The difference is their cost.

What a change is compared with stands in instructions.json, for each build of Python, and for the core compiled or pure;
a rise of 5 % fails. Another build has another interpreter loop: there is nothing to compare with, and that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

KEPT = Path(__file__).with_name("instructions.json")
WARM, COUNTED = 150, 300
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


def server() -> Callable[[int], None]:
    """Return what serves so many requests, one after the other, at four endpoints."""
    from bench.messages import message
    from extproc.admission.controller import Controller
    from extproc.admission.values import EndpointSpec, Policy
    from extproc.stream.ages import Ages
    from extproc.stream.gate import Gate
    from extproc.stream.reception import Reception
    from extproc.stream.request import Headers
    from extproc.stream.session import Session

    plain = {"method": "POST", "path": "/v1/chat/completions", "content_type": "application/json"}
    plain |= {"content_length": "812", "user_agent": "x", "accept": "*/*"}
    begun = message("request_headers", **plain, x_request_id="1", x_model="m", x_tenant_id="t", x_session_id="s")
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
            session.receive(begun)
            session.receive(answered)
            loop.now += 0.01
            session.end()
        if len(replies) != 2 * count:
            raise AssertionError(f"{count} requests had {len(replies)} replies")

    return serve


def serve_and_fork() -> None:
    """Be the two processes of which valgrind counts the instructions."""
    serve = server()
    serve(WARM)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        serve(COUNTED)
    os._exit(0)  # both end alike, and at once


def each() -> int:
    """Return the instructions of one request, as valgrind counts them."""
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
    found = [int(count.replace(",", "")) for count in re.findall(r"I\s+refs:\s+([\d,]+)", done.stderr)]
    if done.returncode or len(found) != 2:
        raise SystemExit(f"valgrind says nothing that is known here:\n{done.stderr[-1000:]}")
    return (max(found) - min(found)) // COUNTED


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
    kept = json.loads(KEPT.read_text())
    now, name = each(), build()
    before = kept.get(name)
    print(
        f"{name}: {now:,} instructions per request, " + (f"{now / before - 1:+.1%}" if before else "nothing to compare")
    )
    if arguments.keep:
        KEPT.write_text(json.dumps({**kept, name: now}, indent=2, sort_keys=True) + "\n")
        return 0
    return 1 if before and now > before * RISE else 0


if __name__ == "__main__":
    sys.exit(main())
