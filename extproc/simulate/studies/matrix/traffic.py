"""What comes: the traffic of the matrix. Values only, each with the source of its figures.

Lengths and rates are those that a fast engine's users send; `cells.py` scales objectives for slow engines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from extproc.simulate.traces import read_trace
from extproc.simulate.workload import (
    INTERACTIVE,
    STANDARD,
    Images,
    Klass,
    Lengths,
    Measured,
    Noise,
    Sessions,
    Surge,
    Workload,
)
from extproc.simulate.world import Faults

if TYPE_CHECKING:
    from pathlib import Path

    from extproc.simulate.workload import Demand

SHARES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


def _measured(*tokens: int) -> Measured:
    return Measured(tuple(zip(SHARES, (float(token) for token in tokens), strict=True)))


AZURE_CONVERSATION = Workload(
    process="waves",
    waves=((0.28, 500.0), (0.12, 8.0)),
    classes=(
        Klass(
            "chat",
            0,
            1.0,
            _measured(2, 29, 181, 207, 387, 403, 703, 1020, 1071, 1130, 1315, 2735, 4083, 4142, 14050),
            _measured(7, 16, 41, 54, 77, 91, 103, 129, 177, 384, 400, 424, 451, 601, 1000),
            1.0,
            0.1,
            30.0,
        ),
    ),
)
"""Azure LLM inference trace 2023, conversation (AzurePublicDataset, CC-BY 4.0; Splitwise, ISCA 2024): quantiles of its
19,366 requests, prompt and answer independent (correlation of logarithms .09). Requests per window, coefficient of
variation, trace and this: 1 s .50, .50; 10 s .26, .25; 60 s .22, .19; 300 s .18, .15."""

AZURE_CODE = Workload(
    process="waves",
    waves=((1.2, 50.0), (1.7, 5.0)),
    classes=(
        Klass(
            "code",
            0,
            1.0,
            _measured(3, 17, 75, 147, 385, 770, 1075, 1469, 1909, 2433, 3193, 5194, 7315, 7436, 7437),
            _measured(1, 6, 6, 7, 8, 9, 11, 13, 16, 20, 29, 55, 90, 252, 1899),
            2.0,
            0.1,
            30.0,
        ),
    ),
)
"""The same source's coding service, 8,819 requests (correlation -.004). Variation per window, trace and this: 1 s 2.3,
2.1; 5 s 1.9, 1.7; 60 s 1.0, .9; 300 s .4, .5."""

AGENT = Klass("agent", 1, 1.0, Lengths(300, 0.9), Lengths(120, 0.7), 2.0, 0.1, 60.0)
AGENTS = Workload(classes=(AGENT,), sessions=Sessions(system_prompt=3000, turns=8.0, think_s=2.0))
"""Turns of an agent: 2 s of tool time between them, a context that grows by some 450 tokens a turn (assumed)."""

REASONING = Workload(
    classes=(Klass("reason", 1, 1.0, Lengths(400, 0.8), Lengths(1200, 0.6), 5.0, 0.1, 60.0, longest=6000),),
    model="reasoner",
)
CHAT = Workload(
    classes=(replace(INTERACTIVE, share=1 / 3), replace(STANDARD, share=2 / 3)),
    model="chat",
)

RAG = Workload(classes=(Klass("rag", 1, 1.0, Lengths(8000, 0.25), Lengths(80, 0.5), 4.0, 0.1, 60.0),))


@dataclass(frozen=True, slots=True)
class Traffic:
    """One kind of traffic.

    Attributes:
        beside: what another model's users send; its engines are others, half of all.
        noise: one tenant in five sends so many times its share, from 1/7 to 6/7 of the run.
        surge: everybody sends so many times as much, from 2/5 to 1/2 of the run.
        blink_s: in the middle of the run the network is gone for so long.
        slow: the speed of the first engine.
        trace: a recorded file instead of the workload, whose classes still hold.
        least_s: how long a run lasts at least: a rate that wanders slowly shows only in a long one.
        ours: our contender; its defaults, but for what the traffic is about.
    """

    workload: Workload = Workload()  # noqa: RUF009 - frozen
    beside: Workload | None = None
    noise: float = 0.0
    surge: float = 0.0
    blink_s: float = 0.0
    slow: float = 1.0
    trace: Path | None = None
    least_s: float = 90.0
    ours: str = "ours"

    def during(self, workload: Workload, duration_s: float) -> Workload:
        """Return a workload of it with what happens in a run of `duration_s`."""
        noise = Noise(1, self.noise, duration_s / 7, duration_s * 6 / 7) if self.noise else None
        surge = Surge(self.surge, duration_s * 0.4, duration_s * 0.5) if self.surge else None
        return replace(workload, noise=noise, surge=surge)

    def faults(self, duration_s: float) -> Faults:
        """Return what goes wrong in a run of `duration_s`."""
        blink = (duration_s / 2, self.blink_s) if self.blink_s else None
        return Faults((self.slow,) if self.slow != 1.0 else (), blink=blink)


TRAFFIC = {
    "standing": Traffic(),
    "azure-conv": Traffic(AZURE_CONVERSATION),
    "azure-code": Traffic(AZURE_CODE, least_s=300.0),
    "prefix": Traffic(Workload(prefix_tokens=3000)),
    "images": Traffic(Workload(images=Images(0.3))),
    "reasoning": Traffic(CHAT, beside=REASONING),
    "agents": Traffic(AGENTS),
    "agents-unnamed": Traffic(
        replace(AGENTS, sessions=replace(AGENTS.sessions, named=False)) if AGENTS.sessions else AGENTS
    ),
    "rag": Traffic(RAG),
    "noisy": Traffic(noise=6.0),
    "flash": Traffic(surge=4.0),
    "blink": Traffic(blink_s=0.5),
    "chunked": Traffic(Workload(unsized=1.0)),
    "unstreamed": Traffic(replace(AZURE_CONVERSATION, unstreamed=0.3), ours="ours,first_byte_probe=true"),
    "conv-images": Traffic(replace(AZURE_CONVERSATION, images=Images(0.05, 500_000))),
    "several": Traffic(Workload(several=(0.2, 4))),
    "slow": Traffic(slow=1 / 3),
}
"""By name; all but the last five are those that the goal names."""


def recorded(path: Path, classes: tuple[Klass, ...]) -> list[Demand]:
    """Return the demands of a trace file, from 0."""
    return read_trace(path, classes)


def with_traces(folder: Path) -> dict[str, Traffic]:
    """Return the traffic with Azure's recorded hours, `azure_conv.csv` and `azure_code.csv`, in place of the fits."""
    conversation, code = folder / "azure_conv.csv", folder / "azure_code.csv"
    found = dict.fromkeys(("azure-conv", "unstreamed", "conv-images"), conversation) | {"azure-code": code}
    return TRAFFIC | {name: replace(TRAFFIC[name], trace=path) for name, path in found.items()}
