"""The policy's quality, scored: ours at its defaults in a slice of the matrix, against its rivals at their best.

The rivals' scores and the cells that are known to miss are in `gate.json` of `extproc/simulate/studies/matrix`; how to
renew them stands in its `gate.py`. Simulated, deterministic, about a minute of CPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from extproc.engine.params import A100_8B
from extproc.simulate.contenders import contender
from extproc.simulate.fronts import Group, Job
from extproc.simulate.studies.matrix import gate
from extproc.simulate.studies.matrix.cells import cell
from extproc.simulate.workload import BATCH, INTERACTIVE, STANDARD, Workload
from extproc.simulate.world import Faults, World, saturation

RECORDS = gate.read()
PATIENT = replace(BATCH, share=0.3, ttft_s=65.0, margin_s=5.0, patience_s=120.0)
CLASSES = (replace(INTERACTIVE, share=0.35), replace(STANDARD, share=0.35), PATIENT)
ENGINES, BEGINS_S, LASTS_S = 2, 60.0, 120.0


@pytest.mark.parametrize("name", gate.names())
def test_the_defaults_hold_their_own_against_the_best_rival_in(name: str) -> None:
    wrong = gate.complaints(name, gate.play(cell(name)), RECORDS[name])
    assert not wrong, f"{name}: {'; '.join(wrong)}"


@pytest.mark.parametrize("what", ["outage", "burst"])
def test_what_is_over_in_seconds_has_nobody_refused_at_once_whom_least_request_would_have_served(what: str) -> None:
    """For 15 s one of two engines is dead, or for 30 s twice as much comes, all of it urgent: batch can wait a minute.

    Engines at their most. 24 and 77 of those were refused for what the ten seconds before they came foretold.
    """
    traffic = Workload(classes=CLASSES)
    most = ENGINES * saturation(A100_8B, 1, traffic.demands(10.0, 300.0, 0))
    demands = traffic.demands(most, LASTS_S, 1)
    if what == "burst":
        more = replace(traffic, classes=CLASSES[:1]).demands(most, 30.0, 2)
        demands = sorted([*demands, *(replace(one, at=one.at + BEGINS_S) for one in more)], key=lambda one: one.at)

    def play(who: str) -> list[Job]:
        faults = Faults(dies=(0, BEGINS_S, BEGINS_S + 15.0) if what == "outage" else None)
        return World([Group(A100_8B, ENGINES)], contender(who, "", CLASSES), 1, faults).run(demands, LASTS_S)

    jobs = list(zip(play("ours"), play("least_request"), strict=True))
    assert any(job.outcome == "budget_expired" for job, _ in jobs), "nothing happened"
    wronged = [
        job
        for job, other in jobs
        if job.outcome == "budget_predicted"
        and other.outcome == "finished"
        and other.first_token is not None
        and other.first_token - other.arrived <= other.demand.klass.ttft_s
    ]
    assert not wronged
