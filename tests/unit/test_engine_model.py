"""The engine model on a virtual clock: scheduling, KV blocks, prefix cache, preemption, step by step."""

from __future__ import annotations

import dataclasses

import pytest

from extproc.engine.model import HORIZON_STEPS, Engine
from extproc.engine.params import A100_8B, DEMO, PRESETS
from extproc.engine.sequence import Finished, FirstToken, Preempted, Refusal
from tests.unit.engines import drain, first_tokens, small


def test_a_lone_request_takes_one_prefill_step_and_one_step_per_further_token() -> None:
    engine = Engine(small())
    engine.submit("a", 5, 3, now=100.0)
    first, finished = drain(engine)
    assert first == FirstToken("a", pytest.approx(100.015))
    assert finished == Finished("a", pytest.approx(100.035), 3, 0)


def test_the_step_time_is_the_sum_of_its_four_terms_over_the_speed() -> None:
    engine = Engine(small(decode_seq_s=0.002, context_token_s=0.0001, speed=0.5))
    engine.submit("a", 5, 4, now=0.0)
    first, finished = drain(engine)
    assert first.t == pytest.approx(2 * 0.015)
    assert finished.t - first.t == pytest.approx(2 * (3 * (0.010 + 0.002) + (6 + 7 + 8) * 0.0001))


def test_a_prompt_longer_than_the_token_budget_is_prefilled_in_chunks() -> None:
    engine = Engine(small())
    engine.submit("a", 20, 1, now=0.0)
    assert [event.t for event in drain(engine)] == pytest.approx([0.050, 0.050])
    assert engine.steps_total == 3


def test_decodes_take_their_token_of_the_budget_before_a_prefill_does() -> None:
    engine = Engine(small())
    engine.submit("a", 1, 20, now=0.0)
    engine.advance(engine.next_step() or 0)
    engine.submit("b", 8, 1, now=0.012)
    events = drain(engine)
    # Steps: 11 ms (a alone), 10 ms in progress when b comes, then 7 of its 8 tokens beside a's one, then the last.
    assert next(event.t for event in events if event.seq_id == "b") == pytest.approx(0.021 + 0.017 + 0.011)


def test_requests_beyond_max_num_seqs_wait_in_arrival_order() -> None:
    engine = Engine(small())
    for name in "abcd":
        engine.submit(name, 2, 3, now=0.0, priority=-ord(name))
    assert (engine.running, engine.waiting) == (1, 3)
    assert first_tokens(drain(engine)) == ["a", "b", "c", "d"]


def test_the_peak_of_the_queue_is_what_scheduling_left_behind_not_who_came_during_a_step() -> None:
    engine = Engine(small())
    for name in "abcd":
        engine.submit(name, 2, 3, now=0.0)
    assert (engine.waiting, engine.peak_waiting) == (3, 0)
    drain(engine)
    assert (engine.peak_running, engine.peak_waiting) == (2, 2)


def test_under_priority_scheduling_the_lowest_number_is_admitted_first() -> None:
    engine = Engine(small(scheduling_policy="priority", max_num_seqs=1))
    for name, priority in (("a", 5), ("b", 9), ("c", 1), ("d", 9), ("e", -3)):
        engine.submit(name, 2, 2, now=0.0, priority=priority)
    assert first_tokens(drain(engine)) == ["a", "e", "c", "b", "d"]


def test_a_head_of_the_queue_that_does_not_fit_blocks_those_behind_it() -> None:
    engine = Engine(small(max_num_seqs=8))
    engine.submit("holder", 20, 8, now=0.0)
    engine.submit("big", 16, 1, now=0.0)
    engine.submit("small", 1, 1, now=0.0)
    assert first_tokens(drain(engine)) == ["holder", "big", "small"]


def test_without_a_free_block_the_last_admitted_is_preempted_and_finishes_later() -> None:
    engine = Engine(small(max_num_batched_tokens=32))
    engine.submit("a", 14, 10, now=0.0)
    engine.submit("b", 14, 10, now=0.0)
    events = drain(engine)
    assert [event.seq_id for event in events if isinstance(event, Preempted)] == ["b"]
    finished = [event for event in events if isinstance(event, Finished)]
    assert [(event.seq_id, event.output_tokens, event.preemptions) for event in finished] == [
        ("a", 10, 0),
        ("b", 10, 1),
    ]
    assert engine.generation_tokens_total == 20
    assert engine.preemptions_total == 1


