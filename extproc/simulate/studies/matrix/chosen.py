"""Which of all cells `make bench-matrix` plays, and why cells miss.

All are 2,148, and a night on two cores. Most say the same as their neighbours. Chosen are the gate's, the corners of
the made-up engines, every traffic on the measured engines at full load and on a slow and a small one at an easy load,
and what engines that tell little do with traffic that is not the standing mix.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from extproc.simulate.studies.matrix import gate
from extproc.simulate.studies.matrix.traffic import TRAFFIC

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


_SLOW_CONVERSATIONS = """\
Users of this engine take 200 ms a token; the limit aims at 1.75 steps (165 ms), which waves of prompts exceed, so it
stands below the 53 that would do and 3 % are refused. `adaptive_limit.step_factor: 2` has .96 there, and .42 where a
tenant is noisy (the defaults .82): it stays as it is."""

REASONS: dict[str, str] = {
    "a100-8b/[gn]*/unstreamed@80": """\
In the first ten seconds under load the limit of an engine that tells nothing grows from 16 by one an answer; what comes
meanwhile may be refused: more than half of all that is refused there. The rest is refused in the run's one wave. A
start of two an answer up to a cap of 40 or 56 mends it on both pages (at most .93 %), and costs such engines under
overload up to a sixth of their goodput: docs/adr/0009. `max_running_requests: 104` has .998.""",
    "h100-32b/[gn]*/azure-code@80": """\
No counters of tokens: neither the cache of 24,000 tokens nor what prompts cost is known, and bursts of prompts bring
first tokens late. `max_running_requests: 5` has .57 on both pages, `kv_capacity_tokens: 24000` .50.""",
    "h100-32b/[gn]*/[ip]*@80": """\
No counters of tokens, and a cache of 24,000 tokens whose size nobody tells: more is sent than fits, and first tokens
are late (nothing is refused). `max_running_requests` has .93 to .95 (10 to 13). `kv_capacity_tokens: 24000` has .96
with the shared prefix and gauges; without a page nobody tells what prompts share and images are, so it has less (.71,
.75): there set the first.""",
    "h100-32b/[gn]*/*@80": """\
No counters of tokens, and a cache of 24,000 tokens whose size nobody tells: the limit stays above the three (agents) to
fourteen requests that fit, since at 80 % load it hardly binds, and the rest waits inside the engine. With agents an
engine finishes too few answers to be learned in the run. With `kv_capacity_tokens: 24000` the defaults lead: agents .45
and .43 (no page, gauges), rag .93 and .91, Azure's conversations .98.""",
    "step90/seqs32/kv24k/[gn]*/*": """\
The cache of 24,000 tokens is the narrow place, and nobody tells its size. With `kv_capacity_tokens: 24000` the defaults
lead: .98 at 80 % and .90 at 120 %, on both pages.""",
    "*/none/*": """\
No page at all: the limit is learned from how long answers take, which have all lengths. That takes some hundred answers
of each engine, in a run of some hundred, and is rough. `max_running_requests` is the number to set (the best is in
`gate.json` and `further.json`); `extproc check` says that it is missing.""",
    "*/gauges/*": """\
No counters of tokens: the limit is learned as without a page, but for the batch, which `waiting` shows, and prompts are
bounded by nothing but that limit. `max_running_requests` is the number to set.""",
    "*/several@*": """\
One request in five asks for four answers, and says so in its body only, which the defaults don't read: it counts as
one. With `request_fields` it counts as four: step30/seqs8/kv200k .87, h100-8b .87, h100x4-70b .81, h100-32b .85. Not on
step90/seqs256/kv430k (.80): the limit swings between 25 and 66 around the 48 that are right, so some are late by their
time per token, and who asks for four answers waits for four free slots. What makes more tokens than the defaults there
and on h100x4-70b is the tuned engine with 62 and 112, for answers that are late (.77 and .68 in time).""",
    "*/flash@*": """\
The defaults lead. What makes more tokens is least request, which turns nobody away: .51 of its answers are in time.""",
    "*/noisy@*": """\
The defaults lead. What makes more tokens is least request, which turns nobody away: .35 of its answers are in time.""",
    "step90/seqs256/kv430k/vllm/azure-conv@80": _SLOW_CONVERSATIONS,
    "step90/seqs256/kv430k/vllm/unstreamed@80": _SLOW_CONVERSATIONS,
    "*/azure-code@*": """\
Prompts of 2,000 tokens, answers of 28: the rival that makes most tokens makes them for requests whose first token came
too late. In goodput the defaults lead, but on h100-32b (.97: a fixed 10 refuses 27 %, the defaults 36 %, and is late
for 17 %, not 9 %), h100x4-70b and step30/seqs8/kv200k (.99: level).""",
    "*/agents*@*": """\
Contexts that grow by each turn fill the prefix cache. Fewer at once find more of them there (on a100-8b at 28 .77 of
the prompt tokens, with the defaults .74) and first tokens come sooner; the limit looks at time per token, the KV books
at what runs. On h100x4-70b it is the start: of what comes in the first 15 s four in ten are refused while the limit
grows from 16 to the 57 that fit. On h100-8b the time per token holds 56 to 79, and a fixed 158 leaves it to the KV
books. On h100-32b a full cache of three to four looks like a batch of so many, found anew each minute; a fixed limit of
6 or more leaves it to the books (.39), and so does `learning.kv.fill: 80` (.38, unnamed .41).""",
    "h100-32b/vllm/chunked@100": """\
Level but for these two seeds: over twelve the defaults have .870, the fixed 16 .880.""",
    "*/rag@*": """\
A prompt of 8,000 tokens takes half a second to compute, and three are under way at once. Who has waited nearly all
its budget of 3.6 s before that is late for 4 s: 6 to 12 % are on h100x4-70b, a100-8b and h100-32b. The best rival lets
nobody wait longer than a third of it.""",
    "*/blink@*": """\
All that ran is cut in the middle of the run. What waits then comes over 120 % load, and is refused or late.""",
}
"""The first pattern that a cell's name is like says why it misses."""


def reason(name: str) -> str | None:
    """Return why a cell misses, if that is known."""
    return next((why for pattern, why in REASONS.items() if fnmatchcase(name, pattern)), None)
