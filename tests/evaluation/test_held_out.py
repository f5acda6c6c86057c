"""Held-out loss: every token counted once, from the right context."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longscan.errors import DataError
from longscan.evaluation import bits_per_byte, compressors_bits_per_byte, nats_by_position, stream_nats
from longscan.models import LanguageModel, LanguageModelConfig

RNG = np.random.default_rng(0)


def model_of(mixer: str) -> LanguageModel:
    torch.manual_seed(0)
    options = {"n_heads": 2} if mixer == "attention" else {"d_state": 4}
    model = LanguageModel(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=30, mixer=mixer, mixer_options=options))
    with torch.no_grad():  # far from uniform, so that a wrong context shows
        model.backbone.embedding.weight.mul_(30)
    return model


def direct(model: LanguageModel, tokens: np.ndarray) -> torch.Tensor:
    both = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits, _ = model(both[:, :-1])
    return F.cross_entropy(logits[0], both[0, 1:], reduction="none")


@pytest.mark.parametrize("length", [2, 3, 16, 17, 18, 100, 161])
def test_one_row_is_the_whole_stream(length: int) -> None:
    model = model_of("mamba")
    tokens = RNG.integers(0, 30, length).astype(np.uint8)
    expected = direct(model, tokens).sum().item()
    assert stream_nats(model, tokens, rows=1, chunk=16) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [258, 259, 500])
def test_rows_read_the_chunk_before_them(length: int) -> None:
    model = model_of("mamba")
    tokens = RNG.integers(0, 30, length).astype(np.uint8)
    rows, chunk = 4, 16
    size = math.ceil((length - 1) / rows)
    expected = direct(model, tokens[: size + 1]).sum().item()
    for row in range(1, rows):
        part = tokens[row * size - chunk : min((row + 1) * size, length - 1) + 1]
        expected += direct(model, part)[chunk:].sum().item()
    fractions: list[float] = []
    found = stream_nats(model, tokens, rows=rows, chunk=chunk, progress=fractions.append)
    assert found == pytest.approx(expected, rel=1e-5)
    assert fractions[-1] == 1.0


@pytest.mark.parametrize("length", [2, 16, 17, 33, 100])
def test_attention_has_the_chunk_before(length: int) -> None:
    model = model_of("attention")
    tokens = RNG.integers(0, 30, length).astype(np.uint8)
    chunk = 16
    expected = 0.0
    for start in range(0, length - 1, chunk):
        begin = max(0, start - chunk)
        expected += direct(model, tokens[begin : min(start + chunk, length - 1) + 1])[start - begin :].sum().item()
    assert stream_nats(model, tokens, rows=3, chunk=chunk) == pytest.approx(expected, rel=1e-5)


def test_by_position() -> None:
    model = model_of("mamba")
    tokens = RNG.integers(0, 30, 101).astype(np.uint8)
    expected = torch.stack([direct(model, tokens[i * 20 : i * 20 + 21]) for i in range(5)]).mean(0)
    found = nats_by_position(model, tokens, windows=5, length=20, rows=2)
    torch.testing.assert_close(found.float(), expected)
    assert nats_by_position(model, tokens, windows=5, length=1000).shape == (100,)


def test_nothing_to_predict() -> None:
    with pytest.raises(DataError, match="at least two tokens"):
        stream_nats(model_of("mamba"), np.array([1]))


def test_units_and_compressors() -> None:
    assert bits_per_byte(math.log(256) * 10, 10) == pytest.approx(8)
    text = b"hello world, " * 100
    figures = compressors_bits_per_byte(text)
    assert figures["gzip -9"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert set(figures) == {"gzip -9", "xz -9"}
    assert compressors_bits_per_byte(b"") == {}
