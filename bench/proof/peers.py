"""Two routers from PyPI as contenders: `smg` and `vllm-router`, installed on demand into `.venv-peers`.

A contender's name is one of PEERS, or one with settings after commas, which are the keys of SETTINGS:
`smg,limit=10,waits=1:2:2`. What was tried, and why these are the defaults: docs/benchmarks-peers.md.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bench import venvs
from tests.e2e.kit.processes import free_port, http_get

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from extproc.simulate.workload import Demand, Klass

VENV = Path(__file__).resolve().parents[2] / ".venv-peers"
PINS = ("smg==1.13.0", "vllm-router==0.1.17")
PEERS = ("smg", "vllm_router")
SETTINGS: dict[str, dict[str, str]] = {
    "smg": {
        "limit": "12",
        "waits": "1:2:2",
        "policy": "power_of_two",
        "metric": "least_requests",
        "scheduler": "true",
        "preempt": "false",
        "starvation": "3600",
        "overload": "true",
        "engine": "plain",
        "breaker": "true",
        "retries": "5",
    },
    "vllm_router": {
        "limit": "24",
        "wait": "120",
        "deadlines": "",
        "programs": "true",
        "global": "false",
        "order": "mru",
        "tokens": "24000",
        "low": "1",
        "buffer": "100",
        "gain": "false",
        "headroom": "1",
        "binding": "least_program_count",
        "interval": "0.1",
        "gate": "0",
        "concurrent": "0",
        "rate": "0",
        "queue": "100",
        "window": "100",
        "engine": "priority",
        "breaker": "true",
        "retries": "5",
    },
}
"""`waits` and `deadlines` are seconds by class, the most urgent first; `tokens` is the KV cache of one engine of the
preset h100-32b. What is not in here is the peer's own default."""
SMG_CLASSES = ("bulk", "default", "interactive", "system")
"""The classes that smg knows, the least urgent first; their names are fixed."""
Marks = tuple[dict[str, str], dict[str, Any]]
"""Headers and fields of the body by which a request tells a peer what it is."""


def install() -> None:
    """Make `.venv-peers`, unless it is there with these pins."""
    if not venvs.is_made(VENV, PINS):
        with venvs.fresh(VENV, PINS, f"installing {' and '.join(PINS)} into {VENV}: 300 MB, half a minute") as pip:
            subprocess.run([*pip, "install", *PINS], check=True)


def settings(contender: str) -> dict[str, str]:
    """Return all settings of a peer. Raises ValueError for one that it does not have."""
    name, *changes = contender.split(",")
    found = dict(SETTINGS[name])
    for change in changes:
        key, _, value = change.partition("=")
        if key not in found:
            raise ValueError(f"{contender}: no setting {key!r}; {name} has {', '.join(found)}")
        found[key] = value
    return found


def engines(contender: str) -> str:
    """Return how a peer's engines are set: plain; priority, which orders their own queue; tuned, as without a queue."""
    return settings(contender)["engine"] if contender.partition(",")[0] in PEERS else "plain"


def argv(
    contender: str, listen: str, addresses: Sequence[str], classes: Sequence[Klass], check: Mapping[str, Any], at: Path
) -> list[str]:
    """Return a peer's command line; a file that it wants is written into `at`."""
    name = contender.partition(",")[0]
    have = settings(contender)
    host, _, port = listen.rpartition(":")
    common = ["--host", host, "--port", port, "--prometheus-port", str(free_port())]
    common += ["--worker-urls", *(f"http://{address}" for address in addresses)]
    common += ["--health-check-endpoint", check["path"], "--health-failure-threshold", str(check["down"])]
    common += ["--health-success-threshold", str(check["up"])]
    for flag in ("interval", "timeout"):
        common += [f"--health-check-{flag}-secs", check[flag].removesuffix("s")]
    common += ["--retry-max-retries", have["retries"]]
    if have["breaker"] != "true":
        common += ["--disable-circuit-breaker"]
    if name == "smg":
        return [str(VENV / "bin/smg"), "launch", *common, *_smg(have, len(addresses), classes, at)]
    return [str(VENV / "bin/vllm-router"), *common, *_vllm_router(have)]


def _smg(have: Mapping[str, str], engines: int, classes: Sequence[Klass], at: Path) -> list[str]:
    flags = ["--log-level", "warn", "--policy", have["policy"]]
    if have["policy"] == "power_of_two":
        flags += ["--power-of-two-load-metric", have["metric"]]
    if have["overload"] != "true":
        flags += ["--disable-worker-overload-protection"]
    flags += ["--load-monitor-interval", "1", "--max-concurrent-requests", str(int(have["limit"]) * engines)]
    if have["scheduler"] != "true":
        return [*flags, "--queue-size", "1000", "--queue-timeout-secs", have["waits"].split(":")[0]]
    path = at / "scheduler.yaml"
    path.write_text(yaml.safe_dump(scheduler(have, classes)))
    flags += ["--priority-scheduler-enabled", "--priority-scheduler-config", str(path)]
    return [*flags, "--priority-scheduler-default-max-class", "system"]