def test_a_step_that_preempts_admits_nobody() -> None:
    engine = Engine(small(num_gpu_blocks=5, max_num_batched_tokens=32, max_num_seqs=3, scheduling_policy="priority"))
    for name, prompt, priority in (("a", 8, 0), ("b", 8, 1), ("c", 2, 0)):
        engine.submit(name, prompt, 6, now={"a": 0.0, "b": 0.001, "c": 0.020}[name], priority=priority)
    events = drain(engine)
    # Steps: a prefills (18 ms), b prefills (18), b finds no block and c waits on (10), c prefills (12).
    assert Preempted("b", pytest.approx(0.036)) in events
    assert FirstToken("c", pytest.approx(0.058)) in events


def test_a_preempted_request_recomputes_only_the_blocks_that_were_taken_from_it() -> None:
    def prefilled(caching: bool) -> int:
        engine = Engine(small(max_num_batched_tokens=32, prefix_caching=caching))
        engine.submit("a", 14, 10, now=0.0)
        engine.submit("b", 14, 10, now=0.0)
        drain(engine)
        return engine.prefill_tokens_total

    # b, admitted a step after a, is preempted with 15 tokens computed (3 full blocks, of which a takes one) and
    # 16 to have.
    assert prefilled(caching=False) == 28 + 16
    assert prefilled(caching=True) == 28 + 16 - 8


def test_the_next_turn_of_a_session_prefills_only_what_is_new() -> None:
    engine = Engine(small(max_num_batched_tokens=32))
    engine.submit("turn 1", 8, 5, now=0.0, session="s")
    drain(engine)
    engine.submit("turn 2", 20, 1, now=10.0, session="s")
    # 12 tokens are in the cache: 8 of the prompt and 4 of the 5 generated, the last of which was never computed.
    assert drain(engine)[0].t == pytest.approx(10.0 + 0.010 + 8 * 0.001)
    assert (engine.prefix_queries_total, engine.prefix_hits_total) == (28, 12)


def test_a_prefix_is_not_shared_between_sessions() -> None:
    engine = Engine(small())
    engine.submit("a", 8, 5, now=0.0, session="s")
    drain(engine)
    engine.submit("b", 8, 5, now=10.0, session="t")
    drain(engine)
    assert engine.prefix_hits_total == 0


def test_cached_prefixes_are_evicted_when_their_blocks_are_needed() -> None:
    engine = Engine(small(max_num_batched_tokens=64))
    engine.submit("a", 16, 1, now=0.0, session="s")
    drain(engine)
    engine.submit("big", 28, 1, now=1.0)
    drain(engine)
    engine.submit("b", 16, 1, now=2.0, session="s")
    drain(engine)
    assert engine.prefix_hits_total == 4


def test_cached_prefixes_count_as_free() -> None:
    engine = Engine(small())
    engine.submit("a", 8, 5, now=0.0, session="s")
    assert engine.kv_usage == pytest.approx(2 / 8)
    drain(engine)
    assert engine.kv_usage == 0.0


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding"])
def test_an_abort_frees_everything_at_once(when: str) -> None:
    engine = Engine(small(max_num_seqs=1))
    engine.submit("other", 2, 40 if when == "waiting" else 1, now=0.0)
    start = 0.0 if when == "waiting" else drain(engine)[-1].t
    blocks = engine.kv_usage
    engine.submit("x", 17, 5, now=start)
    now = start + {"waiting": 0.005, "prefilling": 0.005, "decoding": 0.060}[when]
    assert engine.abort("x", now)
    assert "x" not in engine
    assert (engine.waiting, engine.kv_usage) == (0, blocks)
    assert "x" not in {event.seq_id for event in drain(engine) if isinstance(event, Finished)}


def test_work_for_an_aborted_request_is_counted_as_wasted() -> None:
    engine = Engine(small())
    engine.submit("a", 8, 20, now=0.0)
    engine.abort("a", 0.018 + 0.010 * 3.5)
    assert engine.wasted_tokens_total == 8 + 4


