"""Which prompts an engine has not computed yet: what bounds the time to the first token behind continuous batching.

The first token of an answer says so exactly, where something sees it. Otherwise it is predicted: prompts are computed
one after the other, in chunks that share their steps with the running sequences, at the costs that the engine's
counters show (`steps.py`); and a prompt that comes in the middle of a step waits for the end of that. The engine's own
count of first tokens corrects the prediction at every reading.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING

from extproc.admission.first_bytes import FirstBytes
from extproc.admission.laws import LAWS
from extproc.admission.ticket import State

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from extproc.admission.laws import PromptLaw
    from extproc.admission.steps import StepCost
    from extproc.admission.ticket import Ticket

FRESH_AT_FIRST, LEAST_FRESH = 20_000.0, 0.02
"""The prompt tokens that make up the first belief in no hits; and no fewer than so many are taken to be fresh."""
LEAST_TOKEN_S, MOST_TOKEN_S = 1e-6, 0.1
"""No engine is faster, or slower: whatever is seen, the limit stays a number of tokens and a prediction a time."""
_number = itemgetter(1)


class Prefill:
    """The prompts of one endpoint's leases that the engine has not computed, oldest first.

    Each stands in one of three places, or in none any more: held back; under way; or computed, as we think, while the
    engine's count has not told of it. Pending are those in the first two, under way has `tokens` those in the second.

    Attributes:
        law: the constants.
        tokens: estimated tokens that have to be computed, of all but those held back.
        counts: the engine tells how many prompts it computed.
        probed: something sees first bytes as they come. An answer that does not stream has its first byte at its end,
            so here too a prompt counts as computed after a while.
        fresh: share of the prompts' tokens that is not found in the prefix cache.
        limit: how many tokens may be under way at once.
    """

    __slots__ = (
        "_all_computed_at",
        "_caution",
        "_first_bytes",
        "_first_number",
        "_fresh_tokens",
        "_held_back",
        "_last_number",
        "_mean",
        "_part",
        "_prompt_tokens",
        "_step_s",
        "_token_s",
        "_uncounted",
        "_under_way",
        "_weight",
        "counts",
        "fresh",
        "law",
        "limit",
        "probed",
        "tokens",
    )

    def __init__(self, law: PromptLaw = LAWS.prompts) -> None:
        """Start idle."""
        self.law = law
        self.tokens = 0
        self.probed = False
        self.limit = law.chunks * law.chunk
        self._held_back: dict[Ticket, None] = {}  # the engine won't begin with them soon
        self._under_way: dict[Ticket, int] = {}  # with their numbers; 0: the engine's count has nothing to tell of it
        self._uncounted: dict[Ticket, int] = {}  # it has yet to tell of these, though they are pending no more
        self.counts = False
        self._last_number = 0  # of the last prompt that the count will tell of
        self._first_number = 0  # of the first one: who was held back goes before it
        self._part = 0.0  # of a first token: the count is a share where others use the engine too
        self._caution = law.caution
        self.fresh = 1.0
        self._prompt_tokens = self._fresh_tokens = FRESH_AT_FIRST  # of the last prompts
        self._mean = 0.0  # of the last prompts' tokens ...
        self._weight = 0.0  # ... and how many prompts it stands for
        self._all_computed_at = 0.0  # when the last of them will be computed
        self._token_s = law.first_token_s
        self._first_bytes = FirstBytes()
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
        self._fresh_tokens = kept * self._fresh_tokens + max(prompt_tokens - cached_tokens, 0)
        self._prompt_tokens = kept * self._prompt_tokens + prompt_tokens
        self.fresh = min(max(self._fresh_tokens / self._prompt_tokens, LEAST_FRESH), 1.0)

    def add(self, ticket: Ticket, now: float, *, held_back: bool = False) -> None:
        """Note a prompt that was sent. `held_back`: the engine won't begin with it soon."""
        ticket.prompt_pending = True
        ticket.work_tokens = self.work_of(ticket)
        if self._weight != self.law.lengths:
            weight = self._weight + 1.0
            self._weight = weight if weight < self.law.lengths else self.law.lengths
        self._mean += (ticket.work_tokens - self._mean) / self._weight
        if held_back:
            self._held_back[ticket] = None
            ticket.computed_at = now
            return
        if self.counts:
            self._last_number += 1
        self._under_way[ticket] = self._last_number if self.counts else 0
        self.tokens += ticket.work_tokens
        if self.counts or self.probed:
            self._predict(ticket, now)

    def follow(self, sent: int, tokens: int) -> None:
        """Take the mean of the last prompts to be that of all `sent` till now, which had so many `tokens`."""
        if sent:
            self._weight, self._mean = min(float(sent), self.law.lengths), tokens / sent

    def computed(self, ticket: Ticket, now: float) -> None:
        """Note that the first token of `ticket` was seen. Repeated: no-op.

        Those sent long before it are computed too: the answers that don't stream among them have no first byte that
        would tell. Of those sent shortly before it tells nothing: not all engines take prompts in the order in which
        they come, and a short one may overtake.
        """
        if ticket in self._held_back:
            self._begin([ticket])
        elif ticket.burst is None and not self.counts:
            self._first_bytes.note(ticket, now)  # a late one too: else nothing tells of a prediction that is too short
        if not ticket.prompt_pending:
            return
        ticket.computed_at = now
        self._finish(ticket)
        while self._under_way and not self.counts:
            oldest = next(iter(self._under_way))
            ahead_s = ticket.leased_at - oldest.leased_at
            if now < oldest.computed_at and ahead_s < self.law.overtaken * (oldest.computed_at - oldest.leased_at):
                return
            oldest.computed_at = now
            self._finish(oldest)

    def was_computed(self, ticket: Ticket) -> None:
        """Note that the first token of `ticket`, just added, came long ago: no count to come will tell of it.

        Held back, it did not: whoever says so goes by its age, and the engine knows.
        """
        if ticket in self._held_back:
            return
        self._finish(ticket)
        self._uncounted.pop(ticket, None)
        ticket.computed_at = ticket.leased_at

    def over(self, ticket: Ticket, now: float, *, served: bool) -> None:
        """Note that the request is over. Unless it was `served`, a prompt that was not computed never will be."""
        if ticket in self._held_back:
            self._begin([ticket])  # since the last page, if it was served
        if ticket.prompt_pending:
            self._finish(ticket)
        elif ticket.burst is not None and not self.counts:
            token_s = self._first_bytes.learn(ticket, ticket.burst, now, self._token_s, self.law)
            if token_s is not None:
                self._take_pace(token_s)
        if self.counts and not served:
            self._uncounted.pop(ticket, None)

    def next_change(self) -> float | None:
        """Return when the oldest prompt will count as computed, if anything tells."""
        if self._under_way and (self.counts or self.probed):
            return next(iter(self._under_way)).computed_at
        return None

    def pass_time(self, now: float) -> bool:
        """Take the prompts as computed whose time has come; tell whether there were any."""
        changed = False
        while (due := self.next_change()) is not None and due <= now:
            self._finish(next(iter(self._under_way)))
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
        told = [ticket for ticket, number in self._under_way.items() if not number]
        behind = _work(self._uncounted) - _work(told)
        if alone:
            is_late = behind > law.tolerance * elapsed_s / token_s + min(self.tokens, law.chunk)
            caution = self._caution * (law.slower if is_late else law.calmer)
            self._caution = min(max(caution, law.caution), law.most_caution)
        self._take_pace(self._caution * token_s)
        self.counts = True
        if not self.probed:
            for ticket in told:
                self._finish(ticket)
        self._all_computed_at = now
        for ticket, number in self._under_way.items():
            if number:  # one counted whose first byte did not come may not stream: it is never put off
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
        if self.counts or self.probed:
            for ticket in begin:
                self._predict(ticket, now)
        for ticket in held_back:
            ticket.computed_at = now
            if ticket in self._held_back:
                continue
            if ticket.prompt_pending:
                del self._under_way[ticket]
                self.tokens -= ticket.work_tokens
            else:  # predicted, and wrongly so
                self._uncounted.pop(ticket, None)
                ticket.prompt_pending = True
        self._held_back = held_back

    def held_back_tokens(self) -> tuple[int, int]:
        """Return what those held back have booked for their prompts, and for their answers."""
        return _booked(self._held_back)

    def pending_tokens(self) -> tuple[int, int]:
        """Return the same of all whose prompts are pending."""
        return _booked([*self._held_back, *self._under_way])

    def forget(self) -> None:
        """Count no more: the counter is silent."""
        self.counts = False
        self._under_way = dict.fromkeys(self._under_way, 0)
        self._uncounted.clear()

    def _begin(self, tickets: Sequence[Ticket]) -> None:
        """Note that the engine no longer holds `tickets` back: it counts them before those that came later."""
        self._first_number -= len(tickets)
        for number, ticket in enumerate(tickets, self._first_number):
            del self._held_back[ticket]
            self._under_way[ticket] = number if self.counts else 0
            self.tokens += ticket.work_tokens

    def _take_pace(self, token_s: float) -> None:
        self._token_s = min(max(LEAST_TOKEN_S, token_s), MOST_TOKEN_S)
        self._set_limit()

    def _set_limit(self) -> None:
        law = self.law
        self.limit = max(law.chunks * law.chunk, int(law.ahead_s / self._token_s), int(law.prompts * self._mean))

    def _predict(self, ticket: Ticket, now: float) -> None:
        law, token_s = self.law, self._token_s
        begins = self._all_computed_at if self._all_computed_at > now else now
        self._all_computed_at = computed_at = begins + ticket.work_tokens * token_s
        in_progress = self.tokens if self.tokens < law.chunk else law.chunk
        due = computed_at + (self._step_s + in_progress * token_s) / 2
        ticket.computed_at = due if self.counts else now + min(law.patience * (due - now), law.patience_s)

    def _count(self, counted: float) -> list[Ticket]:
        """Match the count with the prompts sent, oldest first; return those counted."""
        under_way = ((ticket, number) for ticket, number in self._under_way.items() if number)
        sent = sorted((*self._uncounted.items(), *under_way), key=_number)
        self._part += counted
        done, self._part = int(self._part), self._part % 1.0
        for place, (ticket, _) in enumerate(sent, 1):
            if ticket.state is State.DONE:  # an answer that is over tells of all prompts sent before it
                done = max(done, place)
        tickets = [ticket for ticket, _ in sent[:done]]
        for ticket in tickets:
            if ticket.prompt_pending:
                self._under_way[ticket] = 0
            else:
                del self._uncounted[ticket]
        return tickets

    def _finish(self, ticket: Ticket) -> None:
        """Take a prompt that is under way to be computed; the count may still tell of it."""
        ticket.prompt_pending = False
        self.tokens -= ticket.work_tokens
        number = self._under_way.pop(ticket)
        if number:
            self._uncounted[ticket] = number


def _booked(tickets: Collection[Ticket]) -> tuple[int, int]:
    return sum(ticket.prompt_tokens for ticket in tickets), sum(ticket.output_tokens for ticket in tickets)


def _work(tickets: Iterable[Ticket]) -> int:
    return sum(ticket.work_tokens for ticket in tickets)
