"""Evaluation: held-out bits per byte, loss by position, and what compressors make of the same bytes."""

from __future__ import annotations

from longscan.evaluation.compression import compressors_bits_per_byte
from longscan.evaluation.held_out import bits_per_byte, nats_by_position, stream_nats

__all__ = ["bits_per_byte", "compressors_bits_per_byte", "nats_by_position", "stream_nats"]
