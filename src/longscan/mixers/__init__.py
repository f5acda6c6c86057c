"""The systems, one file each; a new one is a file and a line here."""

from __future__ import annotations

from longscan.mixers.attention import Attention
from longscan.mixers.mamba import Mamba
from longscan.mixers.s4d import S4D
from longscan.nn.mixer import SequenceMixer

#: Name in configurations -> class.
MIXERS: dict[str, type[SequenceMixer]] = {
    "mamba": Mamba,
    "s4d": S4D,
    "attention": Attention,
}

__all__ = ["MIXERS", "S4D", "Attention", "Mamba"]
