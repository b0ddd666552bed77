"""Which of all cells `make bench-matrix` plays, and why cells miss.

All are 2,148, and a night on two cores. Most say the same as their neighbours. Chosen are the gate's, the corners of
the made-up engines, every traffic on the measured engines at full load and on a slow and a small one at an easy load,
and what engines that tell little do with traffic that is not the standing mix.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from bench.matrix import gate
from bench.matrix.traffic import TRAFFIC

CORNERS = [
    f"step{step}/seqs{seqs}/{kv}/vllm/standing@{load}"
    for step in (9, 60, 120)
    for seqs in (8, 256)
    for kv in ("kv24k", "kv430k")
    for load in (50, 100)
]
FULL = [
    f"{engine}/vllm/{traffic}@100" for engine in ("a100-8b", "h100-32b", "h100-8b", "h100x4-70b") for traffic in TRAFFIC
]
EASY = [
    f"{engine}/vllm/{traffic}@80" for engine in ("step90/seqs256/kv430k", "step30/seqs8/kv200k") for traffic in TRAFFIC
]
QUIET = [
    f"{engine}/{page}/{traffic}@80"
    for engine in ("a100-8b", "h100-32b")
    for page in ("gauges", "none")
    for traffic in ("azure-conv", "azure-code", "prefix", "images", "rag", "agents")
]


def chosen() -> list[str]:
    """Return their names, the gate's first: their rivals are known."""
    return list(dict.fromkeys([*gate.names(), *CORNERS, *FULL, *EASY, *QUIET]))


REASONS: dict[str, str] = {
    "a100-8b/[gn]*/unstreamed@80": """\
In the first ten seconds under load the limit of an engine that tells nothing grows from 16 by one an answer; what comes
meanwhile may be refused: more than half of all that is refused there. The rest is refused in the run's one wave. A
start of two an answer up to a cap of 40 or 56 mends it on both pages (at most .93 %), and costs such engines under
overload up to a sixth of their goodput: docs/adr/0009.""",
    "*/none/*": """\
No page at all: the limit is learned from how long answers take, which have all lengths. That takes some hundred answers
of each engine, in a run of some hundred, and is rough. `max_running_requests` is the number to set; `extproc check`
says that it is missing. Examined on none of the cells of h100-32b.""",
    "*/gauges/*": """\
No counters of tokens: the limit is learned as without a page, but for the batch, which `waiting` shows, and prompts are
bounded by nothing but that limit. Examined on none of the cells of h100-32b.""",
    "*/azure-code@*": """\
Prompts of 2,000 tokens, answers of 28: the rival that makes most tokens makes them for requests whose first token came
too late. In goodput the defaults lead, but on h100-32b (.96), h100x4-70b (.99) and step30/seqs8/kv200k (.99), which
were not examined.""",
    "h100-32b/vllm/images@100": """\
In one run of the two 30 % are refused, where a fixed 13 refuses 19 %; hardly any answer is late with either. It is not
the limit that holds them back (it stays at its start of 16), so the books of prompts or of the small KV cache (24,000
tokens); which of them was not examined. In the other run the two are level (.91).""",
    "h100-32b/vllm/several@100": """\
In one run of the two the limits stand at 13 to 24, the best fixed one at 12, and 13 % of the answers are late, where
with 12 it is 2 %. In the other the defaults lead (.86, .77). One request in five has four sequences.""",
    "*/agents*@*": """\
Contexts that grow by each turn fill the prefix cache. Fewer at once find more of them there (at 28 .77 of the prompt
tokens, with the defaults .74) and first tokens come sooner; the limit looks at time per token, the KV books at what
runs. Examined on a100-8b at 120 %, not on the others.""",
    "*/rag@*": """\
A prompt of 8,000 tokens takes half a second to compute, and three are under way at once. Who has waited nearly all
its budget of 3.6 s before that is late for 4 s: 9 % are. The best rival lets nobody wait longer than a third of it.
Not looked at on every engine that misses.""",
    "*/blink@*": """\
All that ran is cut in the middle of the run. What waits then comes over 120 % load, and is refused or late.""",
}
"""The first pattern that a cell's name is like says why it misses."""


def reason(name: str) -> str | None:
    """Return why a cell misses, if that is known."""
    return next((why for pattern, why in REASONS.items() if fnmatchcase(name, pattern)), None)
