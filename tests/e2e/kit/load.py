"""Taking slots on purpose, and measuring what a process holds."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from extproc.config import Config

from .clients import complete_many
from .upstream import behave

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from .stack import Stack

IS_COMPLETION_QUEUE = (
    os.environ.get("EXTPROC_TRANSPORT", Config.model_fields["transport"].default) == "completion_queue"
)
KEPT_BYTES = 5 if IS_COMPLETION_QUEUE else 120
"""What a stream may leave behind. grpc.aio itself keeps 19 to 36 bytes of each (grpc/grpc#43360), measured with a noise
of 80; a handler that does not wait for Envoy's reset 100 to 206; the completion queue nothing measurable."""
SAW_BYTES = 2 << 20
"""How far an allocator's resident memory goes up and down by itself, as seen over 280,000 streams."""
HELD_KIB = 20 if IS_COMPLETION_QUEUE else 26
"""What a held request may cost the sidecar. Measured: 18.6, and 24.6 with grpc.aio."""


class Blocker:
    """Takes slots of endpoint a until they are freed."""

    _used = 0

    def __init__(self, pool: ThreadPoolExecutor, here: Stack, count: int = 1) -> None:
        first = Blocker._used
        Blocker._used += count
        self._upstream = here.upstreams["a"]
        self._ids = [f"block-{number}" for number in range(first, first + count)]

        def headers(number: int) -> dict[str, str]:
            return {"x-test-id": self._ids[number], **dict([behave(hold="head")])}

        self._answers = pool.submit(complete_many, here.url, count, headers, timeout_s=120)
        here.wait_in_flight("a", count)

    def free(self) -> None:
        for one in self._ids:
            self._upstream.release(one)

    def statuses(self) -> set[int]:
        return {answer.status for answer in self._answers.result()}


def memory_bytes(pid: int) -> int:
    """The memory that a process really holds: anonymous pages, without files and shared libraries."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no RssAnon in /proc/{pid}/status")


def descriptors(pid: int) -> int:
    """How many file descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208


class Growth:
    """A line through samples: how much of something comes with each further unit."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []

    def __repr__(self) -> str:
        first, last = self.samples[0], self.samples[-1]
        line = f"{self.slope:+.2f} per unit, floor {self.floor:+.2f}, over {first[0]:g}..{last[0]:g}"
        return f"{line}, from {first[1]:g} to {last[1]:g}"

    def add(self, units: float, value: float) -> None:
        """Note the value after that many units."""
        self.samples.append((units, value))

    @property
    def slope(self) -> float:
        """The median of the slopes between all pairs (Theil and Sen): single steps of an allocator don't tilt it."""
        pairs = [
            (later[1] - earlier[1]) / (later[0] - earlier[0])
            for index, earlier in enumerate(self.samples)
            for later in self.samples[index + 1 :]
        ]
        return statistics.median(pairs)

    @property
    def floor(self) -> float:
        """How the least of the last third compares with the least of the first, per unit.

        An allocator that gives back now and then makes a saw, whose teeth tilt the slope; what leaks raises both.
        """
        third = len(self.samples) // 3
        first, last = (
            min(part, key=lambda sample: sample[1]) for part in (self.samples[:third], self.samples[-third:])
        )
        return (last[1] - first[1]) / (last[0] - first[0])

    @property
    def units(self) -> float:
        """How many units came from the first sample to the last."""
        return self.samples[-1][0] - self.samples[0][0]

    @property
    def kept(self) -> float:
        """What each unit surely leaves behind: the less of slope and floor."""
        return min(self.slope, self.floor)

    @property
    def spread(self) -> float:
        """The largest value over the smallest."""
        values = [value for _, value in self.samples]
        return max(values) - min(values)
