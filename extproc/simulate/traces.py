"""Traffic that was recorded: a CSV of requests, or the JSON access log that our Envoy config writes.

Reading only. All problems of a file are reported at once, each with its line and what would be right.
"""

from __future__ import annotations

import csv
import json
import random
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from extproc.errors import ConfigError
from extproc.files import read_text
from extproc.simulate.workload import LONGEST_OUTPUT, Demand, guess

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from extproc.simulate.workload import Klass

COLUMNS = {
    "time": ("time", "timestamp", "arrived", "arrived_at"),
    "prompt_tokens": ("prompt_tokens", "contexttokens", "input_tokens"),
    "output_tokens": ("output_tokens", "generatedtokens", "completion_tokens"),
    "class": ("class", "request_class"),
    "tenant": ("tenant", "user"),
    "session": ("session", "session_id"),
}
"""Columns of a CSV and their other names, in any case; Azure's public LLM traces can be read as they are."""
REQUIRED = ("time", "prompt_tokens", "output_tokens")
SECONDS_PER_TOKEN = 0.040
"""What one output token is taken to have taken where a log tells only how long an answer took."""
MOST_TOKENS = 1_000_000
MOST_PROBLEMS = 10


def read_trace(path: Path, classes: Sequence[Klass], seed: int = 0) -> list[Demand]:
    """Read `path`, a CSV or an access log, whichever its first line looks like. Raises ConfigError.

    Times start at 0 with the first request. A class that is not in `classes` counts as the first of them only when it
    is empty; else it is a problem.
    """
    lines = read_text(path, "utf-8-sig").splitlines()
    first = next((line for line in lines if line.strip()), "")
    reader = _Reader(str(path), classes, seed)
    demands = reader.access_log(lines) if first.lstrip().startswith("{") else reader.table(lines)
    if reader.problems:
        more = len(reader.problems) - MOST_PROBLEMS
        raise ConfigError(
            str(path), reader.problems[:MOST_PROBLEMS] + ([f"and {more} more problems like these"] if more > 0 else [])
        )
    if not demands:
        raise ConfigError(str(path), ["has no requests; a CSV needs a header line and at least one request"])
    demands.sort(key=lambda demand: demand.at)
    began = demands[0].at
    for demand in demands:
        demand.at -= began
    return demands


class _Reader:
    def __init__(self, source: str, classes: Sequence[Klass], seed: int) -> None:
        self.source = source
        self.problems: list[str] = []
        self._classes = {klass.name: klass for klass in classes}
        self._default = classes[0]
        self._draw = random.Random(f"{seed} trace")  # noqa: S311 - a workload, not a secret

    def table(self, lines: list[str]) -> list[Demand]:
        rows = csv.reader(line for line in lines if line.strip())
        header = [name.strip().lower() for name in next(rows, [])]
        place: dict[str, int] = {}
        for column, names in COLUMNS.items():
            found = [index for index, name in enumerate(header) if name in names]
            if found:
                place[column] = found[0]
        missing = [column for column in REQUIRED if column not in place]
        if missing:
            self.problems.append(
                f"line 1: no column {', '.join(missing)}; needed are {', '.join(REQUIRED)}, "
                f"known too are class, tenant, session; found are {', '.join(header) or 'none'}"
            )
            return []
        return list(self._rows(rows, place, len(header)))

    def _rows(self, rows: Iterable[list[str]], place: dict[str, int], width: int) -> Iterator[Demand]:
        for number, row in enumerate(rows, 2):
            where = f"line {number}"
            if len(row) != width:
                self.problems.append(f"{where}: has {len(row)} fields, the header has {width}")
                continue
            cells = {column: row[index].strip() for column, index in place.items()}
            at = self._time(cells["time"], f"{where}: time")
            prompt = self._tokens(cells["prompt_tokens"], f"{where}: prompt_tokens")
            output = self._tokens(cells["output_tokens"], f"{where}: output_tokens")
            klass = self._class(cells.get("class", ""), f"{where}: class")
            if at is not None and prompt is not None and output is not None and klass is not None:
                session = cells.get("session") or None
                yield Demand(at, klass, prompt, output, guess(self._draw, prompt), cells.get("tenant", ""), session)

    def access_log(self, lines: list[str]) -> list[Demand]:
        """Read what `extproc envoy-config` logs. It has no token counts.

        An answer's tokens are told from its duration without the wait, `SECONDS_PER_TOKEN` each; a refused request's,
        and every prompt's unless the log has `bytes_received`, are drawn as usual for the class.
        """
        demands = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"line {number}"
            try:
                entry = json.loads(line)
            except ValueError:
                self.problems.append(f"{where}: is no JSON; an access log has one JSON object per line")
                continue
            if not isinstance(entry, dict):
                self.problems.append(f"{where}: must be a JSON object, not {line.strip()[:40]!r}")
                continue
            demand = self._entry(entry, where)
            if demand is not None:
                demands.append(demand)
        return demands

    def _entry(self, entry: dict[str, Any], where: str) -> Demand | None:
        queue = entry.get("queue")
        queue = queue if isinstance(queue, dict) else {}
        at = self._time(str(entry.get("time", "")), f"{where}: time")
        klass = self._class(str(queue.get("class") or ""), f"{where}: queue.class")
        if at is None or klass is None:
            return None
        size, duration = entry.get("bytes_received"), entry.get("duration_ms")
        prompt = klass.prompt.draw(self._draw, MOST_TOKENS)
        if isinstance(size, int) and size > 0:
            prompt = max(int(size) // 4, 1)
        output = klass.output.draw(self._draw, LONGEST_OUTPUT)
        wait = queue.get("wait_ms", 0)
        if str(entry.get("code")) == "200" and isinstance(duration, (int, float)) and isinstance(wait, (int, float)):
            output = min(max(round((duration - wait) / 1000 / SECONDS_PER_TOKEN), 1), LONGEST_OUTPUT)
        text = {key: str(entry[key]) for key in ("tenant", "session") if entry.get(key)}
        return Demand(at, klass, prompt, output, guess(self._draw, prompt), text.get("tenant", ""), text.get("session"))

    def _time(self, text: str, where: str) -> float | None:
        try:
            seconds = float(text)
        except ValueError:
            try:
                moment = datetime.fromisoformat(text)
            except ValueError:
                self.problems.append(f"{where}: must be seconds or like 2026-01-31T12:00:00.250Z, not {text!r}")
                return None
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        if not abs(seconds) < 1e12:
            self.problems.append(f"{where}: must be a finite number of seconds, not {text!r}")
            return None
        return seconds

    def _tokens(self, text: str, where: str) -> int | None:
        if text.isascii() and text.isdigit() and 1 <= int(text[:12]) <= MOST_TOKENS:
            return int(text)
        if text == "0":
            return 1  # Azure's traces have answers without a token; an engine makes at least one
        self.problems.append(f"{where}: must be a whole number of tokens up to {MOST_TOKENS}, not {text!r}")
        return None

    def _class(self, name: str, where: str) -> Klass | None:
        if not name:
            return self._default
        klass = self._classes.get(name)
        if klass is None:
            known = ", ".join(self._classes)
            self.problems.append(f"{where}: unknown class {name!r}; known are {known}; --class adds one")
        return klass
