"""What an endpoint's telemetry changes in its books: its page, its reports with answers, and both grown old.

`hearing.py` calls it, and follows what that means for everybody else. The fields are described in `endpoint.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from extproc.admission.load import Load
from extproc.admission.servers import MOST
from extproc.admission.steps import StepCost

if TYPE_CHECKING:
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Policy


def follow_page(
    endpoint: Endpoint, page: Load, now: float, policy: Policy, *, wanted: bool, unsent: int = 0
) -> tuple[Load, list[Ticket]]:
    """Follow a page that was read just now: whose requests it shows, then what all servers at its address say by it.

    `wanted`: requests wait that this endpoint could serve. `unsent`: see `Controller.observe`.

    Return what they say, whether counters are believed or not; and the leases whose prompts were counted since the
    reading before, if prompts are counted and few are others'.
    """
    full = endpoint.held >= endpoint.limit.value
    _see_whose(endpoint, page, now, unsent)
    load = _of_all_servers(endpoint, page)
    believed = load.without_counters() if endpoint.counters.doubted else load
    return load, _follow_load(endpoint, believed, now, policy, full=full, wanted=wanted)


def _see_whose(endpoint: Endpoint, page: Load, now: float, unsent: int) -> None:
    """See on a page, as it is, of how many servers it is one's, and whether it shows requests that are not ours."""
    ours, held = endpoint.leases, endpoint.sequences
    if endpoint.servers.follow(page, ours, held, endpoint.answered, now, unsent):
        endpoint.forget_servers()
    most, learned, in_batch = endpoint.limit.value, endpoint.is_learned, endpoint.limit.is_batch
    endpoint.strangers.follow(page, ours, held, most, now, unsent, is_learned=learned, in_batch=in_batch)


def _of_all_servers(endpoint: Endpoint, page: Load) -> Load:
    """Return what all servers at an endpoint's address say, as far as one's page tells."""
    count = endpoint.servers.count
    if count == 1:
        return page
    if count < MOST:
        return page.times(count)
    return Load(gpu_usage=page.gpu_usage)  # which comes from its exporter; what the server said may be anybody's


def _follow_load(
    endpoint: Endpoint, load: Load, now: float, policy: Policy, *, full: bool, wanted: bool
) -> list[Ticket]:
    endpoint.keep_tokens()
    reading = endpoint.reading
    before = reading.page
    elapsed_s = 1.0 if before is None else now - reading.page_at
    endpoint.steps.follow(load, None if before is None else before.running, elapsed_s, endpoint.prefill.fresh)
    reading.take_page(load, now)
    endpoint.health.sleep(is_asleep=load.asleep is True)
    endpoint.size_cache()
    endpoint.deferred.follow(load, endpoint.leases, endpoint.prefill, now)
    counted = _follow_prompts(endpoint, load, elapsed_s, now, policy)
    kv, prefill = endpoint.kv, endpoint.prefill
    prompts, outputs = prefill.pending_tokens()
    reading.booked = (kv.prompts - prompts, kv.outputs - outputs)
    load = _set_aside(endpoint, load)
    knows_kv, why = endpoint.kv.capacity is not None and load.kv_usage is not None, endpoint.limit.why
    deferred = endpoint.deferred.count
    endpoint.limit.observe(
        load,
        endpoint.steps,
        wanted=full and (wanted or deferred > 0),
        in_flight=max(endpoint.held - deferred, 1),
        elapsed_s=elapsed_s,
        knows_kv=knows_kv,
    )
    if endpoint.limit.why != why:
        endpoint.limit_since = now
    if load.kv_usage is not None:
        kv.judge(load.kv_usage, load.waiting, load.preemptions, elapsed_s, wanted=wanted)
        if endpoint.sees_first_tokens:
            kv.learn(load.kv_usage, *reading.booked, elapsed_s)
        elif load.waiting == 0:  # nothing tells which prompts are computed: about all, where nobody waits inside
            prompts, outputs = prefill.held_back_tokens()
            kv.learn(load.kv_usage, kv.prompts - prompts, kv.outputs - outputs, elapsed_s)
    if reading.report is None or reading.report.kv_usage is None:
        endpoint.kv.compare(load.kv_usage)
    _follow_heat(endpoint, now, policy)
    return counted


