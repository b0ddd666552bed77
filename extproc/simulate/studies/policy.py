"""Is the admission policy worth it? The tables of docs/simulate.md from the shipped core, and where it does not win.

    python -m bench.policy                # about two minutes on one core
    python -m bench.policy --seeds 11 12 13 14 15 --duration 420
    python -m bench.policy --only adapters --preset a100-8b --seeds 1 2 3 4 5 --duration 60

Exits 1 if an expectation fails. Simulated engines: no GPU was measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

from extproc.admission.tenants import NO_RULES, TenantRule, TenantRules
from extproc.engine.params import PRESETS
from extproc.simulate.contenders import contender
from extproc.simulate.fronts import Group
from extproc.simulate.plan import Plan, Task, capacity, run
from extproc.simulate.report import goodput, table
from extproc.simulate.workload import CLASSES, STANDARD, Noise, Sessions, Workload
from extproc.simulate.world import Faults, Record, World

SHAPES = ("a100-8b", "h100-32b")
CONTENDERS = ("round_robin", "least_request", "circuit_breaker", "tuned_engine", "original", "ours")
OTHERS = CONTENDERS[:-1]
LOADS = (0.7, 0.9, 1.2)
CHATTY = Workload(
    classes=tuple(replace(klass, share=share) for klass, share in zip(CLASSES, (0.8, 0.13, 0.07), strict=True)),
    sessions=Sessions(think_s=30.0, system_prompt=3000),
)

failed: list[str] = []


def expect(holds: bool, what: str) -> None:
    print(f"  {'ok  ' if holds else 'FAIL'} {what}")
    if not holds:
        failed.append(what)


def headline(preset: str, seeds: tuple[int, ...], duration_s: float) -> None:
    plan = Plan(preset, contenders=CONTENDERS, loads=LOADS, seeds=seeds, duration_s=duration_s)
    print(f"\n== {preset}: load 100% is {capacity(preset, 4, plan.workload, None):.1f} requests/s on 4 engines")
    results = run(plan)
    print(table(results))
    at = {(result.load, result.contender): result.all.goodput for result in results}
    ours, tuned = at[1.2, "ours"], at[1.2, "tuned_engine"]
    expect(ours >= 0.85, f"{preset} 120%: ours {ours:.3f}, 0.85 or more")
    expect(
        ours >= 1.1 * tuned, f"{preset} 120%: ours is {ours / tuned:.2f}x the tuned engine ({tuned:.3f}), 1.1x or more"
    )
    for load in (0.7, 0.9):
        best = max(at[load, other] for other in OTHERS)
        mine = at[load, "ours"]
        expect(mine >= best - 0.005, f"{preset} {load:.0%}: ours {mine:.3f}, best other {best:.3f}: nothing lost")


def noisy(preset: str, seeds: tuple[int, ...]) -> None:
    """One tenant of five sends six times its share for 150 of 210 seconds, on top of 70% load."""
    print(f"\n== {preset}: a noisy tenant, 6x; goodput of the four others")
    one_class = Workload(classes=(replace(STANDARD, share=1.0),))
    for name, workload in (("three classes", Workload()), ("one class", one_class)):
        noisy_workload = replace(workload, noise=Noise(1, 6.0, 30.0, 180.0))
        victims = {}
        for who in ("least_request", "tuned_engine", "ours,fair=false,shed=false", "ours,fair=false", "ours"):
            plan = Plan(preset, loads=(0.7,), duration_s=210.0, workload=noisy_workload, contenders=(who,))
            runs = [Task(plan, 0.7, seed, who).run() for seed in seeds]
            records = [record for run in runs for record in run.records]
            victims[who] = goodput(record for record in records if record.tenant != "tenant-1")
            loud = goodput(record for record in records if record.tenant == "tenant-1")
            print(f"  {name:14} {who:28} victims {victims[who]:.3f}  noisy {loud:.3f}")
        if name == "three classes":
            expect(victims["ours"] >= 0.9, f"{preset} noisy tenant: victims {victims['ours']:.3f}, 0.9 or more")
        fair, unfair = victims["ours"], victims["ours,fair=false"]
        expect(fair >= unfair - 0.01, f"{preset} {name}: fairness {fair:.3f}, without {unfair:.3f}")


def tenants(preset: str, seeds: tuple[int, ...]) -> None:
    """The same noisy tenant, all of one class, and what an operator may say; by its name, or made-up ones."""
    print(f"\n== {preset}: rules for tenants; goodput of tenant-0 (paying), of the three others, of the noisy one")
    workload = Workload(classes=(replace(STANDARD, share=1.0),), noise=Noise(1, 6.0, 30.0, 180.0))
    others = {f"tenant-{number}": TenantRule() for number in (2, 3, 4)}
    cap = {"a100-8b": 120, "h100-32b": 24}[preset]
    for what, rules in (
        ("no rules", NO_RULES),
        (f"each at most {cap} in flight", TenantRules(default=TenantRule(cap))),
        (f"paying: {cap} guaranteed", TenantRules({"tenant-0": TenantRule(guaranteed=cap)})),
        ("paying: weight 4", TenantRules({"tenant-0": TenantRule(weight=4.0)})),
        ("all but the noisy one named", TenantRules({"tenant-0": TenantRule(), **others}, apart=False)),
    ):
        cells = []
        for made_up in (False, True):
            records = [record for seed in seeds for record in _ruled(preset, workload, rules, seed, made_up=made_up)]
            groups: dict[str, list[Record]] = {"paying": [], "others": [], "noisy": []}
            for record in records:
                who = "paying" if record.tenant == "tenant-0" else "others" if record.tenant in others else "noisy"
                groups[who].append(record)
            cells.append(" ".join(f"{goodput(group):.3f}" for group in groups.values()))
        print(f"  {what:28} {cells[0]}   by made-up names {cells[1]}")


def _ruled(preset: str, workload: Workload, rules: TenantRules, seed: int, *, made_up: bool) -> list[Record]:
    """Play 210 s of `workload` on 70 % load before the defaults with `rules`."""
    who = contender("ours", preset, workload.classes)
    assert who.setting is not None
    setting = replace(who.setting, policy=replace(who.setting.policy, tenants=rules))
    demands = workload.demands(0.7 * capacity(preset, 4, replace(workload, noise=None), None), 210.0, seed)
    for number, demand in enumerate(demands):
        if made_up and demand.tenant == "tenant-1":
            demand.tenant = f"made-up-{number}"
    world = World([Group(PRESETS[preset], 4)], replace(who, setting=setting), seed)
    world.run(demands, 210.0)
    return world.result(0.7, seed, 210.0).records


def sessions(preset: str, seeds: tuple[int, ...], duration_s: float) -> None:
    print(f"\n== {preset}: conversations at 110% and more of what the engines can do without their prefix caches")
    for load in (0.9, 1.1, 1.4, 1.8):
        contenders = ("least_request", "tuned_engine", "ours,session_homes=false", "ours")
        plan = Plan(preset, loads=(load,), seeds=seeds, duration_s=duration_s, workload=CHATTY, contenders=contenders)
        results = run(plan)
        cells = "  ".join(f"{r.contender} {r.all.goodput:.3f} (hit {r.hits:.2f})" for r in results)
        print(f"  load {load:.0%}: {cells}")
        best = {result.contender: result.all.goodput for result in results}
        without = best["ours,session_homes=false"]
        expect(
            best["ours"] >= without - 0.02,
            f"{preset} sessions {load:.0%}: homes {best['ours']:.3f}, without {without:.3f}",
        )


def faults(preset: str, seeds: tuple[int, ...], duration_s: float) -> None:
    print(f"\n== {preset}: bursts, a slow engine, a dead one")
    for name, load, workload, fault in (
        ("bursty (MMPP), mean 80%", 0.8, Workload("bursty"), Faults()),
        ("one of 4 at half speed, 90%", 0.9, Workload(), Faults((0.5,))),
        ("one dead for 90 s, 80%", 0.8, Workload(), Faults(dies=(0, 60.0, 150.0))),
    ):
        contenders = ("least_request", "circuit_breaker", "tuned_engine", "ours")
        plan = Plan(preset, loads=(load,), seeds=seeds, duration_s=duration_s, workload=workload, faults=fault)
        results = run(replace(plan, contenders=contenders))
        print(f"  {name:28} " + "  ".join(f"{r.contender} {r.all.goodput:.3f}" for r in results))
        ours, best = results[-1].all.goodput, max(r.all.goodput for r in results[:-1])
        expect(ours >= best - 0.005, f"{preset} {name}: ours {ours:.3f}, best other {best:.3f}")


def signals(preset: str, seeds: tuple[int, ...], duration_s: float) -> None:
    """What each part is worth at 120%."""
    print(f"\n== {preset}: parts of the policy at 120%")
    for change in (
        "ours",
        "ours,first_byte_probe=true",
        "ours,scrape_interval=5s",
        "ours,max_prompt_tokens=1000000",
        "ours,max_running_requests=10",
        "ours,max_running_requests=96",
        "ours,own_books=false",
        "ours,shed=false",
        "ours,fair=false",
        "ours,short_first=true",
        "ours,binding=bound",
    ):
        (result,) = run(Plan(preset, loads=(1.2,), seeds=seeds, duration_s=duration_s, contenders=(change,)))
        refusal = result.time_to_refusal[0]
        by_class = "/".join(f"{line.goodput:.2f}" for line in result.lines[:-1])
        print(f"  {change:32} {result.all.goodput:.3f} ({by_class})  median wait before a refusal {refusal:.1f} s")


def adapters(preset: str, seeds: tuple[int, ...], duration_s: float) -> None:
    """LoRA adapters, up to four times as many as an engine has slots; engines whose pages name them, and others."""
    print(f"\n== {preset}: LoRA adapters, the n-th 1/n as often, 4 slots; least request, ours nameless, ours named")
    for count in (4, 8, 16):
        for load_s in (0.0, 0.1, 1.0):
            engine = replace(PRESETS[preset], max_loras=4, lora_load_s=load_s)
            contenders = ("least_request", "ours,reads_adapters=false", "ours")
            for load in (0.7, 1.0, 1.2):
                plan = Plan(preset, contenders=contenders, loads=(load,), seeds=seeds, duration_s=duration_s)
                results = run(replace(plan, engine=engine, workload=Workload(adapters=count)))
                least, nameless, named = (result.all.goodput for result in results)
                what = f"{count:2} adapters, {load_s:g} s to load one, {load:.0%}:"
                print(f"  {what} {least:.3f}  {nameless:.3f}  {named:.3f}")
                expect(named >= least - 0.01, f"{preset} {what} ours {named:.3f}, least request {least:.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="not those of tuning (1-3, 11)")
    parser.add_argument("--duration", type=float, default=300.0, help="seconds of arrivals (%(default)g)")
    parser.add_argument("--preset", choices=SHAPES, action="append")
    parser.add_argument("--only", choices=["headline", "noisy", "tenants", "sessions", "faults", "signals", "adapters"])
    flags = parser.parse_args()
    began, seeds = time.monotonic(), tuple(flags.seeds)
    for preset in flags.preset or SHAPES:
        if flags.only in (None, "headline"):
            headline(preset, seeds, flags.duration)
        if flags.only in (None, "noisy"):
            noisy(preset, seeds)
        if flags.only in (None, "tenants"):
            tenants(preset, seeds)
        if flags.only in (None, "sessions"):
            sessions(preset, seeds, flags.duration)
        if flags.only in (None, "faults"):
            faults(preset, seeds, flags.duration)
        if flags.only in (None, "signals"):
            signals(preset, seeds, flags.duration)
        if flags.only == "adapters":
            adapters(preset, seeds, flags.duration)
    print(f"\n{time.monotonic() - began:.0f} s; {len(failed)} expectations failed")
    for what in failed:
        print(f"  FAIL {what}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
