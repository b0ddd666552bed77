"""A storm of random events against the core: deterministic from its seed, endless if you like.

    python -m tests.unit.admission.storm --events 3000000 --seed 1

Every event is checked cheaply, and every `--check-every` events everything is recomputed (`audit.py`). A failure prints
the command that reproduces it with all checks at every event. Plain `random.Random`: no hypothesis, for speed.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from extproc.admission.load import Load
from extproc.admission.tenants import NO_RULES, TenantRule, TenantRules
from extproc.admission.ticket import State
from extproc.admission.values import Answer, Binding, EndpointSpec, Policy, Request, RequestClass

from .audit import BrokenError
from .audited import Audited

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.ticket import Ticket

CLASSES = (RequestClass("std", 0, 8.0), RequestClass("int", 10, 2.0), RequestClass("batch", -5, 40.0))
NAMES = ("a", "b", "c", "d", "e")
MODELS = (frozenset[str](), frozenset({"m1"}), frozenset({"m1", "m2"}), frozenset({"m2"}))
TENANTS = ("t0", "t0", "t0", "t1", "t2", "t3", "t4")
RULES = (
    NO_RULES,
    TenantRules(default=TenantRule(5, 2)),
    TenantRules({"t0": TenantRule(20, 0, 0.5), "t1": TenantRule(None, 3, 4.0)}, TenantRule(9, 1), apart=False),
)
PROMPTS = (0, 10, 100, 500, 2000, 9000)
HERD = (*(10, 20, 40) * 10, 2600)  # an elephant among mice: what the guard is for


MIXED = (10, *6 * (1,), *5 * (0.4,), 3, 0.4)
"""How often each kind of `Answer` comes, as they stand there."""


@dataclass
class Weather:
    """How often what happens; changes now and then, so that floods, droughts and churn all come by."""

    offer: float
    release: float
    cancel: float
    churn: float
    step_s: float
    prompts: tuple[int, ...] = PROMPTS
    budgets: tuple[float | None, ...] = (None, None, None, 0.0, 0.3, 5.0, 1e9)
    share: float = 0.0
    answers: tuple[float, ...] = MIXED
    sick: str = ""  # an endpoint that answers everything by `sickness`
    sickness: Answer = Answer.FAILED


class Storm:
    """One seeded run."""

    def __init__(self, seed: int, *, check_every: int = 200) -> None:
        self.random = Random(seed)
        self.check_every = check_every
        self.policy = Policy(classes=CLASSES, patience_s=0.5, session_memory=50, max_queued_requests=300)
        self.audited = Audited(self.policy, always=check_every == 1)
        self.ids = 0
        self.allows = seed % 3 != 0  # where gateways choose, every change of pools looks at all who wait
        self.weather = self._forecast()
        # Lists beside the audit's dicts: a random pick must not cost a walk.
        self._waiting: list[Ticket] = []
        self._leased: list[Ticket] = []

    def run(self, events: int, progress: Callable[[int], None] = lambda _: None) -> None:
        """Let `events` events happen, and check everything at the end."""
        self._put()
        number = -1
        while self.audited.events < events:
            number += 1
            if number % 2000 == 0:
                self._change_weather()
            self._step()
            if number % self.check_every == 0:
                self.audited.check()
            if number % 100_000 == 0:
                progress(number)
        self.audited.check()

    def _change_weather(self) -> None:
        """Choose the next 2000 steps. Now and then: token limits are what counts, nobody gives up, calm else."""
        self.weather = self._forecast()
        if self.random.random() < 0.3:
            self.weather = Weather(1.15, 1.0, 0.03, self.random.choice((0.0, 0.003)), 0.001, HERD, (1e9,))
            self.audited.set_policy(replace(self.policy, enable_queue=True, shed=False, max_queued_requests=300))
            for name in NAMES[:3]:
                self.audited.put(EndpointSpec(name, max_running_requests=20, kv_capacity_tokens=3000))
                self.audited.set_up(name, is_up=True)

    def _forecast(self) -> Weather:
        pick = self.random.choice
        return Weather(
            offer=pick((0.8, 1.0, 1.3)),
            release=pick((0.5, 1.0, 1.0, 1.5)),
            cancel=pick((0.0, 0.1, 0.3)),
            churn=pick((0.0, 0.05, 0.05, 0.3)),
            step_s=pick((0.001, 0.02, 0.02, 0.2)),
            share=pick((0.0, 0.0, 0.1, 0.5)),
            answers=pick((MIXED, MIXED, (0, 1, *12 * (0,)), (0, *13 * (1,)))),
            sick=pick(("", *NAMES[:2])),
            sickness=pick(tuple(Answer)),
        )

    def _step(self) -> None:
        weather = self.weather
        doings = (
            self._offer,
            self._release,
            self._cancel,
            self._first_token,
            self._answered,
            self._move,
            self._observe,
            self._pass_time,
            self._churn,
            self._share,
        )
        fixed = (0.2, 0.2, 0.1, 0.1, 0.6)
        weights = (weather.offer, weather.release, weather.cancel, *fixed, weather.churn, weather.share)
        self.random.choices(doings, weights)[0]()

    # ---- events

    def _offer(self) -> None:
        random, now = self.random, self.audited.now
        self.ids += 1
        request = Request(
            id=str(self.ids),
            arrived=now - random.choice((0.0, 0.0, 0.0, 0.0, 1.5)),
            model=random.choice((None, "m1", "m1", "m2", "m3", "nobody's")),
            request_class=random.choice(("std", "std", "int", "batch", "no such class")),
            tenant=random.choice(TENANTS),
            session=f"s{random.randrange(100)}" if random.random() < 0.3 else None,
            home=random.choice((*NAMES, "nowhere")) if random.random() < 0.2 else None,
            budget_s=random.choice(self.weather.budgets),
            prompt_tokens=random.choice(self.weather.prompts),
            max_output_tokens=random.choice((None, None, 1, 50, 100_000)),
            sequences=random.choice((1, 1, 1, 1, 1, 1, 2, 4, 30)),
            kind=random.choice(("", "image")),
            allowed=frozenset(random.sample(NAMES, random.choice((1, 1, 2, 3))))
            if self.allows and random.random() < 0.15
            else None,
        )
        self._waiting.append(self.audited.offer(request))

    def _release(self) -> None:
        ticket = self._random_leased()
        if ticket is None:
            return
        if ticket.endpoint is not None and ticket.endpoint.name == self.weather.sick:
            answer = self.weather.sickness
        else:
            answer = self.random.choices(tuple(Answer), self.weather.answers)[0]
        self._leased.remove(ticket)
        self.audited.release(ticket, answer)

    def _cancel(self) -> None:
        self._sort_out()
        if self._waiting:
            self.audited.cancel(self.random.choice(self._waiting))

    def _share(self) -> None:
        """What happens where several sidecars share endpoints."""
        random, audited = self.random, self.audited
        match random.randrange(4):
            case 0:
                self.ids += 1
                request = Request(
                    id=str(self.ids), arrived=audited.now, model="m1", prompt_tokens=random.choice(PROMPTS)
                )
                self._waiting.append(
                    audited.adopt(request, random.choice((*NAMES, "nowhere")), begun=random.random() < 0.5)
                )
            case 1:
                ticket = self._random_leased()
                if ticket is not None:
                    self._leased.remove(ticket)
                    audited.disown(ticket)
            case 2:
                self._sort_out()
                taken = random.sample(self._waiting, min(len(self._waiting), 3))
                for ticket in taken:
                    if ticket in audited.waiting:
                        audited.withdraw(ticket)
                for ticket in taken:
                    if ticket.state is State.NEW:
                        audited.offer_again(ticket)
            case _:
                audited.set_quota(random.choice(NAMES), random.choice((None, None, 0, 1, 3)))

    def _first_token(self) -> None:
        ticket = self._random_leased()
        if ticket is not None:
            self.audited.first_token(ticket)

    def _answered(self) -> None:
        ticket = self._random_leased()
        if ticket is not None:
            self.audited.answered(ticket)

    def _move(self) -> None:
        ticket = self._random_leased()
        if ticket is not None:
            self.audited.move(ticket, self.random.choice((*NAMES, "nowhere")))
            if ticket not in self.audited.leased:
                self._leased.remove(ticket)

    def _observe(self) -> None:
        random = self.random
        load = Load(
            running=random.choice((None, 0.0, 3.0, 60.0)),
            waiting=random.choice((None, 0.0, 0.0, 9.0)),
            kv_usage=random.choice((None, 0.0, 0.3, 0.5, 0.93, 0.99)),
            gpu_usage=random.choice((None, 1.0)),
            tokens_per_s=random.choice((None, 0.0, 500.0, 2000.0)),
            kv_capacity_tokens=random.choice((None, None, 8000)),
            preemptions=random.choice((None, 0, 0, 2)),
            prompt_tokens=random.choice((None, None, 0, 300, 5000)),
            output_tokens=random.choice((None, 0, 4000)),
            asleep=random.choice((None, None, False, random.random() < 0.1)),
            max_running=random.choice((None, None, None, 4)),
        )
        if random.random() < 0.2:
            runs, waits = random.choice(((("m1",), ("m2",)), (("m3",), ("m1", "m2"))))
            load = replace(load, adapters=runs, waiting_adapters=waits, adapter_slots=1)
        if load.prompt_tokens is not None:
            load = replace(load, first_tokens=min(load.prompt_tokens // 300, 5))
            load = replace(load, cached_tokens=random.choice((None, 0, load.prompt_tokens // 2, 9000)))
        name = random.choice((*NAMES, "nowhere"))
        if random.random() < 0.3:
            self.audited.report(name, Load(load.running, load.waiting, load.kv_usage))
        else:
            self.audited.observe(name, load)

    def _pass_time(self) -> None:
        chance = self.random.random()
        if chance < 0.0005:
            self.audited.advance(self.random.choice((30.0, 3600.0)), late=self.random.random() < 0.5)
        elif chance < 0.02:
            self.audited.advance(self.random.uniform(0.1, 3.0), late=self.random.random() < 0.5)
        else:
            self.audited.advance(self.random.expovariate(1.0) * self.weather.step_s)

    def _churn(self) -> None:
        random, audited = self.random, self.audited
        name = random.choice(NAMES)
        match random.randrange(9):
            case 0 | 1 | 2:
                self._put()
            case 3:
                audited.remove(name)
            case 4 | 5 | 6:
                audited.set_up(name, is_up=None if random.random() < 0.1 else random.random() < 0.6)
            case 7:
                audited.know_models(random.choice(("m1", "m2", "m3")), expects_any=random.random() < 0.5)
            case _:
                self._change_policy()

    def _put(self) -> None:
        random = self.random
        specs = [
            EndpointSpec(
                name=random.choice(NAMES),
                models=random.choice(MODELS),
                max_running_requests=random.choice((None, 1, 2, 5, 20)),
                kv_capacity_tokens=random.choice((None, None, 3000, 20_000)),
                address=random.choice(("", "x", "x", "y", "z")),
            )
            for _ in range(random.choice((1, 1, 1, 2, 6)))
        ]
        self.audited.put(*specs)

    def _change_policy(self) -> None:
        random = self.random
        classes = (replace(CLASSES[0], budget_s=random.choice((5.0, 8.0))), *CLASSES[1:])
        if random.random() < 0.5:  # all of one priority, and with weights
            classes = tuple(
                replace(klass, priority=0, weight=weight)
                for klass, weight in zip(classes, (4.0, 1.0, 0.5), strict=True)
            )
        self.policy = Policy(
            enable_queue=random.random() < 0.9,
            classes=classes,
            tenants=random.choice(RULES),
            no_endpoint_budget_s=random.choice((None, 1.0, 20.0)),
            patience_s=random.choice((0.0, 0.5, 3.0)),
            binding=random.choice((Binding.LATE, Binding.LATE, Binding.BOUND)),
            max_queued_requests=random.choice((0, 50, 300, 300)),
            shed=random.random() < 0.5,
            fair=random.random() < 0.8,
            short_first=random.random() < 0.1,
            max_prompt_tokens=random.choice((500, 4096, None)),
            max_gpu_usage=random.choice((None, None, 0.9)),
            stale_after_s=random.choice((0.3, 2.0, 10.0)),
            first_byte_probe=random.random() < 0.3,
            session_memory=random.choice((0, 10, 50)),
            next_choices=random.choice((0, 0, 1, 3)),
        )
        self.audited.set_policy(self.policy)

    # ---- picking

    def _sort_out(self) -> None:
        audited = self.audited
        self._leased += [ticket for ticket in self._waiting if ticket in audited.leased]
        self._waiting = [ticket for ticket in self._waiting if ticket in audited.waiting]

    def _random_leased(self) -> Ticket | None:
        if not self._leased or self.random.random() < 0.1:
            self._sort_out()
        return self.random.choice(self._leased) if self._leased else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.unit.admission.storm", description=__doc__.split("\n")[0])
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check-every", type=int, default=200, help="recompute everything after so many events")
    asked = parser.parse_args(arguments)
    storm = Storm(asked.seed, check_every=asked.check_every)
    began = time.monotonic()

    def progress(number: int) -> None:
        core = storm.audited.core
        line = f"{number:>9} events  {time.monotonic() - began:6.1f} s  {core.waiting:4} waiting  {core}"
        print(line[:150])

    try:
        storm.run(asked.events, progress)
    except Exception as error:
        again = f"python -m tests.unit.admission.storm --seed {asked.seed} --events {asked.events} --check-every 1"
        print(f"BROKEN near event {storm.audited.events}: {error}\nreproduce: {again}", file=sys.stderr)
        if isinstance(error, BrokenError):
            return 1
        raise
    counts = "  ".join(f"{outcome.value}={count}" for outcome, count in storm.audited.outcomes.most_common())
    took_s = time.monotonic() - began
    print(f"{storm.audited.events} events, seed {asked.seed}, {took_s:.1f} s: 0 invariants broken\n{counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