def follow_report(endpoint: Endpoint, report: Load, now: float, policy: Policy) -> None:
    """Follow a report that came with an answer: what it doesn't say stays as it was.

    It is no look at the page: the limit takes no step, no prompt counts as computed, nobody is found foreign.
    """
    endpoint.reading.take_report(report, now)
    endpoint.size_cache()
    if report.kv_usage is not None:
        endpoint.kv.compare(report.kv_usage)
    _follow_heat(endpoint, now, policy)


def judge_counters(endpoint: Endpoint) -> bool:
    """Hold what its counters say of the answers that ended against what its peers' say; tell whether to believe."""
    before, peers = endpoint.counters.doubted, endpoint.peers()
    if peers is not None:
        endpoint.counters.follow(endpoint.produced, endpoint.completed, peers.usual, len(peers.members))
    if endpoint.counters.doubted and not before:
        endpoint.steps = StepCost(endpoint.steps.law)  # they taught it
    return not endpoint.counters.doubted


def forget_stale(endpoint: Endpoint, now: float, policy: Policy) -> bool:
    """Ignore what has become stale; tell whether anything had."""
    reading, before = endpoint.reading, len(endpoint.reading.told_at)
    if reading.page is not None and now >= reading.page_at + policy.stale_after_s:  # as deadlines are, to the bit
        reading.page = None
        endpoint.health.sleep(is_asleep=False)
        endpoint.strangers.forget()
        endpoint.limit.forget()
        endpoint.prefill.forget()
        endpoint.deferred.forget(endpoint.prefill, now)
        endpoint.limit.defer(0)
        _cool_down(endpoint, policy)
        endpoint.look_for_first_tokens(policy)
    if reading.report is not None and now >= reading.report_at + policy.stale_after_s:
        reading.report = None
        endpoint.size_cache()
        _cool_down(endpoint, policy)
    return len(reading.told_at) < before


def _set_aside(endpoint: Endpoint, load: Load) -> Load:
    """Take whom the engine defers out of the books and of the page: they say nothing of its batch, nor of its cache."""
    deferred = endpoint.deferred
    endpoint.limit.defer(deferred.count, anew=deferred.is_found)
    return replace(load, waiting=(load.waiting or 0.0) - deferred.count) if deferred.count else load


def _follow_prompts(endpoint: Endpoint, load: Load, elapsed_s: float, now: float, policy: Policy) -> list[Ticket]:
    endpoint.look_for_first_tokens(policy)
    if load.first_tokens is None:
        return []
    engine_holds = (load.running or 0.0) + (load.waiting or 0.0)
    ours = min(endpoint.sequences / engine_holds, 1.0) if engine_holds else 1.0  # others may use it too
    if load.cached_tokens is not None and load.prompt_tokens:
        endpoint.prefill.found(load.cached_tokens, load.prompt_tokens)
    mostly_ours, others = ours >= endpoint.strangers.law.alone, endpoint.strangers.count > 0
    # Few others are answers that run out: their first tokens came before. Too few counted as ours would add up.
    first_tokens = load.first_tokens * (1.0 if others and mostly_ours else ours)
    alone = mostly_ours or not others
    counted = endpoint.prefill.observe(first_tokens, elapsed_s, now, endpoint.steps, load.running or 0.0, alone=alone)
    return counted if mostly_ours else []


def _follow_heat(endpoint: Endpoint, now: float, policy: Policy) -> None:
    """Close while what is known of its load is over the policy's thresholds."""
    known = endpoint.reading.known
    hot = known is not None and _is_hot(endpoint, known, policy)
    endpoint.closed_until = now + policy.stale_after_s if hot else None


def _cool_down(endpoint: Endpoint, policy: Policy) -> None:
    """Take back what stale telemetry did, unless what is still known says the same."""
    known = endpoint.reading.known
    if known is None or known.kv_usage is None:
        endpoint.kv.compare(None)
    if known is None or not _is_hot(endpoint, known, policy):
        endpoint.closed_until = None


def _is_hot(endpoint: Endpoint, load: Load, policy: Policy) -> bool:
    kv, gpu = load.kv_usage, load.gpu_usage
    if kv is not None and kv >= policy.max_kv_usage and endpoint.kv.trust > 0.0:
        return True
    return gpu is not None and policy.max_gpu_usage is not None and gpu >= policy.max_gpu_usage
