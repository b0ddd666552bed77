"""A decoder-only Transformer with random weights and a KV cache of fixed slots: what a step of an engine computes.

What it says is noise; what it costs is real: weights are read once a step whatever the batch, attention grows with the
context, and a prompt is computed all at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it


@dataclass(frozen=True, slots=True)
class Size:
    """How big a model is; the default has 1.1e9 weights, 2.2 GB in bf16."""

    layers: int = 22
    width: int = 2048
    heads: int = 16
    vocabulary: int = 4096
    longest: int = 4096


TINY = Size(layers=2, width=128, heads=4, vocabulary=256, longest=1024)
"""For a CPU: shows that all of it works."""


class Model:
    """`slots` sequences at once; each step gives every running one its next token."""

    def __init__(self, size: Size, slots: int, device: str) -> None:
        """Draw the weights. `device`: `cuda` or `cpu`."""
        self.size = size
        self.device = torch.device(device)
        kind = torch.bfloat16 if device == "cuda" else torch.float32
        torch.manual_seed(0)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=self.device, dtype=kind) / math.sqrt(columns)

        width = size.width
        self._embedding = matrix(size.vocabulary, width)
        self._layers = [
            (matrix(3 * width, width), matrix(width, width), matrix(4 * width, width), matrix(width, 4 * width))
            for _ in range(size.layers)
        ]
        shape = (size.layers, 2, slots, size.heads, size.longest, width // size.heads)
        self._cache = torch.zeros(shape, device=self.device, dtype=kind)

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: int) -> int:
        """Compute a prompt of so many random tokens into `slot`; return the first token of the answer."""
        ids = torch.randint(self.size.vocabulary, (1, tokens), device=self.device)
        state = F.embedding(ids, self._embedding)
        for number, layer in enumerate(self._layers):
            query, key, value = self._project(state, layer[0])
            self._cache[number, 0, slot, :, :tokens] = key[0]
            self._cache[number, 1, slot, :, :tokens] = value[0]
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            state = self._mix(state, mixed, layer)
        return int(self._next(state[:, -1])[0])

    @torch.inference_mode()
    def decode(self, slots: list[int], tokens: list[int], lengths: list[int]) -> list[int]:
        """Give each sequence in `slots`, `lengths` long so far with `tokens` last, its next token."""
        rows = torch.tensor(slots, device=self.device)
        at = torch.tensor(lengths, device=self.device)
        state = F.embedding(torch.tensor(tokens, device=self.device), self._embedding)[:, None]
        reach = max(lengths) + 1
        mask = (torch.arange(reach, device=self.device)[None] <= at[:, None])[:, None, None]
        for number, layer in enumerate(self._layers):
            query, key, value = self._project(state, layer[0])
            self._cache[number, 0, rows, :, at] = key[:, :, 0]
            self._cache[number, 1, rows, :, at] = value[:, :, 0]
            keys, values = (self._cache[number, part, rows, :, :reach] for part in (0, 1))
            state = self._mix(state, F.scaled_dot_product_attention(query, keys, values, attn_mask=mask), layer)
        found: list[int] = self._next(state[:, -1]).tolist()
        return found

    def _project(self, state: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
        batch, length, width = state.shape
        parts = F.linear(F.layer_norm(state, (width,)), weights).view(batch, length, 3, self.size.heads, -1)
        return [parts[:, :, part].transpose(1, 2) for part in range(3)]

    def _mix(self, state: torch.Tensor, mixed: torch.Tensor, layer: tuple[torch.Tensor, ...]) -> torch.Tensor:
        batch, length, width = state.shape
        state = state + F.linear(mixed.transpose(1, 2).reshape(batch, length, width), layer[1])
        inner = F.gelu(F.linear(F.layer_norm(state, (width,)), layer[2]))
        return state + F.linear(inner, layer[3])

    def _next(self, last: torch.Tensor) -> torch.Tensor:
        return F.linear(last, self._embedding).argmax(-1)
