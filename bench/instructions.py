"""`make instructions`: machine instructions of one request through session, gate and core: counted, so without noise.

valgrind counts a run of a few requests and one of many; the difference is what requests cost. The figures that a change
is compared with stand in instructions.json, by Python and by whether the core is compiled; a rise of 5 % fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

KEPT = Path(__file__).with_name("instructions.json")
FEW, MANY = 300, 1300
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


def serve(count: int) -> int:
    """Answer `count` requests, one after the other, at four endpoints; return how many replies there were."""
    from extproc._pb import ext_proc_pb2 as pb
    from extproc.admission.controller import Controller
    from extproc.admission.values import EndpointSpec, Policy
    from extproc.stream.ages import Ages
    from extproc.stream.gate import Gate
    from extproc.stream.reception import Reception
    from extproc.stream.request import Headers
    from extproc.stream.session import Session

    def message(kind: str, **headers: str) -> bytes:
        found = pb.ProcessingRequest()
        for name, value in headers.items():
            header = getattr(found, kind).headers.headers.add()
            header.key = f":{name}" if name in ("method", "path", "status") else name.replace("_", "-")
            header.raw_value = value.encode()
        return found.SerializeToString()

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
    replies: list[bytes] = []
    for _ in range(count):
        session = Session(reception, replies.append)
        session.receive(begun)
        session.receive(answered)
        loop.now += 0.01
        session.end()
    return len(replies)


def counted(count: int) -> int:
    """Return the instructions of a process that serves `count` requests."""
    done = subprocess.run(
        [
            *("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"),
            *(sys.executable, "-m", "bench.instructions", "--serve", str(count)),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        check=True,
    )
    found = re.search(r"I\s+refs:\s+([\d,]+)", done.stderr)
    if found is None:
        raise SystemExit(f"valgrind says nothing that is known here:\n{done.stderr[-1000:]}")
    return int(found[1].replace(",", ""))


def main() -> int:
    """Measure, and compare with what is kept; the exit code is 1 if it rose by more than 5 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=int, help="serve so many requests, uncounted, and end")
    parser.add_argument("--keep", action="store_true", help="keep what is measured as the figure to compare with")
    arguments = parser.parse_args()
    if arguments.serve is not None:
        return 0 if serve(arguments.serve) == 2 * arguments.serve else 1
    from extproc.pure import is_compiled

    each = (counted(MANY) - counted(FEW)) // (MANY - FEW)
    name = f"{sys.version_info.major}.{sys.version_info.minor} {'compiled' if is_compiled() else 'pure'}"
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    before = kept.get(name)
    print(f"{name}: {each:,} instructions per request" + (f", {each / before - 1:+.1%}" if before else ""))
    if arguments.keep or before is None:
        KEPT.write_text(json.dumps({**kept, name: each}, indent=2, sort_keys=True) + "\n")
        return 0
    return 1 if each > before * RISE else 0


if __name__ == "__main__":
    sys.exit(main())
