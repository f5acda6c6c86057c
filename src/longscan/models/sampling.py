"""From scores to the next token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from longscan.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Applied in this order:

    Args:
        repetition_penalty: scores of tokens seen before (prompt and output) are divided by this if positive, else
            multiplied (Keskar et al. 2019); 1 does nothing.
        temperature: divides the scores; 0 takes the likeliest token.
        top_k: keep the k likeliest; 0 keeps all.
        top_p: of these keep the likeliest whose probabilities first reach p together (Holtzman et al. 2020); 1 keeps
            all.
        min_p: of these keep those at least min_p times as likely as the likeliest (Nguyen et al. 2024); 0 keeps all.

    Raises:
        ArgumentError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not math.isfinite(value):
                raise ArgumentError(f"{name} must be a finite number, got {value!r}")
        ranges = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (isinstance(self.top_k, Integral) and self.top_k >= 0, "an integer of at least 0 (0: off)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (self.repetition_penalty > 0, "positive"),
        }
        for name, (holds, allowed) in ranges.items():
            if not holds:
                raise ArgumentError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    def choose(self, logits: Tensor, uniform: Tensor, seen: Tensor | None = None) -> Tensor:
        """One token per row.

        Args:
            logits: (batch, vocab_size).
            uniform: (batch,) numbers in [0, 1), one draw per row.
            seen: (batch, vocab_size) bool, tokens that the repetition penalty meets.

        Returns:
            (batch,) int64.
        """
        logits = logits.float()
        if self.repetition_penalty != 1.0 and seen is not None:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        return _invert(self.probabilities(logits), uniform)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution (batch, vocab_size) left by temperature, top-k, top-p and min-p, not normalised again."""
        # Shifted first, so that a tiny temperature cannot overflow.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        probabilities = logits.softmax(dim=-1)
        if 0 < self.top_k < logits.shape[-1]:
            chosen = probabilities.topk(self.top_k, dim=-1)
            probabilities = torch.zeros_like(probabilities).scatter(-1, chosen.indices, chosen.values)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        if self.top_p < 1:
            ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
            likelier = ordered.cumsum(dim=-1) - ordered
            ordered = ordered.masked_fill(likelier >= self.top_p, 0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered)
        if self.min_p > 0:
            least = self.min_p * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0)
        return probabilities


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token where the cumulative distribution passes ``uniform``; never one of probability 0."""
    # float64: at 50,000 tokens a float32 sum loses the rare ones. Not every device has it.
    wide = torch.float32 if probabilities.device.type == "mps" else torch.float64
    cumulative = probabilities.to(wide).cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    target = uniform.to(device=cumulative.device, dtype=wide)[:, None] * total
    chosen = torch.searchsorted(cumulative, target, right=True)
    last = torch.searchsorted(cumulative, total, right=False)  # where rounding takes the target to the very end
    return torch.minimum(chosen, last).squeeze(-1)


class Draws:
    """Uniform numbers, a stream per row: a row's tokens depend on its own seed and not on who shares the batch."""

    _BLOCK = 256

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._blocks = [torch.empty(0, dtype=torch.float64) for _ in seeds]
        self._next = [0] * len(seeds)

    def draw(self, rows: Sequence[int]) -> Tensor:
        """(len(rows),) float64 in [0, 1), the next number of each row's stream."""
        return torch.stack([self._draw(row) for row in rows])

    def _draw(self, row: int) -> Tensor:
        if self._next[row] == len(self._blocks[row]):
            self._blocks[row] = torch.rand(self._BLOCK, dtype=torch.float64, generator=self._generators[row])
            self._next[row] = 0
        self._next[row] += 1
        return self._blocks[row][self._next[row] - 1]


def seeds_of_rows(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """A seed per row: ``seed``, ``seed + 1``, ... from one number, fresh ones from None.

    Raises:
        ArgumentError: no integers of 64 bits, or not one per row.
    """
    if seed is None:
        # From the global generator, so that torch.manual_seed makes this repeatable too.
        return [int(value) for value in torch.randint(2**62, (rows,))]
    one = isinstance(seed, Integral)
    try:
        seeds = [seed + row for row in range(rows)] if one else list(seed)  # type: ignore[operator, arg-type]
    except TypeError:
        raise ArgumentError(f"seed must be an integer, or one per prompt, got {seed!r}") from None
    if len(seeds) != rows:
        raise ArgumentError(f"seed must be one number or one per prompt; got {len(seeds)} for {rows} prompts")
    for value in seeds:
        if not isinstance(value, Integral) or not -(2**63) <= value < 2**64:
            raise ArgumentError(f"seed must be integers that fit in 64 bits, got {value!r}")
    return [int(value) for value in seeds]
