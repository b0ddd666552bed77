"""Who stands before the engines: Envoy alone, with an engine tuned for it, HAProxy, the original design, and ours.

Ours is the real Controller behind the shape of a front; the others' fronts live in fronts.py. A contender is a front
with its settings, read from a text like `haproxy,limit=24,queue=2s`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from extproc.admission.controller import Controller
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import UNSIZED, Binding, Dispatch, EndpointSpec, Policy, Request, RequestClass
from extproc.durations import parse_duration
from extproc.errors import ConfigError
from extproc.simulate.fronts import Balancer, Haproxy, Split, Verdict, round_robin, shortest, two_choices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from extproc.admission.load import Load
    from extproc.admission.values import Answer, Decision
    from extproc.engine.params import EngineParams
    from extproc.simulate.fronts import Front, Group, Job
    from extproc.simulate.workload import Klass

FOR_EVER_S = 3500.0
"""A budget that never ends a wait: the longest that the config allows."""


class Core:
    """Our core behind the shape of a front, driven as `gate.py` drives it. Nothing in it knows of the simulation."""

    def __init__(self, groups: Sequence[Group], setting: Setting) -> None:
        """Start a Controller with `setting` before the engines of `groups`."""
        self.controller = Controller(setting.policy)
        self._setting = setting
        models = [frozenset(group.models) for group in groups for _ in range(group.engines)]
        self._names = [f"engine-{number}" for number in range(len(models))]
        self._index = {name: number for number, name in enumerate(self._names)}
        self._jobs: dict[Ticket, Job] = {}
        self._tickets: dict[Job, Ticket] = {}
        for name, served in zip(self._names, models, strict=True):
            spec = EndpointSpec(
                name,
                models=served,
                max_running_requests=setting.max_running_requests,
                kv_capacity_tokens=setting.kv_capacity_tokens,
            )
            self.controller.put_endpoint(spec, 0.0)

    def arrive(self, job: Job, now: float) -> list[Verdict]:
        """Offer it."""
        demand = job.demand
        request = Request(
            id=str(job.number),
            arrived=now,
            model=demand.model,
            request_class=demand.klass.name,
            tenant=demand.tenant,
            session=demand.session if self._setting.session_homes and demand.names_session else None,
            prompt_tokens=demand.estimate,
            sequences=demand.sequences if self._setting.reads_n else 1,
            kind="" if demand.sized else UNSIZED,
        )
        ticket = Ticket(request)
        self._jobs[ticket] = job
        self._tickets[job] = ticket
        return self._verdicts(self.controller.offer(ticket, now))

    def leave(self, job: Job, now: float) -> list[Verdict]:
        """Cancel it."""
        ticket = self._tickets[job]
        decisions = self.controller.cancel(ticket, now)
        self._forget(ticket)
        return self._verdicts(decisions)

    def first_token(self, job: Job, now: float) -> list[Verdict]:
        """Tell the core, if something would tell it in production."""
        ticket, verdicts = self._tickets[job], []
        if ticket.endpoint is not None and ticket.endpoint.health.is_doubted:
            verdicts = self._verdicts(self.controller.answered(ticket, now))
        if not self._setting.policy.first_byte_probe:
            return verdicts
        return verdicts + self._verdicts(self.controller.first_token(ticket, now))

    def end(self, job: Job, now: float, answer: Answer) -> list[Verdict]:
        """Give the lease back."""
        ticket = self._tickets[job]
        decisions = self.controller.release(ticket, now, answer)
        self._forget(ticket)
        return self._verdicts(decisions)

    def observe(self, engine: int, load: Load, now: float) -> list[Verdict]:
        """Pass the scrape on."""
        if not self._setting.own_books:
            load = replace(load, kv_capacity_tokens=None, prompt_tokens=None, first_tokens=None)
        if not self._setting.reads_adapters:
            load = replace(load, adapters=None, waiting_adapters=None)
        return self._verdicts(self.controller.observe(self._names[engine], load, now))

    def set_up(self, engine: int, now: float, *, is_up: bool) -> list[Verdict]:  # noqa: ARG002
        """The sidecar has no active health checks: failures tell it."""
        return []

    def tick(self, now: float) -> list[Verdict]:
        """Pass the time on."""
        return self._verdicts(self.controller.tick(now))

    def next_deadline(self) -> float | None:
        """Ask the core."""
        return self.controller.next_deadline()

    def _verdicts(self, decisions: Iterable[Decision]) -> list[Verdict]:
        verdicts = []
        for decision in decisions:
            job = self._jobs[decision.ticket]
            if isinstance(decision, Dispatch):
                verdicts.append(Verdict(job, self._index[decision.endpoint], decision.outcome.value))
            else:
                verdicts.append(Verdict(job, None, decision.outcome.value))
                self._forget(decision.ticket)
        return verdicts

    def _forget(self, ticket: Ticket) -> None:
        assert ticket.state in (State.DONE, State.LEFT)  # noqa: S101 - a job ends once
        del self._tickets[self._jobs.pop(ticket)]


@dataclass(frozen=True, slots=True)
class Setting:
    """How ours is set: the policy, and what the config says of endpoints.

    Attributes:
        scrape_interval_s: how often engines are asked for their metrics.
        reads_n: whether the body's `n` is read (`request_fields`).
        session_homes: whether the session header is read.
        reads_adapters: whether pages are asked which LoRA adapters run.
        own_books: whether KV capacity and counters of prompts are known; the original design had only gauges.
        replicas: how many sidecars share the engines, each with a part of the arrivals.
        replicas_fault: what happens to them in the middle.
    """

    policy: Policy = field(default_factory=Policy)
    max_running_requests: int | None = None
    kv_capacity_tokens: int | None = None
    scrape_interval_s: float = 1.0
    reads_n: bool = False
    session_homes: bool = True
    reads_adapters: bool = True
    own_books: bool = True
    replicas: int = 1
    replicas_fault: str = "none"


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to stand before the engines.

    Attributes:
        kind: `core` for the real Controller, `haproxy`, else the balancer's rule.
        limit, queue_s: `maxconn` and `timeout queue`, for `haproxy`.
        breaker: per engine; None: none. Envoy's counts per cluster, which does worse: this is the kinder reading.
        setting: for `core`.
        max_num_seqs, engine_priority: how the engines are set for it; None: as the preset says.
    """

    name: str
    kind: str
    breaker: int | None = None
    limit: int = 0
    queue_s: float = 0.0
    setting: Setting | None = None
    max_num_seqs: int | None = None
    engine_priority: bool = False

    def front(self, groups: Sequence[Group], seed: int) -> Front:
        """Build it, with its own dice."""
        if self.kind == "core":
            assert self.setting is not None  # noqa: S101 - kind is `core`
            if self.setting.replicas > 1:
                from extproc.simulate.replicas import Several

                return Several(groups, self.setting)
            return Core(groups, self.setting)
        total = sum(group.engines for group in groups)
        parts: list[tuple[Front, Sequence[int], tuple[str, ...]]] = []
        first = 0
        for group in groups:
            own = range(first, first + group.engines)
            parts.append((self._proxy(total, own, seed), own, group.models))
            first += group.engines
        return parts[0][0] if len(parts) == 1 else Split(parts)

    def _proxy(self, engines: int, own: Sequence[int], seed: int) -> Front:
        match self.kind:
            case "round_robin":
                return Balancer(engines, round_robin(), self.breaker, own)
            case "least_request":
                return Balancer(engines, two_choices(seed), self.breaker, own)
            case "shortest_queue":
                return Balancer(engines, shortest, self.breaker, own)
        return Haproxy(engines, self.limit, self.queue_s, own)

    def engine(self, params: EngineParams) -> EngineParams:
        """Return the engine as this contender's operator sets it."""
        return replace(
            params,
            max_num_seqs=min(self.max_num_seqs or params.max_num_seqs, params.max_num_seqs),
            scheduling_policy="priority" if self.engine_priority else params.scheduling_policy,
        )

    @property
    def scrape_interval_s(self) -> float | None:
        """Return how often it scrapes; None: never."""
        return None if self.setting is None else self.setting.scrape_interval_s


