"""A folder in the Transformers layout has what serving engines read: vLLM's Mamba, and llama.cpp's converter.

Neither is imported: what each reads is written down here, from `vllm/model_executor/models/mamba.py` and from
llama.cpp's `conversion/mamba.py`. The converter's table of tensor names comes from its own package, `gguf`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longscan.models import LanguageModel
from longscan.nn.storage import load_tensors
from longscan.tasks.bpe import learn_bpe
from longscan.tasks.sources import open_source
from tests.models.small import make

FALCON: dict[str, Any] = {"mixer_options": {"selection_norm_eps": 1e-6}}
MAMBA2: dict[str, Any] = {"mixer": "mamba2", "mixer_options": {"d_state": 8, "head_dim": 4, "n_groups": 2}}

# Fields of the configuration that vLLM reads, beside those that MambaConfig has a default for.
VLLM = {
    "architectures", "model_type", "hidden_size", "state_size", "conv_kernel", "intermediate_size", "time_step_rank",
    "use_conv_bias", "use_bias", "hidden_act", "layer_norm_epsilon", "num_hidden_layers", "vocab_size",
    "tie_word_embeddings",
}  # fmt: skip

# And llama.cpp's converter; where one is missing, it takes that of mamba-ssm's default without a word. It rounds the
# vocabulary up to the multiple, and wants as many rows.
LLAMA_CPP = {
    "architectures", "model_type", "hidden_size", "conv_kernel", "intermediate_size", "state_size", "time_step_rank",
    "layer_norm_epsilon", "num_hidden_layers", "vocab_size", "pad_vocab_size_multiple",
}  # fmt: skip
LLAMA_CPP_MAMBA2 = {
    "architectures", "hidden_size", "conv_kernel", "state_size", "head_dim", "n_groups", "layer_norm_epsilon",
    "num_hidden_layers", "vocab_size", "pad_vocab_size_multiple",
}  # fmt: skip

#: What each knows, by name.
ARCHITECTURES = {"MambaForCausalLM": "mamba", "FalconMambaForCausalLM": "falcon_mamba", "Mamba2ForCausalLM": "mamba2"}

KINDS = {"tied": {}, "untied": {"tie_embeddings": False}, "falcon": FALCON, "mamba2": MAMBA2}


def written(model: LanguageModel, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    model.save_pretrained(folder, format="transformers")
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    assert ARCHITECTURES[architecture] == config["model_type"]
    # llama.cpp pads the vocabulary by itself.
    rows, multiple = config["vocab_size"], config["pad_vocab_size_multiple"]
    assert rows == -(-rows // multiple) * multiple
    return config, load_tensors(folder / "model.safetensors")[0]


def check_shapes(config: dict[str, Any], tensors: dict[str, torch.Tensor], mixer: dict[str, tuple[int, ...]]) -> None:
    """Every tensor that is expected, in float32, and no other."""
    rows, d_model, layers = config["vocab_size"], config["hidden_size"], range(config["num_hidden_layers"])
    expected = {"backbone.embeddings.weight": (rows, d_model), "backbone.norm_f.weight": (d_model,)}
    expected |= {f"backbone.layers.{i}.norm.weight": (d_model,) for i in layers}
    expected |= {f"backbone.layers.{i}.mixer.{name}": shape for i in layers for name, shape in mixer.items()}
    if not config["tie_word_embeddings"]:
        # vLLM stops at a head of its own where the configuration says that there is none.
        expected["lm_head.weight"] = (rows, d_model)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["tied", "untied", "falcon"])
def test_what_engines_read(kind: str, tmp_path: Path) -> None:
    model = make(**KINDS[kind])
    config, tensors = written(model, tmp_path)
    assert config.keys() >= VLLM | LLAMA_CPP
    if kind == "falcon":
        assert config["mixer_rms_eps"] == 1e-6
    mixer: Any = model.backbone.blocks[0].mixer
    d_model, inner, rank, states = config["hidden_size"], config["intermediate_size"], mixer.dt_rank, mixer.d_state
    assert (inner, config["time_step_rank"], config["state_size"]) == (mixer.d_inner, rank, states)
    # llama.cpp knows no other.
    assert inner == 2 * d_model
    # Integers: "auto" is mamba-ssm's word.
    assert all(type(config[name]) is int for name in ("time_step_rank", "vocab_size", "num_hidden_layers"))
    shapes = {
        "in_proj.weight": (2 * inner, d_model),
        "conv1d.weight": (inner, 1, config["conv_kernel"]),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * states, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "A_log": (inner, states),
        "D": (inner,),
        "out_proj.weight": (d_model, inner),
    }
    check_shapes(config, tensors, shapes)


def test_what_engines_read_of_mamba2(tmp_path: Path) -> None:
    config, tensors = written(make(**MAMBA2), tmp_path)
    assert config.keys() >= LLAMA_CPP_MAMBA2
    d_model, heads, groups = config["hidden_size"], config["num_heads"], config["n_groups"]
    inner, convolved = heads * config["head_dim"], heads * config["head_dim"] + 2 * groups * config["state_size"]
    assert inner == 2 * d_model
    shapes = {
        "in_proj.weight": (inner + convolved + heads, d_model),
        "conv1d.weight": (convolved, 1, config["conv_kernel"]),
        "conv1d.bias": (convolved,),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        # It is cut into its groups.
        "norm.weight": (inner,),
        "out_proj.weight": (d_model, inner),
    }
    check_shapes(config, tensors, shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_knows_every_tensor(kind: str, tmp_path: Path) -> None:
    """By the converter's own table; of the engine's tensors none is left without one."""
    gguf = pytest.importorskip("gguf")
    config, tensors = written(make(**KINDS[kind]), tmp_path)
    architecture = gguf.MODEL_ARCH.MAMBA2 if kind == "mamba2" else gguf.MODEL_ARCH.MAMBA
    layers = config["num_hidden_layers"]
    table = gguf.get_tensor_name_map(architecture, layers)
    # So it renames one of them.
    asked = [f"{name.removesuffix('dt_bias')}dt_proj.bias" if name.endswith("dt_bias") else name for name in tensors]
    found = [table.get_type(name, try_suffixes=(".weight", ".bias")) for name in asked]
    assert None not in found
    tied = {gguf.MODEL_TENSOR.OUTPUT} if config["tie_word_embeddings"] else set()
    assert {*found, *tied} == set(gguf.MODEL_TENSORS[architecture])


def test_a_runs_tokenizer_is_read_beside_the_model(tmp_path: Path) -> None:
    """As docs/scaling.md has it: tokenizer.json alone, next to the configuration."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    text, folder = tmp_path / "text", tmp_path / "model"
    text.write_text("def double(x):\n    return 2 * x\n" * 99)
    tokenizer = learn_bpe("bpe:280", open_source(str(text)), held_out=0.2, cache=tmp_path)
    make(vocab_size=tokenizer.vocab_size).save_pretrained(folder, format="transformers")
    tokenizer.save(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    words = "def double(x): return x"
    assert theirs(words).input_ids == tokenizer.encode(words.encode()).tolist()
    assert theirs.decode(theirs(words).input_ids) == words
