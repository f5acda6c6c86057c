"""Small models that tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from longscan.models import LanguageModel, LanguageModelConfig
from longscan.models.config import TRANSFORMER

VOCABULARY = 13

KINDS: dict[str, dict[str, Any]] = {
    "mamba": {},
    "complex": {"mixer_options": {"d_state": 4, "a_init": "s4d-lin"}},
    "mixed": {
        "mixer": ("attention", "s4d", "mamba"),
        "mixer_options": {"attention": {"n_heads": 2}, "s4d": {"d_state": 4}},
        "d_intermediate": 8,
        "tie_embeddings": False,
    },
    "outer-products": {"mixer": ("linear_attention", "retnet", "rwkv4"), "mixer_options": {"retnet": {"n_heads": 2}}},
    "memories": {"mixer": ("lmu", "hippo", "lssl"), "mixer_options": {"lmu": {"order": 4}, "lssl": {"d_state": 4}}},
    "transformer": {
        **TRANSFORMER, "mixer_options": {"rotary": False, "bias": True, "n_heads": 2}, "d_intermediate": 24,
    },
    "transformer-2017": {
        "mixer": "attention", "mixer_options": {"rotary": False, "head_dim": 5, "n_heads": 2}, "d_intermediate": 24,
        "norm": "layer", "prenorm": False, "mlp": "relu", "positions": "learned", "max_positions": 64, "d_model": 24,
        "tie_embeddings": False,
    },
    "recurrent": {"mixer": ("lstm", "dilated_rnn"), "mixer_options": {"dilated_rnn": {"dilations": [1, 3]}}},
}  # fmt: skip


def make(kind: str = "mamba", **changes: Any) -> LanguageModel:
    """A model whose next token depends clearly on its past."""
    torch.manual_seed(0)
    config = LanguageModelConfig(**{"d_model": 16, "n_layer": 3, "vocab_size": VOCABULARY, **KINDS[kind], **changes})
    model = LanguageModel(config)
    stir(model)
    return model


def stir(model: nn.Module) -> None:
    """Add noise to all parameters: none is zero or one as it starts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)


def randomise(model: nn.Module) -> Any:
    """The model, stirred the same way each time, for evaluation."""
    torch.manual_seed(0)
    stir(model)
    return model.eval()
