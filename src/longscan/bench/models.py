"""What the benchmarks of whole models share: a model of a shape, its exact twin, the products it cannot avoid."""

from __future__ import annotations

import copy

import torch

from longscan.bench import floors
from longscan.models import LanguageModel, LanguageModelConfig


def make_model(layers: int, d_model: int, vocabulary: int, dtype: torch.dtype, device: str, seed: int) -> LanguageModel:
    """A Mamba language model with random weights, for inference: no gradients."""
    torch.manual_seed(seed)
    config = LanguageModelConfig(d_model=d_model, n_layer=layers, vocab_size=vocabulary)
    return LanguageModel(config).to(device, dtype).eval().requires_grad_(False)


def exact(model: LanguageModel) -> LanguageModel:
    """The same numbers in float32."""
    return copy.deepcopy(model).float()


def random_tokens(count: int, vocabulary: int, seed: int) -> torch.Tensor:
    """(count,) token numbers from 1: some peers treat 0 as padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(1, vocabulary - 1), vocabulary, (count,), generator=generator)


def products(model: LanguageModel, rows: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of every product of a prefill over `rows` tokens; the head serves the last token only."""
    config = model.config
    layer = floors.mamba_products(rows, config.d_model)
    return layer * config.n_layer + [(1, config.d_model, config.padded_vocab_size)]


def weight_bytes(model: LanguageModel) -> int:
    """Bytes of weights that one token reads: all, the tied embedding once, as the head."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
