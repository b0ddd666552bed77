"""Estimates of the tokens a request will need, from its headers and from what engines counted for earlier ones.

Prompts: a size in bytes says little by itself. Prose, code, other languages, base64 of an image have each their own
tokens per byte; bodies of about one size mostly are of one kind. So for each model, kind of body and power of two of
the announced size, the scale from announced to real tokens is learned from the engines' counters.

Answers: their mean length by model and class. Counters tell the mean of all; how long an answer was being written, at
the pace of its engine, tells one from another.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from extproc.admission.laws import LAWS
from extproc.admission.transitions import DONE, LEASED, WAITING
from extproc.admission.values import UNSIZED, Answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.laws import TokenLaw
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Request

MOST_PROMPT: Final = 262_144
MOST_OUTPUT: Final = 32_768
"""What a page says of one prompt or answer above this is not believed."""
MOST_CONTEXT: Final = 131_072
"""Tokens that a model takes where nobody says: a size is a claim, and books no more than could be true."""
LEAST_SCALE: Final = 1 / 1024
MOST_SCALE: Final = 8.0
LEAST_CORRECTION: Final = 1 / MOST_SCALE
LEAST_LASTED_S: Final = 1e-3
MOST_PACE: Final = 1000.0
"""Answers are taken to last so long in the mean at the least; tokens per second of one sequence: no median over engines
is more."""
SCALES = 4096
"""Scales remembered, and means of answers; what was learned from longest ago is forgotten first."""
TRIES = 3
"""Of a size that no engine has counted: where clients leave, or engines fail, one more may tell."""


class _Scale:
    __slots__ = ("value", "variance")

    def __init__(self, variance: float) -> None:
        self.value = 1.0
        self.variance = variance


class _Mean:
    """A mean of the last values, and how many there were."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.count = 0.0
        self.value = 0.0

    def add(self, value: float, memory: float) -> None:
        """Follow a value; about the last `memory` of them count."""
        if self.count != memory:  # as it soon is: what every answer does
            grown = self.count + 1.0
            self.count = grown if grown < memory else memory
        self.value += (value - self.value) / self.count


class Learnt(NamedTuple):
    """One thing that was learned, for the core of another sidecar: what of (model, kind or class, bits of the size)."""

    what: str
    model: str | None
    kind: str
    bits: int
    value: float
    weight: float


MOST_LEARNT: Final = 500
"""Scales, and means of answers, that another core is told: those that were learned from last."""

SizeClass = tuple[str | None, str, int]
"""A model, a kind of body, and the bits of the announced size."""


