"""Models over any mixers: language models with generation and checkpoints, classifiers, and SaShiMi for waveforms."""

from __future__ import annotations

from longscan.models.backbone import Backbone, Block
from longscan.models.classifier import Classifier, ClassifierConfig
from longscan.models.config import PRESETS, LanguageModelConfig
from longscan.models.generation import Generation, Token, prefill
from longscan.models.language_model import LanguageModel
from longscan.models.long_sequences import backward_in_chunks
from longscan.models.sampling import Sampling
from longscan.models.sashimi import Sashimi, SashimiConfig

__all__ = [
    "PRESETS",
    "Backbone",
    "Block",
    "Classifier",
    "ClassifierConfig",
    "Generation",
    "LanguageModel",
    "LanguageModelConfig",
    "Sampling",
    "Sashimi",
    "SashimiConfig",
    "Token",
    "backward_in_chunks",
    "prefill",
]
