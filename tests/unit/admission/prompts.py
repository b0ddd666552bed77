"""Prompts under way at an engine of known costs, for the tests of when one counts as computed."""

from __future__ import annotations

from extproc.admission.laws import LAWS
from extproc.admission.prefill import Prefill
from extproc.admission.steps import StepCost
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Request

LAW = LAWS.prompts

WORK = 800
PROMPT_S, STEP_S = 1e-4, 0.03


def costs(prompt_s: float = PROMPT_S, base_s: float = STEP_S) -> StepCost:
    known = StepCost()
    known.base_s, known.sequence_s, known.prompt_s = base_s, 0.0, prompt_s
    return known


TOKEN_S = LAW.caution * (PROMPT_S + STEP_S / LAW.chunk)
"""What a prompt token is predicted to take: its own cost, its part of the steps, and some caution."""
LASTS = WORK * TOKEN_S


def waits(pending: int) -> float:
    """How long a prompt waits for the end of the step in progress, with `pending` tokens under way, itself included."""
    return (STEP_S + min(pending, LAW.chunk) * TOKEN_S) / 2


def sent(prefill: Prefill, now: float, work: int = WORK) -> Ticket:
    ticket = Ticket(Request("r", now))
    ticket.work_tokens = ticket.prompt_tokens = work
    ticket.state, ticket.leased_at = State.LEASED, now
    prefill.add(ticket, now)
    return ticket


def count(prefill: Prefill, counted: float, elapsed_s: float, now: float) -> list[Ticket]:
    return prefill.observe(counted, elapsed_s, now, costs(), 0.0)


def counting(known: StepCost | None = None) -> Prefill:
    prefill = Prefill()
    prefill.observe(0, 1.0, 0.0, costs() if known is None else known, 0.0)
    return prefill


def probed() -> Prefill:
    prefill = Prefill()
    prefill.probed = True
    return prefill
