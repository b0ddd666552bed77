"""An offline queue: each line of a file becomes a request of a low class, and is tried until it has an answer.

    python examples/batch.py requests.jsonl results.jsonl --to http://127.0.0.1:8080 --class batch

Lines are those of OpenAI's Batch API, in and out. A refusal (429, or 503 with Retry-After) is no failure: nothing is
sent before the time that it names, and then that request again. What fails otherwise is tried a few times. Started
again, it leaves out what has a result. It needs aiohttp alone, which the sidecar brings along.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any, TextIO

import aiohttp

TRIES = 5
"""Of a request that fails; refusals don't count."""
FIRST_PAUSE_S = 1.0
"""Before the second try; it doubles."""
SPREAD = 0.2
"""Of a pause, at most so much more: those who were refused together don't come back together."""
ANSWER_S = 3600.0


class Batch:
    """Sends requests, so many at once, and writes a line for each answer."""

    def __init__(self, to: str, headers: dict[str, str], results: TextIO) -> None:
        """Send to the Envoy at `to`; `headers`: of each request; `results`: where answers go."""
        self._to = to.rstrip("/")
        self._headers = headers
        self._results = results
        self._resume_at = 0.0  # nothing is sent before; the loop's clock
        self.refused = 0
        self.failed = 0

    async def run(self, requests: list[dict[str, Any]], at_once: int) -> None:
        """Send all of them."""
        left = iter(requests)
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as client,
            asyncio.TaskGroup() as group,
        ):

            async def work() -> None:
                for request in left:  # shared: each takes the next
                    self._write(request, *await self._answer(client, request))

            for _ in range(at_once):
                group.create_task(work())

    async def _answer(self, client: aiohttp.ClientSession, request: dict[str, Any]) -> tuple[int, Any]:
        """Return status and body of the answer; 0 and words if there was none at last."""
        loop, failures = asyncio.get_running_loop(), 0
        status, body = 0, ""
        while failures < TRIES:
            while (pause_s := self._resume_at - loop.time()) > 0:  # noqa: ASYNC110 - it may be put off meanwhile
                await asyncio.sleep(pause_s * (1 + SPREAD * random.random()))
            try:
                async with client.post(
                    self._to + request["url"], json=request["body"], headers=self._headers
                ) as response:
                    status, body = response.status, _said(await response.text(errors="replace"))
                    retry_after = response.headers.get("retry-after", "")
            except (aiohttp.ClientError, TimeoutError) as error:
                status, body, retry_after = 0, str(error) or type(error).__name__, ""
            if status in (429, 503) and retry_after.isdigit():
                self.refused += 1
                self._resume_at = max(self._resume_at, loop.time() + int(retry_after))
            elif status == 0 or status == 429 or status >= 500:
                failures += 1
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (failures - 1) * (1 + SPREAD * random.random()))
            else:
                break
        return status, body

    def _write(self, request: dict[str, Any], status: int, body: Any) -> None:
        self.failed += not 200 <= status < 300
        response = {"status_code": status, "body": body} if status else None
        error = None if status else {"message": body}
        line = {"custom_id": request["custom_id"], "response": response, "error": error}
        self._results.write(json.dumps(line) + "\n")
        self._results.flush()


def _said(text: str) -> Any:
    """Return an answer's body: an answer that is no JSON is one all the same, and is not asked for again."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def left_of(requests: Path, results: Path) -> list[dict[str, Any]]:
    """Return the requests that have no result yet."""
    done: set[str] = set()
    if results.exists():
        whole = results.read_text(encoding="utf-8").rpartition("\n")[0]  # the last line may have been cut by a crash
        results.write_text(whole + "\n" if whole else "", encoding="utf-8")
        done = {json.loads(line)["custom_id"] for line in whole.split("\n") if line}
    lines = requests.read_text(encoding="utf-8").split(
        "\n"
    )  # splitlines would cut at U+2028, which JSON allows in a string
    return [request for line in lines if line and (request := json.loads(line))["custom_id"] not in done]


def main() -> int:
    """Run it; the exit code is 1 if a request failed at last."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("requests", type=Path, help="a line of JSON for each request: custom_id, url, body")
    parser.add_argument("results", type=Path, help="a line for each answer is added here")
    parser.add_argument("--to", default="http://127.0.0.1:8080", help="Envoy (%(default)s)")
    parser.add_argument("--class", dest="request_class", default="batch", help="x-request-class (%(default)s)")
    parser.add_argument("--at-once", type=int, default=32, help="requests sent at a time (%(default)s)")
    arguments = parser.parse_args()
    left = left_of(arguments.requests, arguments.results)
    with arguments.results.open("a", encoding="utf-8") as results:
        batch = Batch(arguments.to, {"x-request-class": arguments.request_class}, results)
        asyncio.run(batch.run(left, arguments.at_once))
    print(f"{len(left)} sent, {batch.failed} failed, {batch.refused} refusals waited out", file=sys.stderr)
    return 1 if batch.failed else 0


if __name__ == "__main__":
    sys.exit(main())
