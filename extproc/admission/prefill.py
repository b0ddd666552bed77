"""Which prompts an engine has not computed yet: what bounds the time to the first token behind continuous batching.

The first token of an answer says so exactly, where something sees it. Otherwise it is predicted: prompts are computed
one after the other, in chunks that share their steps with the running sequences, at the costs that the engine's
counters show (`steps.py`); and a prompt that comes in the middle of a step waits for the end of that. The engine's own
count of first tokens corrects the prediction at every reading.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from extproc.admission.laws import LAWS
from extproc.admission.ticket import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from extproc.admission.laws import PromptLaw
    from extproc.admission.steps import StepCost
    from extproc.admission.ticket import Ticket

FRESH_AT_FIRST, LEAST_FRESH = 20_000.0, 0.02
"""The prompt tokens that make up the first belief in no hits; and no fewer than so many are taken to be fresh."""
BURST_S, LEAST_WORK = 0.005, 256
"""First bytes so close together come from one step of the engine; less work than this says nothing of the pace."""
LEAST_TOKEN_S, MOST_TOKEN_S = 1e-6, 0.1
"""No engine is faster, or slower: whatever is seen, the limit stays a number of tokens and a prediction a time."""


class Burst:
    """First bytes that came together: the engine computed their prompts side by side, so that one time is for all.

    Attributes:
        begun_at: when it began with them.
        seen_at: when the last of them came.
        work_tokens: of all their prompts.
        told: it has taught the pace.
    """

    __slots__ = ("begun_at", "seen_at", "told", "work_tokens")

    def __init__(self, begun_at: float, seen_at: float) -> None:
        """Start with none."""
        self.begun_at, self.seen_at = begun_at, seen_at
        self.work_tokens = 0
        self.told = False


class Prefill:
    """The prompts of one endpoint's leases that the engine has not computed, oldest first.

    Attributes:
        law: the constants.
        tokens: estimated tokens that have to be computed, of all but those held back.
        prompts, outputs: what all these requests have booked for their whole prompts and answers.
        probed: something sees first bytes as they come. An answer that does not stream has its first byte at its end,
            so here too a prompt counts as computed after a while.
        fresh: share of the prompts' tokens that is not found in the prefix cache.
        limit: how many tokens may be under way at once.
    """

    __slots__ = (
        "_asked",
        "_burst",
        "_computed",
        "_computed_at",
        "_counts",
        "_held_back",
        "_mean",
        "_part",
        "_pending",
        "_seen",
        "_seen_at",
        "_slack",
        "_step_s",
        "_token_s",
        "_uncounted",
        "fresh",
        "law",
        "limit",
        "outputs",
        "probed",
        "prompts",
        "tokens",
    )

    def __init__(self, law: PromptLaw = LAWS.prompts) -> None:
        """Start idle."""
        self.law = law
        self.tokens = self.prompts = self.outputs = 0
        self.probed = False
        self.limit = law.chunks * law.chunk
        self._pending: dict[Ticket, None] = {}
        self._held_back: dict[Ticket, None] = {}  # pending too, but the engine won't begin with them soon
        self._counts = False  # the engine does
        self._uncounted: deque[Ticket] = deque()  # sent, and not yet in the engine's counter
        self._part = 0.0  # of a first token: the count is a share where others use the engine too
        self._slack = law.caution
        self.fresh = 1.0
        self._asked = self._computed = FRESH_AT_FIRST
        self._seen = 0.0
        self._mean = 0.0  # of the last prompts' tokens
        self._computed_at = 0.0  # when the last of them will be computed
        self._token_s = law.first_token_s
        self._burst: Burst | None = None  # the last one
        self._seen_at = 0.0  # when the last burst of enough work before it was seen
        self._step_s = 0.0  # of a step without prompts

    def obey(self, law: PromptLaw) -> None:
        """Go by other constants from now on."""
        if law != self.law:
            self.law = law
            self._set_limit()

    def work_of(self, ticket: Ticket) -> int:
        """Return how many tokens of its prompt the engine will probably have to compute."""
        fresh = int(self.fresh * ticket.prompt_tokens)
        return fresh if fresh < ticket.work_tokens else ticket.work_tokens

    def found(self, cached_tokens: int, prompt_tokens: int) -> None:
        """Follow how many tokens of `prompt_tokens` the engine found in its prefix cache."""
        kept = self.law.hits
        self._computed = kept * self._computed + max(prompt_tokens - cached_tokens, 0)
        self._asked = kept * self._asked + prompt_tokens
        self.fresh = min(max(self._computed / self._asked, LEAST_FRESH), 1.0)

    def add(self, ticket: Ticket, now: float, *, held_back: bool = False) -> None:
        """Note a prompt that was sent. `held_back`: the engine won't begin with it soon."""
        ticket.prompt_pending = True
        ticket.work_tokens = self.work_of(ticket)
        if self._seen != self.law.lengths:
            self._seen = min(self._seen + 1.0, self.law.lengths)
        self._mean += (ticket.work_tokens - self._mean) / self._seen
        self.prompts += ticket.prompt_tokens
        self.outputs += ticket.output_tokens
        if held_back:
            self._held_back[ticket] = None
            ticket.computed_at = now
            return
        self._pending[ticket] = None
        self.tokens += ticket.work_tokens
        if self._counts:
            self._uncounted.append(ticket)
        if self._counts or self.probed:
            self._predict(ticket, now)

    def computed(self, ticket: Ticket, now: float) -> None:
        """Note that the first token of `ticket` was seen. Repeated: no-op.

        Those sent long before it are computed too: the answers that don't stream among them have no first byte that
        would tell. Of those sent shortly before it tells nothing: not all engines take prompts in the order in which
        they come, and a short one may overtake.
        """
        if ticket in self._held_back:
            self._begin([ticket])
        elif ticket.burst is None and not self._counts:
            self._note_first_byte(ticket, now)  # a late one too: else nothing tells of a prediction that is too short
        if not ticket.prompt_pending:
            return
        ticket.computed_at = now
        self._drop(ticket)
        while self._pending and not self._counts:
            oldest = next(iter(self._pending))
            ahead_s = ticket.leased_at - oldest.leased_at
            if now < oldest.computed_at and ahead_s < self.law.overtaken * (oldest.computed_at - oldest.leased_at):
                return
            oldest.computed_at = now
            self._drop(oldest)

    def was_computed(self, ticket: Ticket) -> None:
        """Note that the first token of `ticket`, just added, came long ago: no count to come will tell of it.

        Held back, it did not: whoever says so goes by its age, and the engine knows.
        """
        if ticket in self._held_back:
            return
        if self._counts:
            self._uncounted.remove(ticket)
        self._drop(ticket)
        ticket.computed_at = ticket.leased_at

    def over(self, ticket: Ticket, now: float, *, served: bool) -> None:
        """Note that the request is over. Unless it was `served`, a prompt that was not computed never will be."""
        if ticket in self._held_back:
            self._begin([ticket])  # since the last page, if it was served
        if not served and ticket in self._uncounted:
            self._uncounted.remove(ticket)
        if ticket.prompt_pending:
            self._drop(ticket)
        elif ticket.burst is not None and not self._counts:
            self._learn(ticket, ticket.burst, now)

    def next_change(self) -> float | None:
        """Return when the oldest prompt will count as computed, if anything tells."""
        if not self._pending or not (self._counts or self.probed):
            return None
        return next(iter(self._pending)).computed_at

    def pass_time(self, now: float) -> bool:
        """Take the prompts as computed whose time has come; tell whether there were any."""
        changed = False
        while (due := self.next_change()) is not None and due <= now:
            self._drop(next(iter(self._pending)))
            changed = True
        return changed

    def observe(
        self, counted: float, elapsed_s: float, now: float, costs: StepCost, running: float, *, alone: bool = True
    ) -> list[Ticket]:
        """Follow the engine's count of first tokens: `counted` for our requests in the last `elapsed_s`.

        `alone`: few others use the engine. Else the count is only a share, and says nothing of how fast it is.
        Return those requests, if it counted at the reading before too.
        """
        law = self.law
        self._step_s = costs.base_s + costs.sequence_s * running
        token_s = costs.prompt_s + self._step_s / law.chunk
        done = self._count(counted)
        behind = sum(ticket.work_tokens for ticket in self._uncounted) - self.tokens
        if not alone:
            pass
        elif behind > law.tolerance * elapsed_s / token_s + min(self.tokens, law.chunk):
            self._slack = min(self._slack * law.slower, law.most_caution)
        else:
            self._slack = max(self._slack * law.calmer, law.caution)
        self._take_pace(self._slack * token_s)
        self._counts = True
        known = set(self._uncounted)
        if not self.probed:
            for ticket in [ticket for ticket in self._pending if ticket not in known]:
                self._drop(ticket)
        self._computed_at = now
        for ticket in self._pending:
            if ticket in known:  # one counted whose first byte did not come may not stream: it is never put off
                self._predict(ticket, now)
        return done

    def hold_back(self, tickets: Iterable[Ticket], now: float) -> None:
        """Note that the engine won't begin with `tickets` soon, as it says now, and may begin with all others.

        Until it does their prompts are pending, but neither under way nor in its count. Then they go first: they are
        the oldest. `computed_at` is when they were held back last: one cannot have begun before. Of whose first byte
        was seen nothing is expected.
        """
        held_back = dict.fromkeys(ticket for ticket in tickets if ticket.prompt_pending or ticket.burst is None)
        begin = [ticket for ticket in self._held_back if ticket not in held_back]
        self._begin(begin)
        if self._counts or self.probed:
            for ticket in begin:
                self._predict(ticket, now)
        for ticket in held_back:
            ticket.computed_at = now
            if ticket in self._held_back:
                continue
            if ticket in self._uncounted:
                self._uncounted.remove(ticket)
            if ticket.prompt_pending:
                del self._pending[ticket]
                self.tokens -= ticket.work_tokens
            else:  # predicted, and wrongly so
                ticket.prompt_pending = True
                self.prompts += ticket.prompt_tokens
                self.outputs += ticket.output_tokens
        self._held_back = held_back

    def held_back_tokens(self) -> tuple[int, int]:
        """Return what those held back have booked for their prompts, and for their answers."""
        held_back = self._held_back
        return sum(ticket.prompt_tokens for ticket in held_back), sum(ticket.output_tokens for ticket in held_back)

    def forget(self) -> None:
        """Count no more: the counter is silent."""
        self._counts = False
        self._uncounted.clear()

    def _begin(self, tickets: Sequence[Ticket]) -> None:
        """Note that the engine no longer holds `tickets` back: it counts them before those that came later."""
        for ticket in tickets:
            del self._held_back[ticket]
            self._pending[ticket] = None
            self.tokens += ticket.work_tokens
        if self._counts:
            self._uncounted.extendleft(reversed(tickets))

    def _note_first_byte(self, ticket: Ticket, now: float) -> None:
        """Put it in the burst that it came with. One of little work, or of ends alone, is not when others began."""
        burst, begun_at = self._burst, max(ticket.leased_at, self._seen_at)
        if burst is None or now - burst.seen_at > BURST_S:
            if burst is not None and burst.work_tokens >= LEAST_WORK:
                self._seen_at = burst.seen_at
                begun_at = max(ticket.leased_at, self._seen_at)
            burst = self._burst = Burst(begun_at, now)
        burst.begun_at, burst.seen_at = min(burst.begun_at, begun_at), now
        burst.work_tokens += ticket.work_tokens
        ticket.burst = burst

    def _learn(self, ticket: Ticket, burst: Burst, now: float) -> None:
        """Follow what the burst of an answer that is over took, once; an answer that was not streamed is none of it."""
        if now - burst.seen_at <= self.law.streamed * (now - ticket.leased_at):
            burst.work_tokens -= ticket.work_tokens
        elif burst.work_tokens >= LEAST_WORK and not burst.told:
            burst.told = True
            took_s, nudge = burst.seen_at - burst.begun_at, self.law.nudge
            slower = took_s > self._token_s * burst.work_tokens
            self._take_pace(self._token_s * (nudge if slower else 1.0 / nudge))

    def _take_pace(self, token_s: float) -> None:
        self._token_s = min(max(LEAST_TOKEN_S, token_s), MOST_TOKEN_S)
        self._set_limit()

    def _set_limit(self) -> None:
        law = self.law
        self.limit = max(law.chunks * law.chunk, int(law.ahead_s / self._token_s), int(law.prompts * self._mean))

    def _predict(self, ticket: Ticket, now: float) -> None:
        law = self.law
        begins = max(now, self._computed_at)
        self._computed_at = begins + ticket.work_tokens * self._token_s
        in_progress_s = self._step_s + min(self.tokens, law.chunk) * self._token_s
        due = self._computed_at + in_progress_s / 2
        ticket.computed_at = due if self._counts else min(now + law.patience * (due - now), now + law.patience_s)

    def _count(self, counted: float) -> list[Ticket]:
        """Match the count with the prompts sent, oldest first; return those counted."""
        uncounted = self._uncounted
        self._part += counted
        done, self._part = int(self._part), self._part % 1.0
        for number, ticket in enumerate(uncounted):
            if ticket.state is State.DONE:  # an answer that is over tells of all prompts sent before it
                done = max(done, number + 1)
        return [uncounted.popleft() for _ in range(min(done, len(uncounted)))]

    def _drop(self, ticket: Ticket) -> None:
        del self._pending[ticket]
        ticket.prompt_pending = False
        self.tokens -= ticket.work_tokens
        self.prompts -= ticket.prompt_tokens
        self.outputs -= ticket.output_tokens
