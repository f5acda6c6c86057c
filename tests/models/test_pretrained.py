"""Saved models: the same numbers back, and errors that name file and keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longscan.errors import ArgumentError, CheckpointError, StorageError
from longscan.models import LanguageModel
from longscan.nn.storage import load_tensors, save_tensors
from tests.models.small import KINDS, make

TOKENS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make().save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_come_back(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    again = LanguageModel.from_pretrained(model.save_pretrained(tmp_path))
    assert again.config == model.config
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    assert (again.lm_head.weight is again.backbone.embedding.weight) == model.config.tie_embeddings
    for (name, one), (other_name, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert (name, vars(one), one.requires_grad) == (other_name, vars(other), other.requires_grad)
    again.loss(TOKENS, TOKENS).backward()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_what_is_no_dtype(saved: Path, dtype: object) -> None:
    with pytest.raises(ArgumentError, match=r"dtype must be a floating dtype such as torch\.bfloat16"):
        LanguageModel.from_pretrained(saved, dtype=dtype)  # type: ignore[arg-type]


def test_dtype(saved: Path) -> None:
    model = LanguageModel.from_pretrained(saved, dtype=torch.bfloat16)
    assert model.backbone.embedding.weight.dtype == torch.bfloat16
    assert model.backbone.blocks[0].mixer.A_log.dtype == torch.float32
    model.save_pretrained(saved)
    again = LanguageModel.from_pretrained(saved)
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])


def test_overwriting_while_the_loaded_model_lives(saved: Path) -> None:
    model = LanguageModel.from_pretrained(saved)
    before = model(TOKENS)[0]
    make(n_layer=2).save_pretrained(saved)
    assert torch.equal(model(TOKENS)[0], before)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
def test_damaged_files(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "garbage": b"\xff" * 99}[damage])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        LanguageModel.from_pretrained(saved)


def test_a_flipped_bit(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged.*checksum"):
        LanguageModel.from_pretrained(saved)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        LanguageModel.from_pretrained(tmp_path / "none")


def test_config_with_unknown_keys(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**values, "d_stat": 3}))
    with pytest.raises(CheckpointError, match=r"config\.json: .*'d_stat'"):
        LanguageModel.from_pretrained(saved)


def test_weights_of_another_model(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors, metadata = load_tensors(path)
    del tensors["backbone.norm_f.weight"]
    tensors["backbone.norm.weight"] = torch.ones(16)
    tensors["backbone.layers.0.mixer.D"] = torch.ones(3)
    save_tensors(path, tensors, metadata)
    with pytest.raises(CheckpointError) as caught:
        LanguageModel.from_pretrained(saved)
    for words in (
        "model.safetensors does not fit",
        "missing: backbone.norm_f.weight",
        "unknown: backbone.norm.weight",
        "backbone.layers.0.mixer.D is (3,), expected (32,)",
    ):
        assert words in str(caught.value)


def test_a_write_that_fails_keeps_the_old_model(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    before = LanguageModel.from_pretrained(saved)(TOKENS)[0]
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        make(n_layer=2).save_pretrained(saved)
    assert torch.equal(LanguageModel.from_pretrained(saved)(TOKENS)[0], before)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
