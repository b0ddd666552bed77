"""`extproc top`: what the live page shows, in a terminal, from a sidecar's admin port. The demo shows it too, and in a
log a line of it.

Names and ids may be a client's: whatever is not plainly printable never reaches the terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import shutil
import sys
import termios
import time
import tty
import unicodedata
from typing import TYPE_CHECKING, Any

import aiohttp

from extproc.errors import StartError, plain_words

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

AGAIN_S = 1.0
SILENT_S = 3.5
"""So long without a view is no connection; the sidecar sends one a second."""
MOST_BYTES = 16 * 1024 * 1024
"""Of one view: something else may listen at that port."""
BAR = 20
"""Characters of a bar, for limits above it."""
STEPS = "▁▂▃▄▅▆▇█"
PLAIN_STEPS = "_.-:=+*#"  # where the terminal has no such characters
GAP = "  "
MOST_POOLS = 3
MOST_TO = 60
"""Characters of where a request may go."""
OTHER_COLUMNS = 46
"""What the columns beside it take that are there on every screen."""
QUIET_S = 10.0
"""No request for so long is told."""
FAILURES = {"failed": "unanswered", "broke_off": "cut", "error": "5xx"}
"""Kinds of bad answers, where a shorter word says it."""
UNKNOWN = "unknown"
"""The state of an endpoint that gave no good answer yet: nothing is wrong with it."""

View = dict[str, Any]


def plain(text: str) -> str:
    """Return `text` with a question mark for each character that would not take exactly one place on a line."""
    return "".join(
        one
        if one.isprintable() and unicodedata.east_asian_width(one) not in "WF" and not unicodedata.combining(one)
        else "?"
        for one in text
    )


def lines(view: Mapping[str, Any], width: int = 80, height: int = 24) -> list[str]:
    """Describe `view`, as /events sends it, in at most `height` lines of at most `width` characters.

    What is wrong goes before what is well where there are too many endpoints; waiting requests get the lines left over.
    """
    heading, classes, outcomes = (
        [_heading(view), *_unserved(view), *_capacity(view), *_notices(view)],
        _classes(view, width),
        [*_outcomes(view), *_tenants(view)],
    )
    fixed = len(heading) + len(classes) + len(outcomes)
    endpoints = _endpoints(view, max(height - fixed, 3), width)
    rows = [*heading, *endpoints, *classes, *outcomes]
    left = height - len(rows)
    if view["waiting"] and left >= 3:
        rows += _waiting(view, left, width)
    return [_cut(plain(row.rstrip()), width) for row in rows[:height]]


def line(view: Mapping[str, Any]) -> str:
    """Describe `view` in one short line, for a log. Of endpoints and the like it says only what is wrong."""
    up = [one for one in view["endpoints"] if one["up"] or one["state"] == UNKNOWN]
    running, room = sum(_places(one) for one in view["endpoints"]), sum(one["limit"] for one in up)
    unusual = [] if _mode(view) == "queue on" else [_mode(view)]
    if len(up) < len(view["endpoints"]):
        unusual.append(_up(view["endpoints"]))
    text = f"{view['up_s']:4}s  running {f'{running}/{room}':>5}  waiting {view['waiting_total']:3}"
    return plain("  ".join([text, *unusual, *_notices(view)]))


class Screen:
    """Draws lines over the ones drawn before."""

    def __init__(self) -> None:
        """Draw on stdout, if that is a terminal: `redraws`."""
        self._height = 0
        self.redraws = sys.stdout.isatty()

    def size(self, taken: int = 1) -> tuple[int, int]:
        """Return characters of a line, and lines, without `taken` of them."""
        columns, rows = shutil.get_terminal_size()
        return columns, max(rows - taken, 8)

    def draw(self, rows: list[str]) -> None:
        """Show `rows`."""
        print(f"\x1b[{self._height}A\x1b[J" if self._height else "", end="")
        print("\n".join(rows), flush=True)
        self._height = len(rows)


async def top(admin: str, *, once: bool) -> int:
    """Show the sidecar whose admin port is `admin` until `q` or Ctrl-C; where stdout is no terminal, once.

    Raises StartError if it can't be reached. One that goes away later is waited for.
    """
    screen = Screen()
    if not screen.redraws or once:
        print("\n".join(lines(await _first(admin), width=200, height=60)), flush=True)
        return 0
    shown = _Shown(admin, screen)
    with keys() as pressed:
        following = asyncio.create_task(_keep_following(admin, shown))
        quitting = asyncio.create_task(pressed.wait())
        try:
            await asyncio.wait((following, quitting), return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                await following  # raises what ended it
        finally:
            for task in (following, quitting):
                task.cancel()
            await asyncio.gather(following, quitting, return_exceptions=True)
    return 0


@contextlib.contextmanager
def keys() -> Iterator[asyncio.Event]:
    """Have `q` set an event, while the terminal gives keys as they are pressed; without a terminal, nothing does."""
    pressed = asyncio.Event()
    if not sys.stdin.isatty():
        yield pressed
        return
    terminal, loop = sys.stdin.fileno(), asyncio.get_running_loop()
    before = termios.tcgetattr(terminal)

    def read() -> None:
        typed = os.read(terminal, 64)
        if not typed or typed in (b"q", b"Q"):
            pressed.set()

    tty.setcbreak(terminal)  # Ctrl-C goes on to be a signal
    loop.add_reader(terminal, read)
    try:
        yield pressed
    finally:
        loop.remove_reader(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


async def _keep_following(admin: str, shown: _Shown) -> None:
    drawing = asyncio.create_task(shown.keep_drawing())
    try:
        while True:
            try:
                await follow(admin, shown.take)
                shown.problem = "it ended the connection"
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                if shown.view is None:
                    raise StartError(_nobody(admin, error)) from None
                shown.problem = plain_words(error)
            await asyncio.sleep(AGAIN_S)
    finally:
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)


async def follow(admin: str, take: Callable[[View], Awaitable[bool] | bool | None]) -> None:
    """Give `take` each view that the sidecar sends, until `take` returns False or the stream ends.

    Raises what aiohttp raises, and ValueError for what is no view.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=3, sock_read=SILENT_S)
    async with (
        aiohttp.ClientSession(timeout=timeout, read_bufsize=MOST_BYTES) as client,
        client.get(f"http://{admin}/events") as response,
    ):
        if response.status != 200 or response.content_type != "text/event-stream":
            said = (await response.content.read(200)).decode(errors="replace").strip()
            raise ValueError(plain(f"HTTP {response.status} at /events: {said}"))
        async for line in response.content:
            if line.startswith(b"data: "):
                view = json.loads(line[6:])
                if not isinstance(view, dict) or "classes" not in view:
                    raise ValueError("no view of a sidecar")
                if take(view) is False:
                    return


