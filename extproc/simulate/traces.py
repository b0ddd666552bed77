"""Traffic that was recorded: a CSV, JSON lines of one kind or another, or Envoy's access log as text.

Reading only. What a field is called differs from tool to tool; `NAMES` is the one table of that. All problems of a file
are reported at once, each with its line and what would be right.
"""

from __future__ import annotations

import csv
import json
import random
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from extproc.errors import ConfigError
from extproc.files import read_text
from extproc.simulate.workload import LONGEST_OUTPUT, STANDARD, Demand, guess

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from extproc.simulate.workload import Klass

NAMES = {
    "time": (
        *("time", "timestamp", "@timestamp", "ts", "arrived", "arrived_at", "date", "starttime", "start_time"),
        *("starttimeunixnano", "start_time_unix_nano"),
    ),
    "prompt_tokens": (
        *("prompt_tokens", "contexttokens", "input_tokens", "input_length", "request tokens"),
        *("usage.prompt_tokens", "usage.input_tokens", "gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"),
    ),
    "output_tokens": (
        *("output_tokens", "generatedtokens", "completion_tokens", "output_length", "response tokens"),
        *("usage.completion_tokens", "usage.output_tokens"),
        *("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"),
    ),
    "class": ("class", "request_class", "queue.class"),
    "tenant": ("tenant", "user", "end_user", "user_id", "team_id"),
    "session": ("session", "session_id", "session id", "conversation_id", "gen_ai.conversation.id"),
    "bytes": ("bytes_received", "request_bytes", "request_size", "request_length"),
    "duration_ms": ("duration_ms", "latency_ms"),
    "duration_s": ("duration", "duration_s", "latency", "latency_s", "request_time", "response_time"),
    "end": ("endtime", "end_time", "endtimeunixnano", "end_time_unix_nano"),
    "wait_ms": ("queue.wait_ms",),
    "code": ("code", "status", "status_code", "response_code"),
    "method": ("method", "request_method"),
}
"""What a field may be called, in any case; dots lead into nested objects and OpenTelemetry's attributes.

Sources: Azure's LLM traces (AzurePublicDataset), BurstGPT's CSV, ServeGen's CSV (`input_tokens`), Mooncake's JSON lines
(`input_length`, times in milliseconds), LiteLLM's spend logs (`startTime`, `completion_tokens`), OpenTelemetry's
semantic conventions for GenAI, and what `extproc envoy-config` logs."""
REQUIRED = ("time", "prompt_tokens", "output_tokens")
_NUMBERS = ("bytes", "duration_ms", "duration_s")
"""Of these, or of tokens or of an end, each line of a log that is a request tells one."""
SECONDS_PER_TOKEN = 0.040
"""What one output token is taken to have taken where a log tells only how long an answer took."""
MOST_TOKENS = 1_000_000
MOST_PROBLEMS = 10
MOST_SHOWN = 12
"""Names of fields that a message lists."""
_ENVOY_TEXT = re.compile(
    r'\[(?P<time>[^\]]+)\] "(?P<method>\S+) .*?" (?P<code>\d+) \S+ '
    r'(?:\S+ \S+ "[^"]*" )?(?P<bytes_received>\d+) \d+ (?P<duration_ms>\d+) (?:\d+|-)'
)
"""Envoy's default format, and Istio's, which has details and transport failures between flags and bytes."""
_UNITS = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))
"""A moment that is as big as this as a number is no number of seconds since 1970, but of so much smaller units."""

Fields = dict[str, str]


def read_trace(path: Path, classes: Sequence[Klass], seed: int = 0) -> list[Demand]:
    """Read `path`, in whichever form its first line has. Raises ConfigError.

    Times start at 0 with the first request. A class that is not in `classes` counts as the first of them only when it
    is empty; else it is a problem.
    """
    reader = _Reader({klass.name: klass for klass in classes}, classes[0], seed)
    demands = reader.read(read_text(path, "utf-8-sig"))
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


@dataclass(frozen=True, slots=True)
class Look:
    """What a first look at a trace finds.

    Attributes:
        classes: names of the classes in it, in the order they come.
        entries: lines, or items, that are requests.
        skipped: lines that are none: a server's log has others between them.
    """

    classes: tuple[str, ...]
    entries: int
    skipped: int


def look(path: Path) -> Look:
    """Look at a trace; what can't be read is for `read_trace` to say."""
    reader = _Reader(None, STANDARD, 0)
    reader.read(read_text(path, "utf-8-sig"))
    return Look(tuple(reader.seen), reader.entries, len(reader.skipped))


