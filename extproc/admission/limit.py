"""How many requests an endpoint may hold: a fixed number, or one that follows what the engine shows.

An adaptive limit is a guess, and evidence overrules it, within seconds:

* The engine queues (`waiting` stays above 0 while it runs no more than before): the limit is what it runs. That is
  remembered as its batch size, and tried anew after a while. An engine that says its batch size is believed at once.
* Answers are slower than wanted: fewer. By Little's law time per output token = running requests / token rate, so the
  limit goes to where the wanted time is met, but never below what the engine could do at best (`steps.py`): an engine
  whose steps are slow is no reason for a low limit.
* Neither, while requests wait for this limit: more. It starts low and doubles, as a connection's window does. A queue
  inside is no reason against it below the batch size: it is of others, who send past this one.
* An engine that says nothing of its tokens is judged by how long answers take (`slowdown.py`).

A latency-gradient limiter does not work in front of continuous batching, where the wanted slow-down by batching looks
like queueing (docs/adr/0003).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from extproc.admission.laws import LAWS
from extproc.admission.slowdown import Slowdown

if TYPE_CHECKING:
    from extproc.admission.laws import AnswerLaw
    from extproc.admission.load import Load
    from extproc.admission.steps import StepCost

CEILING = 512
"""The most requests that any adaptive limit allows at one endpoint."""


@dataclass(frozen=True, slots=True)
class LimitLaw:
    """The constants of the adaptive limit.

    Attributes:
        start: the first limit.
        floor: the least, unless the engine itself runs fewer.
        tpot_s: wanted time per output token.
        best_factor: on an engine whose best step is slow: so many times that step is wanted instead, if that is more.
        objective_s: what users want per output token, if they say: it wins over both, as far as steps allow.
        aimed: share of an objective that is aimed at: answers vary.
        attainable: an objective below so many best steps can't be met, and aiming at it would only cost throughput.
        shrink, grow, leap: the most that a second changes the limit by; it leaps while answers are much faster than
            wanted.
        kv_brake: a fuller KV cache shrinks the limit, unless KV tokens are counted in the books.
        queued: an engine queues when it has more than this share of what it runs waiting.
        queued_readings: so many readings in a row make its batch size.
        probe_s: how long a batch size is believed before one more request is tried; each time it is found again it
            doubles, up to probe_most_s.
        silent_readings: readings in a row without a word of tokens; one more makes a limit blind.
    """

    start: int = 16
    floor: int = 4
    tpot_s: float = 0.080
    best_factor: float = 1.75
    objective_s: float | None = None
    aimed: float = 0.8
    attainable: float = 1.1
    shrink: float = 0.85
    grow: float = 1.1
    leap: float = 2.0
    kv_brake: float = 0.92
    queued: float = 0.1
    queued_readings: int = 3
    probe_s: float = 30.0
    probe_most_s: float = 480.0
    silent_readings: int = 5

    def target_s(self, base_s: float) -> float:
        """Return the time per output token to keep on an engine whose steps take `base_s` at the least."""
        if self.objective_s is not None:
            return max(self.aimed * self.objective_s, self.attainable * base_s)
        return max(self.tpot_s, self.best_factor * base_s)


DEFAULT_LAW = LimitLaw()

LONGEST_S = 2.0
"""One reading after a long silence changes the limit no more than one after this."""


class FixedLimit:
    """A limit that a person chose."""

    __slots__ = ("blind", "is_batch", "own", "value", "why")

    def __init__(self, value: int) -> None:
        """Hold at most `value` requests; at least 1."""
        self.value = self.own = value
        self.why = "fixed"
        self.blind = False  # nor is it moved by answers
        self.is_batch = False

    def start_at(self, value: int) -> None:
        """Stay at what was chosen."""

    def defer(self, count: int, *, anew: bool = False) -> None:
        """Stay at what was chosen."""

    def forget_batch(self) -> None:
        """Stay at what was chosen."""

    def observe(
        self, load: Load, costs: StepCost, *, wanted: bool, in_flight: int, elapsed_s: float, knows_kv: bool
    ) -> None:
        """Ignore telemetry."""

    def learn(self, took_s: float, beside: float, *, wanted: bool) -> None:
        """Ignore answers."""

    def forget(self) -> None:
        """Forget nothing."""


class AdaptiveLimit:
    """A limit that follows the engine.

    Attributes:
        law: its constants.
        value: the limit: `own`, and whom the engine defers.
        own: how many may be in the batch.
        batch: the most sequences that the engine runs at once, said or found; None: not known.
        blind: whether the engine says nothing of its tokens; then our own books make the limit.
        slowdown: what these say.
        why: what set the limit last, in a word for people: start, batch, speed, kv, growth, answers.
        target_s: the wanted time per output token.
    """

    __slots__ = (
        "_deferred",
        "_exact",
        "_found_for_s",
        "_peak",
        "_probe_s",
        "_queued",
        "_silent",
        "_tried",
        "batch",
        "blind",
        "law",
        "own",
        "slowdown",
        "target_s",
        "value",
        "why",
    )

    def __init__(self, law: LimitLaw = DEFAULT_LAW, answers: AnswerLaw = LAWS.answers) -> None:
        """Start at the law's `start`: low, for a few seconds in which it doubles. `answers`: what their times say."""
        self.law = law
        self._exact = float(self.law.start)
        self._queued = 0  # readings in a row with a queue inside the engine
        self._silent = 0  # readings in a row that said nothing of tokens
        self._peak = 0.0  # the most it ran in these
        self._found_for_s = 0.0  # how long `batch` is believed already
        self._probe_s = self.law.probe_s
        self._deferred = 0
        self._tried: int | None = None  # the batch size that is being tried anew
        self.target_s = self.law.tpot_s
        self.batch: int | None = None
        self.blind = True
        self.slowdown = Slowdown(answers)
        self.value = self.own = self.law.start
        self.why = "start"

    def start_at(self, value: int) -> None:
        """Go on from where another sidecar's limit was."""
        self._set(float(value))

    def defer(self, count: int, *, anew: bool = False) -> None:
        """Allow `count` requests more: the engine makes so many wait for something else than its batch.

        `anew`: that is known from now on. Until then such a queue was taken for one for the batch.
        """
        self._deferred = count
        if anew:
            self.forget_batch()
        self._set(self._exact)

    def forget_batch(self) -> None:
        """Find the batch size anew: what was taken for it is something else."""
        self.batch, self._tried, self._queued = None, None, 0

    def observe(
        self, load: Load, costs: StepCost, *, wanted: bool, in_flight: int, elapsed_s: float, knows_kv: bool
    ) -> None:
        """Follow one fresh `load`, `elapsed_s` after the one before.

        `costs`: what the engine's steps cost; its best step bounds what can be wanted of it.
        `wanted`: requests wait and this limit is what holds them back. `in_flight`: what the limit allowed lately.
        `knows_kv`: KV tokens are in the books; then a full cache is their affair, and no reason for fewer requests.
        """
        law = self.law
        self.target_s = law.target_s(costs.base_s if costs.readings else 0.0)
        self._silent = self._silent + 1 if load.tokens_per_s is None else 0
        self.blind = self._silent > law.silent_readings or (self.blind and self._silent > 0)
        queues = self._find_batch(load, wanted=wanted, elapsed_s=elapsed_s)
        elapsed_s = min(elapsed_s, LONGEST_S)
        slow, target_s, kv, exact = costs.tpot_s, self.target_s, load.kv_usage, self._exact
        if not knows_kv and (load.preemptions or (kv is not None and kv > law.kv_brake)):
            exact *= 0.9**elapsed_s
            self.why = "kv"
        elif costs.worked and slow is not None and slow > target_s:
            # What is in flight made it slow, not the limit: while that runs out, the limit stays at what is right.
            exact = min(exact, max(exact * law.shrink**elapsed_s, in_flight * target_s / slow))
            self.why = "speed"
        elif wanted and not (queues and self._may_be_ours(load)) and not self.blind and slow is not None:
            room = target_s / slow
            growth = min(law.leap, room) if room > 1.6 else min(law.grow, room)
            exact *= growth**elapsed_s
            self.why = "growth"
        self._set(exact)

    def learn(self, took_s: float, beside: float, *, wanted: bool) -> None:
        """Follow an answer that took `took_s`, with `beside` requests at the endpoint in the mean.

        A blind limit moves with the answers, by one for each: up while requests wait for it, to what they say is right.
        """
        if self.blind:
            self.slowdown.learn(took_s, beside)
            most = self.slowdown.most
            if self._exact > most:
                self._exact, self.why = max(self._exact - 1.0, most), "answers"
            elif wanted and not self._queued and self._tried is None:
                self._exact, self.why = min(self._exact + 1.0, most), "answers"
            self._set(self._exact)

    def forget(self) -> None:
        """Note that telemetry has become stale: what it taught stays, as long as answers don't say otherwise."""
        self.blind = True
        self._queued = 0

    @property
    def is_batch(self) -> bool:
        """Whether it is the engine's batch size, or a little more that is tried: others' sequences are in it, too."""
        return self.own == self.batch or self._tried is not None

    def _set(self, exact: float) -> None:
        self._exact = exact = min(max(exact, self.law.floor), CEILING)
        self.own = int(exact)
        if self.batch is not None and self.batch <= self.own:
            self._exact, self.own, self.why = float(self.batch), self.batch, "batch"
        self.value = min(self.own + self._deferred, CEILING)

    def _may_be_ours(self, load: Load) -> bool:
        """Tell whether what waits inside may be there for this limit: not, if its batch is full with fewer of ours."""
        return self._exact >= min(self.batch or 0.0, load.running or 0.0)

    def _find_batch(self, load: Load, *, wanted: bool, elapsed_s: float) -> bool:
        """Learn the engine's batch size from what waits inside it; tell whether growing is out of place."""
        running, waiting = load.running, load.waiting
        if load.max_running is not None and load.max_running >= (running or 0):
            self.batch, self._tried = max(load.max_running, 1), None
            return bool(waiting)
        if running is None or waiting is None:
            return False
        self._doubt_batch(running, elapsed_s if wanted else 0.0)
        queues = running > 0 and waiting > self.law.queued * running
        if not queues:
            self._queued = 0
        elif self._queued and 0.9 * self._peak <= running <= 1.05 * self._peak:
            self._queued += 1
            self._peak = max(self._peak, running)
            if self._queued >= self.law.queued_readings:
                if self._tried is not None:
                    self._probe_s = min(2 * self._probe_s, self.law.probe_most_s)
                self.batch, self._tried, self._found_for_s = max(int(self._peak), 1), None, 0.0
        else:
            self._queued, self._peak = 1, running
        return queues or self._tried is not None

    def _doubt_batch(self, running: float, wanted_s: float) -> None:
        """Try a little more than the batch size found, after a while in which more was wanted; drop a wrong one."""
        if self.batch is not None:
            self._found_for_s += wanted_s
            if running > self.batch or self._found_for_s >= self._probe_s:
                self._tried, self.batch, self._queued = self.batch, None, 0
        if self._tried is not None:
            if running > self._tried:
                self._tried, self._probe_s = None, self.law.probe_s
            else:
                self._exact = self._tried + max(1.0, self._tried / 8)


Limit = FixedLimit | AdaptiveLimit
