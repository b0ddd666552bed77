"""Load against what the engines can do: how full a pool is, and how many engines its traffic would need.

Demand is what clients asked for in the last minute, as it came, by their estimated tokens: what still waits, and what
was refused, too. What one engine can do with that mix follows from what its counters taught (`admission/steps.py`). At
its best it runs as many sequences as keep the wanted time per token, fit into its KV cache, and into its batch; a step
then gives each of them a token and computes as many prompt tokens as come with so many answers:

    step_s = base_s + running x (sequence_s + prompt_s x prompt tokens per output token)

The rate is stable below running / step_s (after Nie, Si, Zhou, arXiv 2605.04595). It is a mean: bursts need more.

How long answers are is not known when they are asked for, and in a minute of a slow engine there are few: the estimates
are corrected by what the counters said of that minute's answers.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from prometheus_client.core import GaugeMetricFamily

from extproc.admission.limit import CEILING, AdaptiveLimit
from extproc.observe.endpoints import serves
from extproc.observe.filling import Filling
from extproc.observe.served import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

    from extproc.admission.controller import Controller
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.pool import Pool as CorePool
    from extproc.admission.values import EndpointSpec

WINDOW_S: Final = 60.0
"""Now is the mean of so long: shorter is a burst, which is what a queue is for."""
PEAK_WINDOWS: Final = 5
"""A peak is the mean of so many minutes that follow one another: in less no engine starts."""
DAY_S: Final = 86_400.0
LEAST_READINGS: Final = 10
"""Readings of its counters after which an engine's costs are taken for known."""
GRACE_S: Final = 120.0
"""So long what was found last stands while no engine tells: a new one's first readings take a while."""
LEAST_SEQUENCE_S: Final = 1e-6
"""No sequence is for nothing, whatever counters made of a small model's steps."""
MOST_LONGER: Final = 4.0
MOST_SHORTER: Final = 16.0
"""A minute's answers are taken for so many times as long as estimated at most, or that part of it: the first estimates
after a start are a guess. What others had an engine write is counted, too, so the first is not larger."""
BELIEF_ANSWERS: Final = 2.0
"""Estimates are worth as much as so many answers counted: one alone proves nothing."""
LOOKED_AT: Final = 50
"""Endpoints that are looked at in one turn of the event loop: less than a millisecond."""


class Asked(NamedTuple):
    """What was asked of a pool since the start, as it stood at one moment.

    Attributes:
        expected, written: of its engines' answers, tokens as estimated, and as their counters said.
    """

    at: float
    requests: int = 0
    prompts: int = 0
    outputs: int = 0
    expected: float = 0.0
    written: int = 0


class _Group(NamedTuple):
    """Endpoints that serve a model in common, or are joined by others that do, and all their models."""

    models: set[str]
    members: list[Endpoint]


@dataclass(frozen=True, slots=True)
class Answer:
    """How full one pool is.

    Attributes:
        load: demand over the stable rate of its endpoints that are up; None: none of them tells what it can do.
        engines: how many such engines the demand would fill, to the brim.
        peak: the same at the fullest five minutes of the last day; None: five have not passed yet. And `peak_ago_s`
            how long ago these ended.
        up: how many of its endpoints are up, of `known`; those on trial are not.
    """

    load: float | None
    engines: float
    peak: float | None
    peak_ago_s: float
    up: int
    known: int

    @property
    def words(self) -> str:
        """It in words for people."""
        ago = f"{self.peak_ago_s / 3600:.0f} h" if self.peak_ago_s >= 5400 else f"{self.peak_ago_s / 60:.0f} min"
        peak = "" if self.peak is None or self.peak_ago_s < 60 else f"; at the peak, {ago} ago, {self.peak:.1f}"
        has = f"has {self.up}" if self.up == self.known else f"has {self.up} up of {self.known}"
        return f"traffic needs {self.engines:.1f} engines, {has}{peak}"


