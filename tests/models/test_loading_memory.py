"""Loading takes little more memory than the weights: files are mapped, the model is built on the meta device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from longscan.bench import Settings, loading
from longscan.errors import ArgumentError
from longscan.models import LanguageModel, LanguageModelConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Of 100 MB, spread over many tensors, none of which is a large part of it."""
    torch.manual_seed(0)
    return LanguageModel(LanguageModelConfig(d_model=512, n_layer=12, vocab_size=8192))


@pytest.mark.parametrize("layout", loading.LAYOUTS)
def test_peak(layout: str, model: LanguageModel, tmp_path: Path) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    loading.save(model, large, layout)
    loading.save(LanguageModel(LanguageModelConfig(d_model=8, n_layer=1)), small, layout)
    size = loading.size_of(large)
    assert size > (20e6 if layout == "int8" else 80e6)
    assert 0.9 * size < loading.peak_of_loading(large, small) < 1.2 * size


def test_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LAYOUTS", ("longscan",))
    report = loading.run(Settings(shapes=((2, 256, 2048),)))
    (row,) = report.rows
    assert (row.contender, row.kind) == ("longscan", "ours")
    assert row.value is not None
    assert row.value > 0
    assert row.memory is not None
    with pytest.raises(ArgumentError, match="resident memory"):
        loading.run(Settings(device="cuda"))
