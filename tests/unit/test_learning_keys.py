"""Each constant of what is learned is a key that reaches the core: another value leads to other decisions and limits.

Some stories are told to the core again and again, event by event, with one key changed each time: who is sent where,
who is refused, what requests are booked for, what limits the endpoints show. Some of it must not stay as it was. A key
that nothing reads fails.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from extproc.admission.controller import Controller
from extproc.admission.laws import LAWS
from extproc.admission.limit import DEFAULT_LAW
from extproc.admission.load import Load
from extproc.admission.steps import StepCost
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Dispatch, EndpointSpec, Reject, Request
from extproc.config.keys import Config, sections

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.values import Decision

STEP_S = 0.25


@dataclass
class Engine:
    """A made-up server: what its page tells, how long its answers take.

    `silent_s`: from then on its page is short. `models`: by their letters, else the first of its name; with
    `adapter_slots` they are LoRA adapters. `fails`: with what, from when to when. `others`: requests of others that run
    there at first, the last of which end after so many seconds.
    """

    name: str
    slots: int
    step_s: float
    tells: str = "all"
    share: float = 0.0
    lies: float = 1.0
    silent_s: float = 1e9
    cache: int = 6000
    models: str = ""
    adapter_slots: int = 0
    fails: tuple[Answer, float, float] | None = None
    others: tuple[int, float] = (0, 1.0)
    most: int | None = None
    made: float = 0.0
    began: int = 0
    prompts: int = 0

    def answers_in(self, ticket: Ticket, length: float, beside: int) -> float:
        self.prompts, self.began = self.prompts + ticket.request.prompt_tokens, self.began + 1
        crowd = max(beside / self.slots, 1.0) * (1.0 + self.share * min(beside, self.slots))
        return crowd * (ticket.request.prompt_tokens * 1e-4 + length)

    def page(self, endpoint: Endpoint, random: Random, now: float) -> Load | None:
        others = max(round(self.others[0] * (1.0 - now / self.others[1])), 0)
        held, running = endpoint.sequences, float(min(endpoint.sequences, self.slots) + others)
        booked = sum(lease.kv_tokens for lease in endpoint.leases)  # before its first page nobody else books them
        gauges = Load(running=running, waiting=float(max(held - self.slots, 0)))
        if self.adapter_slots:
            of_leases = dict.fromkeys(str(lease.request.model) for lease in endpoint.leases)
            gauges = replace(gauges, adapters=tuple(of_leases)[: self.adapter_slots], adapter_slots=self.adapter_slots)
        if self.tells == "nothing":
            return None
        if self.tells == "gauges" or now >= self.silent_s:
            return replace(gauges, kv_usage=random.choice((0.3, 0.91, 0.93)))
        tokens, self.made = self.made * self.lies, 0.0
        began, self.began = self.began, 0
        prompts, self.prompts = self.prompts, 0
        return replace(
            gauges,
            tokens_per_s=tokens,
            output_tokens=int(tokens),
            first_tokens=int(began * random.random()),
            prompt_tokens=int(prompts * random.uniform(0.3, 5.0)),
            cached_tokens=int(prompts * random.uniform(0.0, 0.3)),
            kv_capacity_tokens=self.cache,
            kv_usage=min(booked * random.uniform(0.0, 1.0) / self.cache, 1.0),
            preemptions=int(random.random() < 0.02),
        )


@dataclass(frozen=True)
class Story:
    """What happens, and the configuration that it is told to; `checked`: health checks say that all are up."""

    engines: tuple[Engine, ...]
    models: str
    arrivals: tuple[int, ...]
    lengths: tuple[float, float]
    config: dict[str, Any]
    seconds: int = 40
    checked: bool = True
    classes: tuple[str, ...] = ()


STORIES = (
    Story(
        engines=(
            Engine("m0", 40, 0.02),
            Engine("m1", 12, 0.05),
            Engine("m2", 40, 0.02, "all", 0.0, 5.0),
            Engine("g0", 30, 0.03, "gauges"),
            Engine("n0", 8, 0.03, "nothing"),
        ),
        models="mmmgnn",
        arrivals=(0, 2, 6),
        lengths=(0.0, 1.2),
        config={"classes": [{"name": "std", "budget": "6s"}]},
        seconds=60,
    ),
    Story(
        engines=(
            Engine("q0", 4, 0.05),
            Engine("w0", 300, 0.05, "all", 0.0, 1.0, 1e9, 10**6),
            Engine("p0", 60, 0.03, "gauges", 0.1),
        ),
        models="qwwwpp",
        arrivals=(0, 8, 16),
        lengths=(0.0, 0.8),
        config={
            "classes": [{"name": "std", "budget": "6s", "tpot": "100ms"}],
            "first_byte_probe": True,
            "adaptive_limit": {"probe": "4s", "floor": 1},
        },
    ),
    Story(
        engines=(
            Engine("b0", 300, 0.06, "all", 0.0, 1.0, 1e9, 10**6),
            Engine("n0", 300, 0.03, "nothing", 0.3),
            Engine("s0", 300, 0.03, "all", 0.3, 1.0, 6.0, 10**6),
        ),
        models="bbnnss",
        arrivals=(0, 6, 12),
        lengths=(1.0, 0.5),
        config={"classes": [{"name": "std", "budget": "3s"}]},
        seconds=30,
    ),
    Story(
        engines=(Engine("u0", 40, 0.02, "all", 0.0, 1.0, 1e9, 2500),),
        models="u",
        arrivals=(1, 3),
        lengths=(0.5, 0.5),
        config={"classes": [{"name": "std", "budget": "2s"}]},
        seconds=14,
    ),
    Story(
        engines=(
            Engine("f1", 64, 0.02, "nothing"),
            Engine("f2", 64, 0.02, "nothing"),
            Engine("f0", 64, 0.02, "nothing", fails=(Answer.ERROR, 8.0, 50.0)),
            Engine("a0", 64, 0.02, "gauges", fails=(Answer.FAILED, 5.0, 14.0)),
            Engine("s0", 64, 0.02, "gauges", fails=(Answer.SATURATED, 3.0, 30.0)),
            Engine("o0", 64, 0.02, others=(12, 20.0)),
        ),
        models="ffffffaso",
        arrivals=(0, 8, 24),
        lengths=(-0.5, 0.6),
        config={"classes": [{"name": "std", "budget": "4s"}]},
        seconds=55,
        checked=False,
    ),
    Story(
        engines=(
            Engine("p0", 8, 0.02, cache=10**6, most=8),
            Engine("l0", 2, 0.02, "gauges", most=1),
            *(Engine(f"x{n}", 64, 0.02, cache=10**6, models="xyz", adapter_slots=2, most=12) for n in range(3)),
        ),
        models="ppppplxxyz",
        arrivals=(0, 6, 14),
        lengths=(0.4, 0.6),
        config={"classes": [{"name": "std", "budget": "8s"}, {"name": "urgent", "priority": 5, "budget": "8s"}]},
        seconds=60,
        classes=("std", "urgent", "urgent", "urgent"),
    ),
)


def with_keys(config: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """Put `changed` into a configuration, section by section."""
    merged = dict(config)
    for key, value in changed.items():
        merged[key] = with_keys(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


class Telling:
    """A story that is told to a core of its own."""

    def __init__(self, story: Story, changed: dict[str, Any]) -> None:
        self.story, self.random, self.now = story, Random(7), 0.0
        self.heard: list[object] = []
        config = Config.model_validate(with_keys({"enable_queue": True, **story.config}, changed))
        self.core = Controller(config.policy())
        self.engines = {engine.name: replace(engine) for engine in story.engines}
        for name, engine in self.engines.items():
            models, most = frozenset(engine.models or name[0]), engine.most
            self.core.put_endpoint(EndpointSpec(name, models=models, max_running_requests=most), 0.0)
            if story.checked:
                self.core.set_up(name, 0.0, is_up=True)
        self.lengths: dict[Ticket, float] = {}
        self.first_bytes: dict[Ticket, float] = {}
        self.ends: dict[Ticket, float] = {}
        self.failed: dict[Ticket, Answer] = {}

    def steps(self) -> Iterator[list[object]]:
        """Tell it; after each step yield what the core decided and showed."""
        for step in range(int(self.story.seconds / STEP_S)):
            self.heard, self.now = [], self.now + STEP_S
            if step % 80 < 60:
                self.ask(step)
            for ticket in self.due(self.first_bytes):
                self.follow(self.core.first_token(ticket, self.now))
            for ticket in self.due(self.ends):
                if ticket.state is State.LEASED:
                    self.follow(self.core.release(ticket, self.now, self.failed.pop(ticket, Answer.OK)))
            self.work(looks=step % 4 == 0)
            self.follow(self.core.tick(self.now))
            yield self.heard

    def ask(self, step: int) -> None:
        random = self.random
        for number in range(random.choice(self.story.arrivals)):
            model, prompt = random.choice(self.story.models), random.choice((50, 300, 900, 3000))
            klass = random.choice(self.story.classes) if self.story.classes else ""
            ticket = Ticket(Request(f"{step}.{number}", self.now, model, klass, prompt_tokens=prompt))
            self.lengths[ticket] = random.lognormvariate(*self.story.lengths)
            self.follow(self.core.offer(ticket, self.now))

    def due(self, times: dict[Ticket, float]) -> list[Ticket]:
        tickets = [ticket for ticket, at in times.items() if at <= self.now]
        for ticket in tickets:
            del times[ticket]
        return tickets

    def work(self, *, looks: bool) -> None:
        for name, engine in self.engines.items():
            endpoint = self.core.endpoints[name]
            running = min(endpoint.sequences, engine.slots)
            engine.made += running * STEP_S / (engine.step_s + 1e-3 * running)
            if looks:
                load = engine.page(endpoint, self.random, self.now)
                if load is not None:
                    self.follow(self.core.observe(name, load, self.now))
                self.heard.append((name, endpoint.limit.value, endpoint.prompt_limit))

    def follow(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            ticket = decision.ticket
            if isinstance(decision, Dispatch):
                name = decision.endpoint
                fails = self.engines[name].fails
                if fails is not None and fails[1] <= self.now < fails[2]:
                    self.failed[ticket], self.ends[ticket] = fails[0], self.now
                    self.heard.append((ticket.request.id, name))
                    continue
                took_s = self.engines[name].answers_in(
                    ticket, self.lengths[ticket], self.core.endpoints[name].sequences
                )
                streams = int(ticket.request.id[-1]) % 3 > 0
                self.first_bytes[ticket] = self.now + (0.1 * took_s if streams else took_s)
                self.ends[ticket] = self.now + took_s
                self.heard.append((ticket.request.id, name, ticket.prompt_tokens, ticket.output_tokens))
            elif isinstance(decision, Reject):
                self.heard.append((ticket.request.id, decision.outcome, decision.retry_after_s))


def told(number: int, changed: dict[str, Any]) -> Iterator[list[object]]:
    """Tell a story with a changed configuration."""
    return Telling(STORIES[number], changed).steps()


CHANGED: dict[str, dict[str, Any]] = {
    "adaptive_limit": {
        "start": 17,
        "floor": 5,
        "tpot": "120ms",
        "step_factor": 9.0,
        "aimed": 0.5,
        "attainable": 3.0,
        "probe": "6s",
        "longest_probe": "5s",
        "shrink": 0.8,
        "grow": 1.5,
        "leap": 1.2,
        "kv_brake": 90,
        "queued": 0.9,
        "queued_readings": 9,
        "silent_readings": 50,
    },
    "learning.kv": {"fill": 80, "least_real": 0.5, "memory": "3s", "enough": 0.5, "pressed": 30, "doubt": "5s"},
    "learning.prompts": {
        "chunk": 1024,
        "chunks": 3,
        "ahead": "400ms",
        "prompts": 2.0,
        "caution": 1.3,
        "most_caution": 1.2,
        "slower": 1.5,
        "calmer": 0.9,
        "tolerance": 0.01,
        "first_token": "1ms",
        "streamed": 0.95,
        "patience": 4.0,
        "longest_patience": "300ms",
        "overtaken": 0.1,
        "nudge": 1.2,
        "lengths": 2,
        "hits": 0.5,
    },
    "learning.answers": {
        "memory": 20.0,
        "noise": 0.5,
        "farthest": 0.3,
        "hope": 0.6,
        "long": "3s",
        "most": 3.0,
        "enough": 12.0,
    },
    "learning.counters": {"far": 4.0, "near": 1.5, "memory": 31.0, "enough": 15.0},
    "learning.steps": {
        "base": "40ms",
        "sequence": "1ms",
        "prompt": "1ms",
        "base_off": "1ms",
        "sequence_off": "1ms",
        "prompt_off": "1ms",
        "base_drift": "5ms",
        "sequence_drift": "1ms",
        "prompt_drift": "1ms",
        "noise": 0.5,
        "uncounted": 5.0,
        "memory": "20s",
    },
    "learning.tokens": {
        "answer": 100.0,
        "memory": 20.0,
        "own": 80.0,
        "first_pace": 20.0,
        "nudge": 1.2,
        "most_faster": 1.1,
        "most_step": 1.5,
        "untried": 500,
        "unsure": 0.1,
        "sure": 0.2,
        "noise": 1.0,
    },
    "learning.pace": {
        "memory": "3s",
        "gaps": 40,
        "enough": 20,
        "enough_slow": 6,
        "least_busy": "4s",
        "sure": 1.0,
    },
    "learning.guard": {"passes": 3},
    "learning.health": {
        "eject_after": 7,
        "chance": 0.1,
        "eject": "2s",
        "longest_eject": "6s",
        "full": "1s",
        "few": 1,
        "quiet": "20s",
        "step": "500ms",
        "longest_step": "3s",
    },
    "learning.foreign": {"arrived": "2s", "steady": "1s", "each": 1, "alone": 0.1},
    "learning.adapters": {"below": 0.9, "times": 10.0},
}
"""Another value for each key."""


@cache
def usual(number: int) -> list[list[object]]:
    """What a story led to with the defaults."""
    return list(told(number, {}))


def setting(section: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Write keys of a section as they stand in a file."""
    for name in reversed(section.split(".")):
        keys = {name: keys}
    return keys


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, keys in CHANGED.items() for key in keys])
def test_each_constant_of_what_is_learned_changes_what_the_core_decides(section: str, key: str) -> None:
    changed = setting(section, {key: CHANGED[section][key]})
    assert any(
        now != before
        for number in range(len(STORIES))
        for now, before in zip(told(number, changed), usual(number), strict=True)
    )


