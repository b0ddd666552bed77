"""`extproc simulate`: flags in, a table and a page out."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from extproc.config import load_config
from extproc.engine.params import PRESETS, EngineParams
from extproc.errors import ConfigError
from extproc.simulate import report
from extproc.simulate.contenders import KEYS, NAMES
from extproc.simulate.plan import Plan, capacity
from extproc.simulate.plan import run as run_plan
from extproc.simulate.replay import replay
from extproc.simulate.sizing import fewest
from extproc.simulate.traces import look
from extproc.simulate.workload import BATCH, CLASSES, INTERACTIVE, STANDARD, Klass, Noise, Sessions, Workload
from extproc.simulate.world import Faults

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MOST_ENGINES = 256
AUTO = "auto"
BAR_WIDTH = 40
_CONSTANTS = (
    *("step_base_s", "prefill_token_s", "decode_seq_s", "context_token_s", "prefill_context_s"),
    *("max_num_seqs", "max_num_batched_tokens", "speed"),
)
"""Of an engine, what `--engine` sets: `EngineParams` has what each means."""
CHATTY = (0.80, 0.13, 0.07)
"""Shares of the classes when most requests are turns of sessions."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `extproc simulate`."""
    add = parser.add_argument
    add(
        "--preset",
        choices=[name for name in sorted(PRESETS) if name != "demo"],
        default="a100-8b",
        help="engine model (%(default)s)",
    )
    add(
        "--engine",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"a constant of your own engines over the preset's: kv_tokens, {', '.join(_CONSTANTS)}",
    )
    add(
        "--engines",
        type=_engines,
        default=4,
        metavar="N",
        help="how many (%(default)s); auto: find the fewest for the --trace",
    )
    add(
        "--meet",
        type=_number(0.01, 1),
        default=0.99,
        metavar="SHARE",
        help="for --engines auto: of each class's requests that must meet their objectives (%(default)g)",
    )
    add(
        "--load",
        type=_number(0.01, 20),
        nargs="+",
        metavar="SHARE",
        help="1.0 is what the engines can do, measured (1.2; a trace: as recorded)",
    )
    add("--duration", type=_number(1, 1e6), default=240.0, metavar="S", help="seconds of arrivals (%(default)g)")
    add("--seeds", type=_whole(0, 10**9), nargs="+", default=[11], metavar="SEED", help="each is a run (11)")
    add(
        "--contender",
        action="append",
        metavar="NAME[,KEY=VALUE...]",
        help=f"repeatable: {', '.join(NAMES)}; ours and original take settings",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=f"for every ours: {', '.join(KEYS)}")
    add("--trace", type=Path, metavar="FILE", help="recorded traffic: a CSV, JSON lines, Envoy's access log")
    add(
        "--replay", type=Path, metavar="FILE", help="run a recording of a sidecar again (/debug/recording), and no more"
    )
    add("--config", type=Path, metavar="FILE", help="a sidecar's configuration: its classes, and their budgets")
    add(
        "--class",
        action="append",
        dest="classes",
        default=[],
        metavar="NAME=TTFT/TPOT",
        help="objectives in seconds, most urgent first; replaces int=1/0.1 std=2/0.1 batch=15/0.2",
    )
    add("--arrivals", choices=["poisson", "gamma", "bursty"], default="poisson", help="(%(default)s)")
    add("--cv", type=_number(0.1, 20), default=4.0, help="coefficient of variation of gamma arrivals (%(default)g)")
    add("--sessions", action="store_true", help="most requests are turns of conversations")
    add("--noisy", type=_number(1, 100), metavar="TIMES", help="one tenant in five sends so many times its share")
    add("--slow", type=_number(0.05, 1), metavar="SPEED", help="speed of the first engine, like 0.5")
    add("--dies", type=_span, metavar="FROM-TO", help="seconds during which the first engine is dead")
    add(
        "--cold",
        type=_whole(0, 100_000),
        default=0,
        metavar="N",
        help="with --dies: back again, it is 5 times slower until it has computed N prompts",
    )
    add("--limit", type=_whole(1, 100_000), metavar="N", help="fixed limit per engine that the baselines are tuned to")
    add("--html", type=Path, metavar="FILE", help="also write a page with plots")
    add("--workers", type=_whole(1, 64), default=1, metavar="N", help="processes (%(default)s)")
    add("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Simulate and print; returns the exit code. Raises ConfigError."""
    if args.replay is not None:
        return replay(args.replay, _say)
    plan = plan_from(args)
    began = time.monotonic()
    if args.trace is not None and (found := look(args.trace)).skipped:
        _say(f"skipped lines of the trace, which are no requests: {found.skipped}; requests: {found.entries}")
    for klass in plan.workload.classes:
        _say(report.objectives(klass))
    if args.engines == AUTO:
        return _size(args, plan)
    if _are_guessed(args):
        names = ", ".join(klass.name for klass in plan.workload.classes)
        _say(f"classes of the trace ({names}) are judged like std; --config FILE or --class NAME=TTFT/TPOT says more")
    tasks = plan.tasks()
    rate = capacity(plan.preset, plan.engines, plan.workload, plan.trace, plan.engine)
    _say(
        f"{plan.engines} x {plan.preset}: load 100% is {rate:.1f} requests/s of this traffic; "
        f"{len(tasks)} runs{'' if plan.trace else f' of {plan.duration_s:g} s'}"
    )
    bar = None if args.quiet or not sys.stderr.isatty() else _Bar()
    results = run_plan(plan, args.workers, bar)
    if bar is not None:
        bar.clear()
    _say(report.table(results))
    _say(f"\n{report.verdict(results)}")
    _say(f"{sum(result.all.arrivals for result in results)} requests in {time.monotonic() - began:.1f} s")
    if args.html is not None:
        command = "extproc simulate " + shlex.join(sys.argv[2:])
        try:
            page = report.page(results, f"{plan.engines} x {plan.preset}", command, plan.workload.classes)
            args.html.write_text(page, encoding="utf-8")
        except OSError as error:
            raise ConfigError(str(args.html), [f"can't be written: {error.strerror or error}"]) from None
        _say(f"wrote {args.html}")
    return 0


def _size(args: argparse.Namespace, plan: Plan) -> int:
    """Say how many engines the trace needs; 1: more than can be tried."""
    if args.trace is None or args.load:
        raise ConfigError("command line", ["--engines auto is for a --trace as it was recorded, without --load"])
    if not args.contender:
        plan = replace(plan, contenders=("ours",))

    def tell(engines: int, figures: report.Figures) -> None:
        classes = ", ".join(f"{line.klass} {line.goodput:.3f}" for line in figures.lines if line.arrivals)
        _say(f"{engines:4} x {plan.preset}: {classes}")

    found = fewest(plan, args.meet, MOST_ENGINES, args.workers, tell)
    _say(f"on average the trace asks for {found.stable:.2f} engines' worth of work")
    if found.engines is None:
        _say(
            f"not even {MOST_ENGINES} are enough for {args.meet:.1%} of each class: objectives that no engine can meet?"
        )
        return 1
    _say(f"{found.engines} are enough: {args.meet:.1%} of the requests of each class meet their objectives")
    return 0


def plan_from(args: argparse.Namespace) -> Plan:
    """Return the plan that the flags ask for. Raises ConfigError."""
    if args.trace is not None and (args.sessions or args.noisy):
        raise ConfigError("command line", ["--trace brings its own traffic; --sessions and --noisy don't go with it"])
    if args.classes and args.config is not None:
        raise ConfigError("command line", ["--class and --config both tell the classes; give one of them"])
    classes = _classes(args.classes) if args.classes else CLASSES
    if args.config is not None:
        classes = _configured(args.config)
    elif _are_guessed(args):
        classes = tuple(
            replace(STANDARD, name=name, share=1 / len(names)) for names in [look(args.trace).classes] for name in names
        )
    if args.sessions and not args.classes:
        classes = _with_shares(CHATTY)
    noise = None
    if args.noisy is not None:
        noise = Noise(1, args.noisy, args.duration / 7, args.duration * 6 / 7)
    loads = tuple(args.load) if args.load else () if args.trace is not None else (1.2,)
    plan = Plan(
        preset=args.preset,
        engines=1 if args.engines == AUTO else args.engines,
        changes=tuple(args.set),
        loads=loads,
        seeds=tuple(args.seeds),
        duration_s=args.duration,
        workload=Workload(
            process=cast("Literal['poisson', 'gamma', 'bursty']", args.arrivals),
            cv=args.cv,
            classes=classes,
            sessions=Sessions() if args.sessions else None,
            noise=noise,
        ),
        trace=args.trace,
        faults=Faults(
            speeds=(args.slow,) if args.slow is not None else (),
            dies=(0, *args.dies) if args.dies is not None else None,
            cold_requests=args.cold,
        ),
        best_limit=args.limit,
        engine=_engine(args.preset, args.engine) if args.engine else None,
    )
    return replace(plan, contenders=tuple(args.contender)) if args.contender else plan


def _engine(preset: str, settings: Sequence[str]) -> EngineParams:
    """Return the preset's engine with constants of one's own. Raises ConfigError."""
    engine = PRESETS[preset]
    problems = []
    for setting in settings:
        key, _, text = setting.partition("=")
        try:
            engine = _with_constant(engine, key, text)
        except ValueError as error:
            problems.append(f"--engine {setting}: {error}")
    if problems:
        raise ConfigError("command line", problems)
    return engine


def _with_constant(engine: EngineParams, key: str, text: str) -> EngineParams:
    if key == "kv_tokens":
        return replace(engine, num_gpu_blocks=int(text) // engine.block_size)
    if key not in _CONSTANTS:
        raise ValueError(f"unknown constant {key!r}; known are kv_tokens, {', '.join(_CONSTANTS)}")
    constants: dict[str, Any] = {key: int(text) if isinstance(getattr(engine, key), int) else float(text)}
    return replace(engine, **constants)


def _are_guessed(args: argparse.Namespace) -> bool:
    """Tell whether a trace has class names that nothing tells of."""
    if args.trace is None or args.classes or args.config is not None:
        return False
    return not {klass.name for klass in CLASSES}.issuperset(look(args.trace).classes)


def _configured(path: Path) -> tuple[Klass, ...]:
    """Return the classes of a sidecar's configuration; an objective is the budget and what the engine needs then."""
    classes = load_config(path).classes
    return tuple(
        replace(
            STANDARD,
            name=klass.name,
            priority=klass.priority,
            ttft_s=klass.budget_s + STANDARD.margin_s,
            patience_s=max(2 * klass.budget_s, STANDARD.patience_s),
            share=1 / len(classes),
        )
        for klass in classes
    )


def _with_shares(shares: tuple[float, ...]) -> tuple[Klass, ...]:
    return tuple(replace(klass, share=share) for klass, share in zip(CLASSES, shares, strict=True))


def _classes(texts: Sequence[str]) -> tuple[Klass, ...]:
    """Read `name=ttft/tpot` into classes with the lengths of the standing ones, where names match, else of `std`."""
    known = {klass.name: klass for klass in (INTERACTIVE, STANDARD, BATCH)}
    classes: list[Klass] = []
    problems = []
    for number, text in enumerate(texts):
        name, _, rest = text.partition("=")
        try:
            ttft_s, tpot_s = (float(part) for part in rest.split("/"))
        except ValueError:
            problems.append(f"--class {text}: must be NAME=TTFT/TPOT in seconds, like chat=1/0.1")
            continue
        if not name or not 0 < ttft_s < 3500 or not 0 < tpot_s < 3500:
            problems.append(f"--class {text}: needs a name, and objectives above 0 s and below 3500 s")
            continue
        like = known.get(name, STANDARD)
        classes.append(
            replace(like, name=name, priority=len(texts) - number, ttft_s=ttft_s, tpot_s=tpot_s, share=1 / len(texts))
        )
    if len({klass.name for klass in classes}) < len(classes):
        problems.append("--class: each name may be given once")
    if problems:
        raise ConfigError("command line", problems)
    return tuple(classes)


def _number(least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = float(text)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be {least:g} to {most:g}, not {text}")
        return number

    return parse


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be {least} to {most}, not {text}")
        return number

    return parse


def _engines(text: str) -> int | str:
    return AUTO if text == AUTO else _whole(1, MOST_ENGINES)(text)


def _span(text: str) -> tuple[float, float]:
    try:
        begin_s, end_s = (float(part) for part in text.split("-"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be FROM-TO in seconds, like 60-150, not {text}") from None
    if not 0 <= begin_s < end_s:
        raise argparse.ArgumentTypeError(f"must begin before it ends, not {text}")
    return begin_s, end_s


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


class _Bar:
    """A progress bar on stderr, redrawn at most ten times a second."""

    def __init__(self) -> None:
        self._drawn = 0.0

    def __call__(self, share: float) -> None:
        now = time.monotonic()
        if now - self._drawn >= 0.1:
            self._drawn = now
            full = int(share * BAR_WIDTH)
            sys.stderr.write(f"\r[{'#' * full}{'.' * (BAR_WIDTH - full)}] {share:4.0%}")
            sys.stderr.flush()

    def clear(self) -> None:
        sys.stderr.write("\r" + " " * (BAR_WIDTH + 8) + "\r")
        sys.stderr.flush()
