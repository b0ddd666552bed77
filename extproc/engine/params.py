"""What a simulated engine is made of: the constants of its step-time model, its sizes, and the presets.

Values only. The constants of `a100-8b` and `h100-32b` come from weight and bandwidth arithmetic; those of
`a100-8b-profiled`, `h100-32b-profiled`, `h100-8b` and `h100x4-70b` were fitted to the kernel times of A100 and H100
that Vidur publishes, with attention estimated. No GPU was measured here: ratios between policies are worth more than
absolute rates.
"""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

SchedulingPolicy = Literal["fcfs", "priority"]


@dataclasses.dataclass(frozen=True, slots=True)
class EngineParams:
    """One engine: step_s = (base + prefill x tokens + decode x sequences + context x context tokens) / speed.

    `prefill_context_s` is added per prompt token computed and per token of context before it: attention of prefill.
    Names follow vLLM's flags where vLLM has one. Raises ValueError, naming the field, on impossible values.
    """

    step_base_s: float = 0.018
    prefill_token_s: float = 50e-6
    decode_seq_s: float = 500e-6
    context_token_s: float = 0.0
    prefill_context_s: float = 0.0
    num_gpu_blocks: int = 512
    block_size: int = 16
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    """Prompt + output tokens of one request, at most; None: as many as the KV cache holds."""
    max_num_queued: int | None = None
    """vLLM's --max-num-queued-reqs, which despite its name bounds waiting AND running requests together."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    prefix_caching: bool = True
    speed: float = 1.0
    """0.5 is an engine at half speed."""
    cold_requests: int = 0
    """A new engine is slow until so many prompts were computed: kernels compiled, graphs captured, pages touched."""
    cold_times: float = 5.0
    """How many times as long its steps take until then."""
    max_loras: int = 0
    """vLLM's --max-loras: LoRA adapters in its GPU memory, and of one batch, at most; 0: it knows none."""
    lora_load_s: float = 0.0
    """How much longer a step takes for each adapter that it must load first: from CPU memory or disk, all wait."""

    def __post_init__(self) -> None:
        for name in ("num_gpu_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            self._must(name, "at least 1", getattr(self, name) >= 1)
        for name in ("max_model_len", "max_num_queued"):
            self._must(name, "at least 1, or unset", getattr(self, name) is None or getattr(self, name) >= 1)
        for name in ("prefill_token_s", "decode_seq_s", "context_token_s", "prefill_context_s"):
            self._must(name, "0 to 60 seconds", 0 <= getattr(self, name) <= 60)
        self._must("step_base_s", "more than 0 and at most 60 seconds", 0 < self.step_base_s <= 60)
        self._must("speed", "more than 0; 1.0 is as modelled", 0 < self.speed <= 1e6)
        self._must("cold_requests", "0 or more", self.cold_requests >= 0)
        self._must("max_loras", "0 or more", self.max_loras >= 0)
        self._must("lora_load_s", "0 to 60 seconds", 0 <= self.lora_load_s <= 60)
        self._must("cold_times", "1 to 1000", 1 <= self.cold_times <= 1000)
        self._must("scheduling_policy", "'fcfs' or 'priority'", self.scheduling_policy in {"fcfs", "priority"})
        right = f"at most max_num_batched_tokens ({self.max_num_batched_tokens}): one token each in every step"
        self._must("max_num_seqs", right, self.max_num_seqs <= self.max_num_batched_tokens)

    def _must(self, name: str, right: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"{name} must be {right}; got {getattr(self, name)!r}")

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_gpu_blocks * self.block_size

    @property
    def longest(self) -> int:
        """Prompt + output tokens of the longest request that this engine accepts."""
        return self.kv_tokens if self.max_model_len is None else min(self.max_model_len, self.kv_tokens)


A100_8B: Final = EngineParams(
    step_base_s=0.009,
    prefill_token_s=70e-6,
    decode_seq_s=20e-6,
    context_token_s=90e-9,
    num_gpu_blocks=26_875,  # 430,000 tokens
    max_num_seqs=256,
)
"""An 8B model on one A100: compute-bound, four of them saturate near 24 req/s of the mix in simulate/workload.py."""

H100_32B: Final = EngineParams(
    step_base_s=0.022,
    prefill_token_s=130e-6,
    decode_seq_s=30e-6,
    context_token_s=100e-9,
    num_gpu_blocks=1_500,  # 24,000 tokens
    max_num_seqs=256,
)
"""A 32B model in bf16 on one 80 GB H100: the KV cache is the bottleneck, four saturate near 6 req/s."""

A100_8B_PROFILED: Final = dataclasses.replace(
    A100_8B,
    step_base_s=0.0115,
    prefill_token_s=66e-6,
    decode_seq_s=28e-6,
    prefill_context_s=2.8e-9,
)
"""`a100-8b` with constants fitted to published kernel times."""

H100_32B_PROFILED: Final = EngineParams(
    step_base_s=0.025,
    prefill_token_s=90e-6,
    decode_seq_s=20e-6,
    context_token_s=105e-9,
    prefill_context_s=3e-9,
    num_gpu_blocks=1_500,  # 24,000 tokens
    max_num_seqs=1024,
    max_num_batched_tokens=8192,
)
"""`h100-32b` with constants fitted to published kernel times, and the sizes that today's vLLM chooses on an H100."""

H100_8B: Final = EngineParams(
    step_base_s=0.0075,
    prefill_token_s=21e-6,
    decode_seq_s=10e-6,
    context_token_s=50e-9,
    prefill_context_s=1.2e-9,
    num_gpu_blocks=26_875,  # 430,000 tokens of 128 KiB
    max_num_seqs=1024,
    max_num_batched_tokens=8192,
)
"""An 8B model in bf16 on one 80 GB H100: fast at prompts."""

H100X4_70B: Final = EngineParams(
    step_base_s=0.0185,
    prefill_token_s=65e-6,
    decode_seq_s=20e-6,
    context_token_s=32e-9,
    prefill_context_s=1.5e-9,
    num_gpu_blocks=26_875,  # 430,000 tokens of 320 KiB
    max_num_seqs=1024,
    max_num_batched_tokens=8192,
)
"""A 70B model in bf16 on four H100 (tensor parallel)."""

LLAMA_CPP: Final = EngineParams(
    step_base_s=0.025,
    prefill_token_s=300e-6,
    decode_seq_s=2e-3,
    context_token_s=200e-9,
    num_gpu_blocks=2_048,  # 32,768 tokens: four slots of 8,192
    max_num_seqs=4,
    max_num_batched_tokens=512,
    max_model_len=8_192,
)
"""A small engine like llama.cpp's server with four slots, 4 bits on a desktop: constants assumed."""

DEMO: Final = EngineParams()
"""Four slots and about 20 ms a step: queues show on a laptop."""

PRESETS: Final[dict[str, EngineParams]] = {
    "a100-8b": A100_8B,
    "h100-32b": H100_32B,
    "a100-8b-profiled": A100_8B_PROFILED,
    "h100-32b-profiled": H100_32B_PROFILED,
    "h100-8b": H100_8B,
    "h100x4-70b": H100X4_70B,
    "llama-cpp": LLAMA_CPP,
    "demo": DEMO,
}