class _Reader:
    def __init__(self, classes: Mapping[str, Klass] | None, default: Klass, seed: int) -> None:
        """Read requests of these `classes`; None: of any."""
        self.problems: list[str] = []
        self.skipped: list[str] = []  # lines of a log that are no requests, and why
        self.entries = 0
        self.seen: dict[str, None] = {}
        self._classes = classes
        self._default = default
        self._draw = random.Random(f"{seed} trace")  # noqa: S311 - a workload, not a secret

    def read(self, text: str) -> list[Demand]:
        demands = self._demands(self._requests(text))
        if len(self.skipped) > self.entries:
            self.problems += self.skipped
        return demands

    def _requests(self, text: str) -> Iterator[tuple[str, Fields]]:
        """Walk what has the form of the first line that has one."""
        lines = text.splitlines()
        first = next((line for line in lines if line.strip()), "")
        if first.lstrip().startswith("[") and not _ENVOY_TEXT.match(first):
            try:
                items = json.loads(text)
            except ValueError:  # a log, then, and the first line is none of its entries
                items = None
            if isinstance(items, list):
                return self._json((f"item {number}", item) for number, item in enumerate(items))
        elif _has_time(first):
            return self._table(lines)
        entry = next((line for line in lines if line.startswith("{") or _ENVOY_TEXT.match(line)), "")
        if not entry:
            return self._table(lines)
        return self._json(self._objects(lines)) if entry.startswith("{") else self._envoy_text(lines)

    def _demands(self, requests: Iterator[tuple[str, Fields]]) -> list[Demand]:
        demands = []
        for where, fields in requests:
            self.entries += 1
            demand = self._demand(fields, where)
            if demand is not None:
                demands.append(demand)
        return demands

    # ---- forms

    def _table(self, lines: list[str]) -> Iterator[tuple[str, Fields]]:
        rows = csv.reader(line for line in lines if line.strip())
        header = [name.strip().lower() for name in next(rows, [])]
        missing = [field for field in REQUIRED if not set(NAMES[field]) & set(header)]
        if missing:
            self.problems.append(
                f"line 1: no column {', '.join(missing)}; needed are {', '.join(REQUIRED)}, "
                f"known too are class, tenant, session; found are {', '.join(header)[:200] or 'none'}. JSON lines and "
                "Envoy's default access log are read too"
            )
            return
        for number, row in enumerate(rows, 2):
            where = f"line {number}"
            if len(row) != len(header):
                self.problems.append(f"{where}: has {len(row)} fields, the header has {len(header)}")
                continue
            yield where, _named({name: cell.strip() for name, cell in zip(header, row, strict=True)})

    def _envoy_text(self, lines: list[str]) -> Iterator[tuple[str, Fields]]:
        for number, line in enumerate(lines, 1):
            match = _ENVOY_TEXT.match(line)
            if match is not None:
                yield f"line {number}", _named(match.groupdict())
            elif line.strip():
                self.skipped.append(f"line {number}: is no line of Envoy's default access log, as others are")

    def _objects(self, lines: list[str]) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except ValueError:
                    self.skipped.append(f"line {number}: is no JSON; a log has one JSON object per line")

    def _json(self, items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Fields]]:
        for where, item in items:
            if not isinstance(item, dict):
                self.skipped.append(f"{where}: must be a JSON object, not {str(item)[:40]!r}")
                continue
            is_telemetry = "resourceSpans" in item or "attributes" in item
            for span in _spans(item):
                flat = _flat(span)
                fields = _named(flat)
                if is_telemetry and not any(name.startswith("gen_ai.usage.") for name in flat):
                    continue
                if _tells_length(fields):
                    yield where, fields
                else:
                    found = ", ".join(list(flat)[:MOST_SHOWN]) or "none"
                    self.skipped.append(
                        f"{where}: tells nothing of how long its request is: {_needed()}; found are {found}"
                    )

    # ---- one request

    def _demand(self, fields: Fields, where: str) -> Demand | None:
        """Return a request, or None with a problem noted, or for one that is no completion.

        Where tokens are not told, an answer's are read off its duration without the wait, `SECONDS_PER_TOKEN` each, and
        a prompt's off the bytes of the body; else they are drawn as usual for the class.
        """
        if fields.get("method", "POST").upper() != "POST":
            return None
        at = self._time(fields.get("time", ""), where)
        klass = self._class(fields.get("class", ""), f"{where}: class")
        told = {name: self._tokens(fields[name], f"{where}: {name}") for name in REQUIRED[1:] if name in fields}
        if at is None or klass is None or None in told.values():
            return None
        at /= 1000.0 if "milliseconds" in fields else 1.0
        prompt, output = klass.prompt.draw(self._draw, MOST_TOKENS), klass.output.draw(self._draw, LONGEST_OUTPUT)
        size, took_s = _number(fields.get("bytes")), self._took_s(fields, at)
        if size:
            prompt = max(int(size) // 4, 1)
        if fields.get("code", "200") in ("200", "success") and took_s is not None:
            output = min(max(round(took_s / SECONDS_PER_TOKEN), 1), LONGEST_OUTPUT)
        prompt, output = told.get("prompt_tokens") or prompt, told.get("output_tokens") or output
        session = fields.get("session") or None
        return Demand(at, klass, prompt, output, guess(self._draw, prompt), fields.get("tenant", ""), session)

    def _took_s(self, fields: Fields, at: float) -> float | None:
        seconds, milliseconds = _number(fields.get("duration_s")), _number(fields.get("duration_ms"))
        if milliseconds is not None:
            seconds = milliseconds / 1000
        if seconds is None and "end" in fields:
            end = _moment(fields["end"])
            seconds = None if end is None else end - at
        return None if seconds is None else seconds - (_number(fields.get("wait_ms")) or 0.0) / 1000

    def _time(self, text: str, where: str) -> float | None:
        seconds = _moment(text)
        if seconds is None:
            self.problems.append(f"{where}: time: must be seconds or like 2026-01-31T12:00:00.250Z, not {text!r}")
        elif not abs(seconds) < 1e12:
            self.problems.append(f"{where}: time: must be a finite number of seconds, not {text!r}")
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
        self.seen[name] = None
        if self._classes is None:
            return self._default
        klass = self._classes.get(name)
        if klass is None:
            known = ", ".join(self._classes)
            self.problems.append(f"{where}: unknown class {name!r}; known are {known}; --class or --config adds one")
        return klass


def _needed() -> str:
    return (
        f"needed are time and either prompt_tokens ({', '.join(NAMES['prompt_tokens'][1:5])} ...) and output_tokens "
        f"({', '.join(NAMES['output_tokens'][1:5])} ...), or duration_ms and bytes_received"
    )


def _named(flat: Mapping[str, str]) -> Fields:
    """Return what `flat` has under the names of this room, the first of each that says something."""
    fields: Fields = {}
    for field, names in NAMES.items():
        for name in names:
            if flat.get(name, "") not in ("", "-", "None"):
                fields[field] = flat[name]
                break
    if "input_length" in flat:
        fields["milliseconds"] = "yes"  # Mooncake's times
    return fields


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Return an object's plain values by the way to them, in lower case; attributes by their own names."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        name = f"{before}{key}".lower()
        if isinstance(item, dict):
            flat |= _flat(item, "" if key == "attributes" else f"{name}.")
        elif key == "attributes" and isinstance(item, list):  # OTLP: [{key: ..., value: {intValue: "12"}}]
            pairs = [one for one in item if isinstance(one, dict) and isinstance(one.get("value"), dict)]
            flat |= {str(one.get("key")).lower(): str(next(iter(one["value"].values()), "")) for one in pairs}
        elif item is not None and not isinstance(item, list):
            flat[name] = str(item)
    return flat


def _spans(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Walk the spans in a line of OpenTelemetry's file exporter; anything else is one request."""
    if "resourceSpans" not in item:
        yield item
        return
    for resource in item["resourceSpans"]:
        for scope in resource.get("scopeSpans", []):
            yield from scope.get("spans", [])


def _has_time(line: str) -> bool:
    """Tell whether a line may be the header of a table."""
    return not {name.strip().lower() for name in line.split(",")}.isdisjoint(NAMES["time"])


def _tells_length(fields: Fields) -> bool:
    if not fields.keys().isdisjoint((*REQUIRED[1:], "end")):
        return True
    return any(_number(fields.get(name)) is not None for name in _NUMBERS)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _moment(text: str) -> float | None:
    """Return a moment in seconds, whatever its unit if it is counted from 1970; None: it is none."""
    try:
        seconds = float(text)
    except ValueError:
        for parse in (datetime.fromisoformat, lambda written: datetime.strptime(written, "%d/%b/%Y:%H:%M:%S %z")):
            try:
                moment = parse(text)
            except ValueError:
                continue
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        return None
    return next((seconds / unit for least, unit in _UNITS if least <= abs(seconds) < 1e20), seconds)
