from __future__ import annotations

import pytest
import torch

from longscan.bench import Settings
from longscan.bench.models import (
    SIZES,
    make_model,
    make_transformer,
    products,
    shapes_of,
    training_products,
)
from longscan.errors import ArgumentError
from longscan.models import LanguageModel, LanguageModelConfig


@pytest.mark.parametrize(("size", "preset"), [("130m", "125m"), ("370m", "350m"), ("1.4b", "1.3b")])
def test_a_transformer_of_a_published_size_is_the_preset(size: str, preset: str) -> None:
    layers, d_model = SIZES[size]
    mamba = LanguageModelConfig.preset(f"mamba-{size}")
    assert (mamba.n_layer, mamba.d_model) == (layers, d_model)
    # Its layers alone are made here: they are what could differ.
    own = make_transformer(2, d_model, 8, torch.bfloat16, "cpu", seed=0).config
    published = LanguageModelConfig.preset(f"transformer++-{preset}")
    assert published.n_layer == layers // 2
    assert (own.mixer, own.mixer_options, own.d_intermediate) == (
        published.mixer,
        published.mixer_options,
        published.d_intermediate,
    )


def parameters(model: LanguageModel) -> int:
    """Without the embedding."""
    return model.num_parameters() - model.backbone.embedding.weight.numel()


def test_a_transformer_has_about_as_many_parameters() -> None:
    mamba = make_model(2, 768, 8, torch.bfloat16, "cpu", seed=0)
    transformer = make_transformer(2, 768, 8, torch.bfloat16, "cpu", seed=0)
    assert parameters(transformer) == pytest.approx(parameters(mamba), rel=0.07)


def test_products_are_those_of_every_linear_layer() -> None:
    model = make_transformer(2, 64, 50, torch.float32, "cpu", seed=0)
    head = (3, 64, model.config.padded_vocab_size)
    assert products(model, 10, head_rows=3) == [(10, 64, 192), (10, 64, 64), (10, 64, 512), (10, 256, 64), head]
    found = training_products(model, 10)
    assert len(found) == 15
    assert sum(m * k * n for m, k, n in found) == 3 * sum(m * k * n for m, k, n in found[:5])


def test_sizes_are_default_shapes_at_those_sizes() -> None:
    defaults = ((1, 8, 9, 1, 2), (1, 8, 9, 4, 2))
    assert shapes_of(Settings(), "a,b,c,d,e", *defaults) == defaults
    asked = Settings(sizes=("130m", "1.4b"))
    assert shapes_of(asked, "a,b,c,d,e", *defaults) == (
        (24, 768, 50277, 1, 2),
        (24, 768, 50277, 4, 2),
        (48, 2048, 50277, 1, 2),
        (48, 2048, 50277, 4, 2),
    )
    with pytest.raises(ArgumentError, match=r"size: got '7b'"):
        shapes_of(Settings(sizes=("7b",)), "a,b,c,d,e", *defaults)