class _Pool:
    """Endpoints that serve the same models, or share some."""

    __slots__ = (
        "asked",
        "engines",
        "expected",
        "fillings",
        "known_at",
        "load",
        "marks",
        "members",
        "models",
        "most",
        "name",
        "named",
        "peaks",
        "samples",
        "up",
        "window",
        "windows",
        "written",
    )

    def __init__(self, now: float) -> None:
        self.models: set[str] = set()
        self.members: list[Endpoint] = []
        self.named: set[str] = set()  # those that its name is made of
        self.name = ""
        self.asked = [0, 0, 0]
        self.marks: dict[Endpoint, tuple[float, int]] = {}  # what each was expected to have written, and had
        self.most: dict[Endpoint, float] = {}  # sequences that each was seen to run
        self.fillings: dict[Endpoint, Filling] = {}  # how prompts fill the cache of each
        self.expected, self.written = 0.0, 0
        self.samples: deque[Asked] = deque([Asked(now)])
        self.window = (now, 0.0, 0.0)  # of the minute under way: its begin, engines x seconds, seconds
        self.windows: deque[float] = deque(maxlen=PEAK_WINDOWS)  # engines of the minutes before
        self.peaks: deque[tuple[float, float]] = deque()  # (end, engines) of five minutes; none before a fuller one
        self.load: float | None = None
        self.engines: float | None = None
        self.known_at = now  # when an engine told last
        self.up = 0

    def serve(self, models: set[str], members: list[Endpoint]) -> None:
        """Serve `models` by `members` now. The name stays while it is true: an adapter more makes no new series."""
        self.models, self.members = models, members
        if not self.named or not self.named <= models:
            self.named, self.name = models, name_of(models)

    def hear_nothing(self, now: float) -> Iterator[None]:
        """Begin the minute anew as long as another sidecar is asked: of what it heard, nothing is known here."""
        self.samples = deque([(yield from self.look(now))])
        self.marks.clear()  # what followers will bring along was begun elsewhere
        self.window = (now, 0.0, 0.0)
        self.windows.clear()
        self.engines = self.load = None

    def look(self, now: float) -> Generator[None, None, Asked]:
        """Return where it stands, and yield where a loop may turn. Of what is being written, half was expected to be
        there."""
        requests, prompts, outputs = self.asked
        before, self.marks = self.marks, {}
        most, self.most = self.most, {}
        fillings, self.fillings = self.fillings, {}
        for number, one in enumerate(self.members):
            if number % LOOKED_AT == 0:
                yield
            page, kv = one.reading.page, one.kv
            running = page.running if page is not None else None
            self.most[one] = max(most.get(one, 0.0), running or 0.0)
            filling = self.fillings[one] = fillings.get(one) or Filling()
            if kv.capacity is not None and page is not None and page.kv_usage is not None:
                booked = one.reading.booked  # of that moment: most of what runs now may be younger
                if booked[0] > kv.law.enough * kv.capacity:
                    filling.learn(one.reading.page_at, kv.capacity, page.kv_usage, *booked)
            # Its counters tell from the first token on, long before its costs are known. But nobody here expected what
            # it writes for a sidecar before us.
            if one.written and not one.foreign:
                mark = self.marks[one] = (one.expected + one.kv.outputs / 2, one.written)
                expected, written = before.get(one, mark)
                self.expected += mark[0] - expected
                self.written += mark[1] - written
        return Asked(now, requests, prompts, outputs, self.expected, self.written)


