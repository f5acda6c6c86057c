"""Models of other packages: the same numbers in and out, and what cannot be said is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from longscan.errors import CheckpointError, ConfigError
from longscan.models import LanguageModel
from longscan.nn.storage import save_pickled, save_tensors
from tests.models.small import make

TOKENS = torch.tensor([[1, 2, 3, 4, 12, 0, 7]])
FALCON = {"mixer_options": {"selection_norm_eps": 1e-6}}
MAMBA2 = {"mixer": "mamba2", "mixer_options": {"d_state": 8, "head_dim": 4}}
GROUPED = {
    **MAMBA2,
    "mixer_options": {**MAMBA2["mixer_options"], "n_groups": 2, "bias": True, "dt_limit": [0.01, math.inf]},
    "tie_embeddings": False,
}
NAMES = {"mamba": "MambaForCausalLM", "falcon": "FalconMambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}


@pytest.mark.parametrize("kind", ["longscan", "mamba-ssm", "transformers"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "residual_in_fp32": False},
        {"mixer_options": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 2, "bias": True, "conv_bias": False}},
        {"mixer": ("mamba", "mamba"), "mixer_options": {"mamba": {"dt_rank": "auto"}}},
        {"mixer": "mamba2"},
        GROUPED,
    ],
    ids=["plain", "untied", "options", "list", "mamba2", "grouped"],
)
def test_a_round_trip_is_exact(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = make(**changes)
    again = LanguageModel.from_pretrained(model.save_pretrained(tmp_path, format=kind))
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    assert again.config.vocab_size == model.config.vocab_size
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_mlps_and_inner_norms(tmp_path: Path) -> None:
    wide = make(d_intermediate=128)
    again = LanguageModel.from_pretrained(wide.save_pretrained(tmp_path / "wide", format="mamba-ssm"))
    assert torch.equal(again(TOKENS)[0], wide(TOKENS)[0])
    falcon = make(**FALCON)
    again = LanguageModel.from_pretrained(falcon.save_pretrained(tmp_path / "falcon", format="transformers"))
    assert torch.equal(again(TOKENS)[0], falcon(TOKENS)[0])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mamba", {}),
        ("mamba", {"tie_embeddings": False}),
        ("falcon", FALCON),
        ("mamba2", MAMBA2),
        ("mamba2", GROUPED),
        ("mamba2", {**MAMBA2, "norm_eps": 1e-2, "mixer_options": {**MAMBA2["mixer_options"], "norm_eps": 1e-2}}),
    ],
    ids=["mamba", "untied", "falcon", "mamba2", "grouped", "epsilon"],
)
def test_transformers_reads_what_we_write_and_we_what_it_writes(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = make(**changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        model.save_pretrained(tmp_path / "ours", format="transformers"), dtype=torch.float32
    )
    assert type(theirs).__name__ == NAMES[kind]
    with torch.no_grad():
        logits = theirs(TOKENS, use_cache=False).logits[..., : model.config.vocab_size]
    torch.testing.assert_close(model(TOKENS)[0], logits, rtol=1e-4, atol=1e-4)
    # In shards, and in half precision.
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    again = LanguageModel.from_pretrained(tmp_path / "shards")
    assert torch.equal(again(TOKENS)[0][..., : model.config.vocab_size], model(TOKENS)[0])
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = LanguageModel.from_pretrained(tmp_path / "half")
    assert half.backbone.embedding.weight.dtype == torch.bfloat16
    assert half.backbone.blocks[0].mixer.A_log.dtype == torch.float32
    assert half(TOKENS)[0].isfinite().all()


def test_the_released_layout(tmp_path: Path) -> None:
    """As the files of state-spaces/mamba-130m are: few keys, a padded embedding, the head beside it."""
    model = make(vocab_size=13)
    released = {
        "d_model": 16, "n_layer": 3, "vocab_size": 13, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(released))
    save_pickled(tmp_path / "pytorch_model.bin", model.state_dict())
    again = LanguageModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])


def test_the_released_layout_of_mamba2(tmp_path: Path) -> None:
    """As the files of state-spaces/mamba2-130m are: a layer's name, the rest by default."""
    model = make(d_model=32, vocab_size=13, mixer="mamba2", pad_vocab_size_multiple=16)
    released = {
        "d_model": 32, "d_intermediate": 0, "n_layer": 3, "vocab_size": 13, "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 16, "tie_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(released))
    save_pickled(tmp_path / "pytorch_model.bin", model.state_dict())
    again = LanguageModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])


def test_the_released_falcon(tmp_path: Path) -> None:
    """As the files of tiiuae/falcon-mamba-7b are: an `expand` that its own inner width contradicts, no epsilon."""
    model = make(**FALCON, tie_embeddings=False, pad_vocab_size_multiple=1)
    folder = model.save_pretrained(tmp_path, format="transformers")
    values = json.loads((folder / "config.json").read_text())
    del values["mixer_rms_eps"], values["unpadded_vocab_size"], values["pad_vocab_size_multiple"]
    (folder / "config.json").write_text(json.dumps({**values, "expand": 16, "intermediate_size": 32}))
    again = LanguageModel.from_pretrained(folder)
    assert again.config.mixer_options["expand"] == 2
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS)[0], rtol=1e-4, atol=1e-4)


