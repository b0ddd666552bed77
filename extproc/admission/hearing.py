"""What an endpoint says of itself, followed: what it teaches of tokens, and what its room is then.

A page is read now and then; a report comes with an answer, says less, and is no look at the page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission import telemetry
from extproc.admission.lines import placed
from extproc.admission.transitions import LEASED

if TYPE_CHECKING:
    from extproc.admission.books import Books
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.estimate import TokenEstimate
    from extproc.admission.fleet import Fleet
    from extproc.admission.lines import Lines
    from extproc.admission.load import Load
    from extproc.admission.ticket import Ticket


class Hearing:
    """Follows the telemetry of all endpoints."""

    __slots__ = ("_books", "_fleet", "_lines", "_tokens")

    def __init__(self, books: Books, lines: Lines, fleet: Fleet, tokens: TokenEstimate) -> None:
        """Tell `fleet` of changed room, `tokens` of what engines counted, and `lines` who needs less than thought."""
        self._books = books
        self._lines = lines
        self._fleet = fleet
        self._tokens = tokens

    def page(self, endpoint: Endpoint, page: Load, unsent: int = 0) -> None:
        """Follow a page that was read just now; see `Controller.observe`."""
        books, wanted = self._books, endpoint.is_waited_for
        load, counted = telemetry.follow_page(endpoint, page, books.now, books.policy, wanted=wanted, unsent=unsent)
        books.adapters.follow(endpoint, load)
        if counted and load.prompt_tokens:
            self._tokens.learn_prompts(load.prompt_tokens, counted)
            self._book_anew(endpoint, counted)
        if load.context_tokens:
            for pool in endpoint.pools:
                pool.longest = max(pool.longest or 0, load.context_tokens)
        if load.output_tokens is not None:
            endpoint.produced += load.output_tokens
            if load.output_tokens and not endpoint.counters.doubted:
                endpoint.written += load.output_tokens
                endpoint.health.heard_at = books.now
            self._count_answers(endpoint)
        else:  # a first page, or the first behind a reset: nobody counted what the answers had that ended until now
            endpoint.produced = endpoint.completed = 0
        self._fleet.heard()
        self._fleet.changed(endpoint)

    def report(self, endpoint: Endpoint, load: Load) -> None:
        """Follow what an answer says of its endpoint's load."""
        telemetry.follow_report(endpoint, load, self._books.now, self._books.policy)
        self._fleet.heard()
        self._fleet.changed(endpoint)

    def _count_answers(self, endpoint: Endpoint) -> None:
        if endpoint.completed:
            if telemetry.judge_counters(endpoint):
                self._tokens.learn(endpoint.produced, endpoint.completed)
            endpoint.produced = endpoint.completed = 0

    def _book_anew(self, endpoint: Endpoint, counted: list[Ticket]) -> None:
        """Correct what came before it was known what it costs: the prompts just counted, and those who may be next.

        Without this, a line of images that were booked above the cache goes one at a time, each until its answer's end.
        """
        for ticket in counted:
            if ticket.endpoint is endpoint and ticket.state is LEASED:
                endpoint.rebook(ticket, self._tokens.prompt_of(ticket, placed(ticket.pool).longest))
        self._lines.renew(endpoint, self._tokens)