class Capacity:
    """A collector for a Prometheus registry. `sample` is to be called every few seconds.

    Its pools come from the configuration, and their names from models that it or a discovery source names.
    """

    def __init__(
        self, controller: Controller, clock: Callable[[], float], decides: Callable[[], bool] = lambda: True
    ) -> None:
        """Watch what is asked of `controller`, by its `clock`. `decides`: it does, and no other sidecar's: else it
        hears of a part of the traffic only, and tells nothing."""
        self._controller = controller
        self._clock = clock
        self._decides = decides
        self._endpoints: list[tuple[Endpoint, EndpointSpec]] = []
        self._pools: dict[str, _Pool] = {}
        self._pool_of: dict[str, _Pool] = {}  # by endpoint
        self._heard: dict[CorePool, tuple[int, int, int]] = {}  # what each pool of the core was asked for

    # ---- time

    def sample(self, now: float) -> None:
        """Look how full each pool is now."""
        for _ in self.samples(now):
            pass

    def samples(self, now: float) -> Iterator[None]:
        """Do so some endpoints at a time, in turns of the loop."""
        endpoints = [(one, one.spec) for one in self._controller.endpoints.values() if not one.removed]
        if endpoints != self._endpoints:
            self._endpoints = endpoints
            self._regroup(now)
        self._hear()
        decides = self._decides()
        for pool in list(self._pools.values()):
            yield from self._look(pool, now) if decides else pool.hear_nothing(now)

    def _hear(self) -> None:
        """Add what came since the last look. What comes while nobody serves it is no engine's of these."""
        before, self._heard = self._heard, {}
        for lines in self._controller.pools():
            heard = self._heard[lines] = (lines.asked, lines.asked_prompts, lines.asked_outputs)
            pool = self._pool_of.get(lines.members[0].name) if lines.members else None
            if pool is not None:
                last = before.get(lines, (0, 0, 0))
                pool.asked = [sum_ + now - then for sum_, now, then in zip(pool.asked, heard, last, strict=True)]

    def _regroup(self, now: float) -> None:
        groups = _groups(one for one, _ in self._endpoints)
        before = self._continued(groups)
        self._pools, self._pool_of = {}, {}
        for index, (models, members) in enumerate(groups):
            pool = before.get(index) or _Pool(now)
            pool.serve(models, members)
            self._pools[pool.name] = pool
            self._pool_of.update((member.name, pool) for member in members)

    def _continued(self, groups: list[_Group]) -> dict[int, _Pool]:
        """Return which pool each of `groups` goes on, by its index: the one with most members and models in common."""
        serving = {model: pool for pool in self._pools.values() for model in pool.models}
        shared = Counter[tuple[int, _Pool]]()
        for index, (models, members) in enumerate(groups):
            known = [*(self._pool_of.get(one.name) for one in members), *(serving.get(model) for model in models)]
            shared.update((index, pool) for pool in known if pool is not None)
        found: dict[int, _Pool] = {}
        taken: set[_Pool] = set()
        for (index, pool), _ in sorted(shared.items(), key=lambda one: (-one[1], one[0][1].name, one[0][0])):
            if index not in found and pool not in taken:
                found[index] = pool
                taken.add(pool)
        return found

    def _look(self, pool: _Pool, now: float) -> Iterator[None]:
        members, samples, after = pool.members, pool.samples, (yield from pool.look(now))
        while len(samples) > 1 and samples[1].at <= now - WINDOW_S:
            samples.popleft()
        before, last = samples[0], samples[-1].at
        samples.append(after)
        pool.up = sum(map(serves, members))
        elapsed_s = now - before.at
        if elapsed_s <= 0.0:
            return
        requests, prompts = after.requests - before.requests, after.prompts - before.prompts
        outputs = _longer(before, after) * (after.outputs - before.outputs)
        known = []
        for number, one in enumerate(members if requests else ()):
            if number % LOOKED_AT == 0:
                yield
            rate = _stable_rate(one, requests, prompts, outputs, pool.most[one], pool.fillings[one])
            if rate is not None:
                known.append(rate)
        if known:
            engine = sum(known) / len(known)
            pool.engines = requests / elapsed_s / engine
            pool.load = pool.engines / pool.up if pool.up else None
        elif not requests:
            pool.engines, pool.load = 0.0, 0.0
        else:
            if now - pool.known_at > GRACE_S:
                pool.engines = pool.load = None
            return
        pool.known_at = now
        self._remember(pool, pool.engines, now, now - last)

    @staticmethod
    def _remember(pool: _Pool, engines: float, now: float, span_s: float) -> None:
        begin, area, spanned_s = pool.window
        pool.window = begin, area + engines * span_s, spanned_s + span_s
        if now - begin >= WINDOW_S:
            pool.windows.append(pool.window[1] / max(pool.window[2], 1e-9))
            pool.window = now, 0.0, 0.0
            if len(pool.windows) == PEAK_WINDOWS:
                mean = sum(pool.windows) / PEAK_WINDOWS
                while pool.peaks and pool.peaks[-1][1] <= mean:
                    pool.peaks.pop()
                pool.peaks.append((now, mean))
        while pool.peaks and pool.peaks[0][0] < now - DAY_S:
            pool.peaks.popleft()

    # ---- what it found

    def answers(self) -> dict[str, Answer]:
        """Return how full each pool is whose engines tell what they can do, by its name."""
        now, found = self._clock(), {}
        for name, pool in self._pools.items() if self._decides() else ():
            end, peak = pool.peaks[0] if pool.peaks else (now, None)
            if pool.engines is None or not (pool.engines or peak):
                continue
            ago_s = max(now - end, 0.0)
            found[name] = Answer(pool.load, pool.engines, peak, ago_s, pool.up, len(pool.members))
        return found

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families: prometheus_client asks."""
        load = GaugeMetricFamily(
            "extproc_capacity_load_ratio",
            "What clients asked for in the last minute, what waits and was refused too, over what the endpoints that "
            "are up can do without falling behind; above 1 no order helps. Absent while no engine's counters tell.",
            labels=["pool"],
        )
        engines = GaugeMetricFamily(
            "extproc_engines_needed",
            "How many such engines the demand would fill: of the last minute (now), and of the fullest five minutes "
            "of the last day (peak; absent in the first five). Bursts need more.",
            labels=["pool", "when"],
        )
        for name, answer in self.answers().items():
            if answer.load is not None:
                load.add_metric([name], answer.load)
            engines.add_metric([name, "now"], answer.engines)
            if answer.peak is not None:
                engines.add_metric([name, "peak"], answer.peak)
        yield from (load, engines)


def _longer(before: Asked, after: Asked) -> float:
    """Return how many times as long as estimated the answers between the two were."""
    requests, outputs = after.requests - before.requests, after.outputs - before.outputs
    if not requests or not outputs:
        return 1.0
    belief = BELIEF_ANSWERS * outputs / requests
    expected = max(after.expected - before.expected, 0.0) + belief
    written = after.written - before.written + belief
    return min(max(written / expected, 1.0 / MOST_SHORTER), MOST_LONGER)


def _stable_rate(
    endpoint: Endpoint, requests: int, prompts: int, outputs: float, ran: float, filling: Filling
) -> float | None:
    """Return how many requests of this mix per second the endpoint can serve for ever; None: it does not tell.

    `ran`: sequences that it was seen to run: what queued below that had no slot too few, but a full cache.
    """
    steps, limit, kv = endpoint.steps, endpoint.limit, endpoint.kv
    if steps.readings < LEAST_READINGS or not outputs:
        return None
    with_prompts_s = steps.sequence_s + steps.prompt_s * endpoint.prefill.fresh * prompts / outputs
    with_prompts_s = max(with_prompts_s, LEAST_SEQUENCE_S)
    most = float(CEILING)
    if isinstance(limit, AdaptiveLimit):
        most = min(most, max((limit.target_s - steps.base_s) / with_prompts_s, limit.law.floor))
        if limit.batch is not None:
            most = min(most, max(limit.batch, ran))
    else:
        most = min(most, limit.value)
    if kv.capacity is not None:
        once, each = filling.line(kv.capacity)
        fit = (kv.law.share * kv.capacity - once) * requests / max(prompts * each + outputs, 1)
        most = min(most, fit - 0.5)  # of the next one, which does not fit, half would
    most = max(most, 1.0)
    return most / (steps.base_s + most * with_prompts_s) * requests / outputs


def _groups(endpoints: Iterable[Endpoint]) -> list[_Group]:
    """Return `endpoints` together where they serve a model in common."""
    serving: dict[str, _Group] = {}
    for endpoint in endpoints:
        models = endpoint.spec.models or ("*",)
        joined = {id(group): group for model in models if (group := serving.get(model)) is not None}
        largest = max(joined.values(), key=lambda group: len(group.models), default=_Group(set(), []))
        largest.members.append(endpoint)
        for group in (_Group(set(models), []), *joined.values()):
            if group is not largest:
                largest.members.extend(group.members)
                for model in group.models - largest.models:
                    serving[model] = largest
                largest.models.update(group.models)
    return list({id(group): group for group in serving.values()}.values())