def test_an_abort_lets_the_next_in_after_the_step_in_progress_not_after_the_planned_ones() -> None:
    engine = Engine(small(max_num_seqs=1))
    engine.submit("a", 2, 30, now=0.0)
    engine.submit("b", 2, 1, now=0.0)
    engine.advance(0.012)
    engine.abort("a", 0.015)
    assert engine.next_step() == pytest.approx(0.022)
    assert drain(engine)[0] == FirstToken("b", pytest.approx(0.022 + 0.012))


def test_an_abort_of_one_that_has_left_changes_nothing() -> None:
    engine = Engine(small())
    engine.submit("a", 2, 1, now=0.0)
    assert not engine.abort("a", 1.0)
    assert engine.aborted_total == 0
    assert isinstance(engine.advance(1.0)[-1], Finished)


def test_a_request_that_can_never_fit_is_refused() -> None:
    engine = Engine(small())
    assert engine.submit("a", 31, 2, now=0.0) is Refusal.TOO_LONG
    assert engine.submit("b", 31, 1, now=0.0) is None
    assert Engine(small(max_model_len=10)).submit("c", 10, 1, now=0.0) is Refusal.TOO_LONG


def test_a_full_queue_refuses_and_counts_running_requests_too_like_vllm() -> None:
    engine = Engine(small(max_num_queued=3))
    answers = [engine.submit(number, 2, 2, now=0.0) for number in range(5)]
    assert answers == [None, None, None, Refusal.QUEUE_FULL, Refusal.QUEUE_FULL]
    assert engine.refused_total == 2


def test_tokens_of_follows_a_request_step_by_step() -> None:
    engine = Engine(small())
    engine.submit("a", 2, 4, now=0.0)
    seen = []
    while "a" in engine:
        seen.append(engine.tokens_of("a"))
        engine.advance(engine.next_step() or 0)
    assert seen == [0, 1, 2, 3]


def test_a_request_that_was_preempted_still_gets_all_its_tokens() -> None:
    # Found by the random test: the step in which it would have finished came while it was prefilled again.
    engine = Engine(small(num_gpu_blocks=6, max_num_batched_tokens=6))
    for number, (prompt, output) in enumerate([(17, 5), (1, 1), (1, 5)]):
        engine.submit(number, prompt, output, now=0.0)
    drain(engine)
    assert engine.generation_tokens_total == 11


def test_a_quiet_run_is_one_event_long_however_many_steps_it_has() -> None:
    engine = Engine(A100_8B)
    engine.submit("a", 100, HORIZON_STEPS, now=0.0)
    engine.advance(engine.next_event() or 0)
    engine.advance(engine.next_event() or 0)
    assert engine.steps_total == HORIZON_STEPS
    assert engine.next_event() is None


def test_time_that_goes_back_is_a_caller_error() -> None:
    engine = Engine(small())
    engine.advance(5.0)
    with pytest.raises(ValueError, match="time went back"):
        engine.submit("a", 1, 1, now=4.0)


def test_what_an_abort_or_a_submit_settles_on_its_way_is_reported_by_the_next_advance() -> None:
    engine = Engine(small())
    engine.submit("a", 2, 9, now=0.0)
    engine.abort("a", 0.025)
    assert engine.next_event() == 0.025
    assert engine.advance(0.025) == [FirstToken("a", pytest.approx(0.012))]


def test_a_live_id_cannot_be_submitted_again() -> None:
    engine = Engine(small())
    engine.submit("a", 1, 9, now=0.0)
    with pytest.raises(ValueError, match="still live"):
        engine.submit("a", 1, 1, now=0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_gpu_blocks", 0),
        ("max_num_queued", 0),
        ("prefill_token_s", -1.0),
        ("step_base_s", float("nan")),
        ("speed", 0.0),
        ("max_num_seqs", 4096),
        ("scheduling_policy", "random"),
    ],
)
def test_impossible_parameters_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(DEMO, **{name: value})