class TokenEstimate:
    """What requests of each kind really need.

    Attributes:
        law: the constants.
    """

    __slots__ = (
        "_all",
        "_answers",
        "_correction",
        "_durations",
        "_mean",
        "_pace",
        "_scales",
        "_tries",
        "_trying",
        "law",
    )

    def __init__(self, law: TokenLaw = LAWS.tokens) -> None:
        """Start at the law's guess, and believe what requests announce."""
        self.law = law
        self._scales: OrderedDict[SizeClass, _Scale] = OrderedDict()
        self._tries: OrderedDict[SizeClass, int] = OrderedDict()  # left, of sizes that nobody has counted
        self._trying: Ticket | None = None  # the last try, unless it was counted
        self._mean = law.answer  # of all answers, by the counters
        self._all = _Mean()  # of all answers, as `tokens_of` sees them
        self._correction = 1.0  # by how much counters and that view differ
        self._answers: dict[tuple[str | None, str], _Mean] = {}  # asked for each request: a plain one is quicker
        self._durations = _Mean()
        self._pace = law.first_pace  # the median of what engines showed

    def estimate(self, ticket: Ticket, longest: int | None, members: Sequence[Endpoint] = ()) -> None:
        """Fill in the ticket's token estimates. `longest`: what the model takes; nobody needs more.

        `members`: where it may be tried what a prompt of its size has, if that is in doubt.
        """
        request, answer = ticket.request, self._mean
        own = self._answers.get((request.model, ticket.request_class.name))
        if own is not None:
            answer += own.count / (own.count + self.law.own) * (own.value * self._correction - answer)
        output, ceiling = int(answer), request.max_output_tokens
        if ceiling is not None and ceiling < output:
            output = ceiling
        most = longest or MOST_CONTEXT
        ticket.output_tokens = output = (output if output < most else most) * ticket.sequences
        prompt = self._scaled(ticket) if self._scales else request.prompt_tokens
        if prompt > most:
            prompt = most
        if self._tries and prompt > self.law.untried and self._begin_try(ticket, members):
            prompt = int(self.law.untried)
        ticket.prompt_tokens = ticket.work_tokens = prompt
        ticket.kv_tokens = prompt + output

    def prompt_of(self, ticket: Ticket, longest: int | None) -> int:
        """Return how many tokens its prompt has by what is known now."""
        prompt, most = self._scaled(ticket), longest or MOST_CONTEXT
        return prompt if prompt < most else most

    def _scaled(self, ticket: Ticket) -> int:
        prompt = ticket.request.prompt_tokens
        scale = self._scales.get(_size_class(ticket)) if prompt else None
        return prompt if scale is None else int(prompt * scale.value)

    def doubt(self, ticket: Ticket) -> None:
        """Note that the guess of its prompt had `ticket` refused. If no engine has counted any such, one is tried.

        Else a guess that makes prompts too big for what is free would keep for ever from being seen how wrong it is.
        """
        key = _size_class(ticket)
        if ticket.prompt_tokens > self.law.untried and key not in self._scales and key not in self._tries:
            self._tries[key] = TRIES
            if len(self._tries) > SCALES:
                self._tries.popitem(last=False)

    def _begin_try(self, ticket: Ticket, members: Sequence[Endpoint]) -> bool:
        """Have `ticket` show what prompts of its size really have, if nobody does; tell whether it will: one at a time.

        Only where every engine counts prompts: elsewhere nothing would tell, and a cache be overfilled for nothing.
        """
        last = self._trying
        if last is not None:
            if last.state is WAITING or last.state is LEASED:
                return False
            self._trying, key = None, _size_class(last)
            if last.state is DONE and key in self._tries:  # one that was served whole would have been counted
                self._tries[key] = 0 if last.answer is Answer.OK else max(self._tries[key] - 1, 0)
        key = _size_class(ticket)
        if not self._tries.get(key):
            return False
        if not members or not all(endpoint.counts_prompts for endpoint in members if endpoint.available):
            del self._tries[key]  # until another is refused: nobody looks at all members for each request
            return False
        self._trying = ticket
        return True

    def _end_tries(self, key: SizeClass) -> None:
        """Note that prompts of this size are known. Who still waits to try it need not."""
        self._tries.pop(key, None)
        ticket = self._trying
        if ticket is not None and ticket.state is WAITING and _size_class(ticket) == key:
            self._trying = None
            ticket.book(self.prompt_of(ticket, None if ticket.pool is None else ticket.pool.longest))
            ticket.work_tokens = ticket.prompt_tokens

    def learn_prompts(self, tokens: int, tickets: Sequence[Ticket]) -> None:
        """Follow what an engine counted for the prompts of `tickets`: `tokens` together.

        A Kalman filter for each scale, with what they have to share: the largest and the least known pay the most.
        """
        announced: dict[SizeClass, int] = {}
        for ticket in tickets:
            if ticket.request.prompt_tokens:
                key = _size_class(ticket)
                announced[key] = announced.get(key, 0) + ticket.request.prompt_tokens
        scales = {key: self._scale(key) for key in announced}
        if self._trying is not None and self._trying in tickets:
            self._trying = None
        expected = sum(scales[key].value * size for key, size in announced.items())
        if expected <= 0.0:
            return
        counted = min(tokens, expected * self.law.most_step, MOST_PROMPT * len(tickets))
        spread = sum(scales[key].variance * size * size for key, size in announced.items())
        spread += (self.law.noise * min(expected, counted)) ** 2
        for key, size in announced.items():
            scale = scales[key]
            gain = scale.variance * size / spread
            scale.value = min(max(scale.value + gain * (counted - expected), LEAST_SCALE), MOST_SCALE)
            scale.variance = max(scale.variance * (1.0 - gain * size), self.law.sure * scale.value**2)
            self._end_tries(key)

    def tokens_of(self, ticket: Ticket, writing_s: float, pace: float | None, *, learn: bool) -> float:
        """Return about how many tokens an answer had that was written for `writing_s`; `learn` from a whole one.

        `pace`: tokens per second of one sequence at its engine; None: not known, their times alone tell answers apart.
        """
        law = self.law
        self._durations.add(writing_s, law.memory)
        if pace is None:
            lasted_s = self._durations.value
            pace = self._mean / (lasted_s if lasted_s > LEAST_LASTED_S else LEAST_LASTED_S)
        else:
            median = self._pace * (law.nudge if pace > self._pace else 1.0 / law.nudge)
            self._pace = median = median if median < MOST_PACE else MOST_PACE
            if pace > median * law.most_faster:
                pace = median * law.most_faster
        seen = writing_s * pace * ticket.sequences
        if seen > MOST_OUTPUT:
            seen = float(MOST_OUTPUT)
        if not learn:
            return seen * self._correction
        self._all.add(seen, law.memory)
        self._compare()
        key = (ticket.request.model, ticket.request_class.name)
        mean = self._answers.get(key)
        if mean is None or len(self._answers) > MOST_LEARNT:
            mean = self._mean_of(key)
        mean.add(seen / ticket.sequences, law.memory)
        return seen * self._correction

    def learn(self, output_tokens: int, answers: int) -> None:
        """Follow `answers` finished answers that had `output_tokens` together, by an engine's counter.

        One engine's page must not spoil the estimate for all: what it says of an answer is bounded, and one reading
        at most doubles the mean.
        """
        if answers > 0:
            share = min(answers / self.law.memory, 0.5)
            seen = min(output_tokens / answers, MOST_OUTPUT)
            self._mean = min(self._mean + share * (seen - self._mean), 2.0 * self._mean + 1.0)
            self._compare()

    def learnt(self) -> list[Learnt]:
        """Return what is known by now, as far as it is worth telling."""
        told = [
            Learnt("mean", None, "", 0, self._mean, 0.0),
            Learnt("all", None, "", 0, self._all.value, self._all.count),
        ]
        for (model, klass), mean in islice(reversed(self._answers.items()), MOST_LEARNT):
            told.append(Learnt("answers", model, klass, 0, mean.value, mean.count))
        for (model, kind, bits), scale in islice(reversed(self._scales.items()), MOST_LEARNT):
            told.append(Learnt("scale", model, kind, bits, scale.value, scale.variance))
        return told

    def believe(self, learnt: Learnt) -> None:
        """Take over one thing that another core learned, as far as it can be true."""
        what, model, kind, bits, value, weight = learnt
        tokens = min(max(value, 0.0), float(MOST_OUTPUT))
        match what:
            case "mean":
                self._mean = tokens
            case "all":
                self._all.value, self._all.count = tokens, min(max(weight, 0.0), self.law.memory)
            case "answers":
                mean = self._mean_of((model, kind))
                mean.value, mean.count = tokens, min(max(weight, 1.0), self.law.memory)
            case "scale":
                scale = self._scale((model, kind, bits))
                scale.value = min(max(value, LEAST_SCALE), MOST_SCALE)
                scale.variance = min(max(weight, self.law.sure * scale.value**2), self.law.unsure)
                self._end_tries((model, kind, bits))
            case _:
                pass  # a newer version knows more
        self._compare()

    def _compare(self) -> None:
        """Follow a change of what counters say of all answers, or of our own view."""
        seen = self._all.value
        correction = self._mean / seen if seen > 0.0 else 1.0
        if correction > MOST_SCALE:
            correction = MOST_SCALE
        elif correction < LEAST_CORRECTION:
            correction = LEAST_CORRECTION
        self._correction = correction

    def _mean_of(self, key: tuple[str | None, str]) -> _Mean:
        mean = self._answers.get(key)
        if mean is None:
            mean = self._answers[key] = _Mean()
            if len(self._answers) > SCALES:
                del self._answers[next(iter(self._answers))]
        elif len(self._answers) > MOST_LEARNT:  # of fewer all are told, and none is forgotten
            self._answers[key] = self._answers.pop(key)
        return mean

    def _scale(self, key: SizeClass) -> _Scale:
        scale = self._scales.get(key)
        if scale is None:
            scale = self._scales[key] = _Scale(self.law.unsure)
            if len(self._scales) > SCALES:
                self._scales.popitem(last=False)
        else:
            self._scales.move_to_end(key)
        return scale


def _size_class(ticket: Ticket) -> SizeClass:
    request: Request = ticket.request
    if request.kind == UNSIZED:  # its class says more than the size that it was given
        return (request.model, f"{UNSIZED} {ticket.request_class.name}", 0)
    return (request.model, request.kind, request.prompt_tokens.bit_length())
