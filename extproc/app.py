"""The sidecar's life, top down: build, start, run, drain. The composition root: nothing else knows all parts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from functools import partial
from typing import TYPE_CHECKING

from extproc.admin.http import Admin
from extproc.admin.state import FileState, Others
from extproc.admission.controller import Controller
from extproc.config import Config, changes, cross_check, load_config, target_of
from extproc.endpoints.discovery.file import ConfigFile
from extproc.endpoints.discovery.source import Sources
from extproc.endpoints.health import HealthChecks
from extproc.endpoints.roster import Roster
from extproc.endpoints.telemetry.scraper import Scraper
from extproc.envoy.clusters import ClustersFile, EnvoyAdmin
from extproc.errors import ConfigError, pip_install
from extproc.garbage import Garbage
from extproc.memory import Ebb
from extproc.observe.aliases import Aliases
from extproc.observe.capacity import Capacity
from extproc.observe.genai import GenAi
from extproc.observe.log import LOOK_S, QueueLog
from extproc.observe.metrics import Metrics
from extproc.observe.paces import Paces
from extproc.observe.served import Served
from extproc.observe.stories import Stories
from extproc.stream import wire
from extproc.stream.ages import Ages
from extproc.stream.dialect import EndpointPicker
from extproc.stream.dry_run import DryRun
from extproc.stream.gate import Gate
from extproc.stream.objectives import classes_of
from extproc.stream.reception import Reception
from extproc.tasks import Tasks
from extproc.transport.completion import server_on
from extproc.transport.completion.loop import CompletionLoop
from extproc.transport.listener import Listener, SocketRights
from extproc.transport.tls import ServerTls
from extproc.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from prometheus_client.metrics_core import Metric

    from extproc.config import EndpointConfig, ReplicasConfig
    from extproc.endpoints.telemetry.target import Target
    from extproc.observe.otlp import OtlpMetrics
    from extproc.observe.traces import QueueSpans
    from extproc.replicas.member import Membership
    from extproc.replicas.observe import ReplicaMetrics
    from extproc.replicas.picture import Role
    from extproc.stream.gate import Observer

log = logging.getLogger("extproc.app")

POLL_S = 0.05
LAST_WORDS_S = 2.0
"""How long a drain waits for the next refusal to reach Envoy: by the thousand they take a while, and a stream that is
cut before looks like a crash."""
HEALTH_SEEN_S = 1.0
"""How long Envoy is given to notice that we want no new requests (its health check interval in our config)."""

FIRST_SEEN_S = 5.0
"""How long a start waits for sources to see their endpoints; a model nobody has listed yet would get 404."""

MOST_CHANGES = 20
"""Lines of what a reload changed; more are at level debug."""

CHANGEABLE = frozenset(
    (
        *("endpoints", "discovery", "allowed_addresses", "health_check", "classes", "enable_queue"),
        *("drain_timeout", "hand_over"),
        *("max_running_requests", "max_queue_wait_time", "binding", "max_queued_requests", "max_prompt_tokens"),
        *("routes", "default_model", "no_endpoint_budget", "overflow_clusters", "tenants"),
        *("session_affinity", "adapter_affinity", "adaptive_limit", "learning"),
        *("shed", "tenant_fairness", "short_prompts_first", "max_gpu_perc", "gpu_utilization_perc"),
    )
)
"""Keys that a reload changes. Any other keeps its value until a restart."""


class App:
    """One sidecar."""

    def __init__(
        self,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        path: Path | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Build all parts of a sidecar that will run on `loop`; `path`: the file to follow, `environ` wins over it."""
        self.config = config
        self.tasks = Tasks()
        self.turns = Turns()
        controller = Controller(config.policy())
        dry_run = DryRun(config.policy(), controller.endpoints) if config.dry_run else None
        if dry_run is not None:
            controller.watch(dry_run.happened)
        self.scraper = Scraper(
            interval_s=config.scrape_interval,
            timeout_s=config.scrape_timeout,
            stale_after_s=config.telemetry_stale_after,
            loop=loop,
            turns=self.turns,
        )
        self.metrics = Metrics(
            controller,
            lambda: self.reception.streams,
            self.scraper,
            clock=loop.time,
            ignored=lambda: self.reception.requests.ignored,
            clock_offset_s=lambda: self.ages.offset_s,
            config_is_refused=lambda: self.file is not None and self.file.is_refused,
            overflowed=lambda: self.reception.overflowed,
            bad_answers=lambda: self.reception.bad_answers,
            second_tries=lambda: self.reception.again.count,
            left_out=lambda: self.sources.left_out + self.roster.left_out,
            transport="completion_queue" if isinstance(loop, CompletionLoop) else "asyncio",
            rehearsed=None if dry_run is None else dry_run.counts,
            restarts=self.tasks.restarts,
            told_models=lambda: self.reception.told_models,
            decides=lambda: self.membership is None or self.membership.replica.decides,
        )
        self.queue_log = QueueLog(controller, loop.time)
        self.ebb = Ebb(lambda: self.reception.streams)
        self.stories = Stories(controller, loop.time)
        self.spans = _spans() if config.tracing else None
        self.otlp = _otlp_metrics(self.metrics.registry.collect) if config.otlp_metrics else None
        genai = GenAi(loop.time, controller.knows_model) if config.otlp_metrics else None
        if genai is not None:
            self.metrics.add(genai)
        if config.metrics_aliases:
            pool = "" if config.inference_pool is None else config.inference_pool.name
            self.metrics.add(Aliases(controller, self.metrics, pool))
        self.capacity = Capacity(
            controller, loop.time, lambda: self.membership is None or self.membership.replica.decides
        )
        self.metrics.add(self.capacity)
        self.paces = Paces(controller, lambda: self.membership is None or self.membership.replica.decides)
        self.metrics.add(self.paces)
        served = Served(controller, lambda: self.membership is None or self.membership.replica.decides)
        self.metrics.add(served)
        self.queue_log.follow(served)
        everybody = (self.metrics, self.queue_log, self.stories, self.spans, genai)
        observers: list[Observer] = [observer for observer in everybody if observer is not None]
        self.membership: Membership | None = None
        if config.replicas is None:
            self.gate = Gate(controller, loop, observers)
        else:
            self.gate, self.membership = _among_others(config.replicas, controller, loop, observers)
            self.metrics.add(_replica_metrics(self.membership), at_once=True)  # our books count what others forwarded
        self._targets: dict[str, Target] = {}
        self._scrapes = True
        self.ages = Ages(config.longest_budget_s)
        self.ages.woke = self._woke
        self.reception = Reception(
            self.gate,
            config.header_names(),
            self.ages,
            wire.FIELDS_NAMESPACE if config.request_fields else "",
            lambda: {klass.priority: klass.name for klass in controller.policy.classes},
            self.scraper.read_report,
            routes=config.routes_table(),
            default_model=config.default_model,
            server_timing=config.server_timing,
            second_try=config.second_try or "",
            unreached=self.scraper.look,
            dialect=EndpointPicker() if config.picks else None,
            read_model=config.picker.read_model,
            picks_without_end=config.picker.without_end == "pick",
            finished=None if genai is None else genai.finished,
        )
        self.reception.set_overflow(config.overflow)
        self.health = HealthChecks(
            self.gate.set_up, config.health_check, self.tasks, self.gate.heard_at, self.gate.is_unreached
        )
        self.scraper.is_there = self._looked
        self.roster = Roster(
            self.gate,
            self.reception,
            config,
            file=ClustersFile(config.envoy_clusters_file) if config.envoy_clusters_file is not None else None,
            envoy=EnvoyAdmin(config.envoy_admin) if config.envoy_admin is not None else None,
            put=self._follow,
            remove=self._unfollow,
            tasks=self.tasks,
        )
        self._priorities: Mapping[str, int] = {}  # of an InferencePool's objectives
        self._rank({})
        self.sources = Sources(self.roster.report, self._rank)
        self.file: ConfigFile | None = None
        if path is not None:
            load = partial(load_config, path, environ)
            self.file = ConfigFile(path, load, self._reload, self.metrics.config_reloads)
        self._following: asyncio.Task[None] | None = None
        self._sending: asyncio.Task[None] | None = None
        self.tls = None if config.tls is None else ServerTls(config.tls)
        self.listener = Listener(config.listen, SocketRights(config.socket_mode, config.socket_group), self.tls)
        probes = None if config.health_listen is None else Listener(config.health_listen)
        self.server = server_on(loop)(
            self.reception, self.listener, reflect=config.reflection, bodies=config.picks, probes=probes
        )
        self._restart_needed: tuple[str, ...] = ()  # keys whose values in the file are not those in use
        self.admin = Admin(
            config.admin,
            self.gate,
            self.metrics,
            self._file_state,
            self._others(),
            self.stories,
            self.capacity,
            self.tasks,
            self.paces,
            self.turns,
            served,
        )
        if self.membership is not None:
            self.membership.answer_with(self.admin.describe)
        self.garbage = Garbage(lambda: self.reception.streams, loop, self.turns.soon)
        self._known_bugs: set[str] = set()

    async def start(self) -> None:
        """Bind and serve. Raises StartError, with nothing left running."""
        if self.file is not None:  # before anything that takes time: an unhandled SIGHUP ends a process
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.file.poke)
        await self.admin.start()
        try:
            await self.health.start()
            self.sources.configure(self.config.sources)
            await self.sources.wait_first(FIRST_SEEN_S)
            self.roster.start()
            await self.scraper.start(self.gate.observe)
            await self.scraper.wait_first()  # what engines still run for a sidecar that died counts from the start
            self._expect_replays()
            if self.membership is not None:
                await self.membership.start(self._turned, self._expect_replays)
            self.garbage.begin()  # nobody waits yet, and what stays is there
            await self.server.start()
        except BaseException:
            await self._stop_following()
            await self.scraper.stop()
            await self.server.stop(0)
            if self.membership is not None:
                await self.membership.stop()
            await self.admin.stop()
            raise
        if self.otlp is not None:
            self._sending = self.tasks.keep("otlp metrics", "otlp metrics", self.otlp.run)
        if self.file is not None:
            follow = partial(self._follow_file, self.file)
            self._following = self.tasks.keep("config file", "config file", follow)
        self.ages.look()  # starting may have taken long
        self.admin.ready = True
        config = self.config
        log.info(
            "serving ext_proc at %s, admin at http://%s, %d endpoints, queue %s",
            config.listen,
            config.admin,
            len(config.endpoints),
            config.mode,
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain. A second signal cuts the drain short."""
        await self.start()
        loop = asyncio.get_running_loop()
        stop, hurry = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            (hurry if stop.is_set() else stop).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        await self.attend(stop)
        await self.drain(hurry)

    async def attend(self, stop: asyncio.Event) -> None:
        """Do what is due now and then, from the start until `stop` is set."""
        while not stop.is_set():
            self._look()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), LOOK_S)

    def _look(self) -> None:
        """Do what is due now and then. A bug there ends neither the process nor the other looks; it is told once."""
        for look in (
            self.queue_log.look,
            self.garbage.look,
            self.ebb.look,
            self.ages.look,
            *([self.tls.look] if self.tls is not None else []),
        ):
            try:
                look()
            except Exception as error:
                kind = f"{look.__qualname__}: {type(error).__name__}"
                if kind not in self._known_bugs:
                    self._known_bugs.add(kind)
                    log.exception("%s, told once and tried again all the time: please report it", kind)

    # ---- what changes while it runs

    async def _reload(self, config: Config) -> None:
        """Take over a changed configuration in one moment, then say what is another. Raises ConfigError."""
        old = self.config
        self.adopt(config)
        await self.roster.settled()
        told = await asyncio.to_thread(changes, old, self.config)  # milliseconds for some hundred endpoints
        for number, line in enumerate(told):
            log.log(logging.INFO if number < MOST_CHANGES else logging.DEBUG, "configuration: %s", line)
        if len(told) > MOST_CHANGES:
            log.info("configuration: and %d more changes", len(told) - MOST_CHANGES)
        log.info("configuration taken over: %d endpoint(s) in the file", len(config.endpoints))

    def adopt(self, config: Config) -> None:
        """Take over a changed configuration, as far as that works while running. Raises ConfigError."""
        old = self.config
        is_empty = not config.endpoints and not config.sources
        if is_empty and "endpoints" not in config.model_fields_set and (old.endpoints or old.sources):
            raise ConfigError(
                "configuration",
                ["endpoints: all are gone, as from a file that was cut off; say `endpoints: []` if that is meant"],
            )
        fixed = [
            key for key in Config.model_fields if key not in CHANGEABLE and getattr(config, key) != getattr(old, key)
        ]
        if "dry_run" in fixed and config.dry_run and config.enable_queue and not old.enable_queue:
            fixed.append("enable_queue")  # who asks for a dry run must not get the queue itself until the restart
        config = config.model_copy(update={key: getattr(old, key) for key in fixed})
        if fixed:  # else it is as it was read, and was checked then
            kept = f"with {', '.join(fixed)} as before, which a restart would change: "
            problems = cross_check(config)
            if problems:
                raise ConfigError("configuration", [kept + problem for problem in problems])
            log.warning("%s: can't change while running; the old value stays until a restart", ", ".join(fixed))
        if config.longest_budget_s > old.longest_budget_s:
            log.warning(
                "the longest budget is now %gs: Envoy's message_timeout must be above it (`extproc check --envoy`)",
                config.longest_budget_s,
            )
        self.config = config
        self._restart_needed = tuple(fixed)
        self.ages.oldest_s = config.longest_budget_s
        self.reception.routes = config.routes_table()
        self.reception.set_overflow(config.overflow)
        self.reception.requests.default_model = config.default_model
        self._rank(self._priorities)
        policy = config.policy()
        if policy != self.gate.controller.policy:  # else all endpoints are looked at for nothing
            self.gate.set_policy(policy)
        self.health.configure(config.health_check)
        try:
            self.roster.configure(config)
        finally:  # what the core can't take over for a fault of ours is tried again with the next change: of these, too
            self.sources.configure(config.sources)

    def _rank(self, priorities: Mapping[str, int]) -> None:
        """Take over what an InferencePool's objectives are worth; what the file lists is known without it."""
        self._priorities = priorities
        known = classes_of(priorities, self.config.policy().classes, self.config.objectives)
        self.reception.requests.class_of_objective = lambda name: known.get(name, name)

    async def _follow_file(self, file: ConfigFile) -> None:
        await file.run(self.config)

    def _file_state(self) -> FileState:
        return FileState(self.file is not None and self.file.is_refused, self._restart_needed)

    def _others(self) -> Others | None:
        """Return what pages show of other sidecars; None: we are alone."""
        if self.membership is None:
            return None
        from extproc.replicas.observe import Shown

        return Shown(self.membership, self.gate)

    def _expect_replays(self) -> None:
        """Be ready for what Envoy held for a sidecar that is gone: our own last life, or another one."""
        self.ages.expect_replays()
        self.gate.expect_replays(lambda: self.ages.offset_s)

    def _woke(self) -> None:
        if self.admin.ready:
            log.warning("this process did nothing for some seconds: expecting that Envoy sends again what it held")
            self.gate.wake()
            self._expect_replays()

    def _turned(self, role: Role) -> None:
        """Scrape while we lead, so that engines are scraped once and not by each of us."""
        if role.value == "seeking":
            return
        self._scrapes = role.value == "leading"
        for name, target in self._targets.items():
            if self._scrapes:
                self.scraper.put(target)
            else:
                self.scraper.remove(name)

    def _follow(self, endpoint: EndpointConfig, waits: bool) -> None:
        target = self._targets[endpoint.name] = target_of(endpoint)
        if self._scrapes:
            self.scraper.put(target)
        self.health.put(endpoint.name, endpoint.address, waits=waits)

    def _looked(self, name: str, is_there: bool) -> None:
        self.health.page(name, self.gate.now(), is_there=is_there)

    def _unfollow(self, name: str) -> None:
        self._targets.pop(name, None)
        self.scraper.remove(name)
        self.health.remove(name)

    async def _stop_following(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self.sources.stop()
        await self.roster.stop()
        await self.health.stop()

    async def drain(self, hurry: asyncio.Event) -> None:
        """Leave to a successor what we hold, a second after we are seen to leave; or, without `hand_over`: place or
        refuse who waits, and let answers run out; all within drain_timeout."""
        self.admin.ready, self.admin.drains = False, True
        await self.server.refuse_new()
        self.gate.stop_gathering()
        if self.membership is not None:
            self.membership.resign()
        grace_s, hands_over = self.config.drain_timeout, self.config.hands_over
        deadline = self.gate.now() + grace_s
        until = "left to a successor" if hands_over else f"at most {grace_s:g}s"
        log.info("draining: %d waiting, %d streams, %s", self.gate.waiting, self.reception.streams, until)
        seen = self.gate.now() + min(HEALTH_SEEN_S, grace_s / 2)
        while not hurry.is_set() and self.gate.now() < deadline - min(1.0, grace_s / 4):
            if self.gate.now() >= seen and (self.gate.waiting == 0 or hands_over):
                break
            await asyncio.sleep(POLL_S)
        if hands_over:
            self.gate.leave()  # Envoy sends again what waits, and lets what runs go on; the successor counts it anew
            await self.server.stop(0)
        else:
            self.reception.drain()
            await asyncio.sleep(POLL_S)  # lets the refusals go out before the port closes
            await self._last_words(hurry)
            await self.server.stop(0 if hurry.is_set() else max(deadline - self.gate.now(), POLL_S))
        if self.membership is not None:
            await self.membership.stop()
        await self._stop_following()
        await self.scraper.stop()
        await self.admin.stop()
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
        for sender in (self.spans, self.otlp):
            if sender is not None:
                await sender.stop()
        log.info("stopped")

    async def _last_words(self, hurry: asyncio.Event) -> None:
        """Wait until all refusals have reached Envoy, that is: their streams ended; or until none does for a while."""
        left = least = self.gate.undelivered + self.reception.refused
        patient_until = self.gate.now() + LAST_WORDS_S
        while left and not hurry.is_set() and self.gate.now() < patient_until:
            await asyncio.sleep(POLL_S)
            left = self.gate.undelivered + self.reception.refused
            if left < least:
                least, patient_until = left, self.gate.now() + LAST_WORDS_S


def _among_others(
    config: ReplicasConfig,
    controller: Controller,
    loop: asyncio.AbstractEventLoop,
    observers: list[Observer],
) -> tuple[Gate, Membership]:
    from extproc.replicas.gate import SharedGate
    from extproc.replicas.member import Membership

    gate = SharedGate(controller, loop, observers)
    return gate, Membership(config, gate, loop)


def _replica_metrics(membership: Membership) -> ReplicaMetrics:
    from extproc.replicas.observe import ReplicaMetrics

    return ReplicaMetrics.of(membership)


def _spans() -> QueueSpans:
    try:
        from extproc.observe.traces import QueueSpans
    except ImportError as error:
        raise _no_opentelemetry("tracing", error) from None
    return QueueSpans()


def _otlp_metrics(collect: Callable[[], Iterable[Metric]]) -> OtlpMetrics:
    try:
        from extproc.observe.otlp import OtlpMetrics
    except ImportError as error:
        raise _no_opentelemetry("otlp_metrics", error) from None
    return OtlpMetrics(collect)


def _no_opentelemetry(key: str, error: ImportError) -> ConfigError:
    problem = f"{key}: needs OpenTelemetry, which is not here: {pip_install('otel')} ({error})"
    return ConfigError("configuration", [problem])
