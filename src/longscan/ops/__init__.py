"""Operators: pure functions over tensors, each with a plain definition and the backends that make it fast."""

from __future__ import annotations

from longscan.ops.add_rms_norm import add_rms_norm
from longscan.ops.backends import backend
from longscan.ops.cauchy import cauchy
from longscan.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from longscan.ops.decay_attention import decay_attention, decay_attention_update
from longscan.ops.linear_cross_entropy import linear_cross_entropy
from longscan.ops.linear_scan import linear_scan
from longscan.ops.long_conv import long_conv
from longscan.ops.selective_scan import selective_scan, selective_state_update
from longscan.ops.vandermonde import vandermonde, vandermonde_transpose

__all__ = [
    "add_rms_norm",
    "backend",
    "cauchy",
    "causal_conv1d",
    "causal_conv1d_update",
    "decay_attention",
    "decay_attention_update",
    "linear_cross_entropy",
    "linear_scan",
    "long_conv",
    "selective_scan",
    "selective_state_update",
    "vandermonde",
    "vandermonde_transpose",
]