def test_pickles_in_shards(tmp_path: Path) -> None:
    """As Transformers wrote large models before it wrote safetensors; every shard is read with the same care."""
    model = make()
    folder = model.save_pretrained(tmp_path, format="mamba-ssm")
    (folder / "pytorch_model.bin").unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {"a.bin": {}, "b.bin": {}}
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        shards["ab"[i % 2] + ".bin"][name] = tensor
    for name, tensors in shards.items():
        save_pickled(folder / name, tensors)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(LanguageModel.from_pretrained(folder)(TOKENS)[0], model(TOKENS)[0])
    torch.save({"backbone.norm_f.weight": Path("/nowhere")}, folder / "b.bin")
    with pytest.raises(CheckpointError, match=r"b\.bin is damaged, truncated or holds more than tensors"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("safetensors", {}, "allowed are longscan, mamba-ssm, transformers"),
        ("transformers", {"mixer": "s4d"}, "holds Mamba layers only"),
        ("mamba-ssm", {"mixer": ("mamba", "mamba2"), "mixer_options": {}}, "this model has mamba, mamba2"),
        ("transformers", {"mixer": "mamba2", "norm_eps": 1e-6}, "one epsilon for all norms"),
        ("mamba-ssm", {"mixer_options": {"a_init": "s4d-lin"}}, "holds a real A only"),
        ("transformers", {"d_intermediate": 8}, "has no MLPs"),
        ("mamba-ssm", {"d_intermediate": 8}, "multiples of 128"),
        ("mamba-ssm", FALCON, "no inner norms"),
        ("mamba-ssm", {"norm_eps": 1e-6}, "norm_eps of 1e-5"),
        ("transformers", {"mixer_options": {"expand": 1.5}}, "whole expand"),
    ],
)
def test_what_a_format_cannot_say(kind: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**changes).save_pretrained(tmp_path / "model", format=kind)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "mamba3"}, "model_type: got 'mamba3'"),
        ({"model_type": "mamba", "hidden_act": "relu"}, "hidden_act: got 'relu'"),
        ({"model_type": "mamba", "vocab_size": 8}, "hidden_size is missing"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layer: got 'Mamba3'"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate: got True"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_rank": 4}}, "unknown keys dt_rank"),
        ({"ssm_cfg": {"headdim": 64}}, "ssm_cfg: unknown keys headdim"),
        ({"ssm_cfg": {}, "rms_norm": False}, "rms_norm: got False"),
        ({"ssm_cfg": {}, "attn_layer_idx": [1]}, "attn_layer_idx"),
        ([], "holds a list"),
    ],
)
def test_what_our_model_is_not(values: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=words):
        LanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "code"])
def test_a_damaged_pickle_is_named_and_never_run(damage: str, tmp_path: Path) -> None:
    path = make().save_pretrained(tmp_path / "model", format="mamba-ssm") / "pytorch_model.bin"
    content = path.read_bytes()
    if damage == "code":
        ran = tmp_path / "ran"

        class Trap:
            def __reduce__(self) -> Any:
                return (Path.touch, (ran,))

        torch.save({"backbone.embedding.weight": Trap()}, path)
    else:
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "garbage": b"\xff" * 99}[damage])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged, truncated or holds more than tensors"):
        LanguageModel.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_an_index_names_files_of_its_folder(tmp_path: Path) -> None:
    folder = make().save_pretrained(tmp_path / "model")
    outside = save_tensors(tmp_path / "outside.safetensors", {"a": torch.ones(1)}, {})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": f"../{outside.name}"}}))
    with pytest.raises(CheckpointError, match="not a file of its folder"):
        LanguageModel.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "lost.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lost\.safetensors: no such file"):
        LanguageModel.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        LanguageModel.from_pretrained(folder)


def test_names_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fake hub: what is asked of it, and what becomes of its failures."""
    hub = pytest.importorskip("huggingface_hub")
    folder = make().save_pretrained(tmp_path / "model", format="mamba-ssm")
    asked: list[Any] = []

    def download(name: str, **wanted: Any) -> str:
        asked.append((name, *wanted.values()))
        if name == "lost/model":
            raise OSError("not found")
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    LanguageModel.from_pretrained("state-spaces/mamba-130m", revision="main")
    # Not what lies in the repository's folders: that is other models, or the same in other states.
    assert asked[0] == ("state-spaces/mamba-130m", "main", ["*.json", "*.safetensors"], ["*/*"])
    assert asked[1] == ("state-spaces/mamba-130m", "main", ["*.json", "*.bin"], ["*/*"])
    with pytest.raises(CheckpointError, match="lost/model: no such folder, and the Hugging Face Hub gives none"):
        LanguageModel.from_pretrained("lost/model")
    with pytest.raises(CheckpointError, match=r"no_such: no such folder"):
        LanguageModel.from_pretrained(folder, subfolder="no_such")


@pytest.mark.parametrize("kind", ["longscan", "mamba-ssm", "transformers"])
def test_the_hub_s_cache(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's own client without a network: revisions, a subfolder, and another model's files beside ours."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--me--small"
    models = {"main": make(), "v2": make(n_layer=1)}
    for i, (revision, model) in enumerate(models.items()):
        commit = f"{i:040x}"
        folder = model.save_pretrained(repository / "snapshots" / commit, format=kind)
        make(n_layer=2).save_pretrained(folder / "inside", format=kind)
        save_tensors(folder / "adapter_model.safetensors", {"a": torch.ones(1)}, {})
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    assert torch.equal(LanguageModel.from_pretrained("me/small")(TOKENS)[0], models["main"](TOKENS)[0])
    again = LanguageModel.from_pretrained("me/small", revision="v2", dtype=torch.bfloat16)
    assert (again.config.n_layer, again.backbone.embedding.weight.dtype) == (1, torch.bfloat16)
    assert LanguageModel.from_pretrained("me/small", subfolder="inside").config.n_layer == 2
    with pytest.raises(CheckpointError, match="me/lost: no such folder, and the Hugging Face Hub gives none"):
        LanguageModel.from_pretrained("me/lost")