class _Shown:
    """The last view and how old it is."""

    def __init__(self, admin: str, screen: Screen) -> None:
        self.view: View | None = None
        self.problem = ""
        self._at = 0.0
        self._admin = admin
        self._screen = screen

    def take(self, view: View) -> None:
        self.view, self._at, self.problem = view, time.monotonic(), ""
        self._draw()

    async def keep_drawing(self) -> None:
        """Show the age of what is shown while nothing comes."""
        while True:
            await asyncio.sleep(AGAIN_S)
            if self.problem:
                self._draw()

    def _draw(self) -> None:
        if self.view is None:
            return
        width, height = self._screen.size()
        said = []
        if self.problem:
            age_s = time.monotonic() - self._at
            text = f"NO CONNECTION to {self._admin}: what you see is {age_s:.0f} s old; trying again ({self.problem})"
            said = [_cut(plain(text), width)]
        self._screen.draw([*said, *lines(self.view, width, height - len(said))])


async def _first(admin: str) -> View:
    views: list[View] = []

    def take(view: View) -> bool:
        views.append(view)
        return False

    try:
        await follow(admin, take)
        return views[0]
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, IndexError) as error:
        raise StartError(_nobody(admin, error)) from None


def _nobody(admin: str, error: Exception) -> str:
    if isinstance(error, aiohttp.ServerTimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
        why = "a sidecar that hangs, which `kill -9` ends without loss, or another program"
        return f"{admin} takes connections and does not answer within {SILENT_S:g} s: {why}"
    return f"no sidecar's admin port at {admin}: {plain_words(error)}"


# ---- the parts of a screen


def _mode(view: Mapping[str, Any]) -> str:
    mode = "dry run" if view["dry_run"] else "queue on" if view["enable_queue"] else "queue off"
    among = view.get("replicas")
    return mode + (", DRAINING" if view["draining"] else "") + (f", {among['words']}" if among else "")


def _heading(view: Mapping[str, Any]) -> str:
    held = sum(one["in_flight"] for one in view["endpoints"])
    return f"{_mode(view)}   {view['waiting_total']} waiting, {held} in flight, {_up(view['endpoints'])}{_quiet(view)}"


def _quiet(view: Mapping[str, Any]) -> str:
    """Tell that no requests come, which nothing else shows: Envoy may ask elsewhere. An older sidecar doesn't say."""
    quiet_s = view.get("quiet_s", 0.0)
    if quiet_s is None:
        return ", no request yet"
    return f", last request {_seconds(quiet_s)} ago" if quiet_s >= QUIET_S else ""


def _up(endpoints: Sequence[Mapping[str, Any]]) -> str:
    """Count who is up. Who gave no good answer yet is not down: it may have been asked clients' mistakes alone."""
    up, fresh = sum(one["up"] for one in endpoints), sum(one["state"] == UNKNOWN for one in endpoints)
    if not fresh:
        return f"{up} of {len(endpoints)} endpoints up"
    out = len(endpoints) - up - fresh
    return f"{len(endpoints)} endpoints: {up} up, {fresh} unknown" + (f", {out} out of use" if out else "")


def _capacity(view: Mapping[str, Any]) -> list[str]:
    """Tell how many engines the traffic needs, of the fullest pools; an older sidecar doesn't say."""
    pools = sorted(view.get("capacity", ()), key=lambda one: -(one["load"] or 0.0))[:MOST_POOLS]
    is_alone = max(len(pools), view.get("pools", 1)) == 1
    return [one["words"] if is_alone else f"{one['pool']}: {one['words']}" for one in pools]


def _unserved(view: Mapping[str, Any]) -> list[str]:
    """Tell which models nobody serves now, and who waits for them; an older sidecar doesn't say."""
    told = []
    for one in view.get("pools_down", ())[:MOST_POOLS]:
        who = "" if view["pools"] == 1 else "any model: " if one["pool"] == "*" else f"{one['pool']}: "
        told.append(f"{who}NO ENDPOINT UP, of {one['endpoints']}; {one['waiting']} wait")
    return told


def _notices(view: Mapping[str, Any]) -> list[str]:
    """Tell how the configuration file differs from what is in use; an older sidecar doesn't say."""
    notices = []
    if view.get("config_refused"):
        notices.append("CONFIGURATION REFUSED at its last change: the old one is in use, see the log")
    if view.get("restart_needed"):
        notices.append(f"RESTART NEEDED to change {', '.join(view['restart_needed'])}")
    return notices


def _endpoints(view: Mapping[str, Any], room: int, width: int) -> list[str]:
    """Describe the endpoints in at most `room` lines, those in trouble first if not all fit."""
    endpoints = view["endpoints"]
    if len(endpoints) + 1 > room:
        order = sorted(endpoints, key=lambda one: ({UNKNOWN: 1, "up": 2}.get(one["state"], 0), -_fault(one)))
        endpoints = order[: max(room - 2, 1)]
    table = [
        ("ENDPOINT", "STATE", "HELD BY", "", "IN FLIGHT", "OLDEST", "RUNS", "QUEUES", "KV", "AGE", "FIRST", "SENT")
    ]
    for one in endpoints:
        load = one["load"]
        state = one["state"] if one["state"] != "up" else "held back" if one["held_back"] else "up"
        state = state if state in ("up", "held back", "on trial", UNKNOWN) else state.upper()
        if "ejected_for_s" in one and one["state"] == "ejected":
            state += f", back in {math.ceil(one['ejected_for_s'])} s"
        if "refusal" in one:
            state += f" ({one['refusal']['answer']})"
        if "times_slower" in one:
            state += f", SLOW x{one['times_slower']:.0f}"
        if "no_token_for_s" in one:
            state += f", NO TOKEN FOR {one['no_token_for_s']:.0f} s"
        if "failed_lately" in one:
            state += f", FAILED {_failures(one['failed_lately'])}"
        if "left_out_for" in one:
            state += f", not {', '.join(one['left_out_for'])}"
        requests = f"({one['in_flight']} request{'' if one['in_flight'] == 1 else 's'})"
        flight = f"{_places(one)}/{one['limit']} {requests if 'sequences' in one else 'in flight'}"
        kv = f"{load['kv_usage']:.0%}" if "kv_usage" in load else "-"
        figures = (_count(load.get("running")), _count(load.get("waiting")), kv)
        if one["foreign"]:
            flight += f" + {one['foreign']} foreign"
        table.append(
            (
                one["name"] if len(one["name"]) <= 24 else one["name"][:23] + "~",
                state,
                _held(one),
                f"[{_bar(_places(one), one['limit'])}]",
                flight,
                _seconds(one.get("oldest_s")),
                *(_doubted(figure, one) for figure in figures),
                _age(one),
                str(one["waiting"] or "-"),
                str(one["dispatched"]),
            )
        )
    rows = _columns(table, width=width, left=(0, 1, 2, 3, 4), spare=(9, 10, 5, 3, 6, 7, 11, 8))
    more = len(view["endpoints"]) - len(endpoints)
    return [*rows, f"and {more} more"] if more else rows


def _classes(view: Mapping[str, Any], width: int) -> list[str]:
    table = [("CLASS", "WAITING", "OLDEST", "P50 WAIT", "P95 WAIT", "WAITING, 5 MIN")]
    for one in view["classes"]:
        oldest = _seconds(one["oldest_s"])
        table.append(
            (
                one["name"],
                str(one["waiting"]),
                oldest if view["scanned_all"] else f">={oldest}",
                _seconds(one["p50_s"]),
                _seconds(one["p95_s"]),
                _curve(one["history"]["waiting"], 25),
            )
        )
    return _columns(table, width=width, left=(0, 5), spare=(5, 3))


def _outcomes(view: Mapping[str, Any]) -> list[str]:
    counted = [one for one in view["outcomes"] if one["total"]]
    named = [f"{one['outcome']} {one['total']} ({one['per_s']:.1f}/s)" for one in counted]
    rows = ["OUTCOMES  " + ("  ".join(named[:2]) or "none yet")]
    rows += ["          " + "  ".join(named[start : start + 3]) for start in range(2, len(named), 3)]
    if view["dry_run"]:
        rows.append("DRY RUN   " + "  ".join(f"{what} {count}" for what, count in view["rehearsed"].items()))
    return rows


def _tenants(view: Mapping[str, Any]) -> list[str]:
    """Tell in a line which tenants have most waiting and running, or refused most; an older sidecar doesn't say."""
    told = []
    for one in view.get("tenants", ()):
        cap = f" of {one['max_in_flight']}{' shared' if one['shared'] else ''}" if "max_in_flight" in one else ""
        refused = f", {one['refused']} refused" if one["refused"] else ""
        told.append(
            f"{one['tenant'][:24] or 'no name'} {one['in_flight']}{cap} "
            f"({one['waiting']} wait, {one['in_flight'] - one['waiting']} run{refused})"
        )
    return ["TENANTS   " + "  ".join(told)] if told else []


def _waiting(view: Mapping[str, Any], room: int, width: int) -> list[str]:
    table = [("LONGEST WAITING", "WAITED", "LEFT", "HELD BY", "MAY GO TO", "TENANT", "REQUEST")]
    most = min(max(width - OTHER_COLUMNS, 12), MOST_TO)
    for one in view["waiting"][: room - 1]:
        to = one.get("may_go_to") or ("any" if one["queue"] == "*" else f"first {one['queue']}")  # an older sidecar
        left = _seconds(max(one["budget_left_s"], 0.0))
        held = one.get("held_by") or "-"
        tenant = one["tenant"][:16] or "-"
        table.append((one["class"], _seconds(one["age_s"]), left, held, _cut(to, most), tenant, one["id"]))
    same = [column for column, nothing in ((5, "-"), (4, "any")) if all(row[column] == nothing for row in table[1:])]
    return _columns(
        table, width=width, left=(0, 3, 4, 5, 6), spare=(*same, *(one for one in (6, 5, 4) if one not in same))
    )


def _columns(
    table: Sequence[Sequence[str]], *, width: int, left: Iterable[int], spare: Sequence[int] = ()
) -> list[str]:
    """Line up columns: those of `left` to the left, figures to the right; `spare`: who goes on a narrow screen."""
    table = [[plain(text) for text in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    to_left, shown = set(left), list(range(len(widths)))
    for index in spare:
        if sum(widths[one] + len(GAP) for one in shown) - len(GAP) <= width:
            break
        shown.remove(index)
    return [
        GAP.join(
            row[index].ljust(widths[index]) if index in to_left else row[index].rjust(widths[index]) for index in shown
        )
        for row in table
    ]


def _failures(counts: Mapping[str, int]) -> str:
    """Tell how many requests an endpoint failed lately, and how: the most first."""
    return " + ".join(f"{n} {FAILURES.get(kind, kind)}" for kind, n in sorted(counts.items(), key=lambda one: -one[1]))


def _fault(one: Mapping[str, Any]) -> float:
    """Tell how much is wrong with an endpoint whatever its state: what it failed, how slow or silent it is; else 0."""
    failed = sum(one.get("failed_lately", {}).values())
    return float(failed + one.get("times_slower", 0.0) + one.get("no_token_for_s", 0.0))


def _places(one: Mapping[str, Any]) -> int:
    """Count what an endpoint's limit counts: sequences, told where they are not as many as its requests."""
    return int(one.get("sequences", one["in_flight"]))


def _bar(in_flight: int, limit: int) -> str:
    width = min(max(limit, in_flight), BAR)
    full = round(width * in_flight / max(limit, in_flight, 1))
    return "#" * full + "." * (width - full)


def _curve(values: Sequence[int | None], width: int) -> str:
    """Draw `values`, a number each STEP_S, in `width` characters: the highest of each stretch."""
    known = [value or 0 for value in values]
    most = max(known, default=0)
    steps = STEPS if _speaks_unicode() else PLAIN_STEPS
    stretch = max(-(-150 // width), 1)
    starts = range(len(known), 0, -stretch)
    peaks = [max(known[max(start - stretch, 0) : start]) for start in starts][::-1]
    drawn = "".join(steps[min(peak * len(steps) // (most + 1), len(steps) - 1)] for peak in peaks) if most else ""
    return f"{drawn} max {most}" if most else "-"


def _speaks_unicode() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _doubted(figure: str, endpoint: Mapping[str, Any]) -> str:
    """Mark what an engine's page said before it could not be had: the figure is shown until it is stale."""
    return f"{figure}?" if "telemetry_silent" in endpoint and figure != "-" else figure


def _age(endpoint: Mapping[str, Any]) -> str:
    """Tell how old an endpoint's figures are, and why there are no newer ones."""
    age = _seconds(endpoint.get("telemetry_age_s"))
    return f"{age} {endpoint['telemetry_silent']}" if "telemetry_silent" in endpoint else age


def _held(endpoint: Mapping[str, Any]) -> str:
    """Tell what keeps requests from an endpoint, and for how long it has had no room; an older sidecar doesn't say."""
    held = endpoint.get("held_by") or "-"
    return f"{held} {_seconds(endpoint['held_for_s'])}" if "held_for_s" in endpoint else held


def _seconds(value_s: float | None) -> str:
    if value_s is None:
        return "-"
    if value_s < 0.001:
        return "<1 ms"
    if value_s < 1:
        return f"{1000 * value_s:.0f} ms"
    return f"{value_s:.1f} s" if value_s < 100 else f"{value_s:.0f} s" if value_s < 600 else f"{value_s / 60:.0f} min"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "~"