def test_the_stories_change_each_key_that_there_is_and_each_field_of_each_law() -> None:
    for section, keys in CHANGED.items():
        described = dict(sections())[section]
        assert set(described.model_fields) == set(keys)
    assert {path for path, _ in sections() if path.startswith("learning.")} == set(CHANGED) - {"adaptive_limit"}
    merged: dict[str, Any] = {}
    for section, keys in CHANGED.items():
        merged = with_keys(merged, setting(section, keys))
    policy, laws = Config.model_validate(merged).policy(), fields(LAWS)
    pairs = [
        (policy.limit_law, DEFAULT_LAW),
        *((getattr(policy.laws, law.name), getattr(LAWS, law.name)) for law in laws),
    ]
    same = {
        field.name
        for now, before in pairs
        for field in fields(now)
        if getattr(now, field.name) == getattr(before, field.name)
    }
    assert same == {"objective_s"}, "which is of the classes"
    assert Config().policy().laws == LAWS
    assert Config().policy().limit_law == DEFAULT_LAW


def test_a_story_told_twice_ends_the_same() -> None:
    """Else each key would seem to change it."""
    for number in range(len(STORIES)):
        assert list(told(number, {})) == usual(number)


def test_two_readings_at_one_instant_teach_steps_with_the_least_noise_that_may_be_set() -> None:
    """A division by zero, once: without a time between them, what a reading may miss is all the noise there is."""
    with pytest.raises(ValidationError, match=r"learning\.steps\.uncounted"):
        Config.model_validate(setting("learning.steps", {"uncounted": 0}))
    least = Config.model_validate(setting("learning.steps", {"uncounted": 1, "noise": 1e-9}))
    steps = StepCost(least.learning.laws().steps)
    steps.learn(0.0, 0.0, 0.0, 0.0)
    assert steps.readings == 1