# ---- the standing ones

NAMES = ("round_robin", "least_request", "circuit_breaker", "tuned_engine", "haproxy", "original", "ours")
TAKE_SETTINGS = ("circuit_breaker", "tuned_engine", "haproxy", "original", "ours")
HAPROXY_QUEUE_S = 1.6
"""The best `timeout queue` for the standing mix on both presets; with one class, that class's budget."""
BEST_FIXED = {"a100-8b": 96, "h100-32b": 12}
"""The limit per engine that a patient operator would find for each preset: of those from 4 to 256, simulated at 120 %
load, the one with the most goodput."""
ENGINE_QUEUE = {"a100-8b": 14, "h100-32b": 1}
"""How many more the tuned engine may hold waiting: up to 1.15 times its limit in all; 1.5 times was far worse."""


def contender(
    text: str, preset: str, classes: tuple[Klass, ...], changes: Iterable[str] = (), *, best: int | None = None
) -> Contender:
    """Return the contender called `text`: a name, or a name and its own settings: `ours,key=value,key=value`.

    `changes` (`key=value`) hold for every `ours`; its own settings win. `best` is the fixed limit per engine that
    the tuned baselines use. Raises ConfigError.
    """
    name, *own = text.split(",")
    if name not in NAMES:
        raise ConfigError("command line", [f"--contender: {name!r} is unknown; known are {', '.join(NAMES)}"])
    if own and name not in TAKE_SETTINGS:
        raise ConfigError("command line", [f"--contender: {name} takes no settings; {', '.join(TAKE_SETTINGS)} do"])
    limit = best or BEST_FIXED.get(preset, 64)
    queue_s = classes[0].budget_s if len(classes) == 1 else HAPROXY_QUEUE_S
    if name in ("circuit_breaker", "tuned_engine", "haproxy"):
        limit, queue_s = _proxy_settings(name, own, limit, queue_s)
    match name:
        case "round_robin" | "least_request":
            return Contender(name, name)
        case "circuit_breaker":
            return Contender(text, "least_request", breaker=limit)
        case "haproxy":
            return Contender(text, "haproxy", limit=limit, queue_s=queue_s)
        case "tuned_engine":
            return Contender(
                text,
                "shortest_queue",
                breaker=limit + (-(-limit * 15 // 100) if own else ENGINE_QUEUE.get(preset, -(-limit * 15 // 100))),
                max_num_seqs=limit,
                engine_priority=True,
            )
        case "original":
            endless = tuple(RequestClass(klass.name, klass.priority, FOR_EVER_S) for klass in classes)
            policy = Policy(classes=endless, patience_s=5.0, binding=Binding.BOUND, shed=False, fair=False)
            setting = Setting(policy, max_running_requests=10, own_books=False)
            return Contender(text, "core", setting=_change(setting, own))
        case _:
            ordered = tuple(RequestClass(klass.name, klass.priority, klass.budget_s) for klass in classes)
            return Contender(text, "core", setting=_change(Setting(Policy(classes=ordered)), [*changes, *own]))


# ---- settings by name


def _proxy_settings(name: str, own: Iterable[str], limit: int, queue_s: float) -> tuple[int, float]:
    """Read `limit=N`, and for HAProxy `queue=DURATION`, over what holds without. Raises ConfigError."""
    known = ("limit", "queue") if name == "haproxy" else ("limit",)
    for setting in own:
        key, _, value = setting.partition("=")
        if key not in known:
            raise ConfigError("command line", [f"--contender {setting}: {name} knows {' and '.join(known)}"])
        try:
            if key == "limit":
                limit = _count(value)
            else:
                queue_s = _duration(value)
        except ValueError as error:
            raise ConfigError("command line", [f"--contender {setting}: {error}"]) from None
    return limit, queue_s


def _duration(value: str) -> float:
    seconds = parse_duration(value)
    if seconds is None:
        raise ValueError(f"must be a duration like 10s or 250ms, not {value!r}")
    return seconds


def _interval(value: str) -> float:
    seconds = _duration(value)
    if seconds < 0.01:
        raise ValueError(f"must be 10ms or more, not {value}")
    return seconds


def _number(value: str, least: float, most: float) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"must be a number, not {value!r}") from None
    if not least <= number <= most:
        raise ValueError(f"must be {least:g} to {most:g}, not {value}")
    return number


def _count(value: str) -> int:
    return int(_number(value, 1, 1e12))


def _limit(value: str) -> int | None:
    return None if value == "adaptive" else _count(value)


def _switch(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f"must be true or false, not {value!r}")
    return value == "true"


def _replicas_fault(value: str) -> str:
    from extproc.simulate.replicas import FAULTS

    if value not in FAULTS:
        raise ValueError(f"must be one of {', '.join(FAULTS)}")
    return value


def _binding(value: str) -> Binding:
    if value not in ("late", "bound"):
        raise ValueError(f"must be late or bound, not {value!r}")
    return Binding(value)


_KEYS: dict[str, tuple[str, str, Callable[[str], object]]] = {
    "adapter_affinity": ("policy", "adapter_affinity", _switch),
    "binding": ("policy", "binding", _binding),
    "enable_queue": ("policy", "enable_queue", _switch),
    "fair": ("policy", "fair", _switch),
    "first_byte_probe": ("policy", "first_byte_probe", _switch),
    "kv_capacity_tokens": ("setting", "kv_capacity_tokens", _count),
    "max_gpu_perc": ("policy", "max_kv_usage", lambda value: _number(value, 0, 100) / 100),
    "max_prompt_tokens": ("policy", "max_prompt_tokens", _count),
    "max_queue_wait_time": ("policy", "patience_s", _duration),
    "max_queued_requests": ("policy", "max_queued_requests", lambda value: int(_number(value, 0, 1e9))),
    "max_running_requests": ("setting", "max_running_requests", _limit),
    "own_books": ("setting", "own_books", _switch),
    "replicas": ("setting", "replicas", _count),
    "replicas_fault": ("setting", "replicas_fault", _replicas_fault),
    "reads_adapters": ("setting", "reads_adapters", _switch),
    "reads_n": ("setting", "reads_n", _switch),
    "scrape_interval": ("setting", "scrape_interval_s", _interval),
    "session_affinity": ("policy", "session_affinity", _switch),
    "session_homes": ("setting", "session_homes", _switch),
    "shed": ("policy", "shed", _switch),
    "short_first": ("policy", "short_first", _switch),
    "stale_after_s": ("policy", "stale_after_s", _duration),
}
"""What `--set` knows: named as in the config file where such a key exists, else as in Policy or Setting."""

_OF_CLASS: dict[str, tuple[str, Callable[[str], object]]] = {
    "budget": ("budget_s", _duration),
    "priority": ("priority", lambda value: int(_number(value, -1000, 1000))),
    "weight": ("weight", lambda value: _number(value, 0.001, 1000)),
}
KEYS = (*(f"{key}.CLASS" for key in _OF_CLASS), *_KEYS)


def _change(setting: Setting, changes: Iterable[str]) -> Setting:
    problems = []
    for change in changes:
        key, equals, value = change.partition("=")
        try:
            setting = _changed(setting, key.strip(), value.strip(), given=bool(equals))
        except ValueError as error:
            problems.append(f"--set {change}: {error}")
    if problems:
        raise ConfigError("command line", problems)
    return setting


def _changed(setting: Setting, key: str, value: str, *, given: bool) -> Setting:
    if not given:
        raise ValueError("must be key=value")
    policy = setting.policy
    of_class, dot, chosen = key.partition(".")
    if dot and of_class in _OF_CLASS:
        names = [klass.name for klass in policy.classes]
        if chosen not in names:
            raise ValueError(f"there is no such class; classes are {', '.join(names)}")
        its_attribute, its_parse = _OF_CLASS[of_class]
        its_change: dict[str, Any] = {its_attribute: its_parse(value)}
        classes = tuple(replace(klass, **its_change) if klass.name == chosen else klass for klass in policy.classes)
        return replace(setting, policy=replace(policy, classes=classes))
    if key not in _KEYS:
        raise ValueError(f"unknown key; known are {', '.join(KEYS)}")
    where, attribute, parse = _KEYS[key]
    change: dict[str, Any] = {attribute: parse(value)}
    if where == "setting":
        return replace(setting, **change)
    return replace(setting, policy=replace(policy, **change))
