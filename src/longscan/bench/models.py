"""What the benchmarks of whole models share: a model of a shape, its exact twin, the products it cannot avoid."""

from __future__ import annotations

import copy

import torch
from torch import nn

from longscan.bench.contest import Settings
from longscan.errors import ArgumentError
from longscan.models import LanguageModel, LanguageModelConfig

#: Layers and width of the published Mambas (Gu and Dao 2023, Table 12, layers doubled).
SIZES = {"130m": (24, 768), "370m": (48, 1024), "790m": (48, 1536), "1.4b": (48, 2048), "2.8b": (64, 2560)}

#: GPT-NeoX's.
VOCABULARY = 50277


def shapes_of(settings: Settings, names: str, *defaults: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes asked for, else `defaults`, all of them at each of the sizes asked for.

    Args:
        names: the axes, the first three of which are layers, width and vocabulary.
    """
    if not settings.sizes:
        return settings.shapes_of(names, *defaults)
    if settings.shapes:
        raise ArgumentError("size: a shape says the size already; leave one of the two out")
    for size in settings.sizes:
        if size not in SIZES:
            raise ArgumentError(f"size: got {size!r}; allowed are {', '.join(SIZES)}")
    rest = list(dict.fromkeys(shape[3:] for shape in defaults))
    return tuple((*SIZES[size], VOCABULARY, *axes) for size in settings.sizes for axes in rest)


def make_model(layers: int, d_model: int, vocabulary: int, dtype: torch.dtype, device: str, seed: int) -> LanguageModel:
    """A Mamba language model with random weights, for inference: no gradients."""
    return _make(LanguageModelConfig(d_model=d_model, n_layer=layers, vocab_size=vocabulary), dtype, device, seed)


def make_transformer(
    layers: int, d_model: int, vocabulary: int, dtype: torch.dtype, device: str, seed: int
) -> LanguageModel:
    """The Transformer++ with about as many parameters as a Mamba of this shape: half its layers, heads of 64, SwiGLU.

    At the published sizes it is the preset: a block of 12 d_model^2 parameters beside two Mambas of 6 each.
    """
    config = LanguageModelConfig(
        d_model=d_model,
        n_layer=max(1, layers // 2),
        vocab_size=vocabulary,
        mixer="attention",
        mixer_options={"n_heads": max(1, d_model // 64)},
        d_intermediate=-(-8 * d_model // (3 * 128)) * 128,
    )
    return _make(config, dtype, device, seed)


def _make(config: LanguageModelConfig, dtype: torch.dtype, device: str, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    # Made where it will live: drawing billions of numbers takes a CPU long.
    return LanguageModel(config, device=device).to(dtype).eval().requires_grad_(False)


def exact(model: LanguageModel) -> LanguageModel:
    """The same numbers in float32."""
    return copy.deepcopy(model).float()


def random_tokens(count: int, vocabulary: int, seed: int) -> torch.Tensor:
    """(count,) token numbers from 1: some peers treat 0 as padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(1, vocabulary - 1), vocabulary, (count,), generator=generator)


def products(model: LanguageModel, rows: int, *, head_rows: int = 1) -> list[tuple[int, int, int]]:
    """(m, k, n) of the products of every linear layer over `rows` tokens; the head serves `head_rows` of them."""
    config = model.config
    linear = [module for module in model.backbone.modules() if isinstance(module, nn.Linear)]
    layers = [(rows, module.in_features, module.out_features) for module in linear]
    return [*layers, (head_rows, config.d_model, config.padded_vocab_size)]


def training_products(model: LanguageModel, rows: int) -> list[tuple[int, int, int]]:
    """The same for a training step: the head runs for every token, and each product has two more behind it, for its
    input and for its weight."""
    forward = products(model, rows, head_rows=rows)
    return forward + [(m, n, k) for m, k, n in forward] + [(n, m, k) for m, k, n in forward]


def weight_bytes(model: LanguageModel) -> int:
    """Bytes of weights that one token reads: all, the tied embedding once, as the head."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