def test_the_presets_have_the_kv_sizes_of_the_policy_study() -> None:
    assert {name: params.kv_tokens for name, params in PRESETS.items()} == {
        "a100-8b": 430_000,
        "h100-32b": 24_000,
        "a100-8b-profiled": 430_000,
        "h100-32b-profiled": 24_000,
        "h100-8b": 430_000,
        "h100x4-70b": 430_000,
        "llama-cpp": 32_768,
        "demo": 8_192,
    }


def test_a_prefix_that_many_share_is_computed_and_kept_once() -> None:
    engine = Engine(dataclasses.replace(DEMO, max_num_seqs=8, num_gpu_blocks=256))
    for number in range(5):
        engine.submit(number, 1000 + 40, 20, 0.0 if number == 0 else 1.0, prefix="system", prefix_tokens=1000)
        if number == 0:
            engine.advance(0.9)
    blocks, whole = engine.params.block_size, 1000 // engine.params.block_size
    while engine.running < 4:
        engine.advance(engine.next_step() or 0.0)
    assert engine.prefix_hits_total == 4 * whole * blocks
    assert engine.prefill_tokens_total == 1040 + 4 * (1040 - whole * blocks)
    assert engine.kv_usage * 256 < whole + 5 * 5
    while (due := engine.next_event()) is not None:
        engine.advance(due)
    assert engine.kv_usage == 0.0


def test_a_prefix_that_its_first_user_left_unfinished_is_computed_by_the_next() -> None:
    engine = Engine(dataclasses.replace(DEMO, max_num_batched_tokens=256))
    engine.submit("first", 1040, 20, 0.0, prefix="system", prefix_tokens=1000)
    engine.advance(engine.next_step() or 0.0)
    engine.abort("first", engine.next_step() or 0.0)
    assert engine.kv_usage == 0.0
    engine.submit("next", 1040, 20, 1.0, prefix="system", prefix_tokens=1000)
    while (due := engine.next_event()) is not None:
        engine.advance(due)
    assert engine.prefix_hits_total == 512, "two steps of 256 were done"
    assert engine.prompt_tokens_total == 1040


@pytest.mark.parametrize("tokens", [3, 5])
def test_one_that_has_less_of_a_prefix_than_is_remembered_still_ends(tokens: int) -> None:
    """It owned all that was remembered, found no room for its own blocks, and was preempted and let in for ever."""
    engine = Engine(small(num_gpu_blocks=3, prefix_caching=True, max_num_batched_tokens=16))
    engine.submit("long", 9, 1, 0.0, prefix="p", prefix_tokens=10)
    engine.advance(1.0)
    engine.submit("short", tokens, 12 - tokens, 1.0, prefix="p", prefix_tokens=10)
    (ended,) = [event for event in engine.advance(2.0) if isinstance(event, Finished)]
    assert (ended.seq_id, ended.output_tokens, ended.preemptions) == ("short", 12 - tokens, 0)


def test_attention_over_the_context_before_a_prompts_chunk_takes_its_time() -> None:
    def first_token_s(prefill_context_s: float) -> float:
        engine = Engine(dataclasses.replace(DEMO, prefill_context_s=prefill_context_s, max_num_batched_tokens=500))
        engine.submit("one", 1000, 1, 0.0)
        return engine.advance(10.0)[0].t

    # Two chunks of 500: half of 500 before each token of the first, and 500 more of the second.
    assert first_token_s(1e-6) - first_token_s(0.0) == pytest.approx(1e-6 * (500 * 250 + 500 * 750))


def test_an_adapter_that_is_more_than_the_batch_may_have_is_passed_over_and_loading_one_holds_up_the_step() -> None:
    engine = Engine(small(max_num_seqs=4, max_loras=1, lora_load_s=0.5, num_gpu_blocks=64))
    for name, adapter in (("a", "law"), ("b", "med"), ("c", "law"), ("d", None)):
        engine.submit(name, 1, 3, now=0.0, adapter=adapter)
    engine.advance(engine.next_step() or 0)
    assert (engine.running, engine.adapters) == (3, (("law",), ("med",)))
    events = drain(engine)
    ends = {event.seq_id: event.t for event in events if isinstance(event, Finished)}
    assert ends["b"] - ends["c"] == pytest.approx(0.5 + 0.011 + 2 * 0.010)
    assert engine.adapters_loaded_total == 2
