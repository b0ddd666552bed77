"""Child processes and waiting. Every child is started by a context manager here and ended by its own pid."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, TypeVar

from .awake import awake

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from aiohttp import web

T = TypeVar("T")

PATIENCE_S = 30.0
"""How long what surely comes may take on a machine that is busy with others. Nobody waits longer than it takes."""
_POLL_S = 0.01
_GRPC_LOGS = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d|WARNING: All log messages before absl::InitializeLog")
_MOST_WORKERS = 8
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _MOST_WORKERS
_given_ports: set[int] = set()


async def take_turns() -> None:
    """Let what was accepted a moment ago come to its handler: a loop that ends before leaves its socket open."""
    for _ in range(5):
        await asyncio.sleep(0)


async def end_server(runner: web.AppRunner) -> None:
    """End a server and cut what is open: TLS that is closed in order waits for the other side, longer than the loop
    lives."""
    assert runner.server is not None
    for site in runner.sites:
        await site.stop()
    await take_turns()
    for protocol in runner.server.connections:
        if protocol.transport is not None:
            protocol.transport.abort()
    await runner.cleanup()
    await take_turns()


def wait_until(condition: Callable[[], T | None], timeout_s: float = PATIENCE_S, message: str = "") -> T:
    """The first true value of `condition`; AssertionError with `message` and the last value after `timeout_s`."""
    deadline = awake() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if awake() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {message or condition}; last value: {value!r}")
        time.sleep(_POLL_S)


def free_port() -> int:
    """A TCP port on loopback that nobody listens on, given out once per process.

    Taken from below the ephemeral range, so that an outgoing connection of another test can't grab it before its owner
    binds it; and each of pytest's workers has ports of its own, so that no two take one that neither has bound yet.
    """
    return _free(range(12000 + _worker, 32000, _MOST_WORKERS), 1)


def free_pair() -> int:
    """The first of two such ports in a row."""
    return _free(range(11000 + 2 * _worker, 12000, 2 * _MOST_WORKERS), 2)


def _free(among: range, count: int) -> int:
    for _ in range(1000):
        port = random.choice(among)
        if port not in _given_ports and all(_can_be_bound(port + number) for number in range(count)):
            _given_ports.add(port)
            return port
    raise AssertionError(f"no free port found between {among.start} and {among.stop}")


def _can_be_bound(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def http_get(address: str, path: str, timeout_s: float = PATIENCE_S) -> tuple[int, bytes]:
    """Status and body of `GET http://address/path`. OSError or HTTPException when there is no answer."""
    connection = http.client.HTTPConnection(address, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"connection": "close"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def http_ok(address: str, path: str) -> bool:
    """Whether `GET http://address/path` answers 200 now; never raises."""
    try:
        return http_get(address, path)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def tcp_open(address: str) -> bool:
    """Whether `host:port` accepts a TCP connection now; never raises."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE_S).close()
    except OSError:
        return False
    return True


class Child:
    """One child process in its own session, its output in one file, ended when the context ends.

    Ending is TERM to the child's pid, KILL to its session after `grace_s`; what it started in its session is killed
    with it. If this process dies hard the kernel kills the child too (`setpriv --pdeathsig`, where there is one; it
    goes by the thread that started the child, so start children in a thread that outlives them).
    """

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        name: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        grace_s: float = 5.0,
    ) -> None:
        self.argv = [str(part) for part in argv]
        self.log = log
        self.name = name or self.argv[0].rpartition("/")[2]
        self._env = {**os.environ, "PYTHONFAULTHANDLER": "1", **(env or {})}
        self._cwd = cwd
        self._grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        state = "not started" if self._process is None else f"pid {self.pid}, returncode {self.returncode}"
        return f"<Child {self.name}: {state}>"

    def __enter__(self) -> Child:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, also again after it ended; the output is appended to the same file."""
        if self._process is not None and self.returncode is None:
            raise AssertionError(f"{self!r} runs already")
        guard = shutil.which("setpriv")
        wrapper = [guard, "--pdeathsig", "KILL", "--"] if guard else []
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                [*wrapper, *self.argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        if self._process is None:
            raise AssertionError(f"{self.name} was not started")
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative = the signal that ended it."""
        process = self._process
        if process is None:
            return None
        if process.returncode is None:
            # Look without reaping: an unreaped leader keeps its session id reserved, so `stop` can't hit a stranger.
            seen = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if seen is None:
                return None
            return seen.si_status if seen.si_code == os.CLD_EXITED else -seen.si_status
        return process.returncode

    def output(self) -> str:
        """Everything it wrote so far, stdout and stderr together."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def lines(self) -> list[str]:
        """The whole lines that it wrote, without those of gRPC's own log: such a line may come at any moment."""
        whole = self.output().rpartition("\n")[0]
        return [line for line in whole.splitlines() if not _GRPC_LOGS.match(line)]

    def wait_ready(self, probe: Callable[[], T | None], timeout_s: float = PATIENCE_S, what: str = "readiness") -> T:
        """The first true value of `probe`; fails at once, with its output, when the child ends before that."""
        deadline = awake() + timeout_s
        while True:
            value = probe()
            if value:
                return value
            code = self.returncode
            late = awake() > deadline
            if code is not None or late:
                reason = f"no {what} in {timeout_s:g} s" if code is None else f"ended with {code} before {what}"
                raise AssertionError(f"{self.name}: {reason}; its output:\n{self.output()[-4000:]}")
            time.sleep(_POLL_S)

    def wait_line(self, pattern: str, timeout_s: float = PATIENCE_S) -> re.Match[str]:
        """The first match of the regular expression in its output."""
        compiled = re.compile(pattern, re.MULTILINE)
        return self.wait_ready(lambda: compiled.search(self.output()), timeout_s, f"line {pattern!r}")

    def wait_exit(self, timeout_s: float = PATIENCE_S) -> int:
        """Its return code, once it has ended by itself; if it does not, what it did and, of Python, where it stands."""
        try:
            wait_until(lambda: self.returncode is not None, timeout_s)
        except AssertionError:
            self.signal(signal.SIGABRT)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: self.returncode is not None, self._grace_s)
            raise AssertionError(f"{self.name} has not ended in {timeout_s:g} s:\n{self.output()[-8000:]}") from None
        code = self.returncode
        if code is None:
            raise AssertionError(f"{self.name} runs again")
        return code

    def signal(self, number: int) -> None:
        """Send one signal to the child's pid (KILL to crash it, STOP and CONT to hang it)."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def stop(self) -> int | None:
        """End it and its session; its return code, None if it never ran. Safe to call again."""
        process = self._process
        if process is None or process.returncode is not None:
            return None if process is None else process.returncode
        if self.returncode is None:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: self.returncode is not None, self._grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait(timeout=PATIENCE_S)


def run(
    argv: Sequence[str], *, timeout_s: float = 2 * PATIENCE_S, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a short command to its end; its output as text. The return code is the caller's to judge."""
    return subprocess.run(
        [str(part) for part in argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=cwd,
        check=False,
    )