def scheduler(have: Mapping[str, str], classes: Sequence[Klass]) -> dict[str, Any]:
    """Return the file of smg's scheduler: a place in the queue for all, no slots set aside, waits in whole seconds."""
    rules = {name: _rule(have, 1) for name in SMG_CLASSES}
    for klass, wait in _by_class(have["waits"], classes):
        rules[smg_class(klass, classes)] = _rule(have, int(wait))
    return {"classes": rules}


def _by_class(words: str, classes: Sequence[Klass]) -> list[tuple[Klass, str]]:
    values = words.split(":")
    if len(values) != len(classes):
        raise ValueError(f"{words!r} must have one value per class, the most urgent first; there are {len(classes)}")
    return list(zip(sorted(classes, key=lambda klass: -klass.priority), values, strict=True))


def _rule(have: Mapping[str, str], wait_s: int) -> dict[str, Any]:
    return {
        "reserved_floor": 0,
        "queue_size": 1000,
        "queue_timeout_secs": wait_s,
        "starvation_threshold_secs": int(have["starvation"]),
        "can_preempt": have["preempt"] == "true",
    }


def smg_class(klass: Klass, classes: Sequence[Klass]) -> str:
    """Return what smg calls a class of ours; raises ValueError where there are more than it has."""
    place = sum(other.priority < klass.priority for other in classes)
    if place >= len(SMG_CLASSES):
        raise ValueError(f"smg has {len(SMG_CLASSES)} classes; {klass.name} would be number {place + 1}")
    return SMG_CLASSES[place]


def _vllm_router(have: Mapping[str, str]) -> list[str]:
    flags = ["--log-level", "warning", "--policy", "power_of_two", "--worker-startup-check-interval", "1"]
    if int(have["concurrent"]):
        flags += ["--max-concurrent-requests", have["concurrent"], "--queue-size", have["queue"]]
        flags += ["--queue-timeout-secs", f"{max(round(float(have['wait'])), 1)}"]
        if int(have["rate"]):
            flags += ["--rate-limit-tokens-per-second", have["rate"]]
    if have["programs"] == "true":
        programs = {
            "global_queue": have["global"] == "true",
            "resume_order": have["order"],
            "binding_strategy": have["binding"],
            "cross_rank_headroom_ratio": float(have["headroom"]),
            "max_active_programs_per_target": int(have["limit"]),
            "metrics_interval_seconds": float(have["interval"]),
            "admission_waiting_request_threshold": int(have["gate"]),
            "queue_timeout_seconds": float(have["wait"]),
            "force_resume_timeout_seconds": float(have["wait"]),
            "low_watermark_ratio": float(have["low"]),
            "high_watermark_ratio": max(float(have["low"]), 1.0),
            "decode_buffer_tokens": int(have["buffer"]),
            "enable_batch_gain_admission": have["gain"] == "true",
            "stats_window_size": int(have["window"]),
            "paused_retention_ttl_seconds": 60.0,
        }
        if have["tokens"]:
            programs["token_capacity_per_dp_rank"] = int(have["tokens"])
        flags += ["--enable-program-scheduling", "--program-scheduling-config-json", json.dumps(programs)]
    return flags


def marks(contender: str, classes: Sequence[Klass]) -> Callable[[Demand], Marks] | None:
    """Return what says to a peer what a request is; None for a contender that is none.

    smg reads a header, and passes none on: the engine hears the true lengths in the body. vllm-router knows agents'
    programs, so that each request is a program of one step.
    """
    name = contender.partition(",")[0]
    if name == "smg":
        return lambda demand: (
            {"x-smg-priority": smg_class(demand.klass, classes)},
            {"vllm_xargs": {"x-sim-prompt-tokens": demand.prompt, "x-sim-output-tokens": demand.output}},
        )
    if name != "vllm_router" or settings(contender)["programs"] != "true":
        return None
    numbers = itertools.count()
    words = settings(contender)["deadlines"]
    deadlines = {klass: float(value) for klass, value in _by_class(words, classes)} if words else {}

    def program(demand: Demand) -> Marks:
        context = {"program_id": f"request-{next(numbers)}", "priority": demand.klass.priority}
        context |= {"expected_resume": False, "kv_retention_ttl_seconds": 0}
        if demand.klass in deadlines:
            context["deadline_seconds"] = deadlines[demand.klass]
        return {}, {"vllm_xargs": {"agentic_context": context}}

    return program


def ready(contender: str, address: str, engines: int) -> bool:
    """Say whether a peer knows all engines. smg's scheduler is told on the way how many requests each may run."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        status, body = http_get(address, "/readiness")
        if status != 200 or json.loads(body).get("healthy_workers") != engines:
            return False
        if contender.partition(",")[0] != "smg":
            return True
        workers = json.loads(http_get(address, "/workers")[1])["workers"]
        label = {"max_running_requests": settings(contender)["limit"]}
        missing = [worker["id"] for worker in workers if label.items() - worker["labels"].items()]
        for one in missing:
            _patch(address, f"/workers/{one}", {"labels": label})
        return not missing
    return False


def _patch(address: str, path: str, value: dict[str, Any]) -> None:
    connection = http.client.HTTPConnection(address, timeout=2)
    try:
        connection.request("PATCH", path, json.dumps(value), {"content-type": "application/json"})
        connection.getresponse().read()
    finally:
        connection.close()
