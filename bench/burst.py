"""One burst on real Envoy, with the queue off and on: `make bench-burst`.

60 streaming requests over 2 simulated engines of 4 slots, the 6 of the high class sent last; the two settings take
turns, so that a noisy machine hurts both. What is compared: how long the high class waits for its first token, how
many requests the engines themselves had to queue, and how long the whole burst takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

from tests.e2e.kit.clients import complete_many
from tests.e2e.kit.processes import Child, http_get
from tests.e2e.kit.stack import Stack

SLOTS, REQUESTS, HIGH = 4, 60, 6
BODY = json.dumps({"model": "sim", "stream": True, "max_tokens": 40, "messages": [{"role": "user", "content": "hi"}]})


def burst(directory: Path, *, enable_queue: bool) -> dict[str, float]:
    """Run one burst and return its figures: seconds, and requests."""
    with contextlib.ExitStack() as running:
        engines = {}
        for name in ("engine-a", "engine-b"):
            command = [sys.executable, "-m", "extproc", "engine", "--preset", "demo", "--name", name, "--port", "0"]
            child = running.enter_context(Child([*command, "--max-num-seqs", str(SLOTS)], directory / f"{name}.log"))
            engines[name] = {"address": child.wait_line(r"listening on http://(\S+)").group(1)}
        config = {
            "enable_queue": enable_queue,
            "max_running_requests": SLOTS,
            "classes": [{"name": "batch", "budget": "60s"}, {"name": "interactive", "priority": 10, "budget": "60s"}],
        }
        stack = running.enter_context(Stack(directory, upstreams=(), endpoints=engines, config=config))
        first_high = REQUESTS - HIGH

        def headers(number: int) -> dict[str, str]:
            return {"x-request-class": "interactive" if number >= first_high else "batch"}

        answers = complete_many(stack.url, REQUESTS, headers, body=BODY.encode(), gap_s=0.002, timeout_s=120)
        failed = [answer for answer in answers if answer.status != 200 or answer.error]
        if failed:
            raise SystemExit(f"{len(failed)} of {REQUESTS} failed, the first: {failed[0]}")
        peaks = [json.loads(http_get(one["address"], "/debug/peaks")[1])["peak_waiting"] for one in engines.values()]
        return {
            "high class, first token p50 s": statistics.median(one.first_chunk_s for one in answers[first_high:]),
            "low class, first token p50 s": statistics.median(one.first_chunk_s for one in answers[:first_high]),
            "waiting inside an engine, peak": max(peaks),
            "whole burst s": max(one.started_at + one.end_s for one in answers) - answers[0].started_at,
        }


def main() -> None:
    """Print the medians of both settings side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    results: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(runs):
        for enable_queue, rows in results.items():
            with tempfile.TemporaryDirectory() as directory:
                rows.append(burst(Path(directory), enable_queue=enable_queue))
    print(f"{'median of ' + str(runs) + ' runs':<34}{'queue off':>12}{'queue on':>12}")
    for what in results[True][0]:
        off, on = (statistics.median(row[what] for row in results[setting]) for setting in (False, True))
        print(f"{what:<34}{off:>12.2f}{on:>12.2f}")


if __name__ == "__main__":
    main()
