"""The protocol of sequence mixers, and the small parts they are built with."""

from __future__ import annotations

from longscan.nn.mixer import SequenceMixer
from longscan.nn.mlp import MLP, GatedMLP
from longscan.nn.norms import AddLayerNorm, AddRMSNorm, RMSNorm
from longscan.nn.rotary import rotate
from longscan.nn.state import ModelState, State

__all__ = ["MLP", "AddLayerNorm", "AddRMSNorm", "GatedMLP", "ModelState", "RMSNorm", "SequenceMixer", "State", "rotate"]
