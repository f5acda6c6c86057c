"""A folder in the Transformers layout has what serving engines read: vLLM's Mamba, and llama.cpp's converter.

Neither is imported: what each reads is written down here, from `vllm/model_executor/models/mamba.py` and from
`MambaModel` of `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longscan.nn.storage import load_tensors
from longscan.tasks.bpe import learn_bpe
from longscan.tasks.sources import open_source
from tests.models.small import make

FALCON: dict[str, Any] = {"mixer_options": {"selection_norm_eps": 1e-6}}

# Fields of the configuration that vLLM reads, beside those that MambaConfig has a default for.
VLLM = {
    "architectures", "model_type", "hidden_size", "state_size", "conv_kernel", "intermediate_size", "time_step_rank",
    "use_conv_bias", "use_bias", "hidden_act", "layer_norm_epsilon", "num_hidden_layers", "vocab_size",
    "tie_word_embeddings",
}  # fmt: skip

# And llama.cpp's converter; where one is missing, it takes that of mamba-ssm's default without a word.
LLAMA_CPP = {
    "architectures", "model_type", "hidden_size", "conv_kernel", "intermediate_size", "state_size", "time_step_rank",
    "layer_norm_epsilon", "num_hidden_layers", "vocab_size",
}  # fmt: skip

#: What each knows, by name.
ARCHITECTURES = {"MambaForCausalLM": "mamba", "FalconMambaForCausalLM": "falcon_mamba"}


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, FALCON], ids=["tied", "untied", "falcon"])
def test_what_engines_read(changes: dict[str, Any], tmp_path: Path) -> None:
    model = make(**changes)
    folder = model.save_pretrained(tmp_path, format="transformers")
    config = json.loads((Path(folder) / "config.json").read_text())
    assert config.keys() >= VLLM | LLAMA_CPP
    (architecture,) = config["architectures"]
    assert ARCHITECTURES[architecture] == config["model_type"]
    if changes is FALCON:
        assert config["mixer_rms_eps"] == 1e-6
    mixer: Any = model.backbone.blocks[0].mixer
    d_model, inner, rank, states = config["hidden_size"], config["intermediate_size"], mixer.dt_rank, mixer.d_state
    assert (inner, config["time_step_rank"], config["state_size"]) == (mixer.d_inner, rank, states)
    # llama.cpp knows no other.
    assert inner == 2 * d_model
    # Integers: "auto" is mamba-ssm's word.
    assert all(type(config[name]) is int for name in ("time_step_rank", "vocab_size", "num_hidden_layers"))
    of_a_layer = {
        "norm.weight": (d_model,),
        "mixer.in_proj.weight": (2 * inner, d_model),
        "mixer.conv1d.weight": (inner, 1, config["conv_kernel"]),
        "mixer.conv1d.bias": (inner,),
        "mixer.x_proj.weight": (rank + 2 * states, inner),
        "mixer.dt_proj.weight": (inner, rank),
        "mixer.dt_proj.bias": (inner,),
        "mixer.A_log": (inner, states),
        "mixer.D": (inner,),
        "mixer.out_proj.weight": (d_model, inner),
    }
    expected: dict[str, tuple[int, ...]] = {
        f"backbone.layers.{i}.{name}": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in of_a_layer.items()
    }
    expected["backbone.embeddings.weight"] = (config["vocab_size"], d_model)
    expected["backbone.norm_f.weight"] = (d_model,)
    if not config["tie_word_embeddings"]:
        # vLLM stops at a head of its own where the configuration says that there is none.
        expected["lm_head.weight"] = (config["vocab_size"], d_model)
    tensors, _ = load_tensors(Path(folder) / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


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
