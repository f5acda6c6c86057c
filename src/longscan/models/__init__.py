"""Models: a residual backbone over any mixers, a language model on it, generation and checkpoints."""

from __future__ import annotations

from longscan.models.backbone import Backbone, Block
from longscan.models.config import PRESETS, LanguageModelConfig
from longscan.models.generation import Generation, Token, prefill
from longscan.models.language_model import LanguageModel
from longscan.models.sampling import Sampling

__all__ = [
    "PRESETS",
    "Backbone",
    "Block",
    "Generation",
    "LanguageModel",
    "LanguageModelConfig",
    "Sampling",
    "Token",
    "prefill",
]
