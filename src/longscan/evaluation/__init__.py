"""Evaluation: held-out bits per byte, loss by position, what compressors make of the same bytes, and continuations."""

from __future__ import annotations

from longscan.evaluation.compression import compressors_bits_per_byte
from longscan.evaluation.held_out import bits_per_byte, nats_by_position, stream_nats
from longscan.evaluation.scoring import Score, score_continuations

__all__ = [
    "Score",
    "bits_per_byte",
    "compressors_bits_per_byte",
    "nats_by_position",
    "score_continuations",
    "stream_nats",
]
